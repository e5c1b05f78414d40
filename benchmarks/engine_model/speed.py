"""How fast the engine model runs on a virtual clock: CPU time per turn of a conversation.

    python benchmarks/engine_model/speed.py [--conversations N] [--turns K]

One engine; conversations arrive at random, with gaps of 5 s between turns, at a moderate and at a
saturating rate. Decode steps are run together until the batch changes, as the simulator does.
"""

from __future__ import annotations

import argparse
import heapq
import random
import time
from dataclasses import dataclass

from conserve_serving.engines.content import StreamPrompt
from conserve_serving.engines.model import EngineModel
from conserve_serving.engines.model_types import ModelConfig, ModelRequest, RequestFinished
from conserve_serving.engines.profile import load_profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One run: ``first_tokens`` of input, then small appends, at ``rate`` conversations/s."""

    profile: str
    rate: float
    first_tokens: int
    conversations: int
    turns: int


def run(load: Load) -> tuple[EngineModel, int, float, float]:
    """Returns the model, turns finished, CPU seconds, model seconds."""
    dice = random.Random(1)  # noqa: S311 - a workload, not a secret
    model = EngineModel(load_profile(load.profile), ModelConfig(token_events=False))
    arrivals: list[tuple[float, int, int, int]] = []  # when, conversation, turn, context so far
    at_s = 0.0
    for conversation in range(load.conversations):
        at_s += dice.expovariate(load.rate)
        arrivals.append((at_s, conversation, 0, 0))
    live: dict[str, tuple[int, int, int]] = {}
    now_s, turns = 0.0, 0
    started_s = time.process_time()
    while True:
        while arrivals and arrivals[0][0] <= now_s:
            at_s, conversation, turn, context = heapq.heappop(arrivals)
            new = dice.choice((67, 67, 67, 400, 2000)) if turn else load.first_tokens
            output = dice.choice((40, 60, 100, 150))
            prompt, rid = context + new, str(conversation)
            live[rid] = (conversation, turn, prompt + output)
            model.submit(
                ModelRequest(
                    rid=rid,
                    prompt=StreamPrompt([(conversation, 0, prompt)], 64),
                    context=StreamPrompt([(conversation, 0, prompt + output)], 64),
                    output_tokens=output,
                    session_id=rid,
                    priority=int(turn > 0),
                ),
                now_s=at_s,
            )
        next_s = arrivals[0][0] if arrivals else 1e12
        step = model.begin_step(now_s=now_s, until_s=next_s)
        if step is None:
            wake_s = model.wake_at_s()
            if wake_s is None and not arrivals:
                break
            now_s = next_s if wake_s is None else min(next_s, wake_s)
            model.poll(now_s=now_s)
            continue
        now_s = step.end_s
        for event in model.end_step(now_s=now_s):
            if not isinstance(event, RequestFinished):
                continue
            turns += 1
            conversation, turn, context = live.pop(event.rid)
            if turn + 1 < load.turns:
                again_s = now_s + dice.expovariate(1 / 5.0)
                heapq.heappush(arrivals, (again_s, conversation, turn + 1, context))
            else:
                model.close_session(event.rid, now_s=now_s)
    return model, turns, time.process_time() - started_s, now_s


def main() -> None:
    """Print one line per load."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--conversations", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=10)
    options = parser.parse_args()
    for profile, rate, first in (
        ("a40-qwen3-0.6b", 0.1, 8_000),
        ("a40-qwen3-0.6b", 0.3, 8_000),
        ("a40-qwen3-0.6b", 0.6, 8_000),
        ("h100-qwen3-8b", 0.3, 8_000),
    ):
        load = Load(
            profile=profile,
            rate=rate,
            first_tokens=first,
            conversations=options.conversations,
            turns=options.turns,
        )
        model, turns, cpu_s, model_s = run(load)
        idle = model.stats().energy.idle_j / model.profile.power.idle_w / model_s
        steps = model.stats().counters
        print(
            f"{profile} at {rate}/s: {turns} turns, busy {1 - idle:.0%}, "
            f"{steps.decode_steps + steps.mixed_steps + steps.prefill_steps} steps, "
            f"{cpu_s / turns * 1e6:.0f} us CPU per turn"
        )


if __name__ == "__main__":
    main()
