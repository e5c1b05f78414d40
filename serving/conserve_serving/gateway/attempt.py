"""One attempt at a turn: one plan carried out on the engines it names.

Hands over if the plan says so, sends the client's body with a few fields added, passes the answer
on, and tells the scheduler of its end. What breaks on the way is raised; `turn.Turn` decides what
follows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from conserve_serving.core.decisions import Place
from conserve_serving.core.events import PrefillFinished, TurnFinished
from conserve_serving.energy.work import Work
from conserve_serving.engines.http import Response
from conserve_serving.engines.http_errors import EngineHttpError
from conserve_serving.engines.splice import splice
from conserve_serving.gateway.conversations import Usage
from conserve_serving.gateway.engine import Engine
from conserve_serving.gateway.errors import normalise_upstream
from conserve_serving.gateway.handover import hand_over
from conserve_serving.gateway.relay import (
    cached_tokens_header,
    passed_headers,
    relay_stream,
    turn_headers,
)
from conserve_serving.gateway.request import Api
from conserve_serving.gateway.usage import StreamTap, plausible, read_reply

if TYPE_CHECKING:
    from conserve_serving.gateway.turn import Turn

#: Engine statuses after which another attempt can help.
_RETRYABLE: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
#: Shorter prefills end within a step or two: the end of the turn is soon enough to book them off.
_WORTH_TELLING_TOKENS: Final = 256


class EngineAnsweredError(EngineHttpError):
    """The engine answered with an error that another attempt may not meet."""


class StreamError(EngineHttpError):
    """The engine ended a stream with an error event, which the client has been sent."""


class Attempt:
    """One plan of one turn.

    Attributes:
        finished: the scheduler has been told that the turn finished.
        refused: the engine refused the request itself; the client has its answer.
        handed_over: the KV was handed over by a prefiller.
        decoding: the request is with the decoder.
        asking: the decoder is being asked whether it is at work on it.
        last_progress_s: when it last brought anything (wall).
    """

    def __init__(self, turn: Turn, place: Place, decoder: Engine) -> None:
        self.place = place
        self.decoder = decoder
        self.finished = False
        self.refused = False
        self.handed_over = False
        self.decoding = False
        self.asking = False
        self.last_progress_s = 0.0
        self._turn = turn
        self._rid = f"{turn.id}-{place.plan}"
        self._overhead_s = 0.0
        self._local_prefill = False
        self._work: Work | None = None

    async def run(self) -> None:
        """Carry the plan out to the end of the response.

        Raises:
            EngineHttpError: the decoder failed; the scheduler has not been told.
        """
        turn, gateway = self._turn, self._turn.gateway
        conversation, wall = turn.conversation, gateway.wall
        conversation.decoder = self.decoder.id
        since_s = wall()
        if self.place.prefiller is not None:
            conversation.phase = "prefill"
            self.handed_over = await hand_over(turn, self.place, self.decoder)
        conversation.phase = "decode"
        conversation.parked = False
        session = gateway.sessions.open_already(conversation, self.decoder)
        if session is None:
            session = await gateway.sessions.ensure(conversation, self.decoder)
        self.last_progress_s = wall()
        turn.waited_s += self.last_progress_s - since_s
        await self._decode(session)

    async def _decode(self, session: str | None) -> None:
        turn, gateway, decoder = self._turn, self._turn.gateway, self.decoder
        request, tokens = turn.request, turn.prompt_tokens
        fields, remove_usage = self._fields(session)
        body = splice(request.body, fields)
        self.decoding = True
        decoder.turn_started(tokens)
        self._work = gateway.energy.begin(
            decoder,
            turn.energy,
            prefill_tokens=tokens - self._expected_cached_tokens(),
            decodes=True,
            streams=request.stream,
        )
        self._local_prefill = not self.handed_over
        if self._local_prefill:
            decoder.mixed.prefill_started()
        self._overhead_s = gateway.wall() - turn.arrived_s - turn.waited_s
        gateway.metrics.overhead_s.observe(self._overhead_s)
        response: Response | None = None
        try:
            response = await decoder.client.stream(request.api.value, body)
            if response.status >= 400:
                await self._refused(response)
            elif response.status != 200:
                raise self._nonsense(f"answered {response.status}")
            elif request.stream:
                await self._relay(response, StreamTap(remove=remove_usage))
            else:
                await self._reply(response)
        finally:
            self._work.end(gateway.energy.now_s())
            decoder.turn_ended(tokens)
            decoder.mixed.stream_ended(self)
            if self._local_prefill:
                decoder.mixed.prefill_ended(tokens=0, active_tokens=0)
            if response is None or not response.ended:
                if response is not None:
                    response.close()
                if not self.finished:
                    self._abort()

    def _abort(self) -> None:
        """Stop the request; of one whose prompt came in a list SGLang numbers the parts."""
        rid = f"{self._rid}_0" if self._turn.request.unwrapped else self._rid
        self._turn.gateway.abort_upstream(self.decoder, rid)

    def _expected_cached_tokens(self) -> int:
        """Whole pages of the prompt that the decoder should find, and never all of it."""
        if self.place.prefiller is not None and not self.handed_over:
            return 0
        page_tokens = self.decoder.page_tokens
        return max(0, self.place.expected_cached_tokens - 1) // page_tokens * page_tokens

    def _fields(self, session: str | None) -> tuple[dict[str, object], bool]:
        """What is added to the client's body, and whether the usage event is ours to remove."""
        turn, request = self._turn, self._turn.request
        fields: dict[str, object] = {"rid": self._rid}
        if session is not None:
            fields["session_id"] = session
        priority = self.decoder.priority(self.place.priority)
        if priority is not None:
            fields["priority"] = priority
        if self.handed_over and request.api is Api.CHAT and turn.ids is not None:
            fields["input_ids"] = turn.ids  # the very ids that were prefilled: no second rendering
        if request.unwrapped:
            fields["prompt"] = request.content
        remove = request.stream and not request.include_usage
        if remove:
            fields["stream_options"] = {**(request.stream_options or {}), "include_usage": True}
        return fields, remove

    async def _relay(self, response: Response, tap: StreamTap) -> None:
        wall, decoder, mixed = self._turn.gateway.wall, self.decoder, self.decoder.mixed
        kind = response.header(b"content-type") or b""
        if b"text/event-stream" not in kind.lower():
            raise self._nonsense("did not answer a stream with a stream of events")
        first, failed = True, False

        def on_chunk() -> None:
            nonlocal first
            now_s = wall()
            self.last_progress_s = decoder.last_byte_s = now_s
            if first:
                first = False
                self._first_token(now_s)
            mixed.event(self, 1, now_s)

        def on_done() -> None:
            nonlocal failed
            failed = tap.error()
            if not failed:
                self._finish(self._plausible(tap.usage()), tap.events)

        await relay_stream(
            response,
            decoder.client.pool.origin,
            self._turn.client,
            tap,
            head=self._headers,
            on_chunk=on_chunk,
            on_done=on_done,
        )
        if failed:
            raise StreamError(decoder.client.pool.origin, "the stream ended with an error event")

    async def _reply(self, response: Response) -> None:
        body = await response.read()
        is_object, usage = read_reply(body)
        if not is_object:
            text = body[:100].decode("utf-8", "replace")
            raise self._nonsense(f"answered with something that is no JSON object: {text!r}")
        usage = self._plausible(usage)
        self._turn.first_byte(self._turn.gateway.wall())
        self._finish(usage, 0)
        headers = [*passed_headers(response), (b"content-length", b"%d" % len(body))]
        block = self._headers() + cached_tokens_header(usage)
        self._turn.client.start(response.status, headers, block)
        self._turn.client.finish(body)

    def _nonsense(self, what: str) -> EngineAnsweredError:
        return EngineAnsweredError(self.decoder.client.pool.origin, what)

    def _plausible(self, usage: Usage | None) -> Usage | None:
        description = self.decoder.description
        if description is None:
            return usage
        return plausible(
            usage,
            max_context_tokens=description.max_context_tokens,
            choices=self._turn.request.choices,
        )

    async def _refused(self, response: Response) -> None:
        """The engine answered with an error status: its own trouble, or the request's fault."""
        body = await response.read()
        status = response.status
        if status == 400 and b"session" in body and b"does not exist" in body:
            # The engine ended the session by itself (its own time-out): open another.
            self._turn.conversation.session = None
            raise EngineAnsweredError(self.decoder.client.pool.origin, "knows the session no more")
        if status in _RETRYABLE:
            text = body[:300].decode("utf-8", "replace")
            raise EngineAnsweredError(self.decoder.client.pool.origin, f"answered {status}: {text}")
        self.refused = True
        answer = normalise_upstream(status, body)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(answer)),
        ]
        self._turn.client.start(status, headers, self._headers())
        self._turn.client.finish(answer)

    def _first_token(self, now_s: float) -> None:
        turn = self._turn
        turn.first_byte(now_s)
        if self._work is not None:
            self._work.first_token(turn.gateway.energy.now_s())
        if self._local_prefill:
            self._local_prefill = False
            uncached = max(0, turn.prompt_tokens - self.place.expected_cached_tokens)
            self.decoder.mixed.prefill_ended(
                tokens=uncached, active_tokens=self.decoder.active_tokens
            )
            if uncached >= _WORTH_TELLING_TOKENS:
                turn.gateway.runtime.handle(
                    PrefillFinished(
                        turn=turn.id, plan=self.place.plan, prompt_tokens=turn.prompt_tokens
                    )
                )

    def _finish(self, usage: Usage | None, events: int) -> None:
        """The last token has come: tell the scheduler, remember what the turn was."""
        self.finished = True
        turn, gateway = self._turn, self._turn.gateway
        if usage is None:  # counted; the events are the best guess left
            gateway.metrics.usage_missing += 1
            usage = Usage(
                prompt_tokens=turn.prompt_tokens, output_tokens=events, cached_tokens=None
            )
        cached = usage.cached_tokens
        if cached is not None and self._work is not None:
            self._work.facts(
                prefill_tokens=usage.prompt_tokens - cached, output_tokens=usage.output_tokens
            )
        if cached is None:  # the engine does not tell: nothing can be checked
            cached = min(self.place.expected_cached_tokens, usage.prompt_tokens)
            gateway.warn_no_cache_report(self.decoder)
        gateway.runtime.handle(
            TurnFinished(
                turn=turn.id,
                plan=self.place.plan,
                prompt_tokens=usage.prompt_tokens,
                output_tokens=usage.output_tokens,
                cached_tokens=cached,
            )
        )
        turn.note_finished(self.place, usage, cached)

    def _headers(self) -> bytes:
        turn, place, gateway = self._turn, self.place, self._turn.gateway
        conversation = turn.conversation
        token = gateway.signer.sign(
            conversation.key,
            engine=place.decoder,
            epoch=self.decoder.epoch,
            context_tokens=turn.prompt_tokens,
            turns=max(conversation.turns, turn.index),
            transfers=conversation.transfers,
        )
        prefiller = place.prefiller if self.handed_over else None
        return turn_headers(
            conversation=conversation.id,
            source=turn.tags.source,
            relation=turn.relation,
            turn_index=turn.index,
            prefill_engine=prefiller or place.decoder,
            decode_engine=place.decoder,
            transfers=conversation.transfers,
            reason=place.reason,
            overhead_ms=self._overhead_s * 1e3,
            placement=token,
        )
