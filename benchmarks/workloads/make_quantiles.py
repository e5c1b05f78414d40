"""Make ``serving/conserve_serving/replay/quantiles.json``: what generated workloads are drawn from.

    python benchmarks/workloads/make_quantiles.py --swebench FILE --coding FILE --customer FILE

The files are traces as ``conserve replay`` reads them; docs/workloads.md says which ones the
shipped file was made from. Only statistics are written: quantiles, shares of variance,
correlations, counts of prefixes by length.

Method. Every tail turn's appended tokens, every answer and every gap becomes a normal score among
the turns at about the same position. The scores' variance is parted into what is between
conversations and what is within (one-way analysis of variance, unequal groups); correlations
between conversations' means are freed of what turns contribute to them by chance.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any, Final

import numpy as np

from conserve_serving.lab.cuts import is_reset
from conserve_serving.lab.pool import Pool
from conserve_serving.lab.workloads import WorkloadSpec
from conserve_serving.replay.conversations import Conversation, Turn

TARGET: Final = Path(__file__).resolve().parents[2] / "serving/conserve_serving/replay"
GRID: Final = (
    *(0, 0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5),
    *(0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 1),
)
#: Gaps in seconds between which the probability of a rewritten history is counted.
GAP_STARTS_S: Final = (0.0, 60.0, 300.0, 3600.0)
#: A reset that leaves less of the context than this is a compaction, else a rewritten history.
COMPACTED_BELOW: Final = 0.6
#: Correlations beyond this are not believed: a factor with a small share of the variance has them
#: by chance.
CORRELATION_LIMIT: Final = 0.9


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One workload of the file."""

    name: str
    about: str
    source: str
    spec: WorkloadSpec
    starts: tuple[int, ...]  # first turns of the positions that are told apart
    more: dict[str, Any]
    gaps: bool = False
    resets: bool = False


def plans(arguments: argparse.Namespace) -> list[Plan]:
    coding = "Claude Code sessions of GitHub callanjfox/kv-cache-tester (Apache-2.0)"
    positions = (1, 2, 3, 4, 6, 9, 16, 31)
    return [
        Plan(
            name="swebench",
            about="a software-engineering agent on SWE-bench: one long first turn, then many "
            "short appends; no gaps recorded",
            source="mini-swe-agent on SWE-bench (bm25_13K), trace summary of the ConServe authors' "
            "artifact (GitHub eicchen/conserve, Apache-2.0)",
            spec=WorkloadSpec(source=arguments.swebench),
            starts=tuple(range(1, 11)),
            more={},
        ),
        Plan(
            name="coding-agent",
            about="an interactive coding agent up to its first context reset: long conversations, "
            "large appends, tool and user gaps",
            source=coding,
            spec=WorkloadSpec(
                source=arguments.coding, until_reset=True, max_context_tokens=131_072
            ),
            starts=positions,
            more={"max_gap_s": 120, "max_context_tokens": 131_072},
            gaps=True,
        ),
        Plan(
            name="coding-session",
            about="whole sessions of an interactive coding agent, hours apart at times: histories "
            "are rewritten after long gaps and compacted when they grow",
            source=coding,
            spec=WorkloadSpec(source=arguments.coding, max_context_tokens=200_000),
            starts=positions,
            more={"max_context_tokens": 200_000},
            gaps=True,
            resets=True,
        ),
        Plan(
            name="customer-service",
            about="a customer-service agent with tools: many small turns; gaps are not recorded, "
            "2 s is assumed",
            source="gpt-4o airline trajectories of GitHub sierra-research/tau-bench (MIT)",
            spec=WorkloadSpec(source=arguments.customer),
            starts=(1, 2, 3, 4, 6, 9, 14),
            more={"gap_s": {"starts": [1], "quantiles": [[2] * len(GRID)], "mean": 0, "share": 0}},
        ),
    ]


def quantiles(values: Sequence[float]) -> list[float]:
    return [tidy(float(v)) for v in np.quantile(np.asarray(values, float), GRID)]


