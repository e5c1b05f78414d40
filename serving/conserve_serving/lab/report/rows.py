"""Rows of many cells, read and put in order: who ran where, under which load and which seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any, Final

from conserve_serving.lab.errors import LabError
from conserve_serving.lab.report.metrics import Metric
from conserve_serving.lab.stats import Estimate, Verdict, mean, ratio, verdict

#: What a cell is called that runs on each profile's own hand-off link.
OWN_LINK: Final = "own"
#: What a workload's name has where arrivals are the trace's own.
RECORDED: Final = "recorded arrivals"


@dataclass(frozen=True, slots=True, order=True)
class Setting:
    """What is swept beside the load.

    Attributes:
        mixed_slowdown: time of a step that prefills and decodes over the sum of the two.
        link: name of the link.
        ratio: engines of each tier, as in ``1P + 3D``.
    """

    mixed_slowdown: float
    link: str
    ratio: str

    def __str__(self) -> str:
        link = "" if self.link == OWN_LINK else f", link {self.link}"
        return f"{self.ratio}, interference {say_interference(self.mixed_slowdown)}{link}"


def say_interference(mixed_slowdown: float) -> str:
    """The slowdown of mixed steps as people write it."""
    return "none" if mixed_slowdown == 1 else f"{100 * (mixed_slowdown - 1):+.3g} %"


def say_rate(rate_per_s: float) -> str:
    """An arrival rate for a column of them; 0 stands for arrivals as recorded."""
    return f"{rate_per_s:g}" if rate_per_s else "as recorded"


def at_load(rate_per_s: float) -> str:
    """At which load, within a sentence, a heading or a label; 0 as in :func:`say_rate`."""
    return f"at {rate_per_s:g} conversations/s" if rate_per_s else f"at {RECORDED}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where contenders meet: equal cluster, workload and setting."""

    cluster: str
    workload: str
    setting: Setting

    @property
    def title(self) -> str:
        """For headings."""
        return f"{self.workload} on {self.cluster}"

    def at(self, rate_per_s: float) -> str:
        """For headings and labels of one load; that arrivals are as recorded is said once."""
        if rate_per_s:
            return f"{self.title} {at_load(rate_per_s)}"
        other = replace(self, workload=self.workload.replace(f", {RECORDED}", ""))
        return f"{other.title} {at_load(rate_per_s)}"

    def briefly_at(self, rate_per_s: float) -> str:
        """The same where there is little room: of the workload its source alone."""
        return f"{self.workload.partition(',')[0]} on {self.cluster} {at_load(rate_per_s)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One cell's row, with what the report groups by."""

    place: Place
    contender: str
    policy: str
    rate_per_s: float
    share_of_capacity: float | None
    seed: int
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def saturated(self) -> bool:
        """Conversations came faster than they were finished."""
        return bool(self.raw.get("saturated", False))

    @property
    def recorded(self) -> bool:
        """Conversations and their pattern of arrivals are the trace's, whatever the seed."""
        return bool(self.raw["cell"]["workload"].get("arrivals") == "recorded")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One contender against another in one metric at one load.

    Attributes:
        ratio: ours over theirs, paired by seed.
        verdict: what it says.
        rival: label of the other.
        ours, theirs: means of both.
    """

    ratio: Estimate
    verdict: Verdict
    rival: str
    ours: Estimate
    theirs: Estimate


class Rows:
    """Rows of many cells.

    Args:
        raw: rows as ``lab.cell.run_cell`` makes them, and those of cells that failed.

    Attributes:
        all: the rows that have figures.
        failures: those of cells that failed, as they are.

    Raises:
        LabError: none has figures, or one lacks what it is grouped by (named in the text).
    """

    def __init__(self, raw: Sequence[Mapping[str, Any]]) -> None:
        self.failures = [one for one in raw if failed(one)]
        self.all = [_row(one, i) for i, one in enumerate(raw, 1) if not failed(one)]
        if not self.all:
            raise LabError(
                f"a report needs rows with figures; of {len(raw)} rows none has any. Run "
                "`conserve compare` first, or look at why the cells failed."
            )
        self._at: dict[tuple[Place, str, float], dict[int, Row]] = {}
        for row in self.all:
            seeds = self._at.setdefault((row.place, row.contender, row.rate_per_s), {})
            seeds[row.seed] = row  # the latest of equal cells counts, as in a store that is resumed
        self._most_seeds: dict[tuple[Place, str], int] = {}
        for (place, label, _), seeds in self._at.items():
            most = self._most_seeds.get((place, label), 0)
            self._most_seeds[place, label] = max(len(seeds), most)
        self._estimates: dict[tuple[Any, ...], Estimate | None] = {}
        self._policies = {row.contender: row.policy for row in self.all}

    def places(self) -> list[Place]:
        """In order of appearance."""
        return list(dict.fromkeys(row.place for row in self.all))

    def main_places(self) -> list[Place]:
        """Of each cluster and workload the setting with most rows (the first of equals)."""
        counts = Counter(row.place for row in self.all)
        best: dict[tuple[str, str], Place] = {}
        for place in self.places():
            key = (place.cluster, place.workload)
            if key not in best or counts[place] > counts[best[key]]:
                best[key] = place
        return list(best.values())

    def contenders(self, place: Place | None = None) -> list[str]:
        """Labels in order of appearance; those that ran at ``place``, where it is given."""
        return list(
            dict.fromkeys(r.contender for r in self.all if place is None or r.place == place)
        )

    def policy(self, contender: str) -> str:
        """The policy behind a label."""
        return self._policies[contender]

    def rates(self, place: Place, contender: str | None = None) -> list[float]:
        """Loads run at ``place``, ascending, under half of a contender's seeds, and two, or more.

        A search for the goodput tries loads of its own under each seed; those, and loads that are
        a share of somebody's capacity, are no points of a curve.
        """
        return sorted(
            {
                rate
                for (where, label, rate), seeds in self._at.items()
                if where == place
                and contender in {None, label}
                and self._enough(len(seeds), self._most_seeds[place, label])
                and not all(row.share_of_capacity for row in seeds.values())
            }
        )

    @staticmethod
    def _enough(seeds: int, most: int) -> bool:
        return 2 * seeds >= most and (seeds > 1 or most == 1)

    def by_seed(self, place: Place, contender: str) -> dict[int, list[Row]]:
        """Every row of a contender at ``place`` by seed, ascending by load."""
        found: dict[int, list[Row]] = {}
        for (where, label, _), seeds in self._at.items():
            if (where, label) == (place, contender):
                for seed, row in seeds.items():
                    found.setdefault(seed, []).append(row)
        return {seed: sorted(found[seed], key=lambda row: row.rate_per_s) for seed in sorted(found)}

    def seeds(self, place: Place) -> int:
        """The most seeds that any load has."""
        return max(most for (where, _), most in self._most_seeds.items() if where == place)

    def at(self, place: Place, contender: str, rate_per_s: float) -> list[Row]:
        """The seeds of one point, ascending; empty where it was not run."""
        seeds = self._at.get((place, contender, rate_per_s), {})
        return [seeds[seed] for seed in sorted(seeds)]

    def values(
        self, place: Place, contender: str, rate_per_s: float, metric: Metric
    ) -> dict[int, float]:
        """The metric by seed, of the seeds that have it."""
        found = ((r.seed, metric.of(r.raw)) for r in self.at(place, contender, rate_per_s))
        return {seed: value for seed, value in found if value is not None}

    def estimate(
        self, place: Place, contender: str, rate_per_s: float, metric: Metric
    ) -> Estimate | None:
        """Mean over seeds with its interval; None where no seed has the metric."""
        key = (place, contender, rate_per_s, metric.name, metric.path)
        if key not in self._estimates:
            values = list(self.values(place, contender, rate_per_s, metric).values())
            self._estimates[key] = mean(values) if values else None
        return self._estimates[key]

    def compare(
        self, place: Place, ours: str, theirs: str, rate_per_s: float, metric: Metric
    ) -> Comparison | None:
        """Two contenders over the seeds that both have; None where there are none."""
        return compare(
            self.values(place, ours, rate_per_s, metric),
            self.values(place, theirs, rate_per_s, metric),
            rival=theirs,
            lower_is_better=metric.lower_is_better,
        )

    def best_rival(
        self, place: Place, rivals: Sequence[str], rate_per_s: float, metric: Metric
    ) -> str | None:
        """The contender with the best mean; the first of equals."""
        scored = []
        for number, label in enumerate(rivals):
            values = self.values(place, label, rate_per_s, metric).values()
            if values:
                average = sum(values) / len(values)
                scored.append((average if metric.lower_is_better else -average, number, label))
        return min(scored)[2] if scored else None


def compare(
    ours: Mapping[int, float], theirs: Mapping[int, float], *, rival: str, lower_is_better: bool
) -> Comparison | None:
    """Two contenders' figures by seed, paired; None where no seed has both, or theirs is 0."""
    seeds = sorted(ours.keys() & theirs.keys())
    a, b = [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]
    if not seeds or min(b) <= 0:
        return None
    found = ratio(a, b)
    return Comparison(
        ratio=found,
        verdict=verdict(found, higher_is_better=not lower_is_better),
        rival=rival,
        ours=mean(a),
        theirs=mean(b),
    )


