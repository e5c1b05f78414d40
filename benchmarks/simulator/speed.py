"""How fast the simulator is, and how much memory it needs: turns per second of one core.

Generated workloads on the paper's testbed (1 prefill and 3 decode A40s, Qwen3-0.6B), Poisson
arrivals at the given rate, fed lazily, every turn given to a callback and forgotten:

- ``swebench``: SWE-bench-like conversations of at most 5 turns, as in the paper;
- ``long``: the same, uncapped: contexts to 32,000 tokens, eviction, parking, held turns.

    python benchmarks/simulator/speed.py [--turns 1000000] [--workload swebench] [--rate 1.0]

Reports CPU time of the run alone (the pool is drawn before), and peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import conserve_serving.core.scheduler as measured
from conserve_serving.core import Scheduler, SchedulerSettings, make_policy
from conserve_serving.lab.clusters import cluster
from conserve_serving.lab.pool import Pool
from conserve_serving.lab.workloads import WorkloadSpec
from conserve_serving.simulator import TurnResult, VirtualCluster

MAX_CONTEXT_TOKENS = 32_000
CAPS = {"swebench": 5, "long": None}


def main() -> None:
    """Run one workload and print the figures as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=100_000)
    parser.add_argument("--workload", choices=sorted(CAPS), default="swebench")
    parser.add_argument("--rate", type=float, default=1.0, help="conversations per second")
    parser.add_argument("--policy", default="conserve")
    args = parser.parse_args()

    source = WorkloadSpec(
        source="generated:swebench",
        max_turns=CAPS[args.workload],
        max_context_tokens=MAX_CONTEXT_TOKENS,
        pool_size=500,
    )
    pool = Pool.load(source)
    mean_turns = sum(len(c.turns) for c in pool.conversations) / len(pool.conversations)
    spec = WorkloadSpec(
        source=source.source,
        max_turns=source.max_turns,
        max_context_tokens=source.max_context_tokens,
        pool_size=source.pool_size,
        conversations=round(args.turns / mean_turns),
        rate_per_s=args.rate,
        seed=1,
    )
    done = 0

    def on_turn(_: TurnResult) -> None:
        nonlocal done
        done += 1

    settings = SchedulerSettings()
    virtual = VirtualCluster(
        Scheduler(settings, make_policy(args.policy, settings)),
        cluster("paper").engines(),
        on_turn=on_turn,
        retry_refused=True,
    )
    virtual.feed(pool.stream(spec))
    start_s = time.process_time()
    summary = virtual.run()
    cpu_s = time.process_time() - start_s
    busy_s = sum(use.seconds.busy_s for use in summary.engines.values())
    print(
        json.dumps(
            {
                "workload": args.workload,
                "policy": args.policy,
                "rate_per_s": args.rate,
                "compiled": not str(measured.__file__).endswith(".py"),
                "conversations": summary.conversations,
                "turns": done,
                "virtual_s": round(summary.virtual_s),
                "busy": round(busy_s / len(summary.engines) / summary.virtual_s, 2),
                "cpu_s": round(cpu_s, 2),
                "us_per_turn": round(cpu_s / done * 1e6, 1),
                "turns_per_s": round(done / cpu_s),
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
