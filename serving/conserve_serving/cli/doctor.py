"""`conserve doctor`: what is missing on a machine or in a running cluster, and what to type."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path

import click

from conserve_serving.cli.cluster_file import read_config
from conserve_serving.cli.doctor_cluster import EngineApi, check_cluster
from conserve_serving.cli.doctor_machine import Machine, check_machine
from conserve_serving.cli.errors import EXIT_FAILED, EXIT_OK
from conserve_serving.cli.findings import Finding, as_lines, verdict, works
from conserve_serving.cli.gateway_http import GatewayHttp
from conserve_serving.engines.client import EngineClient

_TIMEOUT_S = 5.0


@click.command()
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A cluster's configuration file: can this machine run what it describes?",
)
@click.option(
    "--engine",
    type=click.Choice(["sglang", "emulated"]),
    help="As for `conserve up`: what tiers run that do not attach to running engines.",
)
@click.option("--url", help="A running gateway: is everything there that it needs of its engines?")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def doctor(*, config_path: Path | None, engine: str | None, url: str | None, as_json: bool) -> int:
    """Say in plain words what is missing, and what to type.

    Without options: could this machine run real engines? Exit code 0: yes, all is well; 1:
    something would not work; 2: called wrongly, or the file cannot be used.
    """
    given = config_path is not None or engine is not None
    config = read_config(config_path, engine=engine) if given else None
    findings: list[Finding] = []
    if config is not None or url is None:
        findings += check_machine(config, Machine())
    if url is not None:
        gateway = config.gateway if config is not None else None
        client = GatewayHttp(
            url, timeout_s=_TIMEOUT_S, api_key=gateway.admin_token if gateway else None
        )
        engine_key = gateway.engine_api_key if gateway else None

        def connect(address: str) -> EngineApi:
            return EngineClient(address, api_key=engine_key, timeout_s=_TIMEOUT_S)

        findings += asyncio.run(check_cluster(client.url, client.cluster, connect))
    if as_json:
        rows = [dataclasses.asdict(finding) for finding in findings]
        click.echo(json.dumps({"ok": works(findings), "findings": rows}, ensure_ascii=False))
    else:
        click.echo("\n".join([*as_lines(findings), verdict(findings)]))
    return EXIT_OK if works(findings) else EXIT_FAILED
