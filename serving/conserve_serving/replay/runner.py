"""The replayer: a workload's conversations through a running gateway, over HTTP.

Each conversation is a closed loop: a turn is sent when the answer before it is there and its gap
has passed. Conversations arrive on their own schedule, whatever the server does (open loop).
Latencies count from when a turn was *due*, so a late client can only make them worse.
"""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from conserve_agents import wire
from conserve_serving.engines.http import Headers, Response
from conserve_serving.replay.completion import CompletionStream, Usage
from conserve_serving.replay.conversations import Conversation, Turn
from conserve_serving.replay.errors import GatewayUnusable, TurnFailure
from conserve_serving.replay.gateway_api import GatewayApi, header
from conserve_serving.replay.options import Clock, Options, Progress
from conserve_serving.replay.records import (
    ClusterSample,
    ConversationRecord,
    RunResult,
    TurnRecord,
)
from conserve_serving.replay.tokens import fresh_ids
from conserve_serving.replay.workload import Arrivals, Workload

#: Prompts are made this long before they are due, so that making them does not delay them.
_PREPARE_WALL_S = 0.05
_END_WALL_S = 5.0


@dataclass(slots=True)
class _Live:
    """A conversation between two turns.

    ``context``: the ids the next prompt may extend (the last prompt and its answer).
    """

    record: ConversationRecord
    wire_id: str
    context: list[int] = field(default_factory=list)
    placement: str | None = None


