"""What `conserve doctor` looks at on a machine before anything is started."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path
from typing import Final

from conserve_serving.cli.doctor_gpus import check_boards, check_engine_gpus, list_boards
from conserve_serving.cli.doctor_model import check_model
from conserve_serving.cli.errors import CliError
from conserve_serving.cli.findings import Finding, Findings, size
from conserve_serving.cli.ports import DEFAULT_PORT, is_ours, reserve_port
from conserve_serving.cli.sglang_tiers import sglang_engines
from conserve_serving.cli.store_place import (
    ENOUGH_BYTES,
    SHARED_MEMORY,
    available_memory_bytes,
)
from conserve_serving.engines.sglang.environment import (
    PythonUnusableError,
    Runner,
    probe,
    run_command,
    version_warning,
    what_is_missing,
)
from conserve_serving.engines.sglang.flags import SglangEngine
from conserve_serving.gateway.config import Config

#: Each client and each engine connection is an open file; so is every log and library.
_ENOUGH_FILES: Final = 8192
_TORCH: Final = (
    "import json, torch; print(json.dumps({'cuda': torch.version.cuda,"
    " 'devices': torch.cuda.device_count() if torch.version.cuda else 0}))"
)


def _port_is_free(host: str, port: int) -> bool:
    try:
        reserve_port(host, port).release()
    except CliError:
        return False
    return True


def _free_bytes(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """How a machine is asked; tests put other answers here.

    Attributes:
        run: runs a command.
        environ: the environment that engines would inherit.
        open_files: how many files a process may have open.
        memory_bytes: memory that programs can still take.
        port_is_free: whether a host's port can be listened on.
        is_ours: whether a host is this machine.
        free_bytes: what is free on a folder's file system; None: there is none.
        shared: the file system in shared memory.
    """

    run: Runner = run_command
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    open_files: Callable[[], int] = lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    memory_bytes: Callable[[], int | None] = available_memory_bytes
    port_is_free: Callable[[str, int], bool] = _port_is_free
    is_ours: Callable[[str], bool] = is_ours
    free_bytes: Callable[[Path], int | None] = _free_bytes
    shared: Path = SHARED_MEMORY


def check_machine(config: Config | None, machine: Machine) -> list[Finding]:
    """Look at this machine.

    Args:
        config: what is to run here; None: asks what could.
        machine: how it is asked.
    """
    findings = _check_ourselves(config, machine)
    if config is None:
        wanted = [
            SglangEngine(id="", role="both", model="", served_model_name="", python=sys.executable)
        ]
    else:
        everywhere = sglang_engines(config, environ=machine.environ)
        wanted = [engine for engine in everywhere if machine.is_ours(engine.host)]
        if not wanted:
            return findings
    findings += _check_environments(wanted, machine)
    weights: dict[str, int] = {}
    if config is not None:
        findings += _check_models(wanted, machine, weights)
    findings += _check_gpus(config, wanted, machine, weights)
    if config is not None:
        findings += _check_memory(wanted, machine)
        findings += _check_addresses(wanted, machine)
        findings += _check_store(config, machine)
    return findings


def _check_ourselves(config: Config | None, machine: Machine) -> list[Finding]:
    into = Findings("ConServe")
    into.ok(f"ConServe {metadata.version('conserve-agents')}, Python {platform.python_version()}")
    files = machine.open_files()
    if files < _ENOUGH_FILES:
        into.warn(
            f"a process may have {files} files open; the gateway alone takes "
            "gateway.max_connections (4096) clients",
            "ulimit -n 65536 in the shell that starts it",
        )
    host, port = "127.0.0.1", DEFAULT_PORT
    if config is not None:
        host, port = config.gateway.host, config.gateway.port
    if port and not machine.port_is_free(host, port):
        into.warn(
            f"the gateway's port {port} on {host} is in use (a gateway that runs?)",
            f"conserve doctor --url http://127.0.0.1:{port} looks at it; else choose another "
            "gateway.port",
        )
    if config is None or all(tier.engine == "emulated" for tier in config.tiers):
        into.ok("emulated engines run here: `conserve up`")
    return into.all


def _without_gpu(engine: SglangEngine) -> bool:
    flags = list(engine.flags)
    return "--device" in flags and flags[flags.index("--device") + 1 :][:1] == ["cpu"]


def _check_environments(engines: Sequence[SglangEngine], machine: Machine) -> list[Finding]:
    into = Findings("SGLang")
    seen: set[tuple[str, str]] = set()
    for engine in engines:
        key = (engine.python, json.dumps(engine.env, sort_keys=True))
        if key in seen:
            continue
        seen.add(key)
        try:
            found = probe(engine.python, engine.env, run=machine.run)
        except PythonUnusableError as error:
            into.bad(str(error), "correct python in the tier")
            continue
        missing = what_is_missing(engine.python, found)
        if missing is not None:
            into.bad(*missing)
            continue
        warning = version_warning(found)
        if warning is not None:
            into.warn(warning, "pip install sglang==0.5.23 in its environment")
        into.ok(
            f"SGLang {found.sglang}, PyTorch {found.torch}, our store and plug-in: {engine.python} "
            f"(Python {found.python})"
        )
        if not _without_gpu(engine):
            _check_torch(engine, machine, into)
    return into.all


def _check_torch(engine: SglangEngine, machine: Machine, into: Findings) -> None:
    try:
        code, out, err = machine.run([engine.python, "-c", _TORCH], engine.env)
        answer = json.loads(out.splitlines()[-1]) if code == 0 else None
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        code, answer, err = 1, None, str(error)
    if answer is None:
        last = err.strip().splitlines()[-1:] or [f"exit code {code}"]
        into.bad(f"PyTorch cannot be loaded: {last[0]}", f"{engine.python} -c 'import torch'")
    elif answer["cuda"] is None:
        into.bad(
            "this PyTorch is built without CUDA",
            "install SGLang's own PyTorch (pip install sglang==0.5.23), or run on the CPU: flags = "
            '["--device", "cpu"]',
        )
    elif not answer["devices"]:
        into.bad(
            f"PyTorch (CUDA {answer['cuda']}) sees no GPU",
            "check `nvidia-smi`, CUDA_VISIBLE_DEVICES, and that the driver is new enough for it",
        )
    else:
        into.ok(f"PyTorch (CUDA {answer['cuda']}) sees {answer['devices']} GPUs")


def _check_models(
    engines: Sequence[SglangEngine], machine: Machine, weights: dict[str, int]
) -> list[Finding]:
    into = Findings("model")
    for model in dict.fromkeys(engine.model for engine in engines):
        env = next(engine.env for engine in engines if engine.model == model)
        found = check_model(model, {**machine.environ, **env}, into)
        if found is not None:
            weights[model] = found.bytes
    return into.all


def _check_gpus(
    config: Config | None,
    engines: Sequence[SglangEngine],
    machine: Machine,
    weights: Mapping[str, int],
) -> list[Finding]:
    into = Findings("GPUs")
    wanting = [engine for engine in engines if not _without_gpu(engine)]
    if not wanting:
        return []
    visible = machine.environ.get("CUDA_VISIBLE_DEVICES")
    boards = list_boards(machine.run, machine.environ)
    check_boards(boards, into)
    if isinstance(boards, str):
        return into.all
    if visible is not None:
        into.ok(f"CUDA_VISIBLE_DEVICES is {visible!r}: tiers without gpus take from those")
    if config is not None:
        check_engine_gpus(wanting, boards, lambda engine: weights.get(engine.model), into)
    if util.find_spec("pynvml") is None:
        into.warn(
            "energy will be modelled, not measured: NVML's Python module is not here",
            "pip install 'conserve-agents[energy]'",
        )
    return into.all


def _check_memory(engines: Sequence[SglangEngine], machine: Machine) -> list[Finding]:
    into = Findings("host memory")
    free = machine.memory_bytes()
    wanted = sum((engine.host_kv_gb or 0) * 1_000_000_000 * engine.tp for engine in engines)
    unsized = [engine.id for engine in engines if engine.host_kv_gb is None]
    if free is not None and wanted > free:
        into.bad(
            f"host_kv_gb asks for {size(wanted)} in all; {size(free)} are free",
            "lower host_kv_gb in the tiers (it counts for each rank of each engine)",
        )
    elif free is not None and wanted:
        into.ok(f"KV in host memory takes {size(wanted)} of {size(free)} free")
    if len(unsized) > 1:
        into.warn(
            f"{', '.join(unsized)} size their host memory for KV by themselves, each as if alone: "
            "twice the device's KV, or most of what is free",
            "set host_kv_gb in the tiers so that they fit together",
        )
    return into.all


def _check_addresses(engines: Sequence[SglangEngine], machine: Machine) -> list[Finding]:
    into = Findings("addresses")
    for engine in engines:
        if engine.port and not machine.port_is_free(engine.host, engine.port):
            into.bad(
                f"{engine.id}: port {engine.port} on {engine.host} is in use",
                "stop the program that listens there, or choose another in the tier's urls",
            )
        elif engine.port:
            into.ok(f"{engine.id}: port {engine.port} on {engine.host} is free")
    return into.all


def _check_store(config: Config, machine: Machine) -> list[Finding]:
    into = Findings("hand-off store")
    handoff, floor = config.handoff, config.scheduler.handoff_floor_tokens
    if handoff.prefetch_threshold_tokens > floor:
        into.warn(
            f"first turns of {floor} to {handoff.prefetch_threshold_tokens} tokens may be handed "
            "over, but decoders do not load what is so short",
            "lower handoff.prefetch_threshold_tokens, or raise scheduler.handoff_floor_tokens",
        )
    if handoff.transport != "file":
        into.ok(f"transport {handoff.transport}: its own servers are not looked at")
        return into.all
    if handoff.path is None:
        free = machine.free_bytes(machine.shared)
        if free is None or free < ENOUGH_BYTES:
            into.warn(
                f"shared memory ({machine.shared}) has {size(free or 0)} free: KV will be "
                "handed over on the disk of the run folder",
                "docker run --shm-size 16g (or mount -o remount,size=16g /dev/shm), or set "
                "handoff.path",
            )
        else:
            into.ok(f"in shared memory ({machine.shared}, {size(free)} free)")
        return into.all
    folder = Path(handoff.path)
    there = next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        into.bad(
            f"nothing can be written to {there}: {error.strerror}",
            "give handoff.path another folder, or yourself the right to write there",
        )
        return into.all
    free = machine.free_bytes(there) or 0
    if free < (handoff.max_bytes or ENOUGH_BYTES):
        into.warn(
            f"{folder}: {size(free)} free; full stores make decoders prefill by themselves",
            "free some, or lower handoff.max_bytes",
        )
    else:
        into.ok(f"{folder}: can be written, {size(free)} free")
    return into.all
