"""Mooncake's traces: JSON lines of single requests, joined into conversations.

A row is ``{"timestamp": ms, "input_length": n, "output_length": m, "hash_ids": [...]}``. Each hash
id names one block of 512 prompt tokens *and everything before it*, so two prompts share exactly
the blocks whose ids they share. The last block is partial, and therefore not shared, unless the
length is a multiple of 512.

Joining. A request continues the latest earlier request whose whole full blocks are a prefix of its
own, if that one is not continued yet and has at least ``MIN_SHARED_BLOCKS`` full blocks (one
block alone is as often a system prompt that everybody shares). The longest such match wins. The
trace does not show whether the answer came back in the next prompt; a chat sends it, so the whole
previous context is taken as kept where the new prompt has room for it, else the full blocks.

The traces recorded when requests were sent, not the clients' gaps, so a turn has ``at_s``: it is
sent at its recorded distance from the conversation's arrival, or when the previous answer is
there, whichever is later.

Shared prefixes. Conversations whose first prompts begin with the same block share a prefix of that
block's name, each as many blocks of it as another's first prompt begins with, too. Where such
conversations part and others go on together, more is taken as shared than is: one name stands for
the whole tree under its first block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final

import msgspec

from conserve_serving.replay.conversations import Conversation, Turn
from conserve_serving.replay.errors import TraceError
from conserve_serving.replay.rows import Count, convert, json_object

#: Tokens per block in Mooncake's published traces (FAST '25 trace release, README).
BLOCK_TOKENS: Final = 512
MIN_SHARED_BLOCKS: Final = 2


class _Request(msgspec.Struct):
    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Count
    output_length: Count
    hash_ids: list[int]


@dataclass(slots=True)
class _Open:
    """A conversation being joined."""

    id: str
    arrival_ms: float
    blocks: list[int]  # full blocks of the first prompt
    turns: list[Turn] = field(default_factory=list)


def join_requests(lines: Iterable[tuple[int, str]], path: Path) -> Iterator[Conversation]:
    """Conversations from Mooncake rows, in the order of their arrival.

    Joining needs the whole file: it is read to its end before the first conversation comes.

    Raises:
        TraceError: a row has wrong fields, lengths that do not fit its blocks, or goes back in
            time.
    """
    conversations: list[_Open] = []
    # Id of a request's last full block -> its conversation, while nothing continues it.
    tails: dict[int, _Open] = {}
    last_ms = 0.0
    for number, line in lines:
        fields = json_object(line, path=path, number=number)
        request = convert(fields, _Request, path=path, number=number)
        blocks = -(-request.input_length // BLOCK_TOKENS)
        if len(request.hash_ids) != blocks:
            raise TraceError(
                f"hash_ids has {len(request.hash_ids)} blocks, but input_length "
                f"{request.input_length} makes {blocks} blocks of {BLOCK_TOKENS} tokens. "
                "Use the trace as published.",
                path=path,
                line=number,
            )
        if request.timestamp < last_ms:
            raise TraceError(
                f"timestamp {request.timestamp:g} is before the previous row's {last_ms:g}. "
                "Sort the rows by timestamp.",
                path=path,
                line=number,
            )
        last_ms = request.timestamp
        joined = _take_longest(tails, request)
        full = request.input_length // BLOCK_TOKENS
        if joined is None:
            joined = _Open(
                id=f"mooncake-{number}",
                arrival_ms=request.timestamp,
                blocks=request.hash_ids[:full],
            )
            conversations.append(joined)
        joined.turns.append(_turn(request, joined))
        if full >= MIN_SHARED_BLOCKS:
            tails[request.hash_ids[full - 1]] = joined
    begun_with = Counter(block for open_ in conversations for block in open_.blocks)
    for open_ in conversations:
        # A block's id names all before it, so the blocks that others begin with come first.
        shared = sum(begun_with[block] > 1 for block in open_.blocks)
        yield Conversation(
            id=open_.id,
            turns=tuple(open_.turns),
            arrival_s=open_.arrival_ms / 1000.0,
            shared_prefix_tokens=shared * BLOCK_TOKENS,
            shared_prefix_name=f"block {open_.blocks[0]}" if shared else "",
        )


def _take_longest(tails: dict[int, _Open], request: _Request) -> _Open | None:
    for index in range(len(request.hash_ids) - 1, MIN_SHARED_BLOCKS - 2, -1):
        joined = tails.pop(request.hash_ids[index], None)
        if joined is not None:
            return joined
    return None


def _turn(request: _Request, joined: _Open) -> Turn:
    kept = 0
    at_s = None
    if joined.turns:
        previous = joined.turns[-1]
        full_tokens = previous.input_tokens // BLOCK_TOKENS * BLOCK_TOKENS
        kept = previous.context_tokens
        if kept > request.input_length:
            kept = min(full_tokens, request.input_length)
        at_s = (request.timestamp - joined.arrival_ms) / 1000.0
    return Turn(
        input_tokens=request.input_length,
        new_input_tokens=request.input_length - kept,
        output_tokens=request.output_length,
        at_s=at_s,
    )
