"""Message lineage: what a prompt continues, told from its own bytes.

Two tools. `Lineage` recognises a conversation that carries no id: it remembers, for each prompt, a
chained hash of its messages, salted by tenant, model and tools, and looks for the longest one that
a new prompt begins with. `PrefixMark` watches a conversation whose id is known and tells how much
of its previous prompt a new one keeps.

Both tell cases apart: *extend* (the previous prompt plus more), *replay* (the same prompt again: a
retry), *fork* (an earlier prompt of a conversation that has moved on, continued differently) and
*rewrite* (the history was changed, for instance compacted). A rewrite without an id is recognised
by what a compaction keeps: the system prompt, and the exchange that the last prompt ended with.
A history that was replaced altogether is a new conversation: it has no KV worth finding.

Long histories are read once and decoded only where they are new: a prompt of more than
``_ANCHOR_BLOCKS`` blocks is found by the hashes of its blocks, which `PrefixMark` has anyway.
"""

from __future__ import annotations

import enum
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Final

import msgspec
from msgspec import Raw
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from conserve_serving.core.types import ConversationId
from conserve_serving.gateway.request import Api, TurnRequest

#: A prompt without messages is cut into units of this size.
_UNIT_BYTES: Final = 1024
#: Resolution of `PrefixMark`, and the number of blocks it remembers at most.
_BLOCK_BYTES: Final = 4096
_MAX_BLOCKS: Final = 1024
#: Prompts of fewer blocks are decoded whole, which takes 20 µs; longer ones are looked up by block.
_ANCHOR_BLOCKS: Final = 8
#: Prompts that share all whole blocks and differ in the last, incomplete one.
_MAX_SHARED: Final = 8
#: Conversations told apart that have sent the very same prompt.
_MAX_ALIKE: Final = 256
#: A compaction keeps the latest exchange within this many messages of its end.
_KEPT_MESSAGES: Final = 16


class Relation(enum.StrEnum):
    """How a prompt stands to what was seen before."""

    NEW = "new"
    EXTEND = "extend"
    REPLAY = "replay"
    FORK = "fork"
    REWRITE = "rewrite"


class _Role(msgspec.Struct):
    role: str = ""


_ROLE: Final = msgspec.json.Decoder(_Role)
_MESSAGES: Final = msgspec.json.Decoder(list[Raw])
_SYSTEM: Final = frozenset({"system", "developer"})
_COMMA: Final = ord(",")
#: Marks the hash of an incomplete last unit: text that the next prompt may continue in place.
_TAIL: Final = b"t"


class _Prompt:
    """One prompt of a conversation, as it is remembered.

    Attributes:
        links: the chained hashes it is found by; of messages one.
        root: hash of the salt, the tools and the system message.
        last, last_role: hash and role of its last message.
        evidence: hashes of the exchange it ends with; a later prompt that has one of them is a
            rewrite of this one.
        anchor: hash of its whole blocks; None for a short one.
        length, tail: its length in bytes, and the hash of what follows its whole blocks.
    """

    __slots__ = (
        "anchor",
        "conversation",
        "evidence",
        "last",
        "last_role",
        "length",
        "links",
        "root",
        "tail",
    )

    def __init__(self, links: tuple[bytes, ...]) -> None:
        self.links = links
        self.conversation: ConversationId | None = None
        self.root = b""
        self.last = b""
        self.last_role = ""
        self.evidence: tuple[bytes, ...] = ()
        self.anchor: bytes | None = None
        self.length = 0
        self.tail = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """What a prompt continues; ``prompt`` is what to remember (see `Lineage.remember`)."""

    relation: Relation
    conversation: ConversationId | None
    prompt: _Prompt


