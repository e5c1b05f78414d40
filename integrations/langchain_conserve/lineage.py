"""Telling the conversations of one thread apart by the messages that are sent.

A thread's namespace does not separate everything: a tool that asks the model itself, the leaves of
a ``Send``, a summarizing step and a run from an earlier checkpoint all share it with the agent they
belong to. Their messages do not: a conversation goes on by extending what was sent before.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage

#: Share of a branch's text that a call must repeat for the branch's KV to be worth going on with.
REUSE_SHARE: Final = 0.5
#: Branches remembered per lineage; the one used least recently is forgotten.
MAX_BRANCHES: Final = 256
_INSTRUCTIONS: Final = frozenset({"system", "developer"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where in a graph a call was made; all empty outside of one.

    Attributes:
        namespace: the call's checkpoint namespace without its last segment.
        node: name of the node.
        task: id of this execution of the node.
        step: number of the graph's step.
        supersteps: for each part of the namespace, and for the node, the step that it belongs to:
            equal for tasks that run at the same time.
        origin: the earlier checkpoint that the run was started from (time travel).
    """

    namespace: str = ""
    node: str = ""
    task: str = ""
    step: int | None = None
    supersteps: tuple[str | None, ...] = ()
    origin: str | None = None

    def beside(self, other: Place) -> bool:
        """Whether both are, or are below, different tasks of one step."""
        mine, theirs = (f"{p.namespace}|{p.task}".split("|") for p in (self, other))
        for task, other_task, step, other_step in zip(
            mine[-len(self.supersteps) :],
            theirs[-len(other.supersteps) :],
            self.supersteps,
            other.supersteps,
            strict=False,
        ):
            if task != other_task:
                return step is not None and step == other_step
        return False

    def after(self, other: Place) -> bool:
        """Whether it is a later step of the same run, where both started at one checkpoint."""
        return (
            self.origin == other.origin
            and self.step is not None
            and other.step is not None
            and self.step > other.step
        )


class Chain:
    """The messages of a call: a hash and a number of characters for each.

    Python's own hash: a string remembers it, so a long history is not read again on every turn. It
    differs between processes, and so do chains.
    """

    __slots__ = ("answers", "instructions", "keys", "size", "sizes")

    def __init__(self, messages: Iterable[BaseMessage]) -> None:
        self.keys: Final = array("q")
        self.sizes: Final = array("Q")
        self.answers: Final = bytearray()  # which of them the model has made
        self.instructions = 0  # leading messages that instruct: many conversations share those
        for message in messages:
            kind, content, rest = message.type, message.content, ""
            if isinstance(message, AIMessage):
                kind = "ai"  # whole or in chunks
                rest = repr(message.tool_calls) if message.tool_calls else ""
            elif isinstance(message, ToolMessage):
                rest = message.tool_call_id
            elif kind in _INSTRUCTIONS and len(self.keys) == self.instructions:
                self.instructions += 1
            text = content if isinstance(content, str) else repr(content)
            self.answers.append(kind == "ai")
            self.keys.append(hash((kind, message.name, text, rest)))
            self.sizes.append(len(text) + len(rest))
        self.size: Final = sum(self.sizes)

    def shared(self, other: Chain) -> tuple[int, int]:
        """How many messages both begin with, and how long those are."""
        count = size = 0
        for mine, theirs, own_size in zip(self.keys, other.keys, self.sizes, strict=False):
            if mine != theirs:
                break
            count += 1
            size += own_size
        return count, size


@dataclass(slots=True, eq=False)
class Branch:
    """A conversation's latest call; ``running``: how many of its calls have not come back."""

    chain: Chain
    place: Place
    running: int = 0

    def goes_on(self, place: Place, chain: Chain) -> bool:
        """Whether a call made there extends or repeats this branch's latest."""
        length = len(self.chain.keys)
        if not 0 < length <= len(chain.keys) or self.chain.keys[-1] != chain.keys[length - 1]:
            return False  # the usual case, seen without comparing the rest
        if self.chain.keys != chain.keys[:length] or self.place.beside(place):
            return False
        again = length == len(chain.keys)
        if again and self.busy(place):
            return False  # the same words at the same time are another conversation
        if place.origin is None or place.origin == self.place.origin:
            return True
        # From an earlier checkpoint: on from the very end, after its answer; all else is a fork.
        return self.place.namespace == place.namespace if again else bool(chain.answers[length])

    def busy(self, place: Place) -> bool:
        """Whether a call made there cannot go on from this branch's latest: that one has not come
        back. Outside of a graph a thread is one conversation, whatever its caller does at once."""
        return self.running > 0 and bool(place.node)


