"""The report: what it reads, what it says and draws, and what it must not let through."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import report_cases as cases
from lorica import config, files, runs
from lorica.errors import ConfigError, DataError, MissingPathError, OutputExistsError
from lorica.evaluation.answers import ANSWER_METRICS
from lorica.evaluation.metrics import METRICS
from lorica.report import curves, findings, page, reading, records, words
from lorica.report.figures import loss
from lorica.report.figures.canvas import SERIES, Figure
from lorica.report.subjects import Subjects
from report_cases import Page, table, written

HOSTILE = ("</script><script>alert(1)</script>", "=1+1", "\u202egnissim", "🦔 $x^2$ <b>&amp;", 'x" onload="alert(1)')


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of each."""
    folder = tmp_path_factory.mktemp("everything")
    cases.study(folder / "study")
    cases.sweep(folder / "sweep")
    cases.merge(folder / "ties")
    cases.matrix(folder / "matrix")
    cases.run(folder / "alone")
    return folder


@pytest.fixture(scope="module")
def reported(everything: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on that folder."""
    return page.write(reading.read([everything]), tmp_path_factory.mktemp("reported") / "report").parent


def test_the_page_has_every_section_and_every_figure_its_words(reported: Path) -> None:
    found = Page((reported / "index.html").read_text("utf-8"))
    sections = [attrs["id"] for attrs in found.having("section")]
    assert sections == [
        *("verdict", "loss", "scores", "recovery", "matrix", "search", "spectra", "costs"),
        "provenance",
    ]
    drawn = [attrs for attrs in found.having("svg") if "strip" not in (attrs.get("class") or "")]
    assert len(drawn) == len(list((reported / "figures").glob("*.svg")))
    for attrs in drawn:
        assert attrs["role"] == "img"
        assert re.search(r"\d", attrs["aria-label"] or "")
    told = " ".join(str(attrs["aria-label"]) for attrs in drawn)
    for figure in (
        "lora: 91.0\u00a0%",
        "ties: mood 0.83, topic 0.41, emotion −0.20",
        "lambda = 0.7",
        "median stable rank",
    ):
        assert figure in told


def test_the_page_needs_nothing_beside_it(reported: Path) -> None:
    html = (reported / "index.html").read_text("utf-8")
    found = Page(html)
    for _, attrs in found.elements:
        for key in ("href", "src", "xlink:href", "action"):
            value = attrs.get(key) or ""
            assert value.startswith(("#", "data:,", "figures/")) or not value
            if value.startswith("figures/"):
                assert (reported / value).is_file()
    assert not re.search(r"url\((?!#)|@import|<script[^>]+src", html)
    ids = [attrs["id"] for _, attrs in found.elements if attrs.get("id")]
    assert len(ids) == len(set(ids))
    referred = {
        value[1:] for _, attrs in found.elements for key, value in attrs.items() if key == "xlink:href" and value
    }
    assert referred <= set(ids)


def test_the_pictures_of_the_page_have_its_colours(reported: Path) -> None:
    html = (reported / "index.html").read_text("utf-8")
    pictures = "".join(re.findall(r"<svg .*?</svg>", html, re.DOTALL))
    assert "var(--series-0)" in pictures
    assert not re.search(r"#[0-9a-f]{6}\b", pictures)
    for name in set(re.findall(r"var\((--[a-z0-9_-]+)\)", html)):
        assert html.count(f"{name}: ") >= (1 if name in ("--sans", "--serif", "--mono") else 3), name


def test_the_same_folders_give_the_same_bytes(everything: Path, tmp_path: Path) -> None:
    targets = [everything / name for name in ("alone", "ties", "sweep")]
    one, other = (page.write(reading.read(targets), tmp_path / name).parent for name in ("one", "other"))
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
    assert len(names) > 10
    assert names == sorted(str(path.relative_to(other)) for path in other.rglob("*") if path.is_file())
    assert [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()] == []


def test_the_tables_are_the_records(everything: Path, reported: Path) -> None:
    rows = table(reported, "runs-loss")
    lines = files.read_records(everything / "alone" / "training_loss.jsonl")
    assert len(rows) == len(lines)
    for row, line in zip(rows, lines, strict=True):
        found = (int(row["step"]), int(row["forwards"]), float(row["seconds"]))
        assert found == (line["step"], line["forwards"], line["seconds"])
        assert row["loss"] == (str(line["loss"]) if line["applied"] else "")
    study = files.read_json(everything / "study" / "study.json")
    scores = {(row["arm"], row["task"], row["seed"]): float(row["score"]) for row in table(reported, "study-scores")}
    assert scores == {
        (cell["arm"], cell["task"], seed): score for cell in study["cells"] for seed, score in cell["scores"].items()
    }
    kept = {(row["merge"], row["task"]): row["recovery"] for row in table(reported, "merges-recovery")}
    assert kept["ties", "mood"] == "0.83"
    assert kept["ties", "intent"] == ""
    events = {(row["event"], row["step"]) for row in table(reported, "study-loss") if row["event"]}
    assert events == {("laid on", "30"), ("rolled back", "60"), ("rejected", "90"), ("laid on", "120")}


def test_spectra_are_those_of_the_dense_updates(everything: Path, reported: Path) -> None:
    tensors = load_file(everything / "alone" / "adapter" / "adapter_model.safetensors")
    path = "model.layers.1.v_proj"
    A, B = (next(value for key, value in tensors.items() if f"{path}.lora_{name}" in key).double() for name in "AB")
    settings = json.loads((everything / "alone" / "adapter" / "adapter_config.json").read_text("utf-8"))
    dense = settings["lora_alpha"] / settings["r"] * B @ A
    found = [float(row["sigma"]) for row in table(reported, "runs-spectra") if row["module"] == path]
    np.testing.assert_allclose(found, torch.linalg.svdvals(dense)[: len(found)].numpy(), rtol=1e-6)


def test_the_headline_is_what_the_study_found(everything: Path) -> None:
    said = findings.findings(reading.read([everything / "study"]))
    assert said == [
        "xgblora is worse than lora by 3.0 points on 2 tasks (3 seeds, 95\u00a0% 1.6 to 4.4)",
        "No difference shown between full and lora on 2 tasks: +1.0 points (3 seeds, 95\u00a0% −1.5 to 3.5)",
    ]
    alone = findings.findings(reading.read([everything / "alone"]))
    assert alone == ["lora reaches 90.0\u00a0% accuracy on mood (95\u00a0% over test examples: 87.0 to 93.0)"]
    assert findings.findings(Subjects()) == ["Nothing has been measured yet"]


def test_hostile_names_are_shown_as_they_are_or_not_at_all(tmp_path: Path) -> None:
    cases.study(tmp_path / "study", arms=HOSTILE[:3], tasks=HOSTILE[3:], seeds=(0, 1), title=HOSTILE[0])
    found = written([tmp_path / "study"], tmp_path / "report")
    assert len(list(found.having("script"))) == 1
    assert not [key for _, attrs in found.elements for key in attrs if key.startswith("on")]
    assert "alert(1)" in found.text
    assert "\u202e" not in found.text
    assert "\ufffdgnissim" in found.text
    assert HOSTILE[3] in found.text
    cells = [cell for row in table(tmp_path / "report", "study-scores") for cell in row.values()]
    assert "'=1+1" in cells
    assert "=1+1" not in cells
    for picture in (tmp_path / "report" / "figures").glob("*.svg"):
        tags = {each.tag for each in ElementTree.parse(picture).iter()}
        assert not {tag for tag in tags if tag.endswith(("script", "}b"))}
    names = {path.name for path in (tmp_path / "report" / "figures").iterdir()}
    assert all(re.fullmatch(r"[a-z0-9_-]+\.(svg|png|csv)", name) for name in names)


def test_runs_are_told_apart_by_what_differs_and_put_together_over_seeds(tmp_path: Path) -> None:
    for seed, score in ((0, 0.8), (1, 0.9)):
        cases.run(tmp_path / f"bp{seed}", seed=seed, score=score, trainer="backprop")
        cases.run(tmp_path / f"zo{seed}", seed=seed, score=score - 0.2, trainer="zo")
    cases.run(tmp_path / "other", score=0.7, trainer="zo", batch_size=64)
    (study,) = reading.read([tmp_path]).studies
    assert set(study.arms) == {"backprop", "zo", "zo, batch_size 64"}
    cell = study.cell("backprop", "mood")
    assert cell is not None
    assert cell.scores == {"0": 0.8, "1": 0.9}
    assert (cell.mean, cell.low, cell.high) == (pytest.approx(0.85), 0.8, 0.9)
    assert cell.interval == "least and most of 2 seeds"


def test_a_run_that_is_not_finished_has_its_curve_and_the_reasons(tmp_path: Path) -> None:
    cases.run(tmp_path / "run", score=None, adapter=False)
    found = written([tmp_path / "run"], tmp_path / "report")
    assert "No scores: no run has ended with an evaluation yet." in found.text
    assert [attrs["id"] for attrs in found.having("section")] == ["loss", "scores", "provenance"]


def test_what_cannot_be_drawn_says_why(tmp_path: Path) -> None:
    cases.merge(tmp_path / "merge", deltas=(None,))
    trials = cases.sweep(tmp_path / "sweep", finished=False) / "trials.jsonl"
    trials.write_text(files.record_line(cases.trial(3)), "utf-8")
    cases.run(tmp_path / "run", score=0.5)
    (tmp_path / "run" / "training_loss.jsonl").unlink()
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").write_bytes(b"no tensors")
    text = written([tmp_path], tmp_path / "report").text
    assert "No recovery: no merge was evaluated on a task that its adapter had learned" in text
    assert "No search history for sweep: no trial could be judged (the merge is not finite)" in text
    assert "No loss curves: no run left any step" in text
    assert "No singular values: lora on mood (" in text


def test_what_a_folder_holds_and_cannot_be_read_is_a_remark(tmp_path: Path) -> None:
    cases.run(tmp_path / "good")
    cases.merge(tmp_path / "bad")
    (tmp_path / "bad" / "summary.json").write_text("{}", "utf-8")
    text = written([tmp_path], tmp_path / "report").text
    assert "Left out: " in text
    assert "is not as a merge leaves it: KeyError 'optimizer'" in text
    with pytest.raises(DataError, match="is not as a merge leaves it"):
        reading.read([tmp_path / "bad"])


def test_a_study_cannot_name_folders_outside_itself(tmp_path: Path) -> None:
    cases.study(tmp_path / "study", seeds=(0, 1))
    cases.run(tmp_path / "outside")
    record = files.read_json(tmp_path / "study" / "study.json")
    record["runs"][0]["folder"] = "../outside"
    files.write_json(tmp_path / "study" / "study.json", record)
    with pytest.raises(DataError, match="names a run outside the study"):
        reading.read([tmp_path / "study"])


def test_where_the_report_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cases.run(tmp_path / "a")
    cases.run(tmp_path / "b", seed=1)
    given = config.read(config.ReportConfig, [])
    assert runs.report(["a"], given) == Path("a/report/index.html")
    assert runs.report(["a"], given).is_file()  # an earlier report is replaced
    both = runs.report(["a", "b"], given)
    assert both.match("artifacts/reports/report-*/index.html")
    with pytest.raises(OutputExistsError, match="not empty"):
        runs.report(["b"], config.read(config.ReportConfig, ["output_dir=a"]))
    assert (tmp_path / "a" / "record.json").is_file()
    shutil.rmtree(tmp_path / "a" / "report" / "figures")
    with pytest.raises(OutputExistsError):
        runs.report(["a"], given)
    with pytest.raises(MissingPathError, match="nothing to report on at 'c': name the folder of"):
        runs.report(["c"], given)
    cases.run(tmp_path / "runs" / "first")
    with pytest.raises(MissingPathError, match=r"at 'runs/frist': did you mean runs/first\?"):
        runs.report(["runs/frist"], given)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingPathError, match="holds no run, study, merge, sweep or evaluation matrix"):
        runs.report(["empty"], given)
    with pytest.raises(ConfigError, match="one folder or more"):
        runs.report([], given)


def test_costs_have_a_front_and_only_what_was_measured(everything: Path, reported: Path) -> None:
    on_front = {(row["cost"], row["arm"]) for row in table(reported, "study-pareto") if row["on_front"] == "True"}
    cells = files.read_json(everything / "study" / "study.json")["cells"]
    for cost in ("num_trainable", "peak_bytes", "seconds"):
        found = {
            arm: tuple(np.mean([each[key] for each in cells if each["arm"] == arm]) for key in (cost, "mean"))
            for arm in ("lora", "xgblora", "full")
        }
        beaten = {
            arm
            for arm, (price, score) in found.items()
            if any(other != (price, score) and other[0] <= price and other[1] >= score for other in found.values())
        }
        assert {arm for each, arm in on_front if each == cost} == set(found) - beaten


def ticks(picture: Path) -> list[str]:
    """What stands at the x axis of a figure's SVG."""
    marks = (each for each in ElementTree.parse(picture).iter() if (each.get("id") or "").startswith("xtick_"))
    return ["".join(mark.itertext()).strip() for mark in marks]


def shortened(folder: Path, num_steps: int) -> Path:
    """A run of so few steps, 0.05 s each."""
    cases.run(folder, adapter=False)
    lines = files.read_records(folder / "training_loss.jsonl")[:num_steps]
    (folder / "training_loss.jsonl").write_text("".join(map(files.record_line, lines)), "utf-8")
    return folder


@pytest.mark.parametrize("num_steps", [1, 4, 6])
def test_ticks_are_whole_steps_and_told_seconds(tmp_path: Path, num_steps: int) -> None:
    written([shortened(tmp_path / "run", num_steps)], tmp_path / "report")
    for unit in ("step", "forwards", "seconds"):
        found = ticks(tmp_path / "report" / "figures" / f"runs-loss-0-{unit}.svg")
        assert found and len(set(found)) == len(found), (unit, found)
        assert unit == "seconds" or all(each.isdigit() for each in found)
    assert "." in "".join(found)


def test_the_rounds_of_all_seeds_are_marked_on_the_median(everything: Path, reported: Path) -> None:
    root = ElementTree.parse(reported / "figures" / "study-loss-0-step.svg").getroot()
    groups = [each for each in root.iter() if (each.get("id") or "").startswith("line2d_")]
    ticks = {each for axis in root.iter() if "tick_" in (axis.get("id") or "") for each in axis.iter()}
    uses = [use for each in groups if each not in ticks for use in each.iter() if use.tag.endswith("}use")]
    places = np.array([[float(use.get(key) or "nan") for key in "xy"] for use in uses])
    assert len(places) == 3 * 4
    (bold,) = (
        np.array(re.findall(r"[ML] (\S+) (\S+)", each[0].get("d") or ""), dtype=float)
        for each in groups
        if "stroke-width: 1.9" in (style := each[0].get("style") or "") and SERIES[1] in style
    )
    np.testing.assert_allclose(places[:, 1], np.interp(places[:, 0], bold[:, 0], bold[:, 1]), atol=0.6)


@pytest.mark.parametrize(
    ("rounds", "told"),
    [
        ([cases.ended(0)], " Marks, of all seeds: open triangle, a booster was laid on."),
        ([cases.ended(2)], " Marks, of all seeds: cross, it was rejected."),
        ([cases.ended(0)] * 61, " Not marked are the rounds of xgblora, more than 60 in a run."),
    ],
    ids=["laid on", "rejected", "too many"],
)
def test_the_words_beside_a_loss_speak_of_what_is_drawn(
    tmp_path: Path, rounds: list[dict[str, Any]], told: str
) -> None:
    cases.run(tmp_path / "run", arm="xgblora")
    (tmp_path / "run" / "ledger.jsonl").write_text("".join(map(files.record_line, rounds)), "utf-8")
    figure = loss.draw(reading.read([tmp_path / "run"]).studies[0])
    assert isinstance(figure, Figure)
    assert figure.lede.partition("steps.")[2] == told


def test_smoothing_is_the_exponential_mean_without_its_start() -> None:
    generator = np.random.default_rng(0)
    loss, keep = generator.normal(size=50), 1 - 1 / 5
    loss[3] = np.nan
    found = curves.smoothed(loss, 5)
    for at in (0, 3, 10, 49):
        seen = [step for step in range(at + 1) if np.isfinite(loss[step])]
        weights = np.array([keep ** (len(seen) - 1 - place) for place in range(len(seen))])
        assert found[at] == pytest.approx(float(weights @ loss[seen] / weights.sum()))


def test_a_band_is_the_median_and_the_ends_of_what_all_seeds_have() -> None:
    steps = np.arange(1, 101, dtype=float)
    made = [
        curves.Curve(steps[:end], steps[:end], steps[:end], np.full(end, level))
        for end, level in ((100, 1.0), (80, 2.0), (90, 6.0))
    ]
    x, middle, low, high = curves.band(made, "step")
    assert (x[0], x[-1]) == (1, 80)
    for line, level in ((middle, 2), (low, 1), (high, 6)):
        np.testing.assert_allclose(line, level)


def test_thinning_keeps_the_extremes() -> None:
    y = np.sin(np.arange(10_000) / 50) * np.linspace(1, 3, 10_000)
    x, kept = curves.thinned(np.arange(10_000, dtype=float), y)
    assert len(x) <= curves.NUM_POINTS
    assert (kept.min(), kept.max()) == (y.min(), y.max())
    assert (np.diff(x) > 0).all()


def test_numbers_in_words() -> None:
    space = words.SPACE
    assert words.score(0.91234) == f"91.2{space}%"
    assert words.score(-0.25, "matthews_correlation") == "−0.250"
    assert words.points(0.0213) == "+2.1"
    assert words.points(-0.00001) == "0.0"
    assert words.count(16384) == "16,384"
    assert words.count(1_250_000) == f"1.25{space}M"
    assert words.size(1536 * 2**20) == f"1.5{space}GiB"
    assert words.duration(250) == f"4{space}min 10{space}s"
    assert words.duration(59.99) == f"60.0{space}s"
    assert words.listed(["a", "b", "c"]) == "a, b and c"
    assert words.listed(["a"]) == "a"
    assert words.between(None, 0.2) == "–"


def test_metrics_that_are_shares_are_told_in_per_cent() -> None:
    assert {*METRICS, *ANSWER_METRICS} == words.PERCENTAGES


def test_texts_are_cleaned_wherever_they_stand() -> None:
    given = {"a\u202eb": ["x\x00y", {"z": "\ud800"}], "n": 1.5}
    assert records.clean(given) == {"a\ufffdb": ["x\ufffdy", {"z": "\ufffd"}], "n": 1.5}
    assert records.text("Zürich 東京 🦔") == "Zürich 東京 🦔"
    assert records.number(float("nan")) is None
    assert records.number(True) is None
