"""What a gateway adds to a request: ConServe and PyPI smg before the same dummy engines.

Everything runs in one go on two cores: the measured process alone on one, load and dummy engines
on the other. Rounds are interleaved (direct, conserve, smg, then the next round in another
order), so that a noisy neighbour hits all alike; figures are medians over rounds, the ratios to
smg are the ones to trust.

    python benchmarks/gateway_overhead/run.py --setup            install smg, once, then measure
    python benchmarks/gateway_overhead/run.py --short            a minute, for CI
    python benchmarks/gateway_overhead/run.py --out DIR          where results.{json,md} go
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import load
import report
import targets
import uvloop
from load import Spec, Window
from targets import Target

Samples = dict[str, list[dict[str, float]]]
SLOPE_EVENTS = 65
SLOPE_CLIENTS = 16


def percentile_ms(values_s: list[float], share: float) -> float:
    """The value below which ``share`` of them lie, in milliseconds.

    Raises:
        RuntimeError: there are none.
    """
    if not values_s:
        raise RuntimeError("nothing finished within the window: raise --seconds")
    ordered = sorted(values_s)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1e3


class Bench:
    """Runs scenarios over all targets, round by round."""

    def __init__(self, *, chosen: list[Target], rounds: int, seconds: float) -> None:
        self._chosen = chosen
        self._workers = chosen[0]
        self._rounds = rounds
        self._seconds = seconds
        self._random = random.Random(7)  # noqa: S311 -- the order of rounds

    def _window(self, target: Target, specs: list[Spec], seconds: float) -> Window:
        ports = [target.ports[i % len(target.ports)] for i in range(len(specs))]
        return uvloop.run(
            load.run(
                list(zip(ports, specs, strict=True)),
                id_header=target.id_header,
                warm_s=0.5,
                seconds=seconds,
                read_cpu_s=target.cpu_s,
            )
        )

    def _order(self) -> list[Target]:
        order = list(self._chosen)
        self._random.shuffle(order)
        return order

    def grid(self, histories: list[int], clients: list[int]) -> list[dict[str, Any]]:
        """Closed loop, 5 events at once: rate, latency, CPU per request."""
        rows = []
        for history in histories:
            for count in clients:
                samples: Samples = {t.name: [] for t in self._chosen}
                for _ in range(self._rounds):
                    for target in self._order():
                        window = self._window(target, [Spec(history)] * count, self._seconds)
                        done = window.tally.latencies_s
                        samples[target.name].append(
                            {
                                "requests_per_s": len(done) / window.seconds,
                                "p50_ms": percentile_ms(done, 0.5),
                                "p99_ms": percentile_ms(done, 0.99),
                                "cpu_us_per_request": window.cpu_s / len(done) * 1e6,
                                "cpu_share": window.cpu_s / window.seconds,
                            }
                        )
                rows.append({"history_bytes": history, "clients": count, **_medians(samples)})
                print(report.grid_line(rows[-1]), flush=True)
        return rows

    def event_cost(self) -> dict[str, Any]:
        """CPU per event: from how a request's CPU grows with events that come one by one."""
        samples: Samples = {t.name: [] for t in self._chosen[1:]}
        for _ in range(self._rounds):
            for target in self._order():
                if target.pid is None:
                    continue
                cost = {}
                for events in (5, SLOPE_EVENTS):
                    specs = [Spec(2_000, events=events, gap_us=2_000)] * SLOPE_CLIENTS
                    window = self._window(target, specs, 2 * self._seconds)
                    done = window.tally.latencies_s
                    cost[events] = window.cpu_s / len(done) * 1e6
                per_event = (cost[SLOPE_EVENTS] - cost[5]) / (SLOPE_EVENTS - 5)
                samples[target.name].append({"cpu_us_per_event": per_event})
        return _medians(samples)

    def beside_large_bodies(self) -> dict[str, Any]:
        """How late events of 16 paced streams come while one client posts 2 MB histories."""
        samples: Samples = {t.name: [] for t in self._chosen}
        streams = [Spec(2_000, events=100, gap_us=5_000)] * 16
        for _ in range(self._rounds):
            for target in self._order():
                for name, specs in (("alone", streams), ("beside", [*streams, Spec(2_000_000)])):
                    window = self._window(target, specs, 2 * self._seconds)
                    delays = window.tally.event_delays_s
                    samples[target.name].append(
                        {
                            f"{name}_p50_ms": percentile_ms(delays, 0.5),
                            f"{name}_p99_ms": percentile_ms(delays, 0.99),
                        }
                    )
        return _medians(samples)

    def memory(self, streams: int) -> dict[str, Any]:
        """Resident memory per open stream."""
        result = {}
        for target in self._chosen[1:]:
            rss = uvloop.run(_open_streams(target, streams))
            result[target.name] = {"kb_per_stream": rss / streams / 1e3, "streams": streams}
        return result

    def aborts(self, repeats: int) -> dict[str, Any]:
        """From the client's leaving to the engine's hearing of it."""
        result: dict[str, Any] = {}
        for target in self._chosen:
            result[target.name] = {}
            for phase in ("prefill", "stream"):
                heard = uvloop.run(_leave(self._workers, target, phase == "prefill", repeats))
                result[target.name] |= {
                    f"{phase}_p50_ms": percentile_ms(heard, 0.5),
                    f"{phase}_max_ms": max(heard) * 1e3,
                    f"{phase}_unheard": repeats - len(heard),
                }
        return result