class Lineage:
    """The conversations (branches) of one thread, or of one sub-agent in it. Not thread-safe."""

    def __init__(self) -> None:
        self._branches: OrderedDict[str, Branch] = OrderedDict()

    def __contains__(self, id_: str) -> bool:
        return id_ in self._branches

    def __len__(self) -> int:
        return len(self._branches)

    def resolve(
        self, main_id: str, place: Place, chain: Chain, *, main_is_free: bool
    ) -> tuple[str, Branch, str | None]:
        """Which conversation a call belongs to, and remember it.

        In this order: the one whose messages it repeats in full (extended or replayed); one of
        the same namespace of which it repeats enough (edited) or which this very node made last
        (rewritten); the namespace's main one, when that is free; else a new one. What runs at the
        same time is apart. A run from an earlier checkpoint edits and rewrites only what it has
        made itself: what it does to the rest is a fork.

        Args:
            main_id: the id of the namespace's main conversation.
            place: where the call was made.
            chain: the messages that are sent.
            main_is_free: whether that conversation has yet to begin.

        Returns:
            The conversation's id, its branch, and for a fork the id of what it was forked from.
        """
        source = None
        found = self._extended(place, chain) or self._edited(place, chain) or self._rewritten(place)
        if found is None and main_is_free:
            found = main_id
        if found is None:
            if place.origin is not None:
                source = self._closest(chain)
            found = self._new_id(main_id, place, chain)
        return found, self._remember(found, place, chain), source

    def latest(self, namespace: str, *, but_node: str) -> str | None:
        """The conversation used last in a namespace, those of one node left out."""
        return next(
            (
                id_
                for id_, branch in reversed(self._branches.items())
                if branch.place.namespace == namespace and branch.place.node != but_node
            ),
            None,
        )

    def _remember(self, id_: str, place: Place, chain: Chain) -> Branch:
        branch = self._branches.get(id_)
        if branch is None:
            branch = self._branches[id_] = Branch(chain, place)
        branch.chain, branch.place = chain, place
        self._branches.move_to_end(id_)
        if len(self._branches) > MAX_BRANCHES:
            self._branches.popitem(last=False)
        return branch

    def _extended(self, place: Place, chain: Chain) -> str | None:
        best, found = (False, 0, False), None
        for id_, branch in self._branches.items():
            if not branch.goes_on(place, chain):
                continue
            before = branch.place
            fit = (
                place.origin is not None
                and before.origin == place.origin,  # what this run has made itself
                len(branch.chain.keys),
                before.namespace == place.namespace,
            )
            if fit > best:
                best, found = fit, id_
        return found

    def _free(self, place: Place) -> Iterable[tuple[str, Branch]]:
        """Latest first."""
        return (
            (id_, branch)
            for id_, branch in reversed(self._branches.items())
            if branch.place.namespace == place.namespace
            and not branch.place.beside(place)
            and not branch.busy(place)
            and (place.origin is None or place.after(branch.place))
        )

    def _edited(self, place: Place, chain: Chain) -> str | None:
        best, found = 0, None
        for id_, branch in self._free(place):
            count, size = branch.chain.shared(chain)
            # Another node's call with the same instructions is another conversation.
            mine = branch.place.node == place.node or count > chain.instructions
            if mine and size > best and size >= REUSE_SHARE * branch.chain.size:
                best, found = size, id_
        return found

    def _rewritten(self, place: Place) -> str | None:
        same = (id_ for id_, branch in self._free(place) if branch.place.node == place.node)
        return next(same, None)

    def _closest(self, chain: Chain) -> str | None:
        best, found = 0, None
        for id_, branch in self._branches.items():
            _, size = branch.chain.shared(chain)
            if size > best:
                best, found = size, id_
        return found

    def _new_id(self, main_id: str, place: Place, chain: Chain) -> str:
        whole = hashlib.blake2b(place.namespace.encode("utf-8", "replace"), digest_size=6)
        whole.update(chain.keys.tobytes())
        while (id_ := f"{main_id}~{whole.hexdigest()}") in self._branches:
            whole.update(b"again")  # the same words, forked once more
        return id_
