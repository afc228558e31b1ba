"""What a report, a card and a table tell of a study: rates, how its arms differ, what failed and what is missing."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from rich.table import Table

import report_cases as cases
from lorica import files
from lorica.card import studies
from lorica.report import findings, provenance, reading
from lorica.runs.studying.outcome import State
from lorica.runs.studying.plan import Planned
from lorica.tables import studies as tables
from report_cases import table, written


def test_an_unfinished_study_says_what_is_missing(tmp_path: Path) -> None:
    def state(run: Planned) -> State:
        if run.role == "tuning" or run.arm != "full":
            return "finished"
        return "failed" if run.seed == 0 else "missing"

    cases.study(tmp_path / "study", state=state)
    found = written([tmp_path / "study"], tmp_path / "report")
    assert "LoRA and its rivals is not finished: 12 final runs of it ended so far" in found.text
    assert "; rates chosen for each arm and task by dev loss (seed 100), among 0.0001, 0.001, 0.01." in found.text
    assert "Missing: 4 of the runs that are compared." in found.text
    assert "Failed: full on mood, seed 0 at rate 0.001: the loss was NaN in 10 steps" in found.text
    assert "no task that all arms were evaluated on" in found.text
    record = files.read_json(tmp_path / "study" / "study.json")
    assert studies.remarks(record)[-1] == "missing: 4 of the runs that are compared"
    (tmp_path / "study" / "study.json").unlink()
    begun = written([tmp_path / "study"], tmp_path / "begun")
    assert [attrs["id"] for attrs in begun.having("section")] == ["provenance"]


def test_a_study_stopped_while_rates_are_chosen(tmp_path: Path) -> None:
    def state(run: Planned) -> State:
        if run.arm == "lora":
            return "finished" if run.role == "tuning" and run.task == "mood" else "missing"
        return "failed" if run.learning_rate == 1e-2 else "missing"

    cases.study(tmp_path / "study", arms=("lora", "xgblora"), seeds=(0, 1), state=state)
    found = written([tmp_path / "study"], tmp_path / "report")
    assert [attrs["id"] for attrs in found.having("section")] == ["verdict", "search", "provenance"]
    assert "Missing: 7 of the runs that rates are chosen by and 8 of the runs that are compared." in found.text
    failed = "Failed while its rate was chosen: xgblora on mood, seed 100 at rate 0.01: the loss was NaN in 10 steps"
    assert failed in found.text
    (mood,) = (str(attrs["aria-label"]) for attrs in found.having("svg") if "mood" in str(attrs.get("aria-label")))
    assert "xgblora: not finished at 0.0001, not finished at 0.001, failed at 0.01; none chosen." in mood
    assert table(tmp_path / "report", "study-rates")[8]["state"] == "failed"


def test_an_arm_that_failed_on_all_its_seeds_is_told_with_the_others(tmp_path: Path) -> None:
    cases.study(
        tmp_path / "study",
        arms=("lora", "xgblora", "full"),
        tasks=("mood",),
        state=lambda run: "failed" if (run.arm, run.role) == ("full", "final") else "finished",
    )
    said = findings.findings(reading.read([tmp_path / "study"]))
    assert said[0].startswith("xgblora is worse than lora by 3.0 points on mood (3 seeds")
    assert said[1] == "full cannot be compared with lora on mood: no pair of their runs has finished"
    found = written([tmp_path / "study"], tmp_path / "report")
    assert "no difference shown: no pair of runs has finished" in found.text
    assert found.text.count("Failed: full on mood, seed") == 3
    assert re.search(r"full\s+–\s+–\s+no run has finished", found.text)
    assert re.search(r"adapter.kind\s*lora\s*xgblora\s*full", found.text)


def test_an_arm_that_failed_at_every_rate_waits_for_nothing(tmp_path: Path) -> None:
    cases.study(
        tmp_path / "study",
        arms=("lora", "full"),
        tasks=("mood",),
        seeds=(0,),
        state=lambda run: "failed" if run.arm == "full" else "finished",
    )
    (study,) = reading.read([tmp_path / "study"]).studies
    assert study.remarks == ("full on mood: a run failed at every rate, so that none was chosen",)
    assert (study.num_missing, study.num_missing_choosing, study.is_finished) == (0, 0, True)
    assert study.configs["full", "mood"]["adapter.kind"] == "full"


def test_the_headline_counts_the_seeds_of_its_difference(tmp_path: Path) -> None:
    cases.study(
        tmp_path / "study",
        arms=("lora", "xgblora"),
        tasks=("mood",),
        state=lambda run: "failed" if (run.arm, run.seed) == ("xgblora", 2) else "finished",
    )
    assert "by 3.0 points on mood (2 seeds, " in findings.findings(reading.read([tmp_path / "study"]))[0]


def differences(folder: Path) -> dict[str, list[str]]:
    """Key -> what each arm of the study has there, of what they do not share."""
    (study,) = reading.read([folder]).studies
    return {each.key: each.values for each in provenance.differences(study)}


def test_what_the_arms_do_not_share_is_read_from_their_configs(tmp_path: Path) -> None:
    cases.study(
        tmp_path / "study",
        grids={"full": (1e-5, 1e-4, 3e-2)},
        state=lambda run: "failed" if (run.arm, run.role) == ("full", "final") else "finished",
        lora={"rank": 4},
        run={"model": "demo", "boosting": {"patience": 7}},
    )
    assert differences(tmp_path / "study") == {
        "adapter.kind": ["lora", "xgblora", "full"],
        "adapter.rank": ["4", "1", "–"],
        "adapter.alpha": ["8", "1", "–"],
        "boosting.patience": ["–", "7", "–"],
        "learning_rate": ["0.001", "0.001", "0.0001"],
    }


def test_a_rate_that_hangs_on_the_task_is_told_of_each(tmp_path: Path) -> None:
    def state(run: Planned) -> State:
        lost = (run.arm, run.task, run.learning_rate) == ("lora", "mood", 1e-3)
        return "failed" if lost else "finished"

    cases.study(tmp_path / "study", arms=("lora", "sharp"), seeds=(0,), state=state)
    found = differences(tmp_path / "study")
    assert found == {"adapter.alpha": ["16", "5"], "learning_rate": ["0.0001 on mood, 0.001 on topic", "0.001"]}


def test_each_arm_is_told_with_its_own_grid(tmp_path: Path) -> None:
    cases.study(tmp_path / "same", arms=("lora", "xgblora"), tasks=("mood",), seeds=(0,))
    told = "rates chosen for each arm and task by dev loss (seed 100), "
    record = files.read_json(tmp_path / "same" / "study.json")
    assert studies.rates(record) == told + "among 0.0001, 0.001, 0.01"
    grids = {"lora": (1e-3, 1e-2, 3e-2), "xgblora": (1e-5, 1e-4, 3e-4)}
    cases.study(tmp_path / "own", arms=("lora", "xgblora"), tasks=("mood",), seeds=(0,), grids=grids)
    own = told + "lora among 0.001, 0.01, 0.03; xgblora among 1e-05, 0.0001, 0.0003"
    assert [study.rates for study in reading.read([tmp_path / "own"]).studies] == [own]
    record = files.read_json(tmp_path / "own" / "study.json")
    assert own in studies.study_card(record, "lorica compare", "loss.png")
    assert studies.remarks(record) == [
        "lora on mood: the best rate, 0.001, is the grid's least",
        "xgblora on mood: the best rate, 0.0003, is the grid's largest",
    ]
    rates = tables.study(record)[1]
    assert isinstance(rates, Table)
    shown = [next(iter(column.cells)) for column in rates.columns]
    assert shown == ["mood", "lora", "0.001: [bold]1.0000[/]", "0.01: 2.0000", "0.03: 2.4771"]


def test_the_interval_of_a_share_ends_where_shares_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.LEVELS, "lora", 0.02)
    cases.study(tmp_path / "study", arms=("lora", "full"), tasks=("mood",), seeds=(0, 1))
    record = files.read_json(tmp_path / "study" / "study.json")
    low, high = record["cells"]
    assert low["low"] == 0 and 0.05 < low["high"] < 0.2
    assert high["high"] == 1 and 0.7 < high["low"] < 0.9
    # Student's 12.7 of two seeds that are 0.01 apart, and the examples' own: the half that is not cut off.
    assert studies.table(record)[1][4] == f"0.025 ± {math.hypot(12.706205 * 0.005, 0.02068):.3f}"


def test_the_search_for_a_rate_is_drawn_with_its_edges(tmp_path: Path) -> None:
    grids = {"xgblora": (1e-4, 3e-4, 1e-3)}
    cases.study(tmp_path / "study", arms=("lora", "xgblora"), tasks=("mood",), seeds=(0,), grids=grids)
    found = written([tmp_path / "study"], tmp_path / "report")
    rows = {(row["arm"], row["learning_rate"]): row for row in table(tmp_path / "report", "study-rates")}
    tuning = files.read_json(tmp_path / "study" / "study.json")["tuning"]
    assert {place: float(row["dev_loss"]) for place, row in rows.items()} == {
        (each["arm"], str(one["learning_rate"])): one["dev_loss"] for each in tuning["found"] for one in each["tried"]
    }
    assert {place for place, row in rows.items() if row["chosen"] == "True"} == {
        ("lora", "0.001"),
        ("xgblora", "0.001"),
    }
    alts = [str(attrs["aria-label"]) for attrs in found.having("svg") if "aria-label" in attrs]
    assert any("lora: 2.0000 at 0.0001, 1.0000 at 0.001, 2.0000 at 0.01; 0.001 chosen." in alt for alt in alts)
    assert re.findall(r"\w+ on mood: the best rate, .*", found.text) == [
        "xgblora on mood: the best rate, 0.001, is the grid's largest"
    ]
