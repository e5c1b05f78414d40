"""Which conversation a LangChain or LangGraph call belongs to.

    thread_id "T", namespace              conversation          parent
    model:<u>                             T                     (none)
    tools:<u>|model:<v>   a sub-agent     T|tools:<u>           T
    tools:<u>             a tool's own    T~<digest>            T
    leaf:<u>, leaf:<v>    parallel Send   T, T~<digest>         (none), T
    model:<u>             time travel     T~<digest>            T, or what it was forked from

The last segment names the node that makes the call and changes with every step; what is before it
names the agent. The first conversation of a thread has the thread's own id wherever it is held (an
agent that is a node, a ``@task``). Inside an explicit ``conversation()`` that one takes the
thread's place.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final
from weakref import WeakKeyDictionary

from langchain_core.messages import BaseMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config, var_child_runnable_config
from pydantic import SecretStr

from conserve_agents import Conversation, current_conversation, wire
from langchain_conserve.lineage import Branch, Chain, Lineage, Place

#: Threads remembered; the one used least recently is forgotten (its turns start at its history).
MAX_THREADS: Final = 4096
#: Conversations remembered per thread.
MAX_CONVERSATIONS: Final = 256
_TASK: Final = re.compile(r":[^|]*")

#: The thread of a run that has none; set by ``ConversationMiddleware``.
_run_thread: Final[ContextVar[str | None]] = ContextVar("conserve_run_thread", default=None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CallSite:
    """What is known of a call's origin when it is made: read at once, before anything yields."""

    explicit: Conversation | None
    thread_id: str | None
    namespace: str = ""
    step: int | None = None
    supersteps: tuple[str | None, ...] = ()
    origin: str | None = None

    @property
    def agent(self) -> str:
        """The namespace of the agent that makes the call."""
        return self.namespace.rpartition("|")[0]


def call_site(config: RunnableConfig | None = None) -> CallSite:
    """Read the call's origin from its own config, else from the graph it runs in."""
    merged = ensure_config(config)
    configurable = merged.get("configurable") or {}
    metadata = merged.get("metadata") or {}
    thread_id = configurable.get("thread_id")
    namespace = str(configurable.get("checkpoint_ns") or "")
    step = metadata.get("langgraph_step")
    step = step if isinstance(step, int) else None
    # A run that is told where to start has that checkpoint among its metadata.
    origin = metadata.get("checkpoint_id")
    return CallSite(
        explicit=current_conversation(),
        thread_id=_run_thread.get() if thread_id in (None, "") else str(thread_id),
        namespace=namespace,
        step=step,
        supersteps=_supersteps(configurable.get("checkpoint_map"), namespace, step),
        origin=str(origin) if origin and step is not None else None,
    )


def _supersteps(checkpoints: Any, namespace: str, step: int | None) -> tuple[str | None, ...]:
    """For each part of a namespace the checkpoint that its step started from: what tasks of one
    step have in common. Where a graph does not tell, the number of its step."""
    found = checkpoints if isinstance(checkpoints, dict) else {}
    parts = namespace.split("|") if namespace else []
    above = ("|".join(parts[:depth]) for depth in range(len(parts)))
    steps = [str(found[agent]) if found.get(agent) else None for agent in above]
    if steps and steps[-1] is None and step is not None:
        steps[-1] = f"step {step}"
    return tuple(steps)


def account(address: str, key: object) -> str:
    """A gateway and the tenant that a model's key makes of its calls: equal thread ids at two
    gateways, or with two keys, are two threads. A function that gives keys counts as none."""
    secret = key.get_secret_value() if isinstance(key, SecretStr) else ""
    tenant = hashlib.blake2b(secret.encode(), digest_size=8).hexdigest()
    return f"{address.rstrip('/').removesuffix('/v1')} {tenant}"


@contextlib.contextmanager
def run_thread(thread_id: str | None) -> Iterator[None]:
    """Give calls made here a thread, where they have none. Not across a ``yield``."""
    token = _run_thread.set(thread_id or _run_thread.get())
    try:
        yield
    finally:
        _run_thread.reset(token)


class Call:
    """One model call: the conversation it belongs to, until it has come back."""

    def __init__(
        self, conversation: Conversation, branch: Branch | None, lock: threading.Lock
    ) -> None:
        self.conversation: Final = conversation
        self._branch = branch
        self._lock: Final = lock

    def end(self) -> None:
        """It has come back, with an answer or without."""
        with self._lock:
            if self._branch is not None:
                self._branch.running -= 1
                self._branch = None


