"""`conserve explain`: why each turn was placed where it was, in plain words.

Two sources say the same: a running gateway, which remembers the latest turns of a conversation,
and a decision journal, which has all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from conserve_serving.cli.errors import BadInputError, GatewayAnsweredError
from conserve_serving.cli.gateway_http import (
    DEFAULT_GATEWAY,
    ConversationDetail,
    ConversationStatus,
    EnergyDetail,
    GatewayHttp,
    TurnDetail,
)
from conserve_serving.cli.journal import read_journal
from conserve_serving.cli.reasons import say_fallback, say_outcome, say_reason, say_transfer

#: Conversations listed at most when none is named.
LISTED = 50


@click.command()
@click.argument("conversation", required=False)
@click.option(
    "--gateway",
    default=DEFAULT_GATEWAY,
    envvar="CONSERVE_BASE_URL",
    show_default=True,
    help="URL of a running gateway.",
)
@click.option(
    "--api-key",
    envvar="OPENAI_API_KEY",
    help="Key the conversation was sent with: conversations are kept apart by key."
    "  [default: $OPENAI_API_KEY]",
)
@click.option(
    "--journal",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A decision journal (setting gateway.decision_journal) instead of a running gateway.",
)
def explain(
    *, conversation: str | None, gateway: str, api_key: str | None, journal: Path | None
) -> None:
    """Say why each turn of CONVERSATION was placed where it was.

    Without CONVERSATION the conversations known are listed.
    """
    if journal is not None:
        conversations = read_journal(journal)
        if conversation is None:
            click.echo("\n".join(listing(conversations.values(), source=str(journal))))
            return
        matching = [c for c in conversations.values() if c.id == conversation]
        if not matching:
            raise BadInputError(
                f"{journal} has no conversation {conversation!r}",
                remedy=f"`conserve explain --journal {journal}` lists those it has",
            )
        for one in matching:
            click.echo("\n".join(explained(one)))
        return
    http = GatewayHttp(gateway, timeout_s=10.0, api_key=api_key)
    if conversation is None:
        known = http.conversations(limit=LISTED)
        click.echo("\n".join(listing(known, source=http.url)))
        return
    try:
        detail = http.conversation(conversation)
    except GatewayAnsweredError as failure:
        if failure.status != 404:
            raise
        raise BadInputError(
            f"the gateway at {http.url} does not know the conversation {conversation!r}",
            remedy="`conserve explain` lists those it knows; was another --api-key used?",
        ) from failure
    click.echo("\n".join(explained(detail, speed=http.cluster().speed or 1.0)))


def listing(
    conversations: Iterable[ConversationStatus | ConversationDetail], *, source: str
) -> list[str]:
    """One line for each conversation.

    Args:
        conversations: in the order to list them.
        source: where they come from.
    """
    lines = [
        f"{c.id}  {c.state}, {_count(c.turns, 'turn')}, on {c.decode_engine or 'no engine'},"
        f" {_count(c.transfers, 'transfer')}"
        for c in conversations
    ]
    if not lines:
        return [f"{source} knows no conversation"]
    return [*lines, "", "conserve explain CONVERSATION says why each turn ran where it did"]


def explained(conversation: ConversationDetail, *, speed: float = 1.0) -> list[str]:
    """A conversation and its turns in plain words.

    Args:
        conversation: what is known of it.
        speed: engine seconds per second of its times; what is shown are engine seconds.
    """
    c = conversation
    lines = [
        f"conversation {c.id}: {c.state}, {_count(c.turns, 'turn')},"
        f" {'ran' if c.state == 'ended' else 'lives'} on {c.decode_engine or 'no engine'}"
    ]
    transfers = [
        f"{count} x {say_transfer(reason)}" for reason, count in c.transfers_by_reason.items()
    ]
    lines.append(f"  KV moved: {'; '.join(transfers) if transfers else 'never'}")
    if c.cached_token_shortfall_tokens:
        lines.append(
            f"  cache: {c.cached_token_shortfall_tokens:,} tokens that should have been cached"
            " had to be prefilled again"
        )
    if c.energy is not None and c.energy.total_j is not None:
        lines.append(f"  energy: {_joules(c.energy)}; {c.energy.source or 'nothing used yet'}")
        if c.energy.unknown_engines:
            lines.append(f"    without what ran on {', '.join(c.energy.unknown_engines)}")
    if c.recent_turns and c.recent_turns[0].index > 1:
        lines.append(f"  (turns before {c.recent_turns[0].index} are not remembered)")
    for turn in c.recent_turns:
        lines += _explained_turn(turn, speed)
    return lines


def _explained_turn(turn: TurnDetail, speed: float) -> list[str]:
    lines = [f"  turn {turn.index}: {say_outcome(turn.outcome)}"]
    lines += [f"    {say_reason(reason)}" for reason in turn.held]
    if turn.reason is not None:
        lines.append(f"    {say_reason(turn.reason)}")
    if turn.fallback is not None:
        lines.append(f"    but {say_fallback(turn.fallback)}")
    if turn.decode_engine is not None:
        where = f"decoded on {turn.decode_engine}"
        if turn.prefill_engine not in {None, turn.decode_engine}:
            where = f"prefilled on {turn.prefill_engine}, {where}"
        if turn.prompt_tokens:
            where += (
                f"; {turn.prompt_tokens:,} prompt tokens, {turn.cached_tokens or 0:,} of them from"
                f" cache; {turn.output_tokens:,} tokens out"
            )
        lines.append(f"    {where}")
    times = []
    if turn.ttft_s is not None:
        times.append(f"first token after {turn.ttft_s * speed:.3g} s")
    if turn.duration_s is not None:
        times.append(f"{turn.duration_s * speed:.3g} s in all")
    if times:
        lines.append(f"    {', '.join(times)}")
    if turn.energy is not None and turn.energy.total_j is not None:
        lines.append(f"    {_joules(turn.energy)}")
    return lines


def _joules(energy: EnergyDetail) -> str:
    text = (
        f"{energy.total_j or 0.0:.4g} J"
        f" (prefill {energy.prefill_j or 0.0:.3g}, decode {energy.decode_j or 0.0:.3g})"
    )
    return text if energy.settled else f"{text} so far"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
