"""`python -m sglang.launch_server` without SGLang: its processes, its routes, its ways to fail.

What it does is told by the environment, in words of STAND_IN separated by spaces:

    family=FILE    start a child and a grandchild, which ignore SIGTERM, and write all ids to FILE
    exit=CODE      end with this code
    kill=N         end by this signal
    say=FILE       print the lines of FILE first
    deaf           ignore SIGTERM
    mute           never listen
    slow=FILE      be unhealthy until FILE exists
    pd             be a decode server of SGLang's own disaggregation
    end-if=FILE    end with code 5 if FILE exists
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

GRANDCHILD = (
    "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
)
CHILD = f"""
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
one = subprocess.Popen([sys.executable, "-S", "-E", "-c", {GRANDCHILD!r}])
with open(sys.argv[1], "a") as ids:
    ids.write(f"{{os.getpid()}} {{one.pid}}\\n")
time.sleep(600)
"""


def value_of(flag: str, default: str) -> str:
    return sys.argv[sys.argv.index(flag) + 1] if flag in sys.argv else default


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main() -> None:
    words = [word.partition("=") for word in os.environ.get("STAND_IN", "").split()]
    does = {name: value for name, _, value in words}
    say("Load weight begin. avail mem=79.10 GB\n")
    if "say" in does:
        say(Path(does["say"]).read_text())
    if "family" in does:
        argv = [sys.executable, "-S", "-E", "-c", CHILD, does["family"]]
        subprocess.Popen(argv)  # noqa: S603 - a program of this file
        while len(ids := Path(does["family"]).read_text().split()) < 2:
            threading.Event().wait(0.01)
        Path(does["family"]).write_text(" ".join([*ids, str(os.getpid())]))
    if "deaf" in does:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "exit" in does:
        os._exit(int(does["exit"]))
    if "kill" in does:
        os.kill(os.getpid(), int(does["kill"]))
    if "end-if" in does and Path(does["end-if"]).exists():
        os._exit(5)
    if "mute" in does:
        threading.Event().wait()
    serve(does)


def serve(does: dict[str, str]) -> None:
    model = value_of("--served-model-name", "m")
    extra = value_of("--hicache-storage-backend-extra-config", "{}")
    info = {
        "max_total_num_tokens": 10_000,
        "page_size": int(value_of("--page-size", "64")),
        "context_length": 8192,
        "version": "0.5.23",
        "hicache_storage_backend_extra_config": extra,
        **{
            name: f"--{name.replace('_', '-')}" in sys.argv
            for name in (
                "enable_metrics",
                "enable_cache_report",
                "enable_session_radix_cache",
                "enable_priority_scheduling",
                "enable_hierarchical_cache",
            )
        },
        **{
            name: value_of(f"--{name.replace('_', '-')}", "")
            for name in (
                "hicache_storage_backend",
                "hicache_write_policy",
                "hicache_storage_prefetch_policy",
            )
        },
        "argv": sys.argv[1:],
        "env": {k: v for k, v in os.environ.items() if k.startswith(("CUDA_", "PYTHON"))},
    }
    load = {
        "num_running_reqs": 0,
        "num_waiting_reqs": 0,
        "total_prefill_uncached_tokens": 0,
        "total_prefill_busy_us": 0,
    }
    answers = {
        "/server_info": info,
        "/model_info": {
            "served_model_name": model,
            "disaggregation_mode": "decode" if "pd" in does else "null",
        },
        "/v1/models": {"data": [{"id": model, "max_model_len": 8192}]},
        "/v1/loads": {"loads": [load]},
    }

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            status, body = 200, b""
            if path == "/metrics":
                body = b"sglang:kv_used_tokens 0.0\nsglang:kv_evictable_tokens 0.0\n"
            elif path == "/health":
                status = 200 if Path(does.get("slow", "/")).exists() else 503
            elif path in answers:
                body = json.dumps(answers[path]).encode()
            else:
                status = 404
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer((value_of("--host", "?"), int(value_of("--port", "0"))), Handler)
    say("The server is fired up and ready to roll!\n")
    server.serve_forever()


if __name__ == "__main__":
    main()