def tidy(value: float, digits: int = 4) -> float:
    """Four significant digits: more would be the trace's, not the distribution's."""
    short = float(f"{value:.{digits}g}")
    return int(short) if short == int(short) else short


def normal_scores(values: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """Normal scores of the ranks; equal values are ranked by lot."""
    order = np.lexsort((rng.random(len(values)), values))
    ranks = np.empty(len(values))
    ranks[order] = np.arange(len(values))
    standard = NormalDist()
    return np.array([standard.inv_cdf((rank + 0.5) / len(values)) for rank in ranks])


class Quantity:
    """One quantity of the turns: values by position, scores, and how alike turns are."""

    def __init__(
        self,
        conversations: Sequence[Conversation],
        value: Callable[[Turn | None, Turn], float | None],
        starts: tuple[int, ...],
        rng: np.random.Generator,
    ) -> None:
        self.cells: dict[tuple[int, int], float] = {}  # (conversation, turn) -> score
        by_position: dict[int, list[tuple[tuple[int, int], float]]] = {}
        for which, c in enumerate(conversations):
            for number, (before, turn) in enumerate(pairwise((None, *c.turns)), 1):
                assert turn is not None
                found = value(before, turn)
                if found is not None:
                    position = max(s for s in starts if s <= number)
                    by_position.setdefault(position, []).append(((which, number), found))
        self.starts = sorted(by_position)
        self.quantiles = []
        for start in self.starts:
            keys, values = zip(*by_position[start], strict=True)
            self.quantiles.append(quantiles(values))
            self.cells.update(zip(keys, normal_scores(values, rng), strict=True))
        groups: dict[int, list[float]] = {}
        for (which, _), score in self.cells.items():
            groups.setdefault(which, []).append(score)
        self.counts = {which: len(scores) for which, scores in groups.items()}
        self.means = {which: float(np.mean(scores)) for which, scores in groups.items()}
        self.mean = float(np.mean(list(self.means.values())))
        self.share = self._between(groups)

    @staticmethod
    def _between(groups: dict[int, list[float]]) -> float:
        """Share of the variance that is between conversations."""
        sizes = np.array([len(g) for g in groups.values()], float)
        whole = np.concatenate([np.array(g) for g in groups.values()])
        means = np.array([np.mean(g) for g in groups.values()])
        within = sum(float(((np.array(g) - np.mean(g)) ** 2).sum()) for g in groups.values())
        if len(whole) <= len(sizes):
            return 0.0
        ms_within = within / (len(whole) - len(sizes))
        ms_between = float((sizes * (means - whole.mean()) ** 2).sum()) / (len(sizes) - 1)
        size = (len(whole) - float((sizes**2).sum()) / len(whole)) / (len(sizes) - 1)
        between = max(0.0, (ms_between - ms_within) / size)
        return between / (between + ms_within) if between + ms_within else 0.0

    def residual(self, key: tuple[int, int]) -> float:
        return self.cells[key] - self.means[key[0]]

    def data(self) -> dict[str, Any]:
        return {
            "starts": self.starts,
            "mean": tidy(self.mean, 3),
            "share": tidy(self.share, 3),
            "quantiles": self.quantiles,
        }


def uncut(values: Sequence[int], cut: Sequence[bool], rng: np.random.Generator) -> list[int]:
    """Values of which some were cut short, those as they might have been.

    What was cut would have gone on for an unknown length: it is drawn from the values that are
    longer, by lot (which gives the Kaplan-Meier estimate of the distribution).
    """
    found = list(values)
    # From the longest down, so that those that a cut one is drawn from are known.
    for place in sorted(np.flatnonzero(cut), key=lambda i: -values[i]):
        longer = [other for other in found if other > values[place]]
        if longer:
            found[place] = int(rng.choice(longer))
    return found


def uncut_lengths(
    conversations: Sequence[Conversation], spec: WorkloadSpec, rng: np.random.Generator
) -> dict[str, int]:
    """Turns of each conversation, had the cap on context not cut it.

    The generator cuts at the same context: lengths that are cut already would be cut twice.
    """
    whole = Pool.load(replace(spec, max_context_tokens=None)).conversations
    turns = {c.id: len(c.turns) for c in whole}
    lengths = [len(c.turns) for c in conversations]
    cut = [len(c.turns) < turns[c.id] for c in conversations]
    return dict(zip((c.id for c in conversations), uncut(lengths, cut, rng), strict=True))


def within_correlation(a: Quantity, b: Quantity) -> float:
    keys = [key for key in a.cells if key in b.cells and a.counts[key[0]] > 1]
    pairs = np.array([(a.residual(key), b.residual(key)) for key in keys])
    if len(pairs) < 3 or not pairs.std(axis=0).all():
        return 0.0
    return float(np.corrcoef(pairs.T)[0, 1])


def factor_correlations(
    conversations: Sequence[Conversation],
    lengths: dict[str, int],
    tails: list[Quantity],
    rng: np.random.Generator,
) -> np.ndarray:
    """Correlations of the factors: turns, first input, then one for each quantity."""
    turns = normal_scores([lengths[c.id] for c in conversations], rng)
    firsts = normal_scores([c.turns[0].input_tokens for c in conversations], rng)
    matrix = np.eye(2 + len(tails))

    def put(i: int, j: int, value: float) -> None:
        limited = float(np.clip(value, -CORRELATION_LIMIT, CORRELATION_LIMIT))
        matrix[i, j] = matrix[j, i] = limited

    put(0, 1, float(np.corrcoef(turns, firsts)[0, 1]))
    for i, a in enumerate(tails):
        which = sorted(a.means)
        means = np.array([a.means[w] for w in which])
        for j, scores in enumerate((turns, firsts)):
            if a.share > 0.01:
                put(j, 2 + i, float(np.cov(means, scores[which])[0, 1]) / a.share**0.5)
        for j, b in enumerate(tails[:i]):
            both = sorted(set(a.means) & set(b.means))
            if a.share <= 0.01 or b.share <= 0.01:
                continue
            together = np.cov([a.means[w] for w in both], [b.means[w] for w in both])[0, 1]
            chance = np.mean([1.0 / max(a.counts[w], b.counts[w]) for w in both])
            chance *= within_correlation(a, b) * ((1 - a.share) * (1 - b.share)) ** 0.5
            put(2 + i, 2 + j, float(together - chance) / (a.share * b.share) ** 0.5)
    return matrix


def lower(matrix: np.ndarray) -> list[list[float]]:
    """Lower triangular factor of the nearest matrix that is one of correlations."""
    values, vectors = np.linalg.eigh(matrix)
    near = vectors @ np.diag(np.clip(values, 1e-6, None)) @ vectors.T
    scale = np.sqrt(np.diag(near))
    factor = np.linalg.cholesky(near / np.outer(scale, scale))
    return [[tidy(float(v), 3) for v in row[: i + 1]] for i, row in enumerate(factor)]


def resets(conversations: Sequence[Conversation], rng: np.random.Generator) -> dict[str, Any]:
    tails = [pair for c in conversations for pair in pairwise(c.turns)]
    ends = (*GAP_STARTS_S[1:], float("inf"))
    chances = []
    for start, end in zip(GAP_STARTS_S, ends, strict=True):
        here = [(b, t) for b, t in tails if start <= t.gap_s < end]
        rewritten = sum(is_reset(t, b) and not compacts(t, b) for b, t in here)
        chances.append([start, tidy(rewritten / len(here), 3)])
    # Contexts that grew until they were compacted, and those that something else ended.
    grown: list[int] = []
    ended: list[bool] = []
    for c in conversations:
        for before, turn in pairwise((*c.turns, None)):
            assert before is not None
            if turn is None or compacts(turn, before):
                grown.append(before.context_tokens)
                ended.append(turn is None)
    return {
        "after_gap_s": chances,
        "compact_at": quantiles(uncut(grown, ended, rng)),
        "compacted_share": quantiles(
            [t.input_tokens / b.context_tokens for b, t in tails if compacts(t, b)]
        ),
    }


def compacts(turn: Turn, before: Turn) -> bool:
    return is_reset(turn, before) and turn.input_tokens < COMPACTED_BELOW * before.context_tokens


def prefixes(conversations: Sequence[Conversation]) -> list[list[int]]:
    names = Counter(
        (c.shared_prefix_name, c.shared_prefix_tokens)
        for c in conversations
        if c.shared_prefix_tokens
    )
    return [[tokens, count] for (_, tokens), count in names.most_common()]


def entry(plan: Plan) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    conversations = Pool.load(plan.spec).conversations
    # Sessions that are compacted mostly stay below the cap: their lengths stand as they are.
    lengths = {c.id: len(c.turns) for c in conversations}
    if not plan.resets:
        lengths = uncut_lengths(conversations, plan.spec, rng)

    def appended(before: Turn | None, turn: Turn) -> float | None:
        return None if before is None or is_reset(turn, before) else turn.new_input_tokens

    def output(_: Turn | None, turn: Turn) -> float:
        return turn.output_tokens

    def gap(before: Turn | None, turn: Turn) -> float | None:
        return turn.gap_s if before is not None and plan.gaps else None

    kinds = {"appended": appended, "output": output, "gap_s": gap}
    found = {
        k: Quantity(conversations, v, plan.starts, rng)
        for k, v in kinds.items()
        if k != "gap_s" or plan.gaps
    }
    tails = list(found.values())
    within = np.eye(3)
    factors = np.eye(5)
    size = len(tails)
    for i in range(size):
        for j in range(i):
            within[i, j] = within[j, i] = within_correlation(tails[i], tails[j])
    factors[: 2 + size, : 2 + size] = factor_correlations(conversations, lengths, tails, rng)
    made: dict[str, Any] = {
        "about": plan.about,
        "source": f"{plan.source}, {len(conversations):,} conversations",
        "turns": quantiles([lengths[c.id] for c in conversations]),
        "first_input": quantiles([c.turns[0].input_tokens for c in conversations]),
        **{kind: quantity.data() for kind, quantity in found.items()},
        "factors": lower(factors),
        "within": lower(within),
        **plan.more,
    }
    if plan.resets:
        made["resets"] = resets(conversations, rng)
    if shared := prefixes(conversations):
        made["prefixes"] = shared
    return made


def dumps(data: dict[str, Any]) -> str:
    """JSON with one list of numbers a line, so that changes can be read."""

    def write(value: Any, indent: str) -> str:
        if isinstance(value, dict):
            inner = ",\n".join(
                f"{indent} {json.dumps(k)}: {write(v, indent + ' ')}" for k, v in value.items()
            )
            return f"{{\n{inner}\n{indent}}}"
        if (
            isinstance(value, list)
            and len(value) > 3
            and isinstance(value[0], list)
            and len(value[0]) > 5
        ):
            inner = ",\n".join(f"{indent} {json.dumps(v)}" for v in value)
            return f"[\n{inner}\n{indent}]"
        return json.dumps(value, ensure_ascii=False)

    return write(data, "") + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("swebench", "coding", "customer"):
        parser.add_argument(f"--{name}", required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, default=TARGET / "quantiles.json")
    arguments = parser.parse_args(argv)
    data = {
        "about": "Statistics of real traces from which workloads are drawn; token counts only. "
        "Made by benchmarks/workloads/make_quantiles.py.",
        "quantiles": GRID,
        "workloads": {plan.name: entry(plan) for plan in plans(arguments)},
    }
    text = dumps(data)
    arguments.out.write_text(text, "utf-8")
    print(f"{arguments.out}: {len(text):,} bytes")


if __name__ == "__main__":
    main()
