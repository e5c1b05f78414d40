"""Colours, and who has which: one look for every plot of a report, in light and dark.

Plots are drawn with stand-in colours (``#0000xx``) that ``svg`` turns into variables of the page's
style sheet, so that one picture serves both. The hues are those of Okabe and Ito, which people with
any common colour blindness can tell apart; members of one family of policies share a hue and differ
in dash and marker as well. ConServe's blue is nobody else's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

#: Variable of the style sheet → (light, dark).
COLOURS: Final[dict[str, tuple[str, str]]] = {
    "fg": ("#1d2126", "#e4e7ea"),
    "soft": ("#646c76", "#98a1ab"),
    "line": ("#dcdfe3", "#30363d"),
    "bg": ("#fcfcfb", "#15181c"),
    "card": ("#f3f4f5", "#1d2126"),
    "bad": ("#b3261e", "#ff8a80"),
    "good": ("#16794a", "#62cf9a"),
    "accent": ("#2f6fd0", "#6ea3f2"),
    "accent-2": ("#173f86", "#a9c8fa"),
    "vermillion": ("#c95000", "#f0813c"),
    "green": ("#00855f", "#35c79b"),
    "amber": ("#b87a00", "#efb43c"),
    "pink": ("#b4578a", "#e594c0"),
    "sky": ("#2b93c4", "#77c7ee"),
    "grey": ("#727b85", "#9aa4ae"),
    "yellow": ("#d9c400", "#f0e05a"),
}
_NUMBERS: Final = {name: number for number, name in enumerate(COLOURS, 1)}


def colour(name: str) -> str:
    """The stand-in of a variable of the style sheet, for matplotlib."""
    return f"#0000{_NUMBERS[name]:02x}"


#: Stand-in → what the page reads.
VARIABLES: Final = {colour(name): f"var(--{name})" for name in COLOURS}

#: Parts of a conversation's time: (key of a row, name, colour). Waiting is warm, work is blue.
PARTS: Final = (
    ("held", "held for room", "vermillion"),
    ("prefill_queue", "prefill queue", "amber"),
    ("prefill", "prefill", "accent"),
    ("handoff", "hand-off", "pink"),
    ("decoder_wait", "decoder wait", "yellow"),
    ("decode", "decode", "sky"),
    ("gaps", "gaps (tools, people)", "grey"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """How a contender is drawn; ``short`` is its name where there is little room."""

    label: str
    short: str
    colour: str
    marker: str
    dash: str | tuple[float, tuple[float, ...]]
    ours: bool

    @property
    def width(self) -> float:
        """Of its line, in points."""
        return 2.4 if self.ours else 1.3


#: Policies by how their names begin → hue; the first that fits.
_FAMILIES: Final = (
    ("conserve", "accent"),
    ("collocated", "vermillion"),
    ("per_turn", "green"),
    ("full_disaggregation", "amber"),
    ("ppd", "pink"),
    ("deflection", "sky"),
    ("oracle", "fg"),
)
_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES: Final[tuple[str | tuple[float, tuple[float, ...]], ...]] = (
    "-",
    (0, (5, 2)),
    (0, (1.5, 1.5)),
    (0, (6, 2, 1.5, 2)),
    (0, (3, 1)),
    (0, (8, 3)),
    (0, (1, 2.5)),
    (0, (4, 1, 1, 1, 1, 1)),
)
_SHORT: Final = (
    ("conserve_plus", "ConServe+"),
    ("conserve", "ConServe"),
    ("full_disaggregation", "full disagg."),
    ("collocated", "colloc."),
    ("per_turn", "per-turn"),
    ("round_robin", "round-robin"),
    ("least_loaded", "least loaded"),
    ("override", "override"),
    ("realistic", "real."),
    ("dedicated", "ded."),
    ("hosting", "host."),
    ("wrong", "%"),
    ("_", " "),
    ("-", " "),
)


def series(contenders: Sequence[tuple[str, str]]) -> dict[str, Series]:
    """How each contender is drawn, throughout one report.

    Args:
        contenders: (label, policy) of all of them, in their order.
    """
    seen: dict[str, int] = {}
    drawn = {}
    for label, policy in contenders:
        hue = next((hue for start, hue in _FAMILIES if policy.startswith(start)), "grey")
        number = seen.get(hue, 0)
        seen[hue] = number + 1
        ours = hue == "accent"
        drawn[label] = Series(
            label=label,
            short=short_name(label),
            colour=colour("accent-2" if ours and policy != "conserve" else hue),
            marker=_MARKERS[number % len(_MARKERS)],
            dash=_DASHES[number % len(_DASHES)],
            ours=ours,
        )
    return drawn


def short_name(label: str) -> str:
    """A contender's name where there is little room."""
    name = label
    for long, short in _SHORT[:-2]:
        name = name.replace(long, short, 1)
    for long, short in _SHORT[-2:]:
        name = name.replace(long, short)
    return name.replace("per turn", "per-turn").replace("round robin", "round-robin")
