"""Tagging at the level of single HTTP requests, for libraries that hide their OpenAI client.

    tagger = HttpTagger()
    httpx.Client(event_hooks={"request": [tagger.tag], "response": [tagger.observe]})   # both

Such a hook sees attempts, not calls: an attempt whose prompt repeats that of one which got no
answer, or an error, carries its tag. Where a client object can be passed in, pass
``conserve_agents.openai``'s instead: it sees calls.
"""

from __future__ import annotations

import contextvars
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from conserve_agents import wire
from conserve_agents.context import current_conversation
from conserve_agents.conversation import Conversation
from conserve_agents.counting import TokenCounter
from conserve_agents.errors import ConServeError
from conserve_agents.gateway import Gateway
from conserve_agents.logs import warn_once
from conserve_agents.turns import Prompt, is_model_call, prompt_of

#: What reading a request of a library's can fail with, should its insides change.
_TAGGING_ERRORS: Final = (ConServeError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    """The attempt that this context made last."""

    conversation: Conversation
    turn_id: str
    prompt: Prompt | None


_sent: Final[contextvars.ContextVar[_Sent | None]] = contextvars.ContextVar(
    "conserve_sent", default=None
)


class HttpTagger:
    """Tags requests and reads answers. Shared by any number of threads and tasks.

    Args:
        conversation: for calls outside of any ``conversation()``; None: those are not tagged.
        token_counter: counts first turns of conversations without a counter of their own; one
            that does I/O blocks the event loop of an async client.
    """

    def __init__(
        self,
        conversation: Conversation | None = None,
        *,
        token_counter: TokenCounter | None = None,
    ) -> None:
        self._conversation: Final = conversation
        self._counter: Final = token_counter

    def tag(self, request: Any) -> None:
        """Tag a request of httpx's kind, where it is a model call in a conversation.

        Never raises: what cannot be tagged is sent as it is.
        """
        try:
            self._tag(request)
        except _TAGGING_ERRORS as error:
            warn_once("tag", "model call sent untagged, for tagging it failed: %r", error)

    def observe(self, response: Any) -> None:
        """Take in the answer to the request that this thread or task has tagged last."""
        sent = _sent.get()
        if sent is None:
            return
        _sent.set(None)
        if response.status_code < 400:
            sent.conversation.observe(response.headers, turn_id=sent.turn_id)
        else:
            sent.conversation.failed(sent.turn_id, sent.prompt)

    def _tag(self, request: Any) -> None:
        before = _sent.get()
        _sent.set(None)
        if before is not None:  # no answer came: the connection broke, or the caller gave up
            before.conversation.failed(before.turn_id, before.prompt)
        talk = current_conversation() or self._conversation
        if talk is None or not is_model_call(request.method, request.url.path):
            return
        if wire.CONVERSATION_ID in request.headers:
            return
        body = json.loads(request.content)
        if not isinstance(body, Mapping):
            return
        prompt = prompt_of(body)
        talk.use_gateway(lambda: _gateway(request))
        tags = talk.headers_for(prompt, body.get("tools"), counter=self._counter)
        request.headers.update(tags)
        if tags:
            _sent.set(_Sent(conversation=talk, turn_id=tags[wire.TURN_ID], prompt=prompt))


def _gateway(request: Any) -> Gateway:
    root = str(request.url).partition("/v1/")[0]
    key = request.headers.get("authorization")
    return Gateway(f"{root}/v1", headers={"Authorization": key} if key else {})