@dataclass(slots=True, eq=False)
class _Thread:
    """The lineages and conversations of one thread, or of one explicit conversation."""

    lineages: dict[str, Lineage] = field(default_factory=dict)
    conversations: OrderedDict[str, Conversation] = field(default_factory=OrderedDict)

    def resolve(
        self, root_id: str, site: CallSite, namespace: str, chain: Chain
    ) -> tuple[str, Branch, str | None, int | None]:
        """The conversation a call belongs to: its id, its branch, who started it, and how many
        turns it has had when it is seen first (None: its history tells)."""
        agent, _, last = namespace.rpartition("|")
        node, _, task = last.partition(":")
        place = Place(
            namespace=agent,
            node=node,
            task=task,
            step=site.step,
            supersteps=site.supersteps[-namespace.count("|") - 1 :],
            origin=site.origin,
        )
        begun = any(self.lineages.values())
        main_id = _agent_id(root_id, agent) if begun else root_id
        # Without task ids: an agent that is a node of a larger graph goes on from run to run
        # there, with new task ids and the old messages.
        lineage = self.lineages.setdefault(_TASK.sub("", agent), Lineage())
        starter = self._starter(agent, node, alone=main_id not in lineage)
        id_, branch, source = lineage.resolve(
            main_id, place, chain, main_is_free=not self._known(main_id)
        )
        if id_ == root_id:
            return id_, branch, None, None
        # What was made here is new, whatever its first prompt holds.
        turns = None if id_ == main_id else 0
        return id_, branch, source or starter or root_id, turns

    def latest(self, agent: str) -> Conversation | None:
        """The conversation that an agent used last."""
        lineage = self.lineages.get(_TASK.sub("", agent))
        found = lineage.latest(agent, but_node="") if lineage is not None else None
        return None if found is None else self.conversations.get(found)

    def _starter(self, agent: str, node: str, *, alone: bool) -> str | None:
        """Who started what is new in an agent's namespace.

        The agent's first conversation: the agent above it. Any other: the agent itself.
        """
        if alone and agent:
            agent, _, last = agent.rpartition("|")
            node = last.partition(":")[0]
        lineage = self.lineages.get(_TASK.sub("", agent))
        return lineage.latest(agent, but_node=node) if lineage is not None else None

    def _known(self, id_: str) -> bool:
        return any(id_ in lineage for lineage in self.lineages.values())


class Conversations:
    """Every conversation that calls of this process belong to, in bounded memory. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: OrderedDict[tuple[str, str], _Thread] = OrderedDict()
        self._explicit: WeakKeyDictionary[Conversation, _Thread] = WeakKeyDictionary()

    def begin(
        self, site: CallSite, messages: Sequence[BaseMessage], *, gateway: str
    ) -> Call | None:
        """Begin a call in the conversation it belongs to; None when nothing names one.

        Args:
            site: see :func:`call_site`.
            messages: what is sent.
            gateway: see :func:`account`.
        """
        if site.explicit is not None:
            if site.explicit.ended:  # which tags nothing any more, and says so
                return Call(site.explicit, None, self._lock)
            return self._in_explicit(site.explicit, site, Chain(messages))
        if site.thread_id is None:
            return None
        chain = Chain(messages)
        root_id = wire.safe_id(site.thread_id)
        with self._lock:
            key = (gateway, site.thread_id)
            thread = self._threads.setdefault(key, _Thread())
            self._threads.move_to_end(key)
            if len(self._threads) > MAX_THREADS:
                self._threads.popitem(last=False)
            id_, branch, parent_id, turns = thread.resolve(root_id, site, site.namespace, chain)
            known = thread.conversations
            if id_ not in known or known[id_].ended:  # ended, and yet it goes on
                known[id_] = Conversation(id_, parent_id=parent_id, turns=turns)
            known.move_to_end(id_)
            if len(known) > MAX_CONVERSATIONS:
                known.popitem(last=False)
            return self._call(known[id_], branch)

    def after_fork(self) -> None:
        """In a forked process: a lock that another thread held would never be free again."""
        self._lock = threading.Lock()

    def latest(self, site: CallSite, *, gateway: str) -> Conversation | None:
        """The conversation that the agent running here used last, where it has a thread."""
        if site.explicit is not None or site.thread_id is None:
            return None
        with self._lock:
            thread = self._threads.get((gateway, site.thread_id))
            return None if thread is None else thread.latest(site.agent)

    def forget(self, thread_id: str, *, gateway: str) -> list[Conversation]:
        """Forget a thread; returns its conversations, sub-agents first, for the caller to end."""
        with self._lock:
            thread = self._threads.pop((gateway, thread_id), None)
        if thread is None:
            return []
        return sorted(thread.conversations.values(), key=lambda c: -len(c.id))

    def _in_explicit(self, talk: Conversation, site: CallSite, chain: Chain) -> Call:
        # A conversation entered inside a tool starts at the tool: what is above it is not its own.
        opened = talk.opened_in.get(var_child_runnable_config) if talk.opened_in else None
        base = str((((opened or {}).get("configurable")) or {}).get("checkpoint_ns") or "")
        inside = site.namespace.startswith(f"{base}|") if base else True
        namespace = site.namespace[len(base) :].lstrip("|") if inside else ""
        with self._lock:
            thread = self._explicit.setdefault(talk, _Thread())
            id_, branch, parent_id, turns = thread.resolve(talk.id, site, namespace, chain)
            if id_ == talk.id:
                return self._call(talk, branch)
            return self._call(talk.child(id_, parent_id=parent_id, turns=turns), branch)

    def _call(self, conversation: Conversation, branch: Branch) -> Call:
        branch.running += 1
        return Call(conversation, branch, self._lock)


#: Those of this process.
known: Final = Conversations()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=known.after_fork)


def _agent_id(root_id: str, agent: str) -> str:
    return wire.safe_id(f"{root_id}|{agent}") if agent else root_id
