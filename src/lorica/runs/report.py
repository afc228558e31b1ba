"""`lorica report`: a page about finished work, from the folders that the other verbs leave."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorica import files
from lorica.config import ReportConfig
from lorica.errors import ConfigError
from lorica.report import page, reading


def report(targets: Sequence[str], given: ReportConfig) -> Path:
    """Write the report on the targets, and return the path of its page; the targets themselves are only read.

    It goes to `output_dir`, else into the folder of the one target, else to a new folder. An earlier report there is
    replaced. Raises ConfigError without a target, and what reading them and writing the page raise.
    """
    if not targets:
        raise ConfigError(
            "report takes one folder or more that a command left: lorica report RUN_OR_STUDY output_dir=DIR"
        )
    folder = _folder(targets, given)
    page.check_free(folder)
    subjects = reading.read([Path(each) for each in targets])
    return page.write(subjects, folder, title=given.title)


def _folder(targets: Sequence[str], given: ReportConfig) -> Path:
    if given.output_dir is not None:
        return Path(given.output_dir)
    if len(targets) == 1:
        return Path(targets[0]) / "report"
    return files.dated(Path(given.artifacts_dir) / "reports", "report")
