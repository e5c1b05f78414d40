"""`conserve workload`: what there is to simulate or to replay, and what it looks like."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import click
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from conserve_serving.cli.errors import EXIT_USAGE
from conserve_serving.cli.params import FiniteRange
from conserve_serving.cli.render import duration, quantity
from conserve_serving.lab.describe import describe as figures_of
from conserve_serving.lab.errors import WorkloadError
from conserve_serving.lab.pool import Pool
from conserve_serving.lab.workloads import Answers, Split, WorkloadSpec
from conserve_serving.replay.generator import recipes
from conserve_serving.replay.session import GENERATED
from conserve_serving.replay.traces import TraceFormat

_POSITIVE = FiniteRange(min=0, min_open=True)
_AT_LEAST_ONE = click.IntRange(min=1)
_Command = TypeVar("_Command", bound=Callable[..., object])
#: Cells of the bar that shows where the tokens are.
_BAR_CELLS = 56


def cap_options(command: _Command) -> _Command:
    """Options that say which part of a trace is used; their names are fields of a spec."""
    options = (
        click.option(
            "--format",
            "trace_format",
            type=click.Choice([str(name) for name in TraceFormat]),
            help="How the trace is written; told by its content if left out.",
        ),
        click.option(
            "--pool",
            "pool_size",
            type=_AT_LEAST_ONE,
            metavar="N",
            help="The trace's first N conversations only; how many are generated (else 1000).",
        ),
        click.option(
            "--split",
            type=click.Choice([str(name) for name in Split]),
            default=str(Split.ALL),
            show_default=True,
            help="One of two halves, told by a hash of the conversations' names.",
        ),
        click.option("--max-turns", type=_AT_LEAST_ONE, help="The first K turns of each only."),
        click.option(
            "--max-context",
            "max_context_tokens",
            type=_AT_LEAST_ONE,
            metavar="TOKENS",
            help="A conversation ends before the turn that exceeds this.",
        ),
        click.option(
            "--max-gap",
            "max_gap_s",
            type=FiniteRange(min=0),
            metavar="SECONDS",
            help="Shorten longer gaps to this.",
        ),
        click.option("--scale", type=_POSITIVE, help="Multiply the trace's token counts."),
        click.option(
            "--until-reset",
            is_flag=True,
            help="Conversations end before the first turn that drops half of its context.",
        ),
        click.option(
            "--answers",
            type=click.Choice([str(name) for name in Answers]),
            default=str(Answers.RETURNED),
            show_default=True,
            help="Whether answers that the next prompt has room for count as kept, or as recorded.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


class _UnusableError(click.ClickException):
    """A trace or an option cannot be used; the text names the field and the remedy."""

    exit_code = EXIT_USAGE


@click.group()
def workload() -> None:
    """What there is to simulate or to replay, and what it looks like."""


@workload.command(name="list")
def list_() -> None:
    """List the workloads that can be generated without any trace."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 1, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, recipe in recipes().items():
        about = Text.assemble(recipe.about, "\n", (f"from {recipe.source}", "dim"))
        table.add_row(f"{GENERATED}{name}", about)
    Console().print(table)
    click.echo(f"`conserve workload describe {GENERATED}NAME` shows what one looks like.")


@workload.command()
@click.argument("trace")
@cap_options
@click.option("--json", "as_json", is_flag=True, help="Print all figures as JSON instead.")
def describe(*, trace: str, as_json: bool, **caps: Any) -> None:
    """Show what a workload looks like: turns, tokens, appends, gaps, resets, sharing.

    TRACE is a file (JSON lines, Mooncake's JSON lines or CSV; plain or gzip), or generated:NAME;
    `conserve workload list` names those there are.
    """
    try:
        spec = WorkloadSpec(source=trace, **caps)
        figures = figures_of(Pool.load(spec))
    except WorkloadError as failure:
        raise _UnusableError(str(failure)) from failure
    if as_json:
        click.echo(json.dumps({**figures, "spec": asdict(spec.pool_key)}, indent=1))
        return
    Console().print(rendered(figures))


