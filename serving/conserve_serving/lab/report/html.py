"""A report as one HTML file: nothing to load, light and dark, fit for paper."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable, Sequence

import jinja2
from markupsafe import Markup

from conserve_serving.lab.report.document import Block, Section, Tile
from conserve_serving.lab.report.style import COLOURS


def to_html(
    *,
    title: str,
    subtitle: str,
    summary: Sequence[str],
    tiles: Sequence[Tile],
    sections: Sequence[Section],
    footer: str,
) -> str:
    """The page.

    Args:
        title, subtitle, summary, tiles: what stands above the sections.
        sections: in order.
        footer: one line.
    """
    text = (
        importlib.resources.files(__package__)
        .joinpath("templates/report.html.j2")
        .read_text("utf-8")
    )
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters.update(kinds=_kinds, drawn=_drawn)
    return environment.from_string(text).render(
        title=title,
        subtitle=subtitle,
        summary=summary,
        tiles=tiles,
        sections=sections,
        footer=footer,
        colours=COLOURS,
    )


def _kinds(blocks: Iterable[Block]) -> list[tuple[str, Block]]:
    return [(type(block).__name__, block) for block in blocks]


def _drawn(text: str) -> Markup:
    return Markup(text)  # noqa: S704 - our own SVG; names in it are escaped where it is made
