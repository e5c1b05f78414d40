"""The hand-off of a conversation's first turn: prefill there, wait until stored, decode here.

The prefiller's reply comes before its pages are in the store, so a decoder called at once would
silently prefill most of the prompt again. The store's acknowledgement says when the pages can be
read; the wait for it is bounded, and the cached tokens of the turn are checked afterwards.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import msgspec
from msgspec import Raw

from conserve_serving.core.decisions import Place
from conserve_serving.core.events import HandoffFinished, PrefillFinished
from conserve_serving.core.types import Fallback, Tier
from conserve_serving.engines.client_wire import error_message
from conserve_serving.engines.http_errors import EngineHttpError, EngineRefused
from conserve_serving.engines.pages import last_page_key
from conserve_serving.gateway.engine import Engine
from conserve_serving.gateway.errors import InvalidRequestError, nested_too_deeply
from conserve_serving.gateway.request import Api, TurnRequest
from conserve_serving.gateway.sessions import session_id

if TYPE_CHECKING:
    from conserve_serving.gateway.turn import Turn

_log = logging.getLogger("conserve.gateway.handover")
#: A tokenizer's answers that say the prompt cannot be served anywhere.
_REQUESTS_FAULT = frozenset({400, 413, 422})
_FIELDS = msgspec.json.Decoder(dict[str, Raw])


class _Message(msgspec.Struct):
    content: Raw = Raw(b"null")


class _Part(msgspec.Struct):
    type: str


class _Prompt(msgspec.Struct):
    """What a body says of its prompt beyond the text."""

    messages: list[_Message] = []
    extra_key: Raw = Raw(b"null")
    cache_salt: Raw = Raw(b"null")
    lora_path: Raw = Raw(b"null")


_PROMPT = msgspec.json.Decoder(_Prompt)
_PARTS = msgspec.json.Decoder(list[_Part])


async def tokenize(turn: Turn) -> list[int] | None:
    """Token ids of a turn's prompt, as an engine renders it; None if none of two would say.

    Raises:
        InvalidRequestError: an engine does not take the prompt.
    """
    fleet = turn.gateway.fleet
    engines = fleet.serving(Tier.PREFILL) + fleet.serving(Tier.DECODE)
    engines.sort(key=lambda engine: engine.running)
    for engine in engines[:2]:
        try:
            return await _tokenize_on(engine, turn.request)
        except EngineHttpError as error:
            _log.warning("tokenizing turn %s: %s", turn.id, error)
            if isinstance(error, EngineRefused) and error.status in _REQUESTS_FAULT:
                raise InvalidRequestError(
                    error_message(error.body), param=turn.request.prompt_field
                ) from error
    return None


async def _tokenize_on(engine: Engine, request: TurnRequest) -> list[int]:
    try:
        if request.api is Api.CHAT:
            fields = _FIELDS.decode(request.body)
        else:
            prompt = msgspec.json.decode(request.content, type=str)
    except RecursionError:
        raise nested_too_deeply() from None
    if request.api is Api.CHAT:
        return (await engine.client.tokenize_chat(fields)).tokens
    return (await engine.client.tokenize_prompt(prompt)).tokens


def _only_tokens(request: TurnRequest) -> bool:
    """Whether the token ids are all there is to a prompt.

    Else the decoder must not be given them: SGLang would leave pictures out. And the KV would not
    be found again: the keys of its pages depend on salt and adapter as well.
    """
    try:
        prompt = _PROMPT.decode(request.body)
        parts = [
            part
            for message in prompt.messages
            if bytes(memoryview(message.content)[:1]) == b"["  # no copy of all of it
            for part in _PARTS.decode(message.content)
        ]
    except (msgspec.DecodeError, RecursionError):  # the engine will say what is wrong with it
        return False
    marks = (prompt.extra_key, prompt.cache_salt, prompt.lora_path)
    return all(part.type == "text" for part in parts) and all(bytes(m) == b"null" for m in marks)


async def hand_over(turn: Turn, place: Place, decoder: Engine) -> bool:
    """Prefill on ``place.prefiller`` and bring the KV within ``decoder``'s reach.

    The scheduler is told how it went; with a fallback the decoder prefills by itself. The
    decoder's session is opened meanwhile.

    Returns:
        Whether the KV was handed over.
    """
    gateway = turn.gateway
    opening = asyncio.ensure_future(gateway.sessions.ensure(turn.conversation, decoder))
    opening.add_done_callback(_consume)
    fallback: Fallback | None = None
    moved_tokens, duration_s = 0, 0.0
    try:
        await gateway.sessions.settle(turn.conversation)
        turn.conversation.in_store = True
        moved_tokens, duration_s, fallback = await _move(turn, place)
        # A session that could not be opened is tried again, and complained about, by the decode.
        await asyncio.wait([opening])
    finally:
        opening.cancel()
    if fallback is not None:
        _log.warning("turn %s: no hand-off (%s): its decoder prefills", turn.id, fallback.value)
    elif place.transfer is not None:
        turn.conversation.prefiller = place.prefiller
        turn.conversation.note_transfer(place.transfer.value)
    gateway.runtime.handle(
        HandoffFinished(
            turn=turn.id,
            plan=place.plan,
            moved_tokens=moved_tokens,
            duration_s=duration_s,
            fallback=fallback,
        )
    )
    return fallback is None


async def _move(turn: Turn, place: Place) -> tuple[int, float, Fallback | None]:
    """Tokens moved, the engines' seconds it took once prefilled, or why it came to nothing."""
    gateway = turn.gateway
    if not _only_tokens(turn.request):
        return 0, 0.0, Fallback.NOT_ONLY_TOKENS
    if turn.ids is None:
        turn.ids = await tokenize(turn)
    ids = turn.ids
    if ids is None:
        return 0, 0.0, Fallback.TOKENIZE_FAILED
    prefiller = gateway.fleet.get(place.prefiller or "")
    if prefiller is None or not prefiller.serving:
        return 0, 0.0, Fallback.PREFILLER_FAILED
    key = last_page_key(ids, prefiller.page_tokens)
    if key is None:  # not one full page: there is nothing that could be handed over
        return 0, 0.0, Fallback.PARTIAL_PAGES
    acknowledged = gateway.handoffs.expect(key)
    try:
        if not await _prefill(turn, place, prefiller, ids):
            return 0, 0.0, Fallback.PREFILLER_FAILED
        prefilled_s = gateway.wall()
        gateway.runtime.handle(
            PrefillFinished(turn=turn.id, plan=place.plan, prompt_tokens=len(ids))
        )
        try:
            async with asyncio.timeout(gateway.config.gateway.handoff_ack_timeout_s):
                ack = await asyncio.shield(acknowledged)
        except TimeoutError:
            return 0, 0.0, Fallback.ACK_LATE
    finally:
        gateway.handoffs.release(key, turn.conversation.key)
    if ack.error is not None:
        full = ack.error == Fallback.STORE_FULL
        return 0, 0.0, Fallback.STORE_FULL if full else Fallback.PARTIAL_PAGES
    whole_pages = len(ids) // prefiller.page_tokens * prefiller.page_tokens
    if ack.tokens < whole_pages:
        return 0, 0.0, Fallback.PARTIAL_PAGES
    duration_s = ack.duration_s
    if duration_s is None:  # the store does not say: what it looked like from here
        duration_s = (gateway.wall() - prefilled_s) * gateway.runtime.clock.speed
    return whole_pages, duration_s, None


