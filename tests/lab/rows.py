"""Rows of cells that never ran: plausible figures with noise by seed, for what reads rows."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from typing import Any

#: Conversations a second that a policy carries, as a share of the cluster's.
STRENGTHS = {
    "conserve": 0.98,
    "conserve_plus": 1.08,
    "collocated": 1.0,
    "collocated_speed": 1.04,
    "per_turn_10_wrong": 0.86,
    "full_disaggregation": 0.55,
    "oracle": 1.15,
    "round_robin": 0.5,
}
_PARTS = ("held", "prefill_queue", "prefill", "handoff", "decoder_wait", "decode", "gaps")


def group(count: int, tier: str, profile: str) -> dict[str, Any]:
    return {"count": count, "tier": tier, "profile": profile, "cap_w": None, "cap_exponent": 1.0}


def cluster(
    name: str = "paper", *, prefill: int = 1, decode: int = 3, profile: str = "a40-qwen3-0.6b"
) -> dict[str, Any]:
    groups = [group(prefill, "prefill", profile), group(decode, "decode", profile)]
    return {
        "name": name,
        "title": f"{prefill} + {decode} A40",
        "groups": [g for g in groups if g["count"]],
        "link": None,
        "usd_per_hour": [],
    }


def workload(rate_per_s: float, seed: int, **changes: Any) -> dict[str, Any]:
    spec = {
        "source": "generated:swebench",
        "max_turns": 5,
        "max_context_tokens": None,
        "max_gap_s": None,
        "scale": None,
        "conversations": 1000,
        "arrivals": "poisson",
        "shared_prefix": "cold",
        "rate_per_s": rate_per_s,
        "seed": seed,
    }
    return spec | changes


def row(
    *,
    policy: str = "conserve",
    label: str | None = None,
    rate_per_s: float = 1.0,
    seed: int = 0,
    capacity_per_s: float = 1.7,
    strength: float | None = None,
    mixed_slowdown: float = 1.0,
    link: str | None = None,
    on: dict[str, Any] | None = None,
    predictor: str = "none",
    **workload_changes: Any,
) -> dict[str, Any]:
    """One row as ``lab.cell.run_cell`` makes them; latencies explode towards the capacity."""
    on = on or cluster()
    label = label or policy
    cell = {
        "cluster": on,
        "contender": {
            "label": label,
            "policy": policy,
            "tier_mode": "dedicated",
            "predictor": predictor,
            "settings": {},
        },
        "workload": workload(rate_per_s, seed, **workload_changes),
        "mixed_slowdown": mixed_slowdown,
        "link": link,
        "reference": None,
        "warmup_share": 0.1,
    }
    # Equal seeds are good or bad days for everybody: that is what pairing is for.
    day = random.Random(f"{seed} {rate_per_s}").gauss(0, 0.05)
    own = random.Random(f"{seed} {rate_per_s} {label} {mixed_slowdown} {link}")
    load = rate_per_s / (capacity_per_s * (strength or STRENGTHS.get(policy, 0.9)))
    load *= 1 + (mixed_slowdown - 1) * (0.05 if policy.startswith("conserve") else 0.3)
    slow = 1 + 0.6 * load / max(0.04, 1 - min(load, 0.96)) + 60 * max(0.0, load - 0.96)
    slow *= 1 + day + own.gauss(0, 0.015)

    def spread(value: float) -> dict[str, float | int]:
        return {
            "p50": value * 0.5,
            "p90": value * 0.85,
            "p95": value,
            "p99": value * 1.4,
            "mean": value * 0.55,
            "n": 900,
        }

    idle = {"ttfet": 7.0, "first_turn_ttft": 0.9, "last_turn_tbt": 0.013, "e2e": 11.0}
    stress = {"ttfet": slow, "first_turn_ttft": slow**0.8 * 1.1, "e2e": slow**0.9}
    stress["last_turn_tbt"] = 1 + load * (1.5 if policy == "full_disaggregation" else 4)
    latency = {f"{m}_s": spread(idle[m] * x) for m, x in stress.items()}
    latency |= {f"{m}_s_normalized": spread(x) for m, x in stress.items()}
    latency["tail_turn_ttft_s"] = spread(0.2 * slow)
    met = {m: max(0.0, min(1.0, 1.12 - x / 40)) for m, x in stress.items()}
    efficiency = 62 * (1 - 0.35 / (0.4 + load)) * (1 + own.gauss(0, 0.004))
    total = 1e6
    where = dict.fromkeys(_PARTS, 0.2)
    where |= {
        "prefill_queue": 0.4 * slow,
        "prefill": 0.9,
        "decode": 4.0,
        "decoder_wait": 0.1 * slow,
    }
    key = hashlib.sha256(repr(sorted(cell.items(), key=str)).encode()).hexdigest()[:16]
    return {
        "key": key,
        "cell": cell,
        "conversations": 1000,
        "turns": 5000,
        "virtual_s": 1000 / rate_per_s,
        "wall_s": 3.5,
        "latency": latency,
        "slo": {"factor": 5.0, **met, "all": min(met.values())},
        "arrival_rate_per_s": rate_per_s,
        "completion_rate_per_s": min(rate_per_s, capacity_per_s),
        "saturated": load > 1.0,
        "energy": {
            "total_j": total,
            "idle_j": 0.2 * total,
            "prefill_j": 0.3 * total,
            "decode_j": 0.4 * total,
            "mixed_j": 0.1 * total,
        },
        "tokens": {"prompt": 80_000_000, "new": 16_000_000, "recomputed": 160_000 * seed},
        "transfers_per_conversation": {"mean": 1.0 + 0.1 * seed, "max": 3},
        "evicted_tokens": 4_000_000,
        "retractions": 2 * seed,
        "engines": {
            "p0": {"tier": "prefill", "busy": 0.3},
            "d0": {"tier": "decode", "busy": min(1.0, 0.7 * load)},
        },
        "tokens_per_j": efficiency,
        "tokens_per_j_low": efficiency * 1.25,
        "tokens_per_j_high": efficiency * 0.8,
        "where": {
            "all": {**where, "ttfet_s": sum(where.values()), "conversations": 900},
            "p95": {part: 3 * seconds for part, seconds in where.items()},
        },
    }


def rows(
    policies: Iterable[str] = ("conserve", "collocated", "per_turn_10_wrong"),
    rates: Sequence[float] = (0.5, 1.0, 1.5, 1.634, 2.0),
    seeds: int = 4,
    **more: Any,
) -> list[dict[str, Any]]:
    """Every policy at every rate under every seed."""
    return [
        row(policy=policy, rate_per_s=rate, seed=seed, **more)
        for policy in policies
        for rate in rates
        for seed in range(seeds)
    ]


def as_recorded(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, as if their arrivals had been a trace's own; their figures stay as they are."""
    found = list(rows)
    for one in found:
        one["cell"]["workload"] |= {
            "source": "/traces/shop.jsonl",
            "arrivals": "recorded",
            "rate_per_s": None,
        }
    return found