class PrefixMark:
    """Remembers one prompt by hashes of its blocks, to see how much of it the next one keeps.

    About 8 bytes for each 4 KiB of prompt; prompts beyond 4 MiB are compared by their first 4 MiB.
    """

    __slots__ = ("_tools", "blocks", "length", "tail")

    def __init__(self, request: TurnRequest) -> None:
        # Without its closing bracket or quote, a prompt begins like the one that continues it.
        content = memoryview(request.content)[:-1]
        length = self.length = len(content)
        whole = min(length // _BLOCK_BYTES, _MAX_BLOCKS) * _BLOCK_BYTES
        self.blocks = array("Q")
        for start in range(0, whole, _BLOCK_BYTES):
            self.blocks.append(xxh3_64_intdigest(content[start : start + _BLOCK_BYTES]))
        self.tail = xxh3_64_intdigest(content[whole : whole + _BLOCK_BYTES])
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
        mine, theirs = self.blocks, latest.blocks
        same = theirs[: len(mine)] == mine
        if same and latest.length >= self.length:
            whole = len(mine) * _BLOCK_BYTES
            tail = min(self.length - whole, _BLOCK_BYTES)
            content = memoryview(request.content)
            if xxh3_64_intdigest(content[whole : whole + tail]) == self.tail:
                again = latest.length == self.length
                return (Relation.REPLAY if again else Relation.EXTEND), self.length
        pairs = zip(mine, theirs, strict=False)
        kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return Relation.REWRITE, kept * _BLOCK_BYTES


class Lineage:
    """Finds conversations by the messages their prompts begin with. Bounded: oldest forgotten.

    Args:
        max_prompts: prompts remembered, each in 0.5 to 1.5 kB.
        running: whether a conversation has a turn running: one whose answer is still to come is
            continued by nobody.
    """

    def __init__(
        self,
        max_prompts: int,
        running: Callable[[ConversationId], bool] = lambda _: False,
    ) -> None:
        self._max_prompts = max_prompts
        self._running = running
        self._prompts: OrderedDict[_Prompt, None] = OrderedDict()
        #: Several where conversations began alike: samples of one prompt, for instance.
        self._by_link: dict[bytes, list[_Prompt]] = {}
        self._by_anchor: dict[bytes, list[_Prompt]] = {}
        self._by_evidence: dict[bytes, _Prompt] = {}
        self._latest: dict[ConversationId, _Prompt] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def match(self, request: TurnRequest, mark: PrefixMark, *, salt: str) -> Match:
        """What ``request`` continues.

        Args:
            request: the parsed request.
            mark: its mark.
            salt: tenant and model: equal messages of others never match.
        """
        seed = xxh3_128_digest(salt.encode() + b"\0" + request.tools)
        if request.api is not Api.CHAT:
            return self._look_up(_units(request, seed), None, ())
        anchors = _Anchors(mark, seed)
        known = self._anchored(request, anchors)
        if known is not None:
            rest = memoryview(request.content)[known.length :]
            messages = _MESSAGES.decode(b"[" + rest[1:]) if len(rest) > 1 else []
            return self._continue(anchors, known, messages)
        return self._continue(anchors, None, request.messages(), seed)

    def remember(self, conversation: ConversationId, match: Match) -> None:
        """Note that ``conversation`` has sent the prompt of ``match``."""
        prompt = match.prompt
        prompt.conversation = conversation
        before = self._latest.get(conversation)
        if before is not None:
            self._drop_evidence(before)
            if before.links == prompt.links:  # a retry takes the place of what it repeats
                self._drop(before)
        self._latest[conversation] = prompt
        self._prompts[prompt] = None
        for link in prompt.links:
            alike = self._by_link.setdefault(link, [])
            alike.append(prompt)
            if len(alike) > _MAX_ALIKE:
                self._evict(alike[0])
        for digest in prompt.evidence:
            self._by_evidence[digest] = prompt
        if prompt.anchor is not None:
            shared = self._by_anchor.setdefault(prompt.anchor, [])
            shared.append(prompt)
            if len(shared) > _MAX_SHARED:
                del shared[0]
        while len(self._prompts) > self._max_prompts:
            self._evict(next(iter(self._prompts)))

    def forget(self, conversation: ConversationId) -> None:
        """The conversation is over: what it sent no longer leads to it."""
        latest = self._latest.pop(conversation, None)
        if latest is not None:
            self._drop_evidence(latest)

    # --- looking ------------------------------------------------------------------------------
    def _anchored(self, request: TurnRequest, anchors: _Anchors) -> _Prompt | None:
        """The longest known prompt that ``request`` begins with, found without decoding it."""
        content = memoryview(request.content)
        end = len(content) - 1
        for blocks in range(anchors.blocks, _ANCHOR_BLOCKS - 1, -1):
            start = blocks * _BLOCK_BYTES
            best: _Prompt | None = None
            for prompt in self._by_anchor.get(anchors.of(blocks), ()):
                length = prompt.length
                if prompt.conversation not in self._latest:
                    continue  # over: a shorter prompt may be of one that is not
                if length > end or (best is not None and length <= best.length):
                    continue
                boundary = length == end or content[length] == _COMMA
                if boundary and xxh3_64_intdigest(content[start:length]) == prompt.tail:
                    best = prompt
            if best is not None:
                return best
        return None

    def _continue(
        self,
        anchors: _Anchors,
        known: _Prompt | None,
        messages: Sequence[Raw],
        seed: bytes = b"",
    ) -> Match:
        """Chain the messages that follow ``known`` (all of them without one), and look them up."""
        link, root, last = (known.links[0], known.root, known.last) if known else (seed, seed, b"")
        if known is None and messages and _role(messages[0]) in _SYSTEM:
            root = xxh3_128_digest(seed + xxh3_128_digest(messages[0]))
        digests = [last] if known else []
        links: list[bytes] = [link] if known else []
        for message in messages:
            digest = xxh3_128_digest(message)
            link = xxh3_128_digest(link + digest)
            digests.append(digest)
            links.append(link)
        match = self._look_up(links, root, digests)
        prompt = match.prompt
        roles = [known.last_role] if known else []
        roles += map(_role, messages[-2:])
        prompt.root, prompt.last, prompt.last_role = root, digests[-1], roles[-1]
        if known is not None and not messages:
            prompt.evidence = known.evidence
        elif len(digests) > 1:
            prompt.evidence = _evidence(root, digests, roles[-2:])
        anchors.put_on(prompt)
        return match

    def _look_up(
        self, links: Sequence[bytes], root: bytes | None, digests: Sequence[bytes]
    ) -> Match:
        """The relation of the prompt that ``links`` lead to.

        Args:
            links: chained hashes, shortest prefix first.
            root: where its evidence is rooted; None for prompts without messages.
            digests: hashes of the messages behind the links.
        """
        whole = root is None and len(links) > 1 and links[-1][:1] == _TAIL
        prompt = _Prompt(tuple(links[-2:] if whole else links[-1:]))
        for depth in range(len(links) - 1, -1, -1):
            known, latest = self._best(links[depth])
            if known is None:
                continue
            if latest:
                relation = Relation.REPLAY if depth == len(links) - 1 else Relation.EXTEND
                return Match(relation=relation, conversation=known, prompt=prompt)
            rewritten = self._rewritten(root, digests[depth + 1 :])
            if rewritten is not None:
                return Match(relation=Relation.REWRITE, conversation=rewritten, prompt=prompt)
            return Match(relation=Relation.FORK, conversation=known, prompt=prompt)
        rewritten = self._rewritten(root, digests)
        relation = Relation.NEW if rewritten is None else Relation.REWRITE
        return Match(relation=relation, conversation=rewritten, prompt=prompt)

    def _best(self, link: bytes) -> tuple[ConversationId | None, bool]:
        """The conversation that has sent exactly this, and whether it was its latest prompt.

        Of several, one that has not moved on, and rather one that waits for nothing.
        """
        best: tuple[ConversationId | None, bool] = None, False
        for prompt in self._by_link.get(link, ()):
            conversation = prompt.conversation
            latest = None if conversation is None else self._latest.get(conversation)
            if conversation is None or latest is None:
                continue  # over
            if latest is not prompt:
                best = best if best[0] is not None else (conversation, False)
            elif not self._running(conversation):
                return conversation, True
            elif not best[1]:
                best = conversation, True
        return best

    def _rewritten(self, root: bytes | None, digests: Sequence[bytes]) -> ConversationId | None:
        """The conversation whose latest exchange is among the last of these messages."""
        if root is None or not self._by_evidence:
            return None
        for at in range(len(digests) - 1, max(-1, len(digests) - 1 - _KEPT_MESSAGES), -1):
            found = self._by_evidence.get(xxh3_128_digest(root + digests[at]))
            if found is None and at:
                pair = root + digests[at - 1] + digests[at]
                found = self._by_evidence.get(xxh3_128_digest(pair))
            if found is not None:
                return found.conversation
        return None

    # --- forgetting ---------------------------------------------------------------------------
    def _evict(self, prompt: _Prompt) -> None:
        self._drop(prompt)
        if prompt.conversation is not None and self._latest.get(prompt.conversation) is prompt:
            self.forget(prompt.conversation)

    def _drop(self, prompt: _Prompt) -> None:
        self._prompts.pop(prompt, None)
        for link in prompt.links:
            _remove(self._by_link, link, prompt)
        if prompt.anchor is not None:
            _remove(self._by_anchor, prompt.anchor, prompt)

    def _drop_evidence(self, prompt: _Prompt) -> None:
        for digest in prompt.evidence:
            if self._by_evidence.get(digest) is prompt:
                del self._by_evidence[digest]


def _remove(index: dict[bytes, list[_Prompt]], key: bytes, prompt: _Prompt) -> None:
    shared = index.get(key, [])
    if prompt in shared:
        shared.remove(prompt)
    if not shared:
        index.pop(key, None)


class _Anchors:
    """Hashes of a prompt's first so many whole blocks, each with everything before it."""

    __slots__ = ("_mark", "_seed", "_view", "blocks")

    def __init__(self, mark: PrefixMark, seed: bytes) -> None:
        self._mark = mark
        self._seed = seed
        self._view = memoryview(mark.blocks).cast("B")
        # Beyond what the mark covers, its blocks no longer say where a prompt ends.
        covered = mark.length < (_MAX_BLOCKS + 1) * _BLOCK_BYTES
        self.blocks = len(mark.blocks) if covered else 0

    def of(self, blocks: int) -> bytes:
        """The hash of the first ``blocks`` blocks."""
        return xxh3_128_digest(self._seed + self._view[: 8 * blocks])

    def put_on(self, prompt: _Prompt) -> None:
        """Let ``prompt`` be found by its blocks, where it is long enough."""
        if self.blocks >= _ANCHOR_BLOCKS:
            prompt.anchor = self.of(self.blocks)
            prompt.length, prompt.tail = self._mark.length, self._mark.tail


def _evidence(root: bytes, digests: Sequence[bytes], roles: Sequence[str]) -> tuple[bytes, ...]:
    """What a later prompt is recognised as a rewrite of this one by.

    The last two messages together, if one of them is the model's or a tool's: words that a user or
    a test says to everybody name no conversation. A tool's result alone, which carries the id of
    its call.
    """
    found: list[bytes] = []
    if "assistant" in roles or "tool" in roles:
        found.append(xxh3_128_digest(root + digests[-2] + digests[-1]))
    if roles[-1] == "tool":
        found.append(xxh3_128_digest(root + digests[-1]))
    return tuple(found)


def _role(message: Raw) -> str:
    try:
        return _ROLE.decode(message).role
    except msgspec.DecodeError:  # an engine will say what it thinks of it
        return ""


def _units(request: TurnRequest, seed: bytes) -> list[bytes]:
    """Chained hashes of a prompt's units, each with everything before it."""
    link = seed
    chain: list[bytes] = []
    # Without its closing quote or bracket, a prompt begins like the one that continues it.
    content = memoryview(request.content)[:-1]
    whole = len(content) - len(content) % _UNIT_BYTES
    for start in range(0, whole, _UNIT_BYTES):
        link = xxh3_128_digest(link + xxh3_128_digest(content[start : start + _UNIT_BYTES]))
        chain.append(link)
    chain.append(_TAIL + xxh3_128_digest(link + xxh3_128_digest(content[whole:])))
    return chain
