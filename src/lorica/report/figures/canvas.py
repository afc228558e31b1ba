"""A figure's panels: drawn once, kept as PNG and SVG, and made fit to stand in a page in either of its two colours.

A panel is a small picture of its own, so that a page may set them side by side or, on a phone, below one another, at a
size at which they can be read. They are drawn in the light palette; in the page its colours become the page's own.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

INK, MUTED, RULE, PAPER = "#1c2126", "#5d666f", "#d9dde1", "#ffffff"
SERIES = ("#0a62a8", "#c8501e", "#14805e", "#8a4fa3", "#a87400", "#4a90b8", "#b03a5b", "#6b7280")
GAIN, LOSS = SERIES[0], SERIES[1]
VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", PAPER: "--paper"} | {
    colour: f"--series-{place}" for place, colour in enumerate(SERIES)
}
LIGHT = {name: colour for colour, name in VARIABLES.items()}
LIGHT |= {"--tint": "#f5f6f7", "--better": SERIES[2], "--worse": LOSS}
DARK = {
    "--ink": "#e7e9eb",
    "--muted": "#9aa3ab",
    "--rule": "#333a41",
    "--paper": "#14171a",
    "--tint": "#1c2024",
    "--better": "#46c08f",
    "--worse": "#f08a5d",
    **dict(
        zip(
            (f"--series-{place}" for place in range(len(SERIES))),
            ("#5aaef0", "#f08a5d", "#46c08f", "#c391db", "#dba73c", "#8ecdee", "#ec7f9c", "#a3abb6"),
            strict=True,
        )
    ),
}
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
WIDTH = 4.3  # inches
SETTINGS: dict[Any, Any] = {
    "text.parse_math": False,  # a name may hold a dollar sign
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "text.color": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "path.simplify": True,
    "timezone": "UTC",
    "figure.autolayout": False,
    "figure.constrained_layout.use": False,
}
SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
Cells = Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Panel:
    """One picture: as files, as it stands in the page, and in words."""

    name: str
    alt: str
    svg: bytes
    png: bytes
    inline: str
    width: float  # inches

    @property
    def is_wide(self) -> bool:
        return self.width > WIDTH


@dataclass(frozen=True)
class View:
    """One of the ways to look at a figure; a figure with one alone does not name it."""

    label: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Figure:
    """What a section shows of one subject: `lede` says how to read it, `head` and `rows` are its figures."""

    name: str
    title: str
    lede: str
    views: Sequence[View]
    head: Sequence[str]
    rows: Cells
    legend: Sequence[tuple[str, str]] = field(default_factory=tuple)  # (CSS variable, label)

    @property
    def panels(self) -> list[Panel]:
        return [panel for view in self.views for panel in view.panels]


def panel(
    name: str, title: str, alt: str, draw: Callable[[Any], None], *, height: float = 2.9, width: float = WIDTH
) -> Panel:
    """Draw on fresh axes under a title; `name` is a slug that no other panel of the page has."""
    # Not through pyplot, whose backend and open figures are global to the caller's process.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(SETTINGS | {"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the PNG has a box there, the SVG the letter
        figure = Canvas(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        draw(axes)
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
        layout = figure.get_layout_engine()
        assert layout is not None
        layout.execute(figure)
        figure.set_layout_engine(None)  # it has its places now, and would draw twice at each save to find them again
        svg = _saved(figure, format="svg", metadata={"Date": None, "Creator": None})
        png = _saved(figure, format="png", dpi=200, metadata={"Software": None})
    return Panel(name, alt, svg, png, _inline(svg, name, alt), width)


def _saved(figure: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, **options)
    return file.getvalue()


def colour(place: int) -> str:
    return SERIES[place % len(SERIES)]


def dash(place: int) -> Any:
    """A line's own dashes, once all colours are used."""
    return DASHES[place // len(SERIES) % len(DASHES)]


def variable(place: int) -> str:
    """The page's name of the colour."""
    return VARIABLES[colour(place)]


def _inline(svg: bytes, name: str, alt: str) -> str:
    """The picture as an element of the page: ids of its own, the page's colours and letters, and its words."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(svg)
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    for element in root.iter():
        for key, value in element.attrib.items():
            element.set(key, _of_the_page(key, value, name))
    for size in ("width", "height"):
        del root.attrib[size]
    root.set("role", "img")
    root.set("aria-label", alt)
    return ElementTree.tostring(root, encoding="unicode")


def _of_the_page(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == f"{{{XLINK}}}href":
        return value.replace("#", f"#{name}-", 1)
    if key == "clip-path":
        return value.replace("url(#", f"url(#{name}-")
    if key == "style":
        value = value.replace("url(#", f"url(#{name}-")
        value = re.sub(r"(font: [^;]*?[\d.]+px) [^;]*", r"\1 var(--sans)", value)
        return re.sub(r"#[0-9a-f]{6}", lambda found: _variable(found[0]), value)
    return value


def _variable(colour: str) -> str:
    return f"var({VARIABLES[colour]})" if colour in VARIABLES else colour
