"""`python -m conserve_serving.cli.leash MODULE [ARGS …]`: run a module that must not outlive us.

The module gets SIGTERM when stdin reaches its end, which is when the process that holds the other
end of the pipe is gone, however it went. For programs that do not watch their stdin themselves.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading


def _when_stdin_ends() -> None:
    while os.read(0, 65536):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Run the module named first, with the arguments after it as its own."""
    module = sys.argv[1]
    sys.argv = sys.argv[1:]
    threading.Thread(target=_when_stdin_ends, name="leash", daemon=True).start()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
