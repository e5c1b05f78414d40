"""What `conserve up` shows: pure functions from the gateway's status to text.

``screen`` is the live view (rich renderables), ``line`` the same in one line for a log or a pipe.
Both read nothing but their arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from conserve_serving.cli.gateway_http import ClusterStatus, ConversationStatus, EngineStatus

#: Rows shown at most: the live view stays within a common terminal's height.
ENGINES_SHOWN = 16
CONVERSATIONS_SHOWN = 8
NOTICES_SHOWN = 4
#: Lines of the view beside engines, conversations and notices: headers, gaps, totals, hint.
OTHER_LINES = 13
BAR_CELLS = 14

_STATE_STYLE = {"ready": "green", "draining": "yellow", "joining": "yellow"}
_PHASE_STYLE = {"prefill": "magenta", "handoff": "yellow", "decode": "cyan", "held": "red"}


def screen(
    cluster: ClusterStatus | None,
    conversations: Sequence[ConversationStatus],
    *,
    url: str,
    problem: str | None = None,
    notices: Sequence[str] = (),
    height: int | None = None,
) -> RenderableType:
    """The live view.

    Args:
        cluster: the latest status; None before the first one.
        conversations: open conversations, most recently active first.
        url: where the gateway listens.
        problem: why the status is not current, if it is not.
        notices: what happened last, oldest first.
        height: lines of the terminal; conversations give way first.
    """
    notices = notices[-NOTICES_SHOWN:]
    parts: list[RenderableType] = [_header(cluster, url)]
    if problem:
        parts.append(Text(f"status not current: {problem}", style="bold red"))
    if cluster is not None:
        parts += [_engines(cluster.engines), Text()]
        rows = CONVERSATIONS_SHOWN
        if height is not None:
            others = OTHER_LINES + min(len(cluster.engines), ENGINES_SHOWN) + len(notices)
            rows = max(1, min(rows, height - others))
        parts += [_conversations(cluster, conversations[:rows]), Text(), _totals(cluster)]
    parts += [Text(notice, "yellow", no_wrap=True, overflow="ellipsis") for notice in notices]
    parts.append(Text("Ctrl-C drains and stops", style="dim"))
    return Group(*parts)


def line(cluster: ClusterStatus) -> str:
    """The status in one plain line."""
    engines = cluster.engines
    up = sum(engine.is_up for engine in engines)
    hosts = [engine for engine in engines if engine.tier == "decode"] or engines
    held = " ".join(f"{engine.id} {_share(engine):.0%}" for engine in hosts)
    counters = cluster.counters
    outcomes = counters.turns_by_outcome
    parts = [
        f"engines {up}/{len(engines)} up",
        f"conversations {cluster.gateway.open_conversations}",
        f"waiting turns {cluster.gateway.waiting_turns}",
        f"KV held {held or '-'}",
        f"turns finished {outcomes.get('finished', 0)}",
        *(f"{name} {count}" for name, count in outcomes.items() if name != "finished" and count),
        f"transfers {sum(counters.transfers_by_reason.values())}",
    ]
    energy = total_energy(engines)
    return " | ".join(parts if energy is None else [*parts, f"energy {energy}"])


def total_energy(engines: Sequence[EngineStatus]) -> str | None:
    """Joules of all engines with their source; None where no engine measures any."""
    known = [engine for engine in engines if engine.energy_j is not None]
    if not known:
        return None
    joules = sum(engine.energy_j or 0.0 for engine in known)
    sources = sorted({engine.energy_source or "source not named" for engine in known})
    missing = len(engines) - len(known)
    note = f"; {missing} engine{'s' * (missing > 1)} unknown" if missing else ""
    return f"{quantity(joules)}J ({'; '.join(sources)}{note})"


def quantity(value: float) -> str:
    """A number in at most five characters: ``950``, ``12.3k``, ``4.56M``.

    Args:
        value: zero or more.
    """
    for unit in ("", "k", "M", "G"):
        digits = f"{value:.0f}" if not unit or value >= 99.95 else f"{value:.3g}"
        if float(digits) < 1000:
            return f"{digits}{unit}"
        value /= 1000
    return f"{value:.0f}T"


def duration(seconds: float) -> str:
    """A duration as people write it: ``8s``, ``3m12s``, ``2h05m``."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _header(cluster: ClusterStatus | None, url: str) -> Text:
    text = Text.assemble(("ConServe ", "bold"), (url, "bold cyan"))
    if cluster is None:
        return text.append("  waiting for the first status …", style="dim")
    gateway = cluster.gateway
    text.append(f"\npolicy {gateway.policy}, {gateway.tier_mode} tiers")
    if cluster.speed is not None and cluster.speed != 1.0:
        text.append(f", time x{cluster.speed:g}")
    text.append(f", up {duration(gateway.uptime_s)}")
    return text.append("  DRAINING", style="bold yellow") if gateway.draining else text


def _table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")