class Replay:
    """One run.

    Args:
        api: the gateway.
        model: name of the model asked for.
        workload: what to send.
        arrivals_s: arrival of each of its conversations, in model seconds.
        options: how to send it.
        clock: wall clock.
        on_progress: called whenever ``progress`` has changed.
    """

    def __init__(
        self,
        *,
        api: GatewayApi,
        model: str,
        workload: Workload,
        arrivals_s: Sequence[float],
        options: Options,
        clock: Clock,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        if len(arrivals_s) != len(workload.conversations):
            raise ValueError(
                f"{len(arrivals_s)} arrivals for {len(workload.conversations)} conversations: "
                "give one arrival each"
            )
        self._api = api
        self._model = model
        self._workload = workload
        self._arrivals_s = arrivals_s
        self._options = options
        self._clock = clock
        self._on_progress = on_progress
        self._sockets = asyncio.Semaphore(options.connections)
        self._socket_waits = 0
        self._end_failures = 0
        self._start = 0.0
        self._open: dict[str, None] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._stopped = False
        self.progress = Progress()

    def stop(self) -> None:
        """End the run early: turns in flight are given up, open conversations are ended."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()

    async def run(self, *, arrivals: Arrivals, rate_per_s: float | None) -> RunResult:
        """Replay everything and return what was measured.

        Args:
            arrivals, rate_per_s: how ``arrivals_s`` were made, for the report.

        Raises:
            GatewayUnusable: the cluster's description cannot be read.
            TurnFailure: the gateway is not there at the start.
        """
        samples: list[ClusterSample] = []
        first = await self._api.cluster()
        self._start = self._clock.now()
        if first is not None:
            samples.append(ClusterSample(at_s=0.0, cluster=first))
        records = [
            ConversationRecord(conversation=conversation, arrival_s=arrival_s)
            for conversation, arrival_s in zip(
                self._workload.conversations, self._arrivals_s, strict=True
            )
        ]
        sampler = asyncio.create_task(self._sample(samples)) if first is not None else None
        self._tasks = [asyncio.create_task(self._converse(record)) for record in records]
        helpers = [] if sampler is None else [sampler]
        try:
            # A conversation's failures are records; an exception is a bug and ends the run.
            finished, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
            wall_s = self._clock.now() - self._start
        finally:
            for task in (*self._tasks, *helpers):
                task.cancel()
            await asyncio.gather(*self._tasks, *helpers, return_exceptions=True)
            await self._end_open()
        for task in (*finished, *helpers):
            if not task.cancelled() and (bug := task.exception()) is not None:
                raise bug
        if first is not None:
            await self._sample_once(samples)
        return RunResult(
            workload=self._workload,
            seed=self._options.seed,
            arrivals=arrivals,
            rate_per_s=rate_per_s,
            speed=self._options.speed,
            gateway_url=self._api.url,
            model=self._model,
            connections=self._options.connections,
            conversations=[record for record in records if record.turns],
            samples=samples,
            wall_s=wall_s,
            interrupted=self._stopped,
            waits_for_socket=self._socket_waits,
            end_failures=self._end_failures,
        )

    # --- one conversation ---------------------------------------------------------------------

    async def _converse(self, record: ConversationRecord) -> None:
        conversation = record.conversation
        live = _Live(
            record=record,
            wire_id=conversation_wire_id(conversation, seed=self._options.seed),
        )
        due_s = record.arrival_s
        await self._clock.sleep_until(self._wall(due_s) - _PREPARE_WALL_S)
        self.progress.conversations_open += 1
        self._open[live.wire_id] = None
        try:
            for index, turn in enumerate(conversation.turns, 1):
                prompt = self._prompt(live, index, turn)
                body = self._body(prompt, turn)
                await self._clock.sleep_until(self._wall(due_s))
                done = TurnRecord(index=index, turn=turn, due_s=due_s)
                record.turns.append(done)
                await self._run_turn(live, done, prompt, body)
                self.progress.turns_done += 1
                self._on_progress(self.progress)
                if done.last_token_s is None:
                    break
                if index < len(conversation.turns):
                    following = conversation.turns[index]
                    due_s = done.last_token_s + following.gap_s
                    if following.at_s is not None:
                        due_s = max(due_s, record.arrival_s + following.at_s)
            await self._end(live.wire_id)
        finally:
            self.progress.conversations_open -= 1
        self.progress.conversations_done += 1
        self._on_progress(self.progress)

    def _prompt(self, live: _Live, index: int, turn: Turn) -> list[int]:
        del live.context[turn.kept_tokens :]
        missing = turn.input_tokens - len(live.context)
        fresh = fresh_ids(
            missing,
            seed=self._options.seed,
            conversation=live.record.conversation.id,
            turn=index,
            vocabulary=self._options.vocabulary,
        )
        return live.context + fresh

    def _body(self, prompt: list[int], turn: Turn) -> bytes:
        return msgspec.json.encode(
            {
                "model": self._model,
                "prompt": prompt,
                "max_tokens": turn.output_tokens,
                "min_tokens": turn.output_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
                "return_token_ids": True,
            }
        )

    def _headers(self, live: _Live, index: int) -> Headers:
        first = live.record.conversation.turns[0].input_tokens
        pairs = [
            (wire.CONVERSATION_ID, live.wire_id),
            (wire.TURN_ID, wire.safe_id(f"{live.wire_id}-{index}")),
            (wire.TURN_INDEX, str(index)),
            (wire.FIRST_TURN_TOKENS, str(first)),
            (wire.TOKEN_COUNTER, "server"),
        ]
        if live.placement is not None:
            pairs.append((wire.PLACEMENT, live.placement))
        return [(name.encode(), value.encode()) for name, value in pairs]

    async def _run_turn(
        self, live: _Live, done: TurnRecord, prompt: list[int], body: bytes
    ) -> None:
        """Send one turn until it is answered or given up; fills ``done`` and the context."""
        headers = self._headers(live, done.index)
        options = self._options
        for attempt in range(1, options.max_attempts + 1):
            try:
                async with self._socket():
                    stream, usage = await self._attempt(live, done, body, headers)
                    answer = await self._answer_ids(stream, usage, done)
                break
            except TurnFailure as failure:
                if not failure.retryable or attempt == options.max_attempts:
                    done.error, done.error_message = failure.kind, str(failure)
                    self.progress.errors += 1
                    return
                done.retries.append(failure.kind)
                self.progress.retries += 1
                if failure.retry_after_s is None:
                    delay_s = min(options.backoff_s * 2 ** (attempt - 1), options.max_backoff_s)
                else:
                    delay_s = min(failure.retry_after_s, options.max_retry_after_s)
                await self._clock.sleep(delay_s)
        turn = done.turn
        if (usage.prompt_tokens, usage.completion_tokens) != (
            turn.input_tokens,
            turn.output_tokens,
        ):
            done.error = "token_count_mismatch"
            done.error_message = (
                f"prompt {usage.prompt_tokens} for {turn.input_tokens} tokens, "
                f"answer {usage.completion_tokens} for {turn.output_tokens} tokens"
            )
            self.progress.errors += 1
        live.context = prompt + answer[: turn.output_tokens]

    async def _attempt(
        self, live: _Live, done: TurnRecord, body: bytes, headers: Headers
    ) -> tuple[CompletionStream, Usage]:
        now = self._clock.now
        stream = CompletionStream()
        stall_s = self._options.stall_timeout_s
        loop = asyncio.get_running_loop()
        sent = now()
        try:
            async with asyncio.timeout(stall_s) as deadline:
                async with self._api.complete(body, headers) as reply:
                    async for chunk in reply:
                        stream.feed(chunk, now())
                        deadline.reschedule(loop.time() + stall_s)
                    self._note_reply(live, done, reply)
        except TimeoutError as error:
            raise TurnFailure("timeout", f"no byte for {stall_s:g} s") from error
        usage = stream.finish()
        done.sent_s = self._model_time(sent)
        done.prompt_tokens = usage.prompt_tokens
        done.output_tokens = usage.completion_tokens
        done.cached_tokens = usage.cached_tokens
        done.first_token_s = self._model_time(stream.token_times[0])
        done.last_token_s = self._model_time(stream.token_times[-1])
        if done.index == len(live.record.conversation.turns):
            done.token_times_s = array("d", map(self._model_time, stream.token_times))
            done.token_counts = stream.token_counts
        return stream, usage

    def _note_reply(self, live: _Live, done: TurnRecord, reply: Response) -> None:
        done.decode_engine = header(reply, wire.DECODE_ENGINE)
        done.prefill_engine = header(reply, wire.PREFILL_ENGINE)
        done.reason = header(reply, wire.REASON)
        transfers, overhead = header(reply, wire.TRANSFERS), header(reply, wire.OVERHEAD_MS)
        try:
            done.transfers = None if transfers is None else int(transfers)
            done.overhead_ms = None if overhead is None else float(overhead)
        except ValueError as error:
            raise TurnFailure(
                "bad_reply",
                f"{wire.TRANSFERS}: {transfers!r}, {wire.OVERHEAD_MS}: {overhead!r}: not numbers",
                retryable=False,
            ) from error
        live.placement = header(reply, wire.PLACEMENT) or live.placement

    async def _answer_ids(
        self, stream: CompletionStream, usage: Usage, done: TurnRecord
    ) -> list[int]:
        """The answer's token ids, as near to the engine's as the server lets us know."""
        if len(stream.token_ids) == usage.completion_tokens:
            done.output_ids = "reply"
            return stream.token_ids
        try:
            ids = await self._api.tokenize("".join(stream.text), model=self._model)
            done.output_ids = "tokenize"
        except TurnFailure:
            ids = []  # the next prompt is then padded with fresh ids; the report says so
            done.output_ids = "made up"
        return ids

    # --- around it ----------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _socket(self) -> AsyncIterator[None]:
        if self._sockets.locked():
            self._socket_waits += 1
        async with self._sockets:
            yield

    def _wall(self, model_s: float) -> float:
        return self._start + model_s / self._options.speed

    def _model_time(self, wall: float) -> float:
        return (wall - self._start) * self._options.speed

    async def _end(self, wire_id: str) -> None:
        self._open.pop(wire_id, None)
        try:
            await self._api.end(wire_id)
        except TurnFailure:
            self._end_failures += 1  # reported; the gateway's idle time-out ends it

    async def _end_open(self) -> None:
        """End what an interrupted run left open, within a bounded time."""
        ending = [asyncio.create_task(self._end(wire_id)) for wire_id in list(self._open)]
        if ending:
            _, late = await asyncio.wait(ending, timeout=_END_WALL_S)
            self._end_failures += len(late)
            for task in late:
                task.cancel()

    async def _sample(self, samples: list[ClusterSample]) -> None:
        while True:
            await self._clock.sleep(self._options.sample_every_s)
            await self._sample_once(samples)

    async def _sample_once(self, samples: list[ClusterSample]) -> None:
        try:
            cluster = await self._api.cluster()
        except (TurnFailure, GatewayUnusable):
            return  # a reading is missing; the next one comes
        if cluster is not None:
            at_s = self._model_time(self._clock.now())
            samples.append(ClusterSample(at_s=at_s, cluster=cluster))


def conversation_wire_id(conversation: Conversation, *, seed: int) -> str:
    """The id under which a conversation is sent."""
    return wire.safe_id(f"replay-{seed}-{conversation.id}")