def failed(raw: Mapping[str, Any]) -> bool:
    """Whether the row says why its cell has no figures."""
    return "failure" in raw


def _row(raw: Mapping[str, Any], number: int) -> Row:
    cell = raw.get("cell")
    remedy = "Give the rows that conserve compare or conserve reproduce wrote."
    if not isinstance(cell, Mapping):
        raise LabError(f"row {number}: it has no field 'cell'. {remedy}")
    try:
        contender, workload, cluster = cell["contender"], cell["workload"], cell["cluster"]
        name = str(cluster["name"])
        return Row(
            place=Place(
                cluster=name.partition("@")[0],  # what follows names a ratio or a link
                workload=workload_name(workload),
                setting=Setting(
                    mixed_slowdown=float(cell.get("mixed_slowdown", 1.0)),
                    link=_link_name(cell.get("link") or cluster.get("link")),
                    ratio=_ratio(cluster["groups"]),
                ),
            ),
            contender=str(contender["label"]),
            policy=str(contender["policy"]),
            rate_per_s=round(float(workload["rate_per_s"] or 0.0), 9),
            share_of_capacity=cell.get("share_of_capacity"),
            seed=int(workload["seed"]),
            raw=raw,
        )
    except KeyError as error:
        raise LabError(f"row {number}: its cell has no field {error}. {remedy}") from error
    except (TypeError, ValueError) as error:
        raise LabError(f"row {number}: its cell cannot be read ({error}). {remedy}") from error


