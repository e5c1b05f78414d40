"""Cost of one scheduling decision, and memory per open conversation, as both sizes grow.

Opens N conversations over E engines, then measures a steady mix of events one by one: a tail turn
arrives and finishes on a random conversation; one time in ten a conversation ends and a new one
is opened (arrival, prefill, hand-off, finish). Every size runs in this one process, one after the
other; figures to compare are the ratios.

    python benchmarks/scheduler_core/run.py [--engines 1000] [--conversations 1000,…,1000000]
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import sys
import time
from pathlib import Path

from conserve_serving.core import Scheduler, SchedulerSettings, make_policy
from conserve_serving.core.decisions import Place
from conserve_serving.core.events import (
    ConversationEnded,
    EngineJoined,
    Event,
    HandoffFinished,
    PrefillFinished,
    TurnArrived,
    TurnFinished,
)
from conserve_serving.core.types import ConversationId, EngineId, EngineSpeeds, Link, Tier, TurnId

PROMPT_TOKENS, GROWTH_TOKENS, OUTPUT_TOKENS = 8_000, 100, 60
# A conversation may grow over the run; capacity leaves room so that sizes are compared alike.
ROOM_TOKENS = 16_000


class Bench:
    """A scheduler under a synthetic load; every call of `handle` is timed on its own."""

    def __init__(self, engines: int, conversations: int, seed: int) -> None:
        settings = SchedulerSettings(idle_timeout_s=1e9)
        self.scheduler = Scheduler(settings, make_policy("conserve", settings))
        self.random = random.Random(seed)  # noqa: S311 -- a load, not a secret
        self.samples_ns: dict[str, list[int]] = {}
        self.timing = False
        self.now_s = 0.0
        self.serial = 0
        self.open: list[tuple[ConversationId, int]] = []
        per_engine = max(64, 2 * conversations // max(1, engines * 9 // 10)) * ROOM_TOKENS
        for index in range(engines):
            prefill = index % 10 == 0
            self.send(
                EngineJoined(
                    engine=EngineId(f"e{index:04d}"),
                    epoch=1,
                    tier=Tier.PREFILL if prefill else Tier.DECODE,
                    kv_capacity_tokens=per_engine,
                    host_capacity_tokens=per_engine,
                    page_tokens=64,
                    max_context_tokens=1_000_000,
                    speeds=EngineSpeeds(
                        prefill_tokens_per_s=20_000.0 + index,
                        decode_step_s=0.01 + index * 1e-6,
                        decode_step_s_per_kv_token=1e-7,
                    ),
                    link=Link(setup_s=0.005, bytes_per_s=1e10, kv_bytes_per_token=100_000),
                )
            )
        for _ in range(conversations):
            self.open.append(self.new_conversation())

    def send(self, event: Event) -> Place | None:
        self.now_s += 1e-4
        if self.timing:
            start = time.perf_counter_ns()
            decisions = self.scheduler.handle(event, now_s=self.now_s)
            elapsed = time.perf_counter_ns() - start
            self.samples_ns.setdefault(type(event).__name__, []).append(elapsed)
        else:
            decisions = self.scheduler.handle(event, now_s=self.now_s)
        for decision in decisions:
            if isinstance(decision, Place):
                return decision
        return None

    def turn(self, conversation: ConversationId, prompt_tokens: int) -> None:
        self.serial += 1
        turn = TurnId(f"t{self.serial}")
        place = self.send(
            TurnArrived(turn=turn, conversation=conversation, prompt_tokens=prompt_tokens)
        )
        if place is None:
            raise SystemExit(f"turn {turn} was not placed: the benchmark's capacity is too small")
        if place.prefiller is not None:
            self.send(PrefillFinished(turn=turn, plan=place.plan, prompt_tokens=prompt_tokens))
            self.send(
                HandoffFinished(
                    turn=turn, plan=place.plan, moved_tokens=prompt_tokens, duration_s=0.02
                )
            )
        self.send(
            TurnFinished(
                turn=turn,
                plan=place.plan,
                prompt_tokens=prompt_tokens,
                output_tokens=OUTPUT_TOKENS,
                cached_tokens=prompt_tokens - 1,
            )
        )

    def new_conversation(self) -> tuple[ConversationId, int]:
        self.serial += 1
        conversation = ConversationId(f"conversation-{self.serial:032d}")  # as long as a UUID
        self.turn(conversation, PROMPT_TOKENS)
        return conversation, PROMPT_TOKENS

    def steady(self, turns: int) -> None:
        for index in range(turns):
            at = self.random.randrange(len(self.open))
            conversation, context = self.open[at]
            if index % 10 == 9 or context > ROOM_TOKENS - 2 * GROWTH_TOKENS:
                self.send(ConversationEnded(conversation=conversation))
                self.open[at] = self.new_conversation()
            else:
                context += GROWTH_TOKENS
                self.turn(conversation, context)
                self.open[at] = (conversation, context)


def resident_bytes() -> int:
    """This process's resident memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def measure(engines: int, conversations: int, turns: int) -> dict[str, object]:
    gc.collect()
    before = resident_bytes()
    started = time.perf_counter()
    bench = Bench(engines, conversations, seed=1)
    opened_s = time.perf_counter() - started
    gc.collect()
    used = resident_bytes() - before
    # What a long-running server does: the open conversations are not garbage.
    gc.freeze()
    bench.steady(turns // 10)
    bench.timing = True
    bench.steady(turns)
    gc.unfreeze()
    merged = sorted(ns for samples in bench.samples_ns.values() for ns in samples)
    bench.scheduler.check_invariants(recount=True)
    return {
        "engines": engines,
        "conversations": conversations,
        "events": len(merged),
        "mean_us": sum(merged) / len(merged) / 1e3,
        "p50_us": merged[len(merged) // 2] / 1e3,
        "p99_us": merged[len(merged) * 99 // 100] / 1e3,
        "p999_us": merged[len(merged) * 999 // 1000] / 1e3,
        "by_event_p50_us": {
            name: sorted(samples)[len(samples) // 2] / 1e3
            for name, samples in sorted(bench.samples_ns.items())
        },
        "bytes_per_conversation": used / conversations,
        "opening_s": opened_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--engines", type=int, default=1000)
    parser.add_argument("--conversations", default="1000,10000,100000,1000000")
    parser.add_argument("--turns", type=int, default=50_000)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    sizes = [int(size) for size in args.conversations.split(",")]
    rows = []
    print(f"python {platform.python_version()}, {args.engines} engines, {args.turns} turns a size")
    print(
        f"{'conversations':>13} {'mean µs':>8} {'p50 µs':>8} {'p99 µs':>8} {'p99.9 µs':>9} "
        f"{'bytes/conversation':>18}"
    )
    for size in sizes:
        row = measure(args.engines, size, args.turns)
        rows.append(row)
        print(
            f"{size:>13,} {row['mean_us']:>8.1f} {row['p50_us']:>8.1f} {row['p99_us']:>8.1f} "
            f"{row['p999_us']:>9.1f} {row['bytes_per_conversation']:>18,.0f}",
            flush=True,
        )
    first, last = rows[0], rows[-1]
    print(
        f"p99 at {sizes[-1]:,} over {sizes[0]:,}: {last['p99_us'] / first['p99_us']:.2f}; "
        f"p50: {last['p50_us'] / first['p50_us']:.2f}"
    )
    if args.json:
        args.json.write_text(json.dumps({"python": sys.version, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
