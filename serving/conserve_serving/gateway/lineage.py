"""Message lineage: what a prompt continues, told from its own bytes.

Two tools. `Lineage` recognises a conversation that carries no id: it remembers, for each
conversation, a chained hash of the messages sent, salted by tenant and model, and looks for the
longest one that a new prompt begins with. `PrefixMark` watches a conversation whose id is known
and tells how much of its previous prompt a new one keeps.

Both tell four cases apart: *extend* (the previous prompt plus more), *replay* (the same prompt
again: a retry), *fork* (an earlier prompt of a conversation that has moved on), *rewrite* (the
history was changed, for instance compacted).
"""

from __future__ import annotations

import enum
from array import array
from collections import OrderedDict
from dataclasses import dataclass
from itertools import takewhile
from typing import Final

from xxhash import xxh3_64_intdigest, xxh3_128_digest

from conserve_serving.core.types import ConversationId
from conserve_serving.gateway.request import Api, TurnRequest

#: A prompt without messages is cut into units of this size.
_UNIT_BYTES: Final = 1024
#: Resolution of `PrefixMark`, and the number of blocks it remembers at most.
_BLOCK_BYTES: Final = 4096
_MAX_BLOCKS: Final = 1024


class Relation(enum.StrEnum):
    """How a prompt stands to what was seen before."""

    NEW = "new"
    EXTEND = "extend"
    REPLAY = "replay"
    FORK = "fork"
    REWRITE = "rewrite"


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """What a prompt continues; ``chain`` is what to remember it by (see `Lineage.remember`)."""

    relation: Relation
    conversation: ConversationId | None
    chain: tuple[bytes, ...]


class Lineage:
    """Finds conversations by the messages their prompts begin with. Bounded: oldest forgotten.

    Args:
        max_entries: chain hashes remembered.
    """

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        # Chain hash → the conversation that sent exactly these messages, and its how-manieth.
        self._heads: OrderedDict[bytes, tuple[ConversationId, int]] = OrderedDict()
        self._latest: dict[ConversationId, int] = {}

    def __len__(self) -> int:
        return len(self._heads)

    def match(self, request: TurnRequest, *, salt: str) -> Match:
        """What ``request`` continues.

        Args:
            request: the parsed request.
            salt: tenant and model: equal messages of others never match.
        """
        chain = _chain(request, salt)
        for depth in range(len(chain) - 1, -1, -1):
            head = self._heads.get(chain[depth])
            if head is None:
                continue
            conversation, number = head
            if self._latest.get(conversation) != number:
                relation = Relation.FORK
            elif depth == len(chain) - 1:
                relation = Relation.REPLAY
            else:
                relation = Relation.EXTEND
            return Match(relation=relation, conversation=conversation, chain=chain)
        return Match(relation=Relation.NEW, conversation=None, chain=chain)

    def remember(self, conversation: ConversationId, chain: tuple[bytes, ...]) -> None:
        """Note that ``conversation`` has sent the prompt that ``chain`` stands for."""
        number = self._latest.get(conversation, 0) + 1
        self._latest[conversation] = number
        for head in chain[-2:] if len(chain) > 1 and chain[-1][:1] == _TAIL else chain[-1:]:
            self._heads[head] = (conversation, number)
            self._heads.move_to_end(head)
        while len(self._heads) > self._max_entries:
            _, (old, old_number) = self._heads.popitem(last=False)
            if self._latest.get(old) == old_number:
                del self._latest[old]

    def forget(self, conversation: ConversationId) -> None:
        """The conversation is over: what it sent no longer leads to it."""
        self._latest.pop(conversation, None)


#: Marks the hash of an incomplete last unit: text that the next prompt may continue in place.
_TAIL: Final = b"t"


def _chain(request: TurnRequest, salt: str) -> tuple[bytes, ...]:
    """Chained hashes, one for each message (or unit of a prompt) with everything before it."""
    link = xxh3_128_digest(salt.encode() + b"\0" + request.tools)
    chain: list[bytes] = []
    if request.api is Api.CHAT:
        for message in request.messages():
            link = xxh3_128_digest(link + xxh3_128_digest(message))
            chain.append(link)
        return tuple(chain)
    # Without its closing quote or bracket, a prompt begins like the one that continues it.
    content = memoryview(request.content)[:-1]
    whole = len(content) - len(content) % _UNIT_BYTES
    for start in range(0, whole, _UNIT_BYTES):
        link = xxh3_128_digest(link + xxh3_128_digest(content[start : start + _UNIT_BYTES]))
        chain.append(link)
    chain.append(_TAIL + xxh3_128_digest(link + xxh3_128_digest(content[whole:])))
    return tuple(chain)


class PrefixMark:
    """Remembers one prompt by hashes of its blocks, to see how much of it the next one keeps.

    About 8 bytes for each 4 KiB of prompt; prompts beyond 4 MiB are compared by their first 4 MiB.
    """

    __slots__ = ("_blocks", "_length", "_tail", "_tools")

    def __init__(self, request: TurnRequest) -> None:
        # Without its closing bracket or quote, a prompt begins like the one that continues it.
        content = memoryview(request.content)[:-1]
        length = self._length = len(content)
        whole = min(length // _BLOCK_BYTES, _MAX_BLOCKS) * _BLOCK_BYTES
        self._blocks = array("Q")
        for start in range(0, whole, _BLOCK_BYTES):
            self._blocks.append(xxh3_64_intdigest(content[start : start + _BLOCK_BYTES]))
        self._tail = xxh3_64_intdigest(content[whole : whole + _BLOCK_BYTES])
        self._tools = xxh3_64_intdigest(request.tools) if request.tools else 0

    def compare(self, latest: PrefixMark, request: TurnRequest) -> tuple[Relation, int]:
        """How a new prompt stands to the one remembered here.

        Args:
            latest: the mark of ``request``.
            request: the new prompt.

        Returns:
            The relation, and how many of the remembered prompt's bytes are kept (a multiple of
            4 KiB where the history was rewritten).
        """
        if latest._tools != self._tools:
            return Relation.REWRITE, 0
        mine, theirs = self._blocks, latest._blocks
        same = theirs[: len(mine)] == mine
        if same and latest._length >= self._length:
            whole = len(mine) * _BLOCK_BYTES
            tail = min(self._length - whole, _BLOCK_BYTES)
            content = memoryview(request.content)
            if xxh3_64_intdigest(content[whole : whole + tail]) == self._tail:
                again = latest._length == self._length
                return (Relation.REPLAY if again else Relation.EXTEND), self._length
        pairs = zip(mine, theirs, strict=False)
        kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return Relation.REWRITE, kept * _BLOCK_BYTES
