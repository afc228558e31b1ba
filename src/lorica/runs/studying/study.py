"""`lorica compare` and `lorica ablate`: several runs that answer a question, started, resumed and told together.

A study's folder holds its config (study.yaml), the runs as `lorica train` leaves them (runs/ARM/TASK/seedS), a line for
each failure, and the outcome: study.json, study.csv, the losses as a picture, README.md.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lorica import card, config, files, progress, results
from lorica.config import AblateConfig, CompareConfig, StudyConfig
from lorica.errors import ConfigError, MissingPathError, OutputExistsError
from lorica.runs.studying.outcome import (
    CSV_HEAD,
    FAILURES,
    Found,
    check_folders,
    chosen_rates,
    final_rows,
    found_runs,
    outcome,
)
from lorica.runs.studying.plan import Key, Planned, Study, StudyPlan, planned
from lorica.runs.studying.rehearsal import Rehearsed, rehearsed
from lorica.studies import launcher
from lorica.studies.curves import Curve, draw_losses
from lorica.studies.launcher import Ended, Job, Launch

CONFIG, OUTCOME, CSV, CARD, LOSSES = "study.yaml", "study.json", "study.csv", "README.md", "loss.png"
ORIGIN = "origin.json"
NO_FAILURE = (75, 130, 143)  # exit codes of runs that are in use, or that a signal ended: they are gone on with
OF_THIS_CALL = {"resume", "retry", "plan", "launcher", "num_workers"}


@dataclass(frozen=True)
class Studied:
    """What a study left: its folder, and the outcome that stands there."""

    folder: Path
    outcome: dict[str, Any]


def study(given: Study, say: Console) -> Studied:
    """Run what is missing of a study, rates first, and leave its folder; the same call goes on with one that is there.

    Whatever can be refused without a base's weights is refused before anything runs. A run that fails does not end the
    study: it is told, and run again only with `retry`. A second process on the same folder is refused.
    """
    plan, _ = looked_ahead(given)
    given, launch, folder = plan.given, launcher.find(plan.given.launcher), _folder(plan.given)
    with files.locked_folder(folder):
        check_folders(plan, folder)
        if not (folder / ORIGIN).exists():
            files.write_json(folder / ORIGIN, results.origin(given.seeds[0], str(given.run.get("device", "auto"))))
        files.write_atomic(folder / CONFIG, config.dump(given))  # last: a folder with a config can be resumed
        say.print(f"after a crash: {_command(given)} resume={folder}", highlight=False, markup=False, soft_wrap=True)
        return UnderWay(plan, folder, launch, say).completed()


def looked_ahead(given: Study) -> tuple[StudyPlan, dict[Key, Rehearsed]]:
    """The study's runs, by its own config if it is gone on with, and what is known of each arm's on each task.

    Raises whatever error can be known of without a base's weights and the study's folder.
    """
    given = _taken_up(given).resolved()
    plan = planned(given)
    launcher.find(given.launcher)
    return rehearsed(plan)


@dataclass
class UnderWay:
    """A study under way, its folder held."""

    plan: StudyPlan
    folder: Path
    launch: Launch
    say: Console

    def completed(self) -> Studied:
        """Run what is missing and can be run; tell what has been found."""
        tuning = self.plan.tuning()
        self._run_missing(tuning, "choosing rates")
        finals = self.plan.finals(chosen_rates(self.plan, found_runs(tuning, self.folder)))
        self._run_missing(finals, "runs")
        return self._told(finals)

    def _run_missing(self, runs: Sequence[Planned], description: str) -> None:
        """Run those that are neither finished nor failed, or failed and asked for again."""
        wanted = ("missing", "failed") if self.plan.given.retry else ("missing",)
        missing = [each for each in found_runs(runs, self.folder) if each.state in wanted]
        by_job = {_job(each): each for each in missing}
        with progress.bar() as shown:
            task = shown.add_task(description, total=len(runs), completed=len(runs) - len(missing), note="")
            for ended in self.launch(list(by_job), num_workers=self.plan.given.num_workers):
                self._note(by_job[ended.job], ended)
                shown.update(task, advance=1, note=str(by_job[ended.job].planned.folder))
                files.write_json(self.folder / OUTCOME, outcome(self.plan, self.folder))

    def _note(self, found: Found, ended: Ended) -> None:
        """Tell how a run ended: of a finished one nothing is kept to go on from, and a failure is written down."""
        folder = str(found.planned.folder)
        if ended.error is None:
            shutil.rmtree(found.run.checkpoints, ignore_errors=True)
            self.say.print(f"{folder}: {ended.seconds:.0f} s", highlight=False, markup=False, soft_wrap=True)
            return
        self.say.print(f"{folder}: {ended.error}", highlight=False, markup=False, soft_wrap=True)
        if ended.exit_code not in NO_FAILURE:
            line = {"hash": found.planned.hash, "folder": folder, "error": ended.error, "exit_code": ended.exit_code}
            files.append_record(self.folder / FAILURES, {**line, "time": time.time()})

    def _told(self, finals: Sequence[Planned]) -> Studied:
        found = outcome(self.plan, self.folder)
        files.write_json(self.folder / OUTCOME, found)
        files.write_csv(self.folder / CSV, CSV_HEAD, final_rows(found))
        unit = self.plan.given.budget[0]
        done = [each for each in found_runs(finals, self.folder) if each.is_done]
        curves = [
            Curve(each.planned.arm, each.planned.task, files.read_records(each.run.training_loss)) for each in done
        ]
        path = Path(self.plan.given.loss_figure_path or self.folder / LOSSES)
        draw_losses(curves, path, unit="steps" if unit == "epochs" else unit, smoothing=self.plan.given.loss_smoothing)
        command = f"{_command(self.plan.given)} {CONFIG} output_dir=NEW"
        files.write_atomic(self.folder / CARD, card.study_card(found, command, path.name))
        return Studied(self.folder, found)


def _job(found: Found) -> Job:
    """The run begun, or gone on with where it stands."""
    run, log = found.run, found.run.path.with_name(f"{found.run.path.name}.log")
    if run.config.exists():
        return Job(("train", f"resume={run.path}"), log)
    shutil.rmtree(run.path, ignore_errors=True)  # of a run that was killed before it had a config
    cfg = found.planned.cfg.model_copy(update={"output_dir": str(run.path)})
    path = run.path.with_name(f"{run.path.name}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, config.dump(cfg))
    return Job(("train", str(path)), log)


def _taken_up(given: Study) -> Study:
    """The config of the study that `resume` names; of the words given only those of the call count beside it."""
    if given.resume is None:
        return given
    extra = sorted(given.model_fields_set - OF_THIS_CALL)
    if extra:
        raise ConfigError(f"resume={given.resume} takes its config from the study: drop {', '.join(extra)}")
    path = Path(given.resume) / CONFIG
    if not path.is_file():
        raise MissingPathError(f"{given.resume!r} is not a study's folder: it has no {CONFIG}")
    tree = config.read_yaml(path)
    kind: type[CompareConfig] | type[AblateConfig] = CompareConfig if "arms" in tree else AblateConfig
    words = {key: getattr(given, key) for key in OF_THIS_CALL & given.model_fields_set - {"resume"}}
    return config.check(
        kind, {**tree, "retry": False, "plan": False, **words, "resume": None, "output_dir": given.resume}
    )


def _folder(given: StudyConfig) -> Path:
    """A new folder, or that of the study that is gone on with."""
    if given.output_dir is None:
        return files.new_folder(Path("artifacts") / "studies", _command(given).split()[1])
    path = Path(given.output_dir)
    check_free(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def check_free(path: Path) -> None:
    """Raise OutputExistsError for a folder that holds something, and no study."""
    if (path / CONFIG).is_file() or not path.is_dir():
        return
    if {each.name for each in path.iterdir()} - {".lock", ORIGIN}:
        raise OutputExistsError(f"output_dir={str(path)!r} is not empty, and no study that could be gone on with")


def _command(given: StudyConfig) -> str:
    return "lorica ablate" if isinstance(given, AblateConfig) else "lorica compare"
