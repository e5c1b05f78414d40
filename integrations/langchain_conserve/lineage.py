"""Telling the conversations of one thread apart by the messages that are sent.

A thread's namespace does not separate everything: a tool that asks the model itself, the leaves of
a ``Send`` and a summarizing step all share it with the agent they belong to. Their messages do not:
a conversation goes on by extending what was sent before.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

#: Share of a branch's bytes that a call must repeat for the branch's KV to be worth going on with.
REUSE_SHARE: Final = 0.5
#: Branches remembered per lineage; the one used least recently is forgotten.
MAX_BRANCHES: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where in a graph a call was made; all empty outside of one.

    Attributes:
        namespace: the call's checkpoint namespace without its last segment.
        node: name of the node.
        task: id of this execution of the node.
        step: the graph's step; tasks of one step run at the same time.
    """

    namespace: str = ""
    node: str = ""
    task: str = ""
    step: int | None = None


class Chain:
    """The messages of a call: a digest (8 bytes of BLAKE2b over its JSON) and a size for each."""

    __slots__ = ("keys", "size_bytes", "sizes")

    def __init__(self, messages: Iterable[Mapping[str, Any]]) -> None:
        self.keys: Final = array("Q")
        self.sizes: Final = array("Q")
        for message in messages:
            text = json.dumps(message, sort_keys=True, ensure_ascii=False, default=str)
            data = text.encode("utf-8", "surrogatepass")
            key = hashlib.blake2b(data, digest_size=8).digest()
            self.keys.append(int.from_bytes(key, "little"))
            self.sizes.append(len(data))
        self.size_bytes: Final = sum(self.sizes)

    def shared_bytes(self, other: Chain) -> int:
        """Bytes of the messages that both begin with."""
        shared = 0
        for mine, theirs, size_bytes in zip(self.keys, other.keys, self.sizes, strict=False):
            if mine != theirs:
                break
            shared += size_bytes
        return shared


@dataclass(slots=True)
class _Branch:
    chain: Chain
    place: Place

    def beside(self, place: Place) -> bool:
        """Whether a call made there runs at the same time as this branch's latest."""
        return place.step is not None and (
            self.place.step == place.step and self.place.task != place.task
        )


class Lineage:
    """The conversations (branches) of one thread, or of one sub-agent in it. Not thread-safe."""

    def __init__(self) -> None:
        self._branches: OrderedDict[str, _Branch] = OrderedDict()

    def __contains__(self, id_: str) -> bool:
        return id_ in self._branches

    def __len__(self) -> int:
        return len(self._branches)

    def resolve(self, main_id: str, place: Place, chain: Chain, *, main_is_free: bool) -> str:
        """Which conversation a call belongs to, and remember it.

        In this order: the one whose messages it repeats in full (extended or replayed); one of
        the same namespace that is not running beside it, of which it repeats enough (edited) or
        which this very node made last (rewritten); the namespace's main one, when that is free;
        else a new one.

        Args:
            main_id: the id of the namespace's main conversation.
            place: where the call was made.
            chain: the messages that are sent.
            main_is_free: whether that conversation has yet to begin.
        """
        found = (
            self._extended(chain)
            or self._edited(place, chain)
            or self._rewritten(place)
            or (main_id if main_is_free else None)
            or f"{main_id}~{_name(chain, place)}"
        )
        self._branches[found] = _Branch(chain, place)
        self._branches.move_to_end(found)
        if len(self._branches) > MAX_BRANCHES:
            self._branches.popitem(last=False)
        return found

    def _extended(self, chain: Chain) -> str | None:
        return max(
            (
                (branch.chain.size_bytes, id_)
                for id_, branch in self._branches.items()
                if branch.chain.shared_bytes(chain) == branch.chain.size_bytes > 0
            ),
            default=(0, None),
        )[1]

    def _free(self, place: Place) -> Iterable[tuple[str, _Branch]]:
        """Latest first."""
        return (
            (id_, branch)
            for id_, branch in reversed(self._branches.items())
            if branch.place.namespace == place.namespace and not branch.beside(place)
        )

    def _edited(self, place: Place, chain: Chain) -> str | None:
        shared, found = 0, None
        for id_, branch in self._free(place):
            in_common = branch.chain.shared_bytes(chain)
            if in_common > shared and in_common >= REUSE_SHARE * branch.chain.size_bytes:
                shared, found = in_common, id_
        return found

    def _rewritten(self, place: Place) -> str | None:
        same = (id_ for id_, branch in self._free(place) if branch.place.node == place.node)
        return next(same, None)


def _name(chain: Chain, place: Place) -> str:
    whole = hashlib.blake2b(place.namespace.encode("utf-8", "replace"), digest_size=6)
    whole.update(chain.keys.tobytes())
    return whole.hexdigest()