def rendered(figures: dict[str, Any]) -> RenderableType:
    """The figures as a person wants to read them.

    Args:
        figures: of :func:`conserve_serving.lab.describe.describe`.
    """
    facts = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    for name, text in _facts(figures):
        facts.add_row(name, text)
    parts: list[RenderableType] = [
        Text(_headline(figures), style="bold"),
        Text(),
        _distributions(figures),
        Text(),
        Text("tokens to compute", style="bold"),
        _bar(figures),
        Text(),
        _growth(figures),
        Text(),
        facts,
    ]
    parts += [Text(f"note: {note}", style="yellow") for note in _notes(figures)]
    return Group(*parts)


def _headline(f: dict[str, Any]) -> str:
    agents = f["sub_agents"]["conversations"]
    among = f" ({agents:,} sub-agents)" if agents else ""
    return f"{f['name']}: {f['conversations']:,} conversations{among}, {f['turns']:,} turns"


_COLUMNS = ("mean", "p5", "p50", "p95", "p99", "max")


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column(first, style="bold", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _distributions(f: dict[str, Any]) -> Table:
    table = _table("in tokens", *_COLUMNS)
    work = f["work_tokens"]
    rows: list[tuple[str, dict[str, Any], Callable[[float], str]]] = [
        ("turns (number)", f["turns_per_conversation"], quantity),
        ("first prompt", f["first_input_tokens"], quantity),
        ("appended by a tail turn", f["appended_tokens"], quantity),
        ("answer", f["output_tokens"], quantity),
        ("context at the end", f["context_tokens"], quantity),
        ("prefill per conversation", work["prefill"], quantity),
        ("answers per conversation", work["output"], quantity),
        ("gap before a tail turn", f["gap_s"], _seconds),
        ("gaps per conversation", f["gap_s_per_conversation"], _seconds),
    ]
    for name, values, say in rows:
        if say is _seconds and not values["max"]:
            continue  # the facts below say that there are none
        table.add_row(name, *("–" if values[c] is None else say(values[c]) for c in _COLUMNS))
    return table


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g}s" if seconds < 10 else duration(seconds)


def _bar(f: dict[str, Any]) -> RenderableType:
    """Where the tokens are: first prompts, small and large appends, answers."""
    prefill, output = (
        f["work_tokens"][kind]["mean"] * f["conversations"] for kind in ("prefill", "output")
    )
    first = f["first_turn_share"] * prefill
    large = f["large_appends"]["tokens"]
    limit = f"{f['large_appends']['threshold_tokens']:,}"
    parts = [
        ("█", "blue", "first prompts", first),
        ("▓", "cyan", f"appends up to {limit}", prefill - first - large),
        ("▒", "magenta", f"appends above {limit}", large),
        ("░", "yellow", "answers", output),
    ]
    total = prefill + output
    bar = Text()
    legend = Table.grid(padding=(0, 3, 0, 0))
    items = []
    ends = 0
    reached = 0.0
    for cell, style, name, tokens in parts:
        reached += tokens / total
        bar.append(cell * (round(_BAR_CELLS * reached) - ends), style)
        ends = round(_BAR_CELLS * reached)
        items.append(Text.assemble((cell, style), f" {name}, {_percent(tokens / total)}"))
    for pair in (items[:2], items[2:]):
        legend.add_row(*pair)
    return Padding(Group(bar, legend), (0, 0, 0, 2), expand=False)


def _growth(f: dict[str, Any]) -> Table:
    by_turn = f["context_by_turn"]
    table = _table("context after turn", *by_turn)
    for share in ("p50", "p95"):
        table.add_row(share, *(quantity(v[share]) for v in by_turn.values()))
    table.add_row("conversations", *(f"{v['n']:,}" for v in by_turn.values()))
    return table


