"""What a test runs in another process; a file of its own, so that a spawned one can import it."""

from __future__ import annotations

import os
from typing import Any

from conserve_agents import Conversation, headers_for


def talk_on(talk: Conversation, history: list[Any], out: Any) -> None:
    """Tag one turn of a conversation that was handed over."""
    out.put((os.getpid(), talk.headers_for(history), talk.handover()))


def tag(history: list[Any]) -> dict[str, str]:
    """Tag one turn of whatever conversation is current there."""
    return headers_for(history)
