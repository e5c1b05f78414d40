"""Which conversation a LangChain or LangGraph call belongs to.

    thread_id "T", namespace              conversation          parent
    model:<u>                             T                     (none)
    tools:<u>|model:<v>   a sub-agent     T|tools:<u>           T
    tools:<u>             a tool's own    T~<digest>            T
    leaf:<u>, leaf:<v>    parallel Send   T, T~<digest>         (none), T

The last segment names the node that makes the call and changes with every step; what is before it
names the agent. The first conversation of a thread has the thread's own id wherever it is held (an
agent that is a node, a ``@task``). Inside an explicit ``conversation()`` that one takes the
thread's place.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from weakref import WeakKeyDictionary

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config, var_child_runnable_config

from conserve_agents import Conversation, current_conversation, wire
from langchain_conserve.lineage import Chain, Lineage, Place

#: Threads remembered; the one used least recently is forgotten (its turns start at its history).
MAX_THREADS: Final = 4096
#: Conversations remembered per thread.
MAX_CONVERSATIONS: Final = 64
_TASK: Final = re.compile(r":[^|]*")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CallSite:
    """What is known of a call's origin when it is made: read at once, before anything yields."""

    explicit: Conversation | None
    thread_id: str | None
    namespace: str
    step: int | None


def call_site(config: RunnableConfig | None = None) -> CallSite:
    """Read the call's origin from its own config, else from the graph it runs in."""
    merged = ensure_config(config)
    configurable = merged.get("configurable") or {}
    thread_id = configurable.get("thread_id")
    step = (merged.get("metadata") or {}).get("langgraph_step")
    return CallSite(
        explicit=current_conversation(),
        thread_id=None if thread_id in (None, "") else str(thread_id),
        namespace=str(configurable.get("checkpoint_ns") or ""),
        step=step if isinstance(step, int) else None,
    )


@dataclass(slots=True, eq=False)
class _Thread:
    """The lineages and conversations of one thread, or of one explicit conversation."""

    lineages: dict[str, Lineage] = field(default_factory=dict)
    conversations: OrderedDict[str, Conversation] = field(default_factory=OrderedDict)

    def resolve(
        self, root_id: str, namespace: str, step: int | None, chain: Chain
    ) -> tuple[str, str | None]:
        """Ids of the conversation a call belongs to and of the one that started it."""
        agent, _, last = namespace.rpartition("|")
        node, _, task = last.partition(":")
        place = Place(namespace=agent, node=node, task=task, step=step)
        begun = any(self.lineages.values())
        main_id = _agent_id(root_id, agent) if begun else root_id
        # Without task ids: an agent that is a node of a larger graph goes on from run to run
        # there, with new task ids and the old messages.
        lineage = self.lineages.setdefault(_TASK.sub("", agent), Lineage())
        id_ = lineage.resolve(main_id, place, chain, main_is_free=not self._known(main_id))
        if id_ == root_id:
            return id_, None
        above_id = _agent_id(root_id, agent.rpartition("|")[0]) if id_ == main_id else main_id
        return id_, above_id if self._known(above_id) else root_id

    def _known(self, id_: str) -> bool:
        return any(id_ in lineage for lineage in self.lineages.values())


class Conversations:
    """Every conversation that calls of this process belong to, in bounded memory. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: OrderedDict[tuple[str, str], _Thread] = OrderedDict()
        self._explicit: WeakKeyDictionary[Conversation, _Thread] = WeakKeyDictionary()

    def resolve(
        self, site: CallSite, messages: Sequence[Mapping[str, Any]], *, gateway: str
    ) -> Conversation | None:
        """The conversation of a call; None when nothing names one.

        Args:
            site: see :func:`call_site`.
            messages: what is sent, in the API's form.
            gateway: its address: equal thread ids at two gateways are two threads.
        """
        if site.explicit is not None:
            if site.explicit.ended:
                return site.explicit  # which tags nothing any more, and says so
            return self._of_explicit(site.explicit, site, Chain(messages))
        if site.thread_id is None:
            return None
        chain = Chain(messages)
        root_id = wire.safe_id(site.thread_id)
        with self._lock:
            thread = self._threads.setdefault((gateway, site.thread_id), _Thread())
            self._threads.move_to_end((gateway, site.thread_id))
            if len(self._threads) > MAX_THREADS:
                self._threads.popitem(last=False)
            id_, parent_id = thread.resolve(root_id, site.namespace, site.step, chain)
            known = thread.conversations
            if id_ not in known:
                known[id_] = Conversation(id_, parent_id=parent_id)
            known.move_to_end(id_)
            if len(known) > MAX_CONVERSATIONS:
                known.popitem(last=False)
            return known[id_]

    def forget(self, thread_id: str, *, gateway: str) -> list[Conversation]:
        """Forget a thread; returns its conversations, sub-agents first, for the caller to end."""
        with self._lock:
            thread = self._threads.pop((gateway, thread_id), None)
        if thread is None:
            return []
        return sorted(thread.conversations.values(), key=lambda c: -len(c.id))

    def _of_explicit(self, talk: Conversation, site: CallSite, chain: Chain) -> Conversation:
        # A conversation entered inside a tool starts at the tool: what is above it is not its own.
        opened = talk.opened_in.get(var_child_runnable_config) if talk.opened_in else None
        base = str((((opened or {}).get("configurable")) or {}).get("checkpoint_ns") or "")
        inside = site.namespace.startswith(f"{base}|") if base else True
        namespace = site.namespace[len(base) :].lstrip("|") if inside else ""
        with self._lock:
            thread = self._explicit.setdefault(talk, _Thread())
            id_, parent_id = thread.resolve(talk.id, namespace, site.step, chain)
        return talk if id_ == talk.id else talk.child(id_, parent_id=parent_id)


def _agent_id(root_id: str, agent: str) -> str:
    return wire.safe_id(f"{root_id}|{agent}") if agent else root_id