def _facts(f: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("first turns", _first_turns(f)),
        ("large appends", _large_appends(f["large_appends"])),
        ("resets", _resets(f["resets"])),
        ("shared prefixes", _shared(f["shared_prefixes"])),
        ("sub-agents", _agents(f["sub_agents"])),
        ("arrivals", _arrivals(f["recorded_arrivals"])),
    ] + ([] if f["gap_s"]["max"] else [("gaps", "none recorded")])


def _first_turns(f: dict[str, Any]) -> str:
    cold, warm = f["first_turn_share"], f["first_turn_share_warm"]
    text = f"{_percent(cold)} of uncached prefill"
    if warm != cold:
        text += f", {_percent(warm)} where shared prefixes are cached"
    return f"{text}; {_percent(f['first_turn_share_per_conversation']['p50'])} in the median one"


def _large_appends(large: dict[str, Any]) -> str:
    if not large["turns"]:
        return f"no turn appends more than {large['threshold_tokens']:,} tokens"
    return (
        f"{_percent(large['share_of_tail_turns'])} of tail turns append more than "
        f"{large['threshold_tokens']:,} tokens, and hold "
        f"{_percent(large['share_of_tail_tokens'])} of tail tokens"
    )


def _resets(resets: dict[str, Any]) -> str:
    if not resets["turns"]:
        text = "none"
    else:
        text = (
            f"{resets['turns']:,} ({_percent(resets['share_of_tail_turns'])} of tail turns) in "
            f"{resets['conversations']:,} conversations; medians: of a context of "
            f"{quantity(resets['context_before_tokens']['p50'])} "
            f"{_percent(resets['kept_share']['p50'])} is kept, and "
            f"{quantity(resets['appended_tokens']['p50'])} appended"
        )
    trimmed = resets["trimmed_turns"]
    return f"{text}; {trimmed:,} other turns drop some of their context" if trimmed else text


def _shared(shared: dict[str, Any]) -> str:
    if not shared["conversations"]:
        return "not recorded"
    return (
        f"{shared['conversations_sharing']:,} conversations begin as another does, with "
        f"{shared['prefixes_of_several']:,} prefixes; a prefix has "
        f"{quantity(shared['tokens']['p50'])} tokens (median)"
    )


def _agents(agents: dict[str, Any]) -> str:
    if not agents["conversations"]:
        return "none"
    return f"{agents['conversations']:,}, called by {agents['parents']:,} conversations"


def _arrivals(recorded: dict[str, Any] | None) -> str:
    if recorded is None:
        return "not recorded"
    rate = recorded["rate_per_s"]
    span = duration(recorded["span_s"])
    return f"recorded over {span}" + ("" if rate is None else f", {rate:.3g} per second")


def _notes(f: dict[str, Any]) -> list[str]:
    caps = f["caps"]
    notes = []
    if caps["scale"] is not None:
        notes.append(f"token counts are the trace's, times {caps['scale']:g}")
    for key, text in (
        ("cut_by_max_turns", "conversations lost later turns to --max-turns"),
        ("cut_by_context", "conversations were cut before they outgrow --max-context"),
        ("dropped_by_context", "conversations were left out: their first turn outgrows it"),
        ("gaps_shortened", "gaps were shortened to --max-gap"),
        ("turns_after_reset_cut", "turns from a first reset on were cut"),
        ("sub_agents_left_out", "sub-agents were left out with the turns that call them"),
        (
            "answers_returned",
            "turns count the previous answer as new; it is taken as kept, since their prompts"
            " have room for it (--answers recorded does not)",
        ),
    ):
        if caps[key]:
            notes.append(f"{caps[key]:,} {text}")
    return notes


def _percent(share: float | None) -> str:
    if share is None:
        return "–"
    digits = 0 if share == 0 or share >= 0.0995 else 1
    return f"{100 * share:.{digits}f}%"  # no space: lines break there
