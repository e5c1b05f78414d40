"""Joules over real SGLang's counters: modelled, for want of a GPU, and all accounted for."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytestmark = pytest.mark.sglang

SOURCE = "modelled: a40-qwen3-0.6b (assumed)"


def test_what_turns_are_charged_is_what_engines_used(
    gateway: Any, bed: Any, random_ids: Any
) -> None:
    engines = [("p0", "prefill", bed.prefiller)]
    engines += [(f"d{n}", "decode", engine) for n, engine in enumerate(bed.decoders)]
    for name, tier, engine in engines:
        new = {"id": name, "url": engine.url, "tier": tier, "profile": "a40-qwen3-0.6b"}
        assert gateway.ask("POST", "/conserve/v1/engines", new | {"replace": True}).status == 201
    gateway.until_ready(*(name for name, _, _ in engines))

    def converse(number: int) -> None:
        prompt: list[int] = []
        for new, tokens in ((400 + 300 * number, 40), (50, 30), (200, 60)):
            prompt += random_ids(new)
            reply = gateway.complete(f"e{number}", prompt, tokens)
            assert reply.status == 200, reply.body
            prompt += reply.choice["token_ids"]

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(converse, range(3)))

    def settled() -> list[dict[str, Any]] | None:
        found = [gateway.conversation(f"e{number}")["energy"] for number in range(3)]
        return found if all(energy["settled"] for energy in found) else None

    charged = gateway.until(settled)
    parts = [engine["energy"] for engine in gateway.cluster()["engines"]]
    sums = {name: math.fsum(p[name] for p in parts) for name in parts[0] if name.endswith("_j")}
    active_j = sums["prefill_j"] + sums["decode_j"]
    assert math.fsum(energy["total_j"] for energy in charged) == pytest.approx(active_j)
    assert active_j + sums["idle_j"] + sums["unattributed_j"] + sums["pending_j"] == pytest.approx(
        sums["total_j"]
    )
    assert sums["unattributed_j"] < 0.25 * active_j  # 0.05 as measured
    for energy in charged:
        assert energy["source"] == SOURCE and energy["unknown_engines"] == []
        assert energy["prefill_j"] > 0 and energy["decode_j"] > 0
