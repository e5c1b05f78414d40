"""A tiny child program for the supervisor's tests: speaks the ready protocol, misbehaves on cue.

Usage: scripted_child.py --port N [behaviour …]

    ready            announce and wait for the end of stdin or SIGTERM (always the last thing)
    say=TEXT         print a line
    say-if=FILE:TEXT print a line if FILE exists
    say-env=NAME     print a variable of the environment
    crash=CODE       exit now
    crash-if=FILE    exit with code 3 if FILE exists
    mute             never announce
    ignore-term      ignore SIGTERM
    deaf             do not notice the end of stdin
    cluster=IDS      serve GET /conserve/v1/cluster with these engine ids (comma-separated;
                     ID:STATE for other states than ready; @FILE: they are in a file)
    log=FILE:WORD    append WORD to FILE when told to stop
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def main(argv: list[str]) -> None:
    port, behaviours = int(argv[1]), argv[2:]
    ids = next((b.partition("=")[2] for b in behaviours if b.startswith("cluster=")), "")
    # A wake-up pipe: the signal may come to any thread, at any time, and the main one waits.
    until_done, done = os.pipe()
    os.set_blocking(done, False)
    signal.set_wakeup_fd(done)
    signal.signal(signal.SIGTERM, lambda *_: None)
    server = None
    for behaviour in behaviours:
        name, _, value = behaviour.partition("=")
        if name == "say":
            say(value)
        elif name == "say-env":
            say(os.environ[value])
        elif name == "say-if" and Path(value.partition(":")[0]).exists():
            say(value.partition(":")[2])
        elif name == "crash":
            os._exit(int(value))
        elif name == "crash-if" and Path(value).exists():
            os._exit(3)
        elif name == "mute":
            os.read(until_done, 1)
        elif name == "ignore-term":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which the pipe does not hear either
        elif name == "ready":
            server = serve(port, ids.split(",") if ids else [])
            say(json.dumps({"ready": True, "port": server.server_address[1]}))
    if "deaf" not in behaviours:
        leash = threading.Thread(target=lambda: (sys.stdin.read(), os.write(done, b"!")))
        leash.daemon = True
        leash.start()
    os.read(until_done, 1)
    for behaviour in behaviours:
        if behaviour.startswith("log="):
            file, _, word = behaviour.removeprefix("log=").partition(":")
            with Path(file).open("a") as out:
                out.write(word + "\n")
    os._exit(0)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def serve(port: int, ids: list[str]) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = Path(ids[0][1:]).read_text().split(",") if ids[0][0] == "@" else ids
            named = [id_.partition(":") for id_ in known]
            engines = [{"id": i, "state": s or "ready", "tier": "decode"} for i, _, s in named]
            body = json.dumps({"engines": engines, "conversations": []}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


if __name__ == "__main__":
    main(sys.argv[1:])
