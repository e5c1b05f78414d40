"""Query step times from aiconfigurator; run by ``make_profiles.py`` in that tool's environment.

Reads a JSON list of ``{"system", "model", "ranks", "new", "prefix", "batch", "ctx"}`` on standard
input and writes the answers, ``prefill_ms[new][prefix]`` and ``decode_ms[batch][ctx]``, on standard
output.
"""

# ruff: noqa: PLC0415 - only the tool's own environment has these packages
from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from typing import Any

BACKEND = "sglang"


def query(wanted: dict[str, Any]) -> dict[str, Any]:
    """Step times in milliseconds of one model on ``ranks`` GPUs of one system."""
    from aiconfigurator.sdk import config, models, perf_database
    from aiconfigurator.sdk.backends.factory import get_backend
    from aiconfigurator.sdk.inference_session import InferenceSession

    version = perf_database.get_latest_database_version(wanted["system"], BACKEND)
    database = perf_database.get_database(wanted["system"], BACKEND, version)
    model = models.get_model(wanted["model"], config.ModelConfig(tp_size=wanted["ranks"]), BACKEND)
    session = InferenceSession(model, database, get_backend(BACKEND))

    def prefill_ms(new: int, prefix: int) -> float:
        runtime = config.RuntimeConfig(batch_size=1, isl=new + prefix, osl=1, prefix=prefix)
        return float(session.run_static_latency_only(runtime, "static_ctx"))

    def decode_ms(batch: int, ctx: int) -> float:
        runtime = config.RuntimeConfig(batch_size=batch, isl=ctx, osl=2)
        return float(session.run_static_latency_only(runtime, "static_gen"))

    return {
        "system": wanted["system"],
        "database": version,
        "prefill_ms": [[prefill_ms(n, p) for p in wanted["prefix"]] for n in wanted["new"]],
        "decode_ms": [[decode_ms(b, c) for c in wanted["ctx"]] for b in wanted["batch"]],
    }


def main() -> None:
    """Answer every query; the tool's own chatter goes to standard error."""
    with redirect_stdout(sys.stderr):
        answers = [query(wanted) for wanted in json.load(sys.stdin)]
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