def _engines(engines: Sequence[EngineStatus]) -> RenderableType:
    if not engines:
        return Text("no engine has joined: turns are answered with 503 until one does", "red")
    table = _table()
    for name in ("engine", "tier", "state"):
        table.add_column(name, no_wrap=True)
    table.add_column("KV on the device", no_wrap=True)
    for name in ("held/capacity", "parked", "run", "wait", "convs"):
        table.add_column(name, justify="right", no_wrap=True)
    down_first = sorted(engines, key=lambda engine: engine.is_up)[:ENGINES_SHOWN]
    for engine in sorted(down_first, key=lambda e: (e.tier != "prefill", len(e.id), e.id)):
        cells: list[str | Text] = [Text("-", "dim"), "-", "-", "-", "-"]
        if engine.is_up:
            held = f"{_amount(engine.kv_held_tokens)}/{_amount(engine.kv_capacity_tokens)}"
            loads = (engine.parked_tokens, engine.running, engine.queued)
            cells = [_bar(_share(engine)), held, *map(_amount, loads)]
        state = Text(engine.state, _STATE_STYLE.get(engine.state, "bold red"))
        conversations = _amount(engine.conversations)
        table.add_row(Text(engine.id, "bold"), engine.tier, state, *cells, conversations)
    notes = [
        Text(f"{engine.id} {engine.state}: {engine.note}", "red", no_wrap=True, overflow="ellipsis")
        for engine in down_first
        if engine.note and not engine.is_up
    ][:NOTICES_SHOWN]
    if len(engines) > ENGINES_SHOWN:
        up = sum(engine.is_up for engine in engines)
        more = f"… and {len(engines) - ENGINES_SHOWN} more; {up} of {len(engines)} are up"
        notes.append(Text(more, "dim"))
    return Group(table, *notes)


def _conversations(
    cluster: ClusterStatus, conversations: Sequence[ConversationStatus]
) -> RenderableType:
    gateway = cluster.gateway
    title = f"conversations: {gateway.open_conversations} open"
    if gateway.waiting_turns:
        title += f", {gateway.waiting_turns} turns waiting for room"
    if not conversations:
        return Text(title)
    table = _table()
    table.title, table.title_justify, table.title_style = title, "left", ""
    table.add_column("conversation", no_wrap=True, overflow="ellipsis", max_width=28)
    table.add_column("phase", no_wrap=True)
    table.add_column("pinned to", no_wrap=True)
    for name in ("turns", "context", "transfers", "idle"):
        table.add_column(name, justify="right", no_wrap=True)
    # The latest active, but in an order that does not jump about from one look to the next.
    for conversation in sorted(conversations, key=lambda c: c.id):
        phase = conversation.phase
        table.add_row(
            # rich would read [ ] in an id as markup
            Text(conversation.id),
            Text(phase, _PHASE_STYLE.get(phase, "dim" if phase == "idle" else "")),
            conversation.decode_engine or "-",
            str(conversation.turns),
            quantity(conversation.context_tokens),
            str(conversation.transfers),
            duration(conversation.idle_s) if conversation.idle_s is not None else "-",
        )
    more = gateway.open_conversations - len(conversations)
    return Group(table, Text(f"… and {more} more", style="dim")) if more > 0 else table


def _totals(cluster: ClusterStatus) -> RenderableType:
    counters = cluster.counters
    rows = [
        ("turns", by_reason(counters.turns_by_outcome)),
        ("placed", by_reason(counters.placements_by_reason)),
        ("transfers", by_reason(counters.transfers_by_reason)),
    ]
    if any(counters.moves_by_reason.values()):
        rows.append(("moved", by_reason(counters.moves_by_reason)))
    if any(counters.fallbacks_by_reason.values()):
        rows.append(("fallbacks", by_reason(counters.fallbacks_by_reason)))
    if counters.shortfall_turns:
        short = f"{quantity(counters.cached_token_shortfall_tokens)} tokens"
        rows.append(("cache short", f"{short} in {counters.shortfall_turns} turns"))
    energy = total_energy(cluster.engines)
    if energy is not None:
        rows.append(("energy", energy))
    table = _table()
    table.show_header = False
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def by_reason(counts: Mapping[str, int]) -> str:
    """Counts, largest first: ``pinned 40, first_turn_handoff 10``; ``none`` without any."""
    some = sorted(((-count, name) for name, count in counts.items() if count))
    return ", ".join(f"{name} {-count}" for count, name in some) or "none"


def _amount(value: int | None) -> str:
    return "?" if value is None else quantity(value)


def _share(engine: EngineStatus) -> float:
    """Share of the device's KV capacity that is held, between 0 and 1."""
    if not engine.kv_capacity_tokens or not engine.kv_held_tokens:
        return 0.0
    return min(1.0, max(0.0, engine.kv_held_tokens / engine.kv_capacity_tokens))


def _bar(share: float) -> Text:
    full = round(share * BAR_CELLS)
    full = max(full, 1) if share > 0 else full
    style = "red" if share > 0.95 else "yellow" if share > 0.8 else "green"
    return Text.assemble(("█" * full, style), ("·" * (BAR_CELLS - full), "dim"), f" {share:4.0%}")
