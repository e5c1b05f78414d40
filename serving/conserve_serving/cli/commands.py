"""How the processes of a cluster are called: engines of either kind, and the gateway."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from conserve_serving.cli.children import ChildSpec, Command
from conserve_serving.engines.sglang import flags as sglang
from conserve_serving.engines.sglang.flags import ENV_VARIABLE, SglangEngine, StoreSettings

#: How long engines get to end after SIGTERM: they hold nothing worth waiting for.
ENGINE_GRACE_S = 5.0
#: The same for SGLang, which looks every five seconds; its launcher ends it after twelve.
SGLANG_GRACE_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedEngine:
    """One emulated engine to start.

    Attributes:
        id: engine id; also its name in logs and messages.
        role: ``prefill``, ``decode`` or ``both``.
        profile: hardware profile it runs.
        model: model name it serves.
        speed: model seconds per wall second.
        page_tokens: tokens of a KV page.
        kv_capacity_tokens, host_capacity_tokens: None takes the profile's own.
    """

    id: str
    role: str
    profile: str
    model: str
    speed: float
    page_tokens: int
    kv_capacity_tokens: int | None = None
    host_capacity_tokens: int | None = None


EngineToStart = EmulatedEngine | SglangEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Commands:
    """How processes are called; tests put small scripted programs here."""

    engine: Callable[[EngineToStart, StoreSettings], Command]
    gateway: Callable[[Path], Command]


def engine_command(engine: EngineToStart, store: StoreSettings) -> Command:
    """Command of an engine.

    Args:
        engine: what to run.
        store: how KV is handed over; the same for all engines.
    """

    def emulated(engine: EmulatedEngine, port: int) -> list[str]:
        argv = [sys.executable, "-m", "conserve_serving.engines.emulated"]
        argv += ["--engine-id", engine.id, "--role", engine.role, "--port", str(port)]
        argv += ["--profile", engine.profile, "--model", engine.model]
        argv += ["--speed", f"{engine.speed:g}", "--page-size", str(engine.page_tokens)]
        argv += ["--store", store.path, "--ack-url", store.ack_url]
        if engine.kv_capacity_tokens is not None:
            argv += ["--kv-capacity-tokens", str(engine.kv_capacity_tokens)]
        if engine.host_capacity_tokens is not None:
            argv += ["--host-capacity-tokens", str(engine.host_capacity_tokens)]
        return [*argv, "--announce", "--exit-with-parent"]

    def launched(engine: SglangEngine, port: int) -> list[str]:
        argv = [sys.executable, "-m", "conserve_serving.engines.sglang.launch"]
        argv += ["--python", engine.python, "--host", engine.host, "--port", str(port)]
        return [*argv, "--", *sglang.server_arguments(engine, store)]

    def command(port: int) -> list[str]:
        if isinstance(engine, SglangEngine):
            return launched(engine, port)
        return emulated(engine, port)

    return command


def engine_spec(
    engine: EngineToStart,
    command: Command,
    *,
    log_path: Path,
    echo: Callable[[bytes], None] | None = None,
) -> ChildSpec:
    """How an engine's process is supervised.

    Args:
        engine: what runs.
        command: how it is called.
        log_path: where its output goes.
        echo: also given its output.
    """
    spec = ChildSpec(
        name=engine.id,
        command=command,
        port=0,
        log_path=log_path,
        grace_s=ENGINE_GRACE_S,
        echo=echo,
    )
    if isinstance(engine, SglangEngine):
        return replace(
            spec,
            port=engine.port,
            env={ENV_VARIABLE: json.dumps(sglang.environment(engine))},
            ready_timeout_s=engine.ready_timeout_s,
            slow_remedy="or allow it more time: ready_timeout_s in the tier",
            grace_s=SGLANG_GRACE_S,
        )
    return spec


def gateway_command(config: Path) -> Command:
    """Command of the gateway with this configuration file."""

    def command(port: int) -> list[str]:
        argv = [sys.executable, "-m", "conserve_serving.cli.leash", "conserve_serving.gateway"]
        return [*argv, "--config", str(config), "--port", str(port), "--announce"]

    return command


REAL_COMMANDS = Commands(engine=engine_command, gateway=gateway_command)
