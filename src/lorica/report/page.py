"""The page: one HTML file that needs nothing beside it, and the figures' files beside it for those who want them."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import lorica
from lorica import files
from lorica.report import findings, provenance, verdicts, words
from lorica.report.figures import canvas, heatmap, history, loss, pareto, rates, scores, spectra
from lorica.report.figures.canvas import Figure
from lorica.report.subjects import Subjects

INDEX, FIGURES = "index.html", "figures"
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """A part of the page: figures, and in the place of one that cannot be drawn the reason."""

    slug: str
    short: str  # in the list of sections
    title: str
    shown: Sequence[Figure | str]


def write(subjects: Subjects, folder: Path, *, title: str | None = None) -> Path:
    """Leave the report in `folder`, whole or not at all, in the place of an earlier one; returns the page's path.

    The same subjects give the same bytes. Raises OutputExistsError if `folder` holds anything but a report.
    """
    check_free(folder)
    sections = list(_sections(subjects))
    html = _html(subjects, sections, title)
    with files.staged_folder(folder) as staging:
        (staging / INDEX).write_text(html, "utf-8")
        (staging / FIGURES).mkdir()
        for figure in _figures(sections):
            files.write_csv(staging / FIGURES / f"{figure.name}.csv", figure.head, figure.rows)
            for panel in figure.panels:
                (staging / FIGURES / f"{panel.name}.svg").write_bytes(panel.svg)
                (staging / FIGURES / f"{panel.name}.png").write_bytes(panel.png)
    return folder / INDEX


def check_free(folder: Path) -> None:
    """Raise OutputExistsError if `folder` is there and is neither empty nor an earlier report."""
    is_report = folder.is_dir() and {each.name for each in folder.iterdir()} == {INDEX, FIGURES}
    if folder.exists() and not is_report:
        files.claim_folder(folder)


def _sections(subjects: Subjects) -> Iterator[Section]:
    """What there is to draw, in the order of the page."""
    studies = subjects.studies
    parts: dict[str, tuple[str, str, Sequence[Figure | str | None]]] = {
        "loss": ("Loss", "How the loss fell", [loss.draw(study) for study in studies]),
        "scores": ("Scores", "How well each does", [scores.draw(study) for study in studies]),
        "recovery": ("Recovery", "What the merges keep", [heatmap.draw_recovery(subjects.merges, subjects.sweeps)]),
        "matrix": (
            "Matrix",
            "Every target on every task",
            [heatmap.draw_matrix(matrix) for matrix in subjects.matrices],
        ),
        "search": (
            "Search",
            "How the search went",
            [*map(rates.draw, studies), *map(history.draw, subjects.sweeps)],
        ),
        "spectra": ("Spectra", "What the adapters use of their rank", [spectra.draw(study) for study in studies]),
        "costs": ("Costs", "What quality costs", [pareto.draw(study) for study in studies]),
    }
    for slug, (short, title, found) in parts.items():
        shown = [each for each in found if each is not None]
        if shown:
            yield Section(slug, short, title, shown)


def _figures(sections: Sequence[Section]) -> Iterator[Figure]:
    for section in sections:
        yield from (each for each in section.shown if not isinstance(each, str))


def _html(subjects: Subjects, sections: Sequence[Section], title: str | None) -> str:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["drawn"] = Markup  # our own pictures, whose texts the drawing has escaped
    environment.tests["reason"] = lambda each: isinstance(each, str)
    script = (HERE / "page.js").read_text("utf-8")
    headline, *others = findings.findings(subjects)
    return environment.get_template("page.html.j2").render(
        title=title or headline,
        headline=headline,
        others=others,
        sections=sections,
        subjects=subjects,
        compared=[study for study in subjects.studies if study.cells or study.differences or study.failures],
        verdicts=verdicts.verdicts,
        outcomes=verdicts.outcomes,
        missing=verdicts.missing,
        rate=words.rate,
        span=verdicts.SPAN,
        provenance=provenance.provenance(subjects),
        differences=provenance.differences,
        run_lines=provenance.run_lines,
        light=canvas.LIGHT,
        dark=canvas.DARK,
        variable=canvas.variable,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=lorica.__version__,
    )