def _medians(samples: Samples) -> dict[str, Any]:
    result = {}
    for name, rounds in samples.items():
        keys = {key for values in rounds for key in values}
        result[name] = {
            key: statistics.median(values[key] for values in rounds if key in values)
            for key in sorted(keys)
        }
    return result


async def _open_streams(target: Target, streams: int) -> int:
    tally = load.Tally(0.0, 0.0)
    spec = Spec(2_000, events=2, gap_us=60_000_000)
    warm = [await load.connect(target.ports[0], spec, target.id_header, tally) for _ in range(8)]
    for connection in warm:
        await connection.started.wait()
    before = target.rss_bytes()
    connections = [
        await load.connect(target.ports[0], spec, target.id_header, tally) for _ in range(streams)
    ]
    for connection in connections:
        await connection.started.wait()
    after = target.rss_bytes()
    for connection in warm + connections:
        connection.close()
    await asyncio.sleep(0.5)
    if tally.errors:
        raise RuntimeError(f"responses went wrong: {tally.errors.most_common(3)}")
    return after - before


def _log(workers: Target) -> dict[str, list[int]]:
    connection = http.client.HTTPConnection("127.0.0.1", workers.ports[0], timeout=5)
    connection.request("GET", "/bench/log")
    log: dict[str, list[int]] = json.loads(connection.getresponse().read())
    connection.close()
    return log


async def _leave(workers: Target, target: Target, prefill: bool, repeats: int) -> list[float]:
    """Seconds each abort took; those the engine had not heard of after 3 s are left out."""
    tally = load.Tally(0.0, 0.0)
    spec = Spec(2_000, events=2, gap_us=60_000_000, wait=prefill)
    times = []
    for index in range(repeats):
        before = await asyncio.to_thread(_log, workers)
        port = target.ports[index % len(target.ports)]
        connection = await load.connect(port, spec, target.id_header, tally)
        deadline_s = time.monotonic() + 5
        log = before
        while len(log["received_ns"]) == len(before["received_ns"]):
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"{target.name}: a request never reached an engine")
            await asyncio.sleep(0.02)
            log = await asyncio.to_thread(_log, workers)
        if not prefill:
            await connection.started.wait()
        left_ns = time.monotonic_ns()
        connection.close()
        heard: list[int] = []
        while not heard and time.monotonic_ns() < left_ns + 3_000_000_000:
            await asyncio.sleep(0.02)
            log = await asyncio.to_thread(_log, workers)
            heard = [at for at in log["left_ns"][len(before["left_ns"]) :] if at >= left_ns]
        times.extend((at - left_ns) / 1e9 for at in heard[:1])
    return times


def conditions(short: bool) -> dict[str, Any]:
    """Where and how this was measured."""
    cpu = "unknown"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), cpu)
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parent,
    )  # fmt: skip
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_average_before": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        "uvloop": uvloop.__version__,
        "smg": targets.SMG_VERSION,
        "commit": git.stdout.strip() or "unknown",
        "short": short,
        "turns_per_conversation": load.TURNS,
    }


def main() -> int:
    """Measure, print, write. Exit code 1 when something asked for could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--setup", action="store_true", help="install smg first, if it is not there"
    )
    parser.add_argument("--short", action="store_true", help="one round of a small grid")
    parser.add_argument("--no-smg", action="store_true", help="leave smg out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one measurement")
    parser.add_argument("--clients", default="1,8,64")
    parser.add_argument("--histories", default="2000,200000,2000000", help="bytes")
    parser.add_argument("--only", choices=("grid", "events", "beside", "memory", "aborts"))
    parser.add_argument("--out", type=Path, default=Path("out/gateway_overhead"))
    arguments = parser.parse_args()
    if arguments.setup:
        targets.set_up_smg()
    with_smg = not arguments.no_smg and (targets.SMG_HOME / "bin" / "smg").exists()
    if not with_smg and not arguments.no_smg:
        print(
            f"smg {targets.SMG_VERSION} is not installed: measuring without it (--setup installs)"
        )
    clients = [int(n) for n in arguments.clients.split(",")]
    histories = [int(n) for n in arguments.histories.split(",")]
    rounds, seconds = arguments.rounds, arguments.seconds
    if arguments.short:
        rounds, seconds, clients, histories = 1, 0.5, [1, 8], [2_000, 200_000]
    results: dict[str, Any] = {"conditions": conditions(arguments.short)}

    def wanted(part: str) -> bool:
        return arguments.only in (None, part)

    measured, others = targets.cores()
    os.sched_setaffinity(0, {others})
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = stack.enter_context(targets.workers(others, logs))
        chosen = [workers, stack.enter_context(targets.conserve(workers, measured, logs))]
        if with_smg:
            chosen.append(stack.enter_context(targets.smg(workers, measured, logs)))
        bench = Bench(chosen=chosen, rounds=rounds, seconds=seconds)
        if wanted("grid"):
            results["grid"] = bench.grid(histories, clients)
        if wanted("events"):
            results["event_cost"] = bench.event_cost()
        if wanted("beside"):
            results["beside_large_bodies"] = bench.beside_large_bodies()
        if wanted("aborts"):
            results["aborts"] = bench.aborts(3 if arguments.short else 10)
        if wanted("memory"):
            results["memory"] = bench.memory(100 if arguments.short else 400)
    results["conditions"]["load_average_after"] = [round(x, 2) for x in os.getloadavg()]
    text = report.markdown(results)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(
        json.dumps(results, indent=1, allow_nan=False) + "\n"
    )
    (arguments.out / "results.md").write_text(text)
    print(text)
    print(f"written to {arguments.out}/results.md and results.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
