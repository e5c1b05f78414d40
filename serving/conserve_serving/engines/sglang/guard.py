"""Run a program in a process group of its own, and end the whole group with whoever started us.

    python -I -S guard.py PROGRAM [ARGUMENT …]

Standard input is the leash: when it ends, however the process at its other end went, everything in
the program's group is killed. So is what the program leaves behind when it ends by itself. SIGTERM
is passed on to the program alone, for SGLang's first process stops the others in order.

It exits with the program's exit code, 128 + N when signal N ended it. A file of its own, started by
path: it must be small, and outlive everything but its own group.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def _before_it_runs() -> None:
    """In the program: hear SIGTERM; and go, should the guard itself be killed (Linux)."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(argv: list[str]) -> int:
    """Run ``argv`` until it ends or the leash does. Returns the exit code."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # a thread waits for it
    program = subprocess.Popen(  # noqa: S603 - what our own launcher wants started
        argv,
        stdin=subprocess.DEVNULL,
        process_group=0,
        preexec_fn=_before_it_runs,  # noqa: PLW1509 - no threads yet
    )

    def kill_group() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)

    def hold_leash() -> None:
        while os.read(0, 4096):
            pass
        kill_group()

    def pass_on_terms() -> None:
        while True:
            signal.sigwait({signal.SIGTERM})
            with contextlib.suppress(ProcessLookupError):
                os.kill(program.pid, signal.SIGTERM)

    threading.Thread(target=hold_leash, daemon=True).start()
    threading.Thread(target=pass_on_terms, daemon=True).start()
    # Not reaped yet, so the group's number cannot have become somebody else's.
    os.waitid(os.P_PID, program.pid, os.WEXITED | os.WNOWAIT)
    kill_group()
    code = program.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.stdout = sys.stderr = None
    os._exit(main(sys.argv[1:]))
