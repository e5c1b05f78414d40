"""Where an id is believed, in which order, and what goes with it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_agents import wire
from conserve_serving.gateway.config import Config, IdentitySection
from conserve_serving.gateway.identity import IdentityResolver, Tags
from conserve_serving.gateway.request import Api, parse_turn
from conserve_serving.gateway.sources import DEFAULT_ORDER, GROUPS, LINEAGE, expand


def resolve(
    headers: dict[str, str] | list[tuple[str, str]],
    body: dict[str, Any] | None = None,
    *,
    order: tuple[str, ...] = DEFAULT_ORDER,
    aliases: tuple[str, ...] = (),
    previous: str | None = None,
) -> Tags:
    asked = {"model": "m", "messages": [{"role": "user", "content": "x"}], **(body or {})}
    request = parse_turn(Api.CHAT, json.dumps(asked).encode())
    pairs = headers.items() if isinstance(headers, dict) else headers
    raw = [(name.lower().encode(), value.encode()) for name, value in pairs]
    resolver = IdentityResolver(expand(order, aliases))
    return resolver.resolve(raw, request.identity, previous=previous)


HEADERS = [s.removeprefix("header:") for g in GROUPS.values() for s in g if s.startswith("header:")]


@pytest.mark.parametrize("first", range(len(HEADERS) - 1))
def test_headers_are_believed_in_their_order(first: int) -> None:
    pairs = [(HEADERS[first + 1], "later"), (HEADERS[first], "earlier")]
    for sent in (pairs, pairs[::-1]):
        tags = resolve(sent)
        assert (tags.conversation, tags.source) == ("earlier", f"header:{HEADERS[first]}")


@pytest.mark.parametrize(
    ("order", "conversation", "source"),
    [
        (DEFAULT_ORDER, "alias", "header:x-alias"),
        (DEFAULT_ORDER[1:], "from-header", "header:x-session-id"),
        (("body", "generic"), "from-body", "body:prompt_cache_key"),
        (("baggage", "body", "generic"), "from-baggage", "baggage"),
        (("previous_response", "generic"), "before", "previous_response"),
        (("header:X-Mine", "generic"), "mine", "header:x-mine"),
        (("aliases", "generic"), "alias", "header:x-alias"),
        (("body:metadata", "generic"), "from-metadata", "body:metadata.session_id"),
        (("body:session_id", "baggage"), "from-baggage", "baggage"),
        (("routers", "lineage"), None, ""),
        ((), None, ""),
    ],
)
def test_the_order_is_the_configurations(
    order: tuple[str, ...], conversation: str | None, source: str
) -> None:
    headers = {
        "x-session-id": "from-header",
        "x-mine": "mine",
        "x-alias": "alias",
        "baggage": "session.id=from-baggage",
    }
    body = {"prompt_cache_key": "from-body", "metadata": {"session_id": "from-metadata"}}
    tags = resolve(headers, body, order=order, aliases=("X-Alias",), previous="before")
    assert (tags.conversation, tags.source) == (conversation, source)


@pytest.mark.parametrize("blank", ["\u00a0", "\u0085", "\u3000"])
def test_what_only_looks_like_nothing_is_hashed_like_anything_unprintable(blank: str) -> None:
    tags = resolve({"x-session-id": blank, "x-parent-session-id": f"\u00a0{blank}"})
    assert tags.conversation is not None and tags.parent is not None
    assert wire.is_legal_id(tags.conversation) and wire.is_legal_id(tags.parent)
    agent = {"x-claude-code-session-id": "s", "x-claude-code-agent-id": blank}
    assert resolve(agent).conversation not in ("s", "s/")


def test_a_stored_response_says_more_than_a_hint_to_the_cache() -> None:
    tags = resolve({}, {"prompt_cache_key": "shared by many"}, previous="one")
    assert (tags.conversation, tags.source) == ("one", "previous_response")


def test_our_own_header_needs_no_order() -> None:
    assert resolve({wire.CONVERSATION_ID: "c"}, order=()).source == "conserve"


def test_sources_are_known_or_refused() -> None:
    for section in (IdentitySection(), IdentitySection(order=("generic",)), Config().identity):
        assert expand(section.order)
    assert expand(("generic", "header:x-session-id"))[0] == "header:x-session-id"
    assert expand(("header:X-Session-ID", "generic"))[0] == "header:x-session-id"
    assert len(expand(("header:X-Session-ID", "generic"))) == len(GROUPS["generic"])
    for order, says in (
        (("agnets",), "did you mean 'agents'"),
        (("body:sesion_id",), "did you mean 'body:session_id'"),
        (("user",), "no such source"),
        (("body:user",), "no such source"),
        (("lineage", "body"), "put it last"),
        (("header:",), "no header's name"),
        (("header:a b",), "no header's name"),
    ):
        with pytest.raises(ValueError, match=says):
            expand(order)
    assert IdentityResolver(expand(("body",))).lineage is False
    assert IdentityResolver(expand(("body", LINEAGE))).lineage is True


# --- tenants, parents, ends ------------------------------------------------------------------
def test_the_same_key_is_the_same_tenant_wherever_it_stands() -> None:
    keys = [
        {"authorization": "Bearer k"},
        {"authorization": "bearer  k"},
        {"x-api-key": "k"},
        {"api-key": "k"},
    ]
    tenants = {resolve(key).tenant for key in keys}
    assert len(tenants) == 1
    assert resolve({"x-api-key": "other"}).tenant not in tenants
    assert resolve({}).tenant == ""


@pytest.mark.parametrize(
    ("headers", "conversation", "parent"),
    [
        ({"x-claude-code-session-id": "s"}, "s", None),
        ({"x-claude-code-session-id": "s", "x-claude-code-agent-id": "a"}, "s/a", "s"),
        (
            {
                "x-claude-code-session-id": "s",
                "x-claude-code-agent-id": "a",
                "x-claude-code-parent-agent-id": "b",
            },
            "s/a",
            "s/b",
        ),
        ({"x-session-id": "s", "x-claude-code-agent-id": "a"}, "s", None),
        ({"thread-id": "t", "x-codex-parent-thread-id": "p"}, "t", "p"),
        ({"thread-id": "t", "x-codex-parent-thread-id": "t"}, "t", None),
        ({"x-session-affinity": "t", "x-parent-session-id": "p"}, "t", "p"),
        (
            {
                "x-dynamo-session-id": "t",
                "x-parent-session-id": "q",
                "x-dynamo-parent-session-id": "p",
            },
            "t",
            "p",
        ),
        ({"x-dynamo-session-id": "t", "x-dynamo-parent-session-id": " "}, "t", None),
        ({wire.CONVERSATION_ID: "c", wire.PARENT_ID: "p", "x-parent-session-id": "q"}, "c", "p"),
        ({"thread-id": "t", wire.PARENT_ID: "p", "x-codex-parent-thread-id": "q"}, "t", "p"),
    ],
)
def test_parents(headers: dict[str, str], conversation: str, parent: str | None) -> None:
    tags = resolve(headers)
    assert (tags.conversation, tags.parent) == (conversation, parent)


@pytest.mark.parametrize(
    ("user_id", "conversation"),
    [
        ("user_0a_account_11-22_session_8f14e45f-ceea", "8f14e45f-ceea"),
        ('{"device_id": "d", "session_id": "8f14e45f"}', "8f14e45f"),
        ('{"device_id": "d"}', None),
        ('{"session_id": 7}', None),
        ("{" * 5000, None),
        ("user_0a_account_11_session_", None),
        ("my_session_of_work", None),
        ("ada@example.com", None),
        (7, None),
    ],
)
def test_a_users_id_counts_only_where_a_session_is_in_it(
    user_id: Any, conversation: str | None
) -> None:
    tags = resolve({}, {"metadata": {"user_id": user_id}})
    assert tags.conversation == conversation
    assert tags.source == ("body:metadata.user_id" if conversation else "")


@given(
    st.dictionaries(
        st.sampled_from([*HEADERS, "baggage", "x-dynamo-session-final", "authorization"]),
        st.text(st.characters(max_codepoint=0x2FF), max_size=300),
    ),
    st.dictionaries(
        st.sampled_from(
            ["session_id", "session_params", "conversation", "metadata", "prompt_cache_key"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=300),
            lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["id", "x"]), inner),
            max_leaves=5,
        ),
    ),
)
def test_whatever_others_send_ids_are_legal_and_labels_bounded(
    headers: dict[str, str], body: dict[str, Any]
) -> None:
    tags = resolve(headers, body)
    for id in (tags.conversation, tags.parent):
        assert id is None or wire.is_legal_id(id)
    labels = {"", "baggage", "body:session_params.id", "body:session_params.session_id"}
    labels |= {"body:conversation.id", "body:metadata.session_id", "body:metadata.user_id"}
    labels |= {f"header:{name}" for name in HEADERS} | set(GROUPS["body"])
    assert tags.source in labels
