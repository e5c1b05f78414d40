"""The conversations of LiteLLM's sessions."""

from __future__ import annotations

from typing import Final

from conserve_agents import (
    ConServeError,
    Conversation,
    ConversationStore,
    Gateway,
    TokenCounter,
    wire,
)
from conserve_agents.gateway import end_quietly
from litellm_conserve.identity import Identity

#: What telling whose call it is can fail with, should LiteLLM's insides change.
TAGGING_ERRORS: Final = (ConServeError, AttributeError, LookupError, TypeError, ValueError)


class Sessions:
    """Sessions by gateway and name, in bounded memory. Thread-safe.

    Attributes:
        counter: counts first turns of the conversations made from now on; None: bytes / 4.
    """

    def __init__(self, counter: TokenCounter | None = None) -> None:
        self.counter = counter
        self._store: Final = ConversationStore(make=self._make)

    def conversation(self, who: Identity, gateway: Gateway) -> Conversation | None:
        """The conversation of a call; None when nothing on this side names one."""
        if who.session_id is None:
            return who.conversation
        if who.parent_id is None:
            return self._store.get(_key(gateway, who.session_id))
        # A sub-agent's ends with its parent's, at the latest.
        parent = self._store.get(_key(gateway, who.parent_id))
        return parent.child(wire.safe_id(who.session_id))

    def end(self, session_id: str, gateway: Gateway) -> bool:
        """End a session's conversation and its sub-agents'; whether the gateway confirmed."""
        if self._store.end(_key(gateway, session_id)):
            return True
        # Not known here, or no longer: a proxy's other worker may have made its calls.
        return end_quietly([(gateway, wire.safe_id(session_id))]) > 0

    def _make(self, key: str) -> Conversation:
        _, _, session_id = key.partition(" ")
        return Conversation(session_id, counter=self.counter, end_on_exit=False)


def _key(gateway: Gateway, session_id: str) -> str:
    return f"{gateway.root} {session_id}"
