"""Where a conversation's id may stand in a request: every source known, in groups, in order.

A source is named ``header:<name>``, ``body:<field>``, ``baggage``, ``previous_response`` or
``lineage``; a group stands for its members. ``identity.order`` lists either; what is not listed is
not looked at. The names double as metric labels, so their number is bounded by this module and the
configuration.

Not among them: ``user`` and ``safety_identifier``, which name people; and X-Correlation-ID and
X-Client-Request-ID, which many clients (Claude Code among them) make anew for every request.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Final

from conserve_serving.gateway.request import IDENTITY_FIELDS

HEADER: Final = "header:"
BODY: Final = "body:"
BAGGAGE: Final = "baggage"
PREVIOUS_RESPONSE: Final = "previous_response"
LINEAGE: Final = "lineage"
ALIASES: Final = "aliases"

#: RFC 9110: a header's name is a token.
HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


def _headers(*names: str) -> tuple[str, ...]:
    return tuple(HEADER + name for name in names)


#: Groups in the order they are believed by default (after the configuration's aliases).
GROUPS: Final[dict[str, tuple[str, ...]]] = {
    # NVIDIA Dynamo; SGLang Model Gateway
    "routers": _headers("x-dynamo-session-id", "x-smg-routing-key"),
    # Claude Code; Codex, whose sub-agents share a session and have threads of their own;
    # OpenCode; Amp; xAI
    "agents": _headers(
        "x-claude-code-session-id",
        "thread-id",
        "thread_id",
        "session-id",
        "session_id",
        "x-session-affinity",
        "x-opencode-session",
        "x-amp-thread-id",
        "x-grok-conv-id",
    ),
    "generic": _headers(
        "x-session-id",
        "x-litellm-session-id",
        "x-litellm-trace-id",
        "helicone-session-id",
        "agent-session-id",
    ),
    # Names a turn, so it says more than a hint to the cache, and less than any session's name.
    PREVIOUS_RESPONSE: (PREVIOUS_RESPONSE,),
    "body": tuple(BODY + name for name in IDENTITY_FIELDS),
    BAGGAGE: (BAGGAGE,),
    LINEAGE: (LINEAGE,),
}
DEFAULT_ORDER: Final = (ALIASES, *GROUPS)


def expand(order: Sequence[str], aliases: Iterable[str] = ()) -> list[str]:
    """Single sources in the order they are believed, each once.

    Args:
        order: groups and single sources; ``aliases`` stands for the headers of that setting.
        aliases: names of further headers.

    Raises:
        ValueError: an unknown name, or one after ``lineage``, which always answers.
    """
    found: dict[str, None] = {}
    for name in order:
        if name == ALIASES:
            members: Iterable[str] = (HEADER + alias.lower() for alias in aliases)
        elif name in GROUPS:
            members = GROUPS[name]
        else:
            members = (_single(name),)
        found.update(dict.fromkeys(members))
    sources = list(found)
    if LINEAGE in sources and sources[-1] != LINEAGE:
        raise ValueError(f'"{LINEAGE}" always finds something: put it last')
    return sources


def _single(name: str) -> str:
    header = name.removeprefix(HEADER)
    if header != name:
        if not HEADER_NAME.fullmatch(header):
            raise ValueError(f"{name!r} is no header's name: letters, digits and hyphens")
        return HEADER + header.lower()
    if name in GROUPS["body"]:
        return name
    known = [*DEFAULT_ORDER, *GROUPS["body"]]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(known)} or header:<name>"
    raise ValueError(f"no such source {name!r}: {hint}")
