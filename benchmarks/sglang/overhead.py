"""What the gateway adds to a turn on real SGLang: the same turns asked of an engine directly.

    make test-sglang                              # once: the engines' environment
    python benchmarks/sglang/overhead.py [--turns N] [--conversations N] [--json OUT]

Starts the test bed (one prefiller, two decoders, real SGLang on the CPU with a tiny model) and a
gateway, then asks tail turns alternately of a decoder and through the gateway, and first turns of a
decoder alone and with a hand-off. Ratios are within one run; the engine is slow here (a CPU) and
the model tiny, so on a GPU with a real model the engine's part is another one.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]


def load(path: Path) -> ModuleType:
    """A module of the tests, which are no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


class Caller:
    """A kept-open connection, as agents have one."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)

    def complete(
        self, prompt: list[int], tokens: int, headers: dict[str, str], more: dict[str, Any]
    ) -> tuple[float, dict[str, str], list[int]]:
        """Seconds, response headers and answer of one greedy turn."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True, **more}
        data = json.dumps(body).encode()
        began = time.perf_counter()
        sent = {"Content-Type": "application/json", **headers}
        self._connection.request("POST", "/v1/completions", data, sent)
        response = self._connection.getresponse()
        text = response.read()
        took_s = time.perf_counter() - began
        assert response.status == 200, text[:500]
        named = {name.lower(): value for name, value in response.getheaders()}
        return took_s, named, json.loads(text)["choices"][0]["token_ids"]


def percentiles(values_s: list[float]) -> dict[str, float]:
    """p10 (the least disturbed), p50 and p95 in milliseconds."""
    ordered = sorted(values_s)
    places = {"p10_ms": 0.10, "p50_ms": 0.50, "p95_ms": 0.95}
    return {
        name: round(1e3 * ordered[int(at * (len(ordered) - 1))], 3) for name, at in places.items()
    }


def tail_turns(engine: Any, gateway: Any, turns: int) -> dict[str, Any]:
    """The same growing conversation, turn by turn, directly and through the gateway."""
    source = random.Random(1)  # noqa: S311 -- a workload
    direct, through = Caller(engine.port), Caller(gateway.port)
    engine.post("/open_session", {"session_id": "d", "capacity_of_str_len": 1, "timeout": 600})
    context = [source.randrange(300, 2000) for _ in range(1000)]
    times: dict[str, list[float]] = {"direct": [], "gateway": [], "inside": []}
    for turn in range(turns + 1):
        context += [source.randrange(300, 2000) for _ in range(30)]
        asked: list[tuple[str, float, list[int]]] = []
        order = ["direct", "gateway"] if turn % 2 else ["gateway", "direct"]
        for way in order:
            if way == "direct":
                took_s, _, answer = direct.complete(context, 16, {}, {"session_id": "d"})
            else:
                name = {"X-ConServe-Conversation-ID": "g"}
                took_s, headers, answer = through.complete(context, 16, name, {})
                if turn:
                    times["inside"].append(float(headers["x-conserve-overhead-ms"]) / 1e3)
            asked.append((way, took_s, answer))
        assert asked[0][2] == asked[1][2], "the answers differ"
        for way, took_s, _ in asked:
            if turn:  # the first one is no tail turn
                times[way].append(took_s)
        context += asked[0][2]
    added_s = [g - d for g, d in zip(times["gateway"], times["direct"], strict=True)]
    return {
        "turns": turns,
        "engine": percentiles(times["direct"]),
        "through_gateway": percentiles(times["gateway"]),
        "added": percentiles(added_s),
        "added_by_its_own_account": percentiles(times["inside"]),
        "added_over_engine_p50": statistics.median(added_s) / statistics.median(times["direct"]),
        "own_account_over_engine_p50": statistics.median(times["inside"])
        / statistics.median(times["direct"]),
    }


def first_turns(engine: Any, gateway: Any, conversations: int, length: int) -> dict[str, Any]:
    """First turns prefilled by their decoder alone, and handed over by a prefiller."""
    source = random.Random(2)  # noqa: S311 -- a workload
    direct, through = Caller(engine.port), Caller(gateway.port)
    alone_s, handed_s = [], []
    for number in range(conversations):
        prompts = [[source.randrange(300, 2000) for _ in range(length)] for _ in range(2)]
        alone_s.append(direct.complete(prompts[0], 1, {}, {})[0])
        name = {"X-ConServe-Conversation-ID": f"first{number}"}
        took_s, headers, _ = through.complete(prompts[1], 1, name, {})
        assert headers["x-conserve-prefill-engine"] == "p0", headers
        handed_s.append(took_s)
        gateway.end(name["X-ConServe-Conversation-ID"])
    added_s = [h - a for h, a in zip(handed_s, alone_s, strict=True)]
    return {
        "conversations": conversations,
        "prompt_tokens": length,
        "prefilled_where_it_lives": percentiles(alone_s),
        "handed_over": percentiles(handed_s),
        "added": percentiles(added_s),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--conversations", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    testbed = load(ROOT / "tests" / "sglang" / "testbed.py")
    missing = testbed.why_not()
    if missing:
        sys.exit(missing)
    process = load(ROOT / "tests" / "sglang" / "gateway_process.py").GatewayProcess
    with tempfile.TemporaryDirectory() as folder:
        bed = testbed.open_testbed(Path(folder), print)
        decoder = bed.decoders[0]
        gateway = process(Path(folder), prefillers=[bed.prefiller.url], decoders=[decoder.url])
        try:
            bed.acks.forward_to(gateway.url)
            gateway.until_ready("p0", "d0")
            for number in range(4):  # what is compiled or cached on first use
                gateway.complete(f"warm{number}", [400 + number] * 700, 4)
            results = {
                "tail_turns": tail_turns(decoder, gateway, arguments.turns),
                "first_turns": first_turns(decoder, gateway, arguments.conversations, 1500),
            }
        finally:
            gateway.close()
            bed.close()
    print(json.dumps(results, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
