"""`conserve profiles`: the hardware profiles that come with the package."""

from __future__ import annotations

import click

from conserve_serving.cli.errors import BadInputError
from conserve_serving.cli.render import quantity
from conserve_serving.engines.errors import ProfileError
from conserve_serving.engines.profile import (
    PARTS,
    Confidence,
    HardwareProfile,
    PowerLevel,
    list_profiles,
    load_profile,
)


@click.command()
@click.argument("name", required=False)
def profiles(name: str | None) -> None:
    """List hardware profiles, their source and confidence; with NAME, every part of one."""
    if name is None:
        for known in list_profiles():
            click.echo("\n".join(summary(load_profile(known))))
        return
    try:
        profile = load_profile(name)
    except ProfileError as failure:
        raise BadInputError(
            str(failure), remedy="`conserve profiles` lists the hardware profiles there are"
        ) from failure
    click.echo("\n".join([*summary(profile), "", *parts(profile), "", *watts(profile)]))


def summary(profile: HardwareProfile) -> list[str]:
    """A profile in a few lines: what it is, what it can do, where that is from."""
    speeds = profile.speeds()
    gpus = f"{profile.tensor_parallel} x {profile.gpu}"
    confidence = []
    for grade in Confidence:
        names = [name for name in PARTS if profile.parts[name].confidence is grade]
        if names:
            confidence.append(f"{grade.value}: {', '.join(names)}")
    return [
        f"{profile.name}: {profile.model} on {gpus}",
        f"  {quantity(profile.kv_capacity_tokens)} KV tokens on the device,"
        f" {quantity(profile.host_capacity_tokens)} in host memory;"
        f" prefill {quantity(speeds.prefill_tokens_per_s)} tokens/s,"
        f" decode step {speeds.decode_step_s * 1e3:.3g} ms alone",
        f"  {'; '.join(confidence)}",
        f"  {profile.source}",
    ]


def parts(profile: HardwareProfile) -> list[str]:
    """Confidence and source of every part."""
    rows = [(name, profile.parts[name]) for name in PARTS]
    return [f"  {name:14} {part.confidence.value:10} {part.source}" for name, part in rows]


def watts(profile: HardwareProfile) -> list[str]:
    """Power of one board by what it does, at both ends of its band and in its middle."""
    levels = {level: profile.power_at(level) for level in PowerLevel}
    rows = {
        "idle": [power.idle_w for power in levels.values()],
        "prefill": [power.prefill_w for power in levels.values()],
        "decode, batch 1": [power.decode_w(1) / power.boards for power in levels.values()],
        "decode, full": [power.decode_ps_w for power in levels.values()],
    }
    head = f"  {'watts per board':17}" + "".join(f"{level.value:>6}" for level in levels)
    return [
        head,
        *(f"  {name:17}" + "".join(f"{value:6.0f}" for value in row) for name, row in rows.items()),
    ]