def _link_name(link: object) -> str:
    if isinstance(link, Mapping):
        return str(link.get("title", "own-link"))
    return OWN_LINK if link is None else str(link)


def _ratio(groups: Sequence[Mapping[str, Any]]) -> str:
    counts: Counter[str] = Counter()
    for group in groups:
        counts[str(group["tier"])] += int(group["count"])
    return " + ".join(
        f"{counts[tier]}{tier[0].upper()}" for tier in ("prefill", "decode") if counts[tier]
    )


def workload_name(workload: Mapping[str, Any]) -> str:
    """A short name of a workload: its source, and what was changed of it."""
    source = str(workload["source"])
    name = source.removeprefix("generated:")
    if name == source:
        name = PurePath(source).name.split(".")[0]
    parts = [name]
    for key, text in (
        ("conversations", "{:,} conversations"),
        ("pool_size", "first {:,}"),
        ("max_turns", "≤ {:,} turns"),
        ("max_context_tokens", "≤ {:,} tokens"),
        ("max_gap_s", "gaps ≤ {:g} s"),
        ("scale", "× {:g}"),
    ):
        if workload.get(key) is not None:
            parts.append(text.format(workload[key]))
    if workload.get("until_reset"):
        parts.append("to the first reset")
    if workload.get("split", "all") != "all":
        parts.append(f"{workload['split']} half")
    if workload.get("arrivals", "poisson") != "poisson":
        parts.append(f"{workload['arrivals']} arrivals")
    if workload.get("shared_prefix") == "warm":
        parts.append("warm prefixes")
    return ", ".join(parts) + (" (generated)" if source.startswith("generated:") else "")
