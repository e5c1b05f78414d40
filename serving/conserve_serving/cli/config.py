"""`conserve config`: every setting explained, or a file checked."""

from __future__ import annotations

import textwrap
from itertools import groupby
from pathlib import Path

import click

from conserve_serving.cli.cluster_file import read_config
from conserve_serving.cli.sglang_tiers import engine_ids
from conserve_serving.gateway.config import Setting
from conserve_serving.gateway.config import explain as explain_settings
from conserve_serving.gateway.config_checks import DEFAULT_PROFILE


@click.command()
@click.option(
    "--explain",
    "explain_",
    is_flag=True,
    help="Show every setting: type, default and meaning, in the form of a configuration file.",
)
@click.option(
    "--check",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Check a configuration file and say what it starts.",
)
def config(explain_: bool, path: Path | None) -> None:
    """Explain every setting, or check a configuration file."""
    if explain_ == (path is not None):
        raise click.UsageError("give either --explain or --check FILE")
    if path is None:
        click.echo("\n".join(explained(list(explain_settings()))))
        return
    checked = read_config(path)
    click.echo(f"{path}: fine")
    for tier, ids in zip(checked.tiers, engine_ids(checked), strict=True):
        profile = tier.profile or DEFAULT_PROFILE
        what = {
            "emulated": f"emulated, {profile}",
            "sglang": f"SGLang, {tier.model}" + "".join(f", {url}" for url in tier.urls),
            "attach": ", ".join(tier.urls),
        }[tier.engine]
        click.echo(f"  {tier.role.value:8} {' '.join(ids)} ({what})")


def explained(settings: list[Setting]) -> list[str]:
    """The settings as the lines of a configuration file that says what each of them means.

    Args:
        settings: in the file's order.
    """
    lines = [
        "# Every setting of ConServe with its default; a file needs only what differs.",
        "# A line behind # has no default value to write: the setting is unset, or required.",
    ]
    for section, group in groupby(settings, key=lambda setting: setting.section):
        lines += ["", section]
        for setting in group:
            lines += textwrap.wrap(
                f"{setting.description} ({setting.type})",
                width=96,
                initial_indent="# ",
                subsequent_indent="#   ",
            )
            lines.append(_assignment(setting))
    return lines


def _assignment(setting: Setting) -> str:
    if setting.default in {"unset", "required"}:
        return f"# {setting.name} =   # {setting.default}"
    return f"{setting.name} = {setting.default}"
