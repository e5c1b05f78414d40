"""What a close says beyond itself, where an engine runs our plug-in.

SGLang's ``/close_session`` only takes a session's protection away: its KV stays until evicted,
which is what a *parked* conversation needs. For the rest the session's name carries a mark; an
engine without the plug-in knows no session of such a name and does nothing.
Loaded inside SGLang: standard library only.
"""

from __future__ import annotations

from typing import Final

#: The conversation's KV leaves this engine, device and host tier.
FREE: Final = "!free"
#: The conversation is over: its pages leave the hand-off store.
END: Final = "!end"


def split(name: str) -> tuple[str, str | None]:
    """A session's name and its mark, if it has one."""
    for mark in (FREE, END):
        if name.endswith(mark):
            return name.removesuffix(mark), mark
    return name, None
