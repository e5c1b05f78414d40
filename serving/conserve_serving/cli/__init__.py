"""The `conserve` command.

Exit codes: 0 it worked (Ctrl-C on `conserve up` included), 1 it failed, 2 it was called wrongly or
a file could not be used. Subcommands are imported when they are called, so `conserve --help` costs
nothing but click.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import click

from conserve_serving.cli.errors import EXIT_FAILED, EXIT_USAGE, CliError

#: Subcommand → (module, attribute, one line of help).
COMMANDS = {
    "up": ("up", "up", "Start engines and the gateway, and watch them work."),
    "engine": ("engine", "engine", "Run one engine of a cluster on the machine where it is typed."),
    "serve": ("up", "serve", "Run the gateway alone, in front of engines that run already."),
    "doctor": ("doctor", "doctor", "Say in plain words what is missing, and what to type."),
    "replay": ("replay", "replay", "Send a trace's conversations through a running gateway."),
    "simulate": ("simulate", "simulate", "Run a workload on a simulated cluster, in virtual time."),
    "compare": ("compare", "compare", "Compare policies over loads and seeds, with intervals."),
    "report": ("report", "report", "A page of load curves and comparisons, from their rows."),
    "workload": ("workload", "workload", "Show what a trace or a generated workload looks like."),
    "explain": ("explain", "explain", "Say why each turn of a conversation was placed there."),
    "reproduce": (
        "reproduce",
        "reproduce",
        "Ask the paper's claims of this scheduler, in minutes.",
    ),
    "tiers": ("tiers", "tiers", "Say on which hardware and workload which policy carries most."),
    "config": ("config", "config", "Explain every setting, or check a configuration file."),
    "clusters": ("clusters", "clusters", "List clusters to simulate, and what one can carry."),
    "profiles": ("profiles", "profiles", "List hardware profiles, their source and confidence."),
    "demo": ("demo", "demo", "An agent and a replay on an embedded cluster, in minutes."),
}


class _LazyGroup(click.Group):
    """Imports a subcommand's module when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        if cmd_name not in COMMANDS:
            return None
        module_name, attribute, _ = COMMANDS[cmd_name]
        module = importlib.import_module(f"conserve_serving.cli.{module_name}")
        command: click.Command = getattr(module, attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's signature
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_) for name, (_, _, help_) in COMMANDS.items()])


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with `conserve up`, or `conserve demo`.",
)
@click.version_option(package_name="conserve-agents", prog_name="conserve")
def cli() -> None:
    """ConServe: the conversation is the scheduling unit.

    Turn 1 is prefilled where compute is plentiful, its KV cache moves once, and the conversation
    lives on one decoder until it ends.
    """


def run(args: Sequence[str]) -> int:
    """Run the command line.

    Args:
        args: what follows `conserve`.

    Returns:
        The exit code.
    """
    try:
        result = cli.main(args=list(args), prog_name="conserve", standalone_mode=False)
    except CliError as failure:
        _tell(failure)
        return failure.exit_code
    except click.ClickException as failure:
        failure.show()
        return failure.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return EXIT_FAILED
    except ModuleNotFoundError as failure:
        package = (failure.name or "").partition(".")[0]
        if package in {"conserve_serving", "conserve_agents"}:
            raise
        click.echo(f"error: the package {package!r} is not installed", err=True)
        extra = "lab" if package in {"matplotlib", "numpy"} else "serving"
        click.echo(f"  fix: pip install 'conserve-agents[{extra}]'", err=True)
        return EXIT_FAILED
    return result if isinstance(result, int) else 0


def _tell(failure: CliError) -> None:
    if failure.detail:
        click.echo("\n".join(f"  | {line}" for line in failure.detail.splitlines()), err=True)
    click.echo(f"error: {failure.what}", err=True)
    click.echo(f"  fix: {failure.remedy}", err=True)


def main() -> None:
    """Entry point of the `conserve` command."""
    sys.exit(run(sys.argv[1:]))


__all__ = ["EXIT_FAILED", "EXIT_USAGE", "cli", "main", "run"]