async def _prefill(turn: Turn, place: Place, prefiller: Engine, ids: list[int]) -> bool:
    gateway = turn.gateway
    rid = f"{turn.id}-{place.plan}-p"
    prefiller.running += 1
    work = gateway.energy.begin(
        prefiller, turn.energy, prefill_tokens=len(ids), decodes=False, streams=False
    )
    try:
        done = await prefiller.client.prefill(
            ids,
            rid=rid,
            conversation=session_id(turn.conversation.key),
            priority=prefiller.priority(place.priority),
            timeout_s=gateway.config.gateway.stall_timeout_s,
        )
        work.facts(prefill_tokens=done.prompt_tokens - done.cached_tokens, output_tokens=0)
    except asyncio.CancelledError:
        gateway.abort_upstream(prefiller, rid)
        raise
    except EngineHttpError as error:
        _log.warning("prefill of turn %s: %s", turn.id, error)
        gateway.abort_upstream(prefiller, rid)
        # If the prefiller is dead the scheduler makes a new plan, which interrupts this one.
        await gateway.fleet.suspect(prefiller)
        return False
    finally:
        work.end(gateway.energy.now_s())
        prefiller.running -= 1
    return True


def _consume(task: asyncio.Future[str | None]) -> None:
    """Failures of the opening are found again by the decode; here they only must not be lost."""
    if not task.cancelled():
        task.exception()
