"""matplotlib's SVG made fit to stand in a page: small, themed, equal for equal figures."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle

from conserve_serving.lab.report.style import VARIABLES, Series, colour

_SOFT, _LINE, _FG = colour("soft"), colour("line"), colour("fg")
_RC: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's own font
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _SOFT,
    "axes.labelsize": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlecolor": _FG,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.8,
    "text.color": _FG,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "xtick.minor.visible": False,
    "ytick.minor.visible": False,
    "lines.markersize": 5,
    "lines.solid_capstyle": "round",
    "path.simplify": False,
    "font.size": 10,
    "patch.linewidth": 0.0,
}
_PX_PER_IN: Final = 72.0


@contextmanager
def _look(salt: str) -> Iterator[None]:
    """Our settings over matplotlib's own, whatever the person who runs this has configured."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({**_RC, "svg.hashsalt": salt})
        yield


@contextmanager
def axes(width_px: float, height_px: float) -> Iterator[tuple[Figure, Axes]]:
    """One panel to draw on, in the report's look; its unit is a pixel of the page."""
    with _look(""):
        figure = Figure(
            figsize=(width_px / _PX_PER_IN, height_px / _PX_PER_IN), dpi=_PX_PER_IN, layout=None
        )
        FigureCanvasSVG(figure)
        yield figure, figure.add_subplot()


def place(figure: Figure, *, left: float, right: float, top: float, bottom: float) -> None:
    """Margins in pixels: fixed ones, so that panels in a row line up."""
    width, height = figure.get_size_inches() * _PX_PER_IN
    figure.subplots_adjust(
        left=left / width, right=1 - right / width, top=1 - top / height, bottom=bottom / height
    )


def to_svg(figure: Figure, *, label: str) -> str:
    """The figure as an ``<svg>`` element for a page.

    Args:
        figure: from :func:`axes`.
        label: what it shows, in words; it also keeps the ids of this picture from those of others.

    Returns:
        Text without ids that nothing refers to, without date, versions and fonts; colours are the
        page's variables. Equal figures give equal text.
    """
    out = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with _look(label):
        figure.savefig(out, format="svg", metadata=nothing, transparent=True)
    return tidy(out.getvalue().decode(), label=label)


_RULES: Final[tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...]] = (
    (re.compile(r"<metadata>.*?</metadata>", re.DOTALL), ""),
    (re.compile(r"<style.*?</style>", re.DOTALL), ""),
    (re.compile(r"<!--.*?-->", re.DOTALL), ""),
    (re.compile(r"\s*font-family: [^;\"]*;?"), ""),
    (re.compile(r"font: (?:(\w+) )?([\d.]+px) [^;\"]*"), r"font-weight: \1; font-size: \2"),
    (re.compile(r"font-weight: ;\s*"), ""),
    (re.compile(r"; ?stroke-linejoin: miter|; ?stroke-linecap: (?:square|butt)"), ""),
    (re.compile(r' transform="rotate\(-?0 [^"]*\)"'), ""),
    (re.compile(r'(?<= )(?:d|x|y|transform)="[^"]*"'), lambda m: _rounded(m.group())),
    (re.compile(r"xlink:href"), "href"),
    (re.compile(r"#0000[0-9a-f]{2}"), lambda m: VARIABLES.get(m.group(), m.group())),
    (re.compile(r"<g(?: id=\"[^\"]*\")?(?:/>|>\s*</g>)"), ""),
    (re.compile(r"<defs>\s*</defs>"), ""),
)


def tidy(text: str, *, label: str) -> str:
    """What :func:`to_svg` does to matplotlib's text."""
    text = text[text.index("<svg") :]
    viewbox = re.search(r'viewBox="([^"]*)"', text)
    text = text[text.index(">") + 1 :]
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    used = set(re.findall(r'(?:url\(#|href="#)([\w.-]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: m.group() if m.group(1) in used else "", text)
    text = re.sub(r">\s+<", "><", text)
    text = re.sub(r"[ \n]*\n", " ", text)
    text = re.sub(r' d="([^"]*)"', lambda m: f' d="{_path(m.group(1))}"', text)
    box = "0 0 100 100" if viewbox is None else viewbox.group(1)
    return (
        f'<svg class="plot" viewBox="{box}" role="img" aria-label="{escape(label, quote=True)}">'
        f"{text.strip()}"
    )


def _rounded(attribute: str) -> str:
    """A tenth of a pixel is enough for a place; what is written in texts is left alone."""
    return re.sub(
        r"-?\d+\.\d{2,}", lambda m: f"{float(m.group()):.1f}".removesuffix(".0"), attribute
    )


def _path(data: str) -> str:
    """Path data without the blanks that it does not need."""
    return re.sub(r"\s*([MLHVCQZz])\s*", r"\1", re.sub(r"\s+", " ", data)).strip()


def swatch(hue: str) -> str:
    """A legend's sample of a filled area: ``hue`` is a variable of the style sheet."""
    return f'<i style="background:var(--{hue})"></i>'


def key(one: Series) -> str:
    """A legend's sample of a line with its marker."""
    paint = VARIABLES[one.colour]
    dash = ""
    if not isinstance(one.dash, str):
        dash = f' stroke-dasharray="{" ".join(f"{d * one.width:.3g}" for d in one.dash[1])}"'
    marker = MarkerStyle(one.marker)
    outline = marker.get_path().transformed(marker.get_transform())
    corners = "L".join(
        f"{17 + 7 * x:.3g} {5 - 7 * y:.3g}" for x, y in np.asarray(outline.to_polygons()[0])
    )
    return (
        f'<svg class="key" viewBox="0 0 34 10" aria-hidden="true"><path d="M0 5H34" style="stroke: '
        f'{paint}; stroke-width: {one.width}; fill: none"{dash}/>'
        f'<path d="M{corners}z" style="fill: {paint}"/></svg>'
    )
