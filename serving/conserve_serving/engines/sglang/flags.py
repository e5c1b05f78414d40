"""The command line of an SGLang engine that takes part in hand-offs (SGLang 0.5.23).

Ours come first and the user's last, so that SGLang's parser lets the user's win; those of the
user's that would break the hand-off are refused by name, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

#: SGLang's own default: shorter hits in the store are computed, not loaded.
DEFAULT_PREFETCH_THRESHOLD_TOKENS: Final = 256
#: Brings `environment` to the launcher: as JSON, for the variables are not meant for itself.
ENV_VARIABLE: Final = "CONSERVE_ENGINE_ENV"
_STORE_MODULE: Final = "conserve_serving.engines.sglang.store"
_STORE_CLASS: Final = "HandoffStore"

#: Flags of ours without a value. No later flag can take one back, so a tier may name it in `omit`.
#: Those for hand-offs and for counting cached tokens are not among them: the driver needs both.
OPTIONAL_FLAGS: Final = (
    "--enable-session-radix-cache",
    "--enable-priority-scheduling",
    "--disable-priority-preemption",
)

#: Flags that have a setting of their own: flag → setting.
_SETTINGS: Final = {
    "--model-path": "tiers.model",
    "--model": "tiers.model",
    "--served-model-name": "tiers.served_model_name",
    "--host": "tiers.urls",
    "--port": "tiers.urls",
    "--page-size": "tiers.page_tokens",
    "--tp-size": "tiers.tp",
    "--tensor-parallel-size": "tiers.tp",
    "--base-gpu-id": "tiers.gpus",
    "--gpu-id-step": "tiers.gpus",
    "--hicache-storage-backend": "handoff.transport",
    "--hicache-storage-backend-extra-config": "handoff.extra",
}

_ONE_ENGINE: Final = (
    "its own router would scatter a conversation's turns: start one engine for each replica"
)
_OTHER_CACHE: Final = "another cache would take the place of the one that hands KV over"

#: Flags that would break the hand-off or the driver: flag → (values that are harmless, why).
_REFUSED: Final[Mapping[str, tuple[tuple[str, ...], str]]] = {
    "--disaggregation-mode": (
        ("null",),
        "in SGLang's own disaggregation a decoder cannot prefill a tail turn",
    ),
    "--disable-radix-cache": ((), "without the prefix cache no KV handed over is ever found"),
    "--hicache-write-policy": (
        ("write_through",),
        "the prefiller must store every page when it is computed",
    ),
    "--hicache-storage-prefetch-policy": (
        ("wait_complete", "timeout"),
        "the decoder would start before the pages handed over are loaded, and prefill them again",
    ),
    "--enable-unified-cache-external-linker": ((), _OTHER_CACHE),
    "--enable-lmcache": ((), _OTHER_CACHE),
    "--enable-flexkv": ((), _OTHER_CACHE),
    "--radix-cache-backend": ((), _OTHER_CACHE),
    "--dp-size": (("1",), _ONE_ENGINE),
    "--data-parallel-size": (("1",), _ONE_ENGINE),
    "--attn-dp-size": (("1",), _ONE_ENGINE),
    "--attention-data-parallel-size": (("1",), _ONE_ENGINE),
    "--enable-dp-attention": ((), _ONE_ENGINE),
    "--nnodes": (
        ("1",),
        "an engine on several machines is not started from here: start it there, with engine = "
        '"attach"',
    ),
    "--smg-grpc-mode": ((), "the driver speaks HTTP"),
    "--grpc-mode": ((), "the driver speaks HTTP"),
    "--ssl-certfile": ((), "the driver speaks plain HTTP to engines: put TLS before the gateway"),
    "--ssl-keyfile": ((), "the driver speaks plain HTTP to engines: put TLS before the gateway"),
    "--fastapi-root-path": ((), "the driver expects SGLang's paths at the root"),
    "--skip-tokenizer-init": ((), "engines render and tokenize conversations for the gateway"),
    "--is-embedding": ((), "conversations need a model that generates"),
    "--encoder-only": ((), "conversations need a model that generates"),
    "--config": ((), "flags in a file of their own cannot be checked: write them in flags"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """How KV is handed over; the same for all engines of a cluster.

    Attributes:
        transport: ``file``, ``mooncake`` or ``nixl``.
        path: folder of the ``file`` transport, on a file system that all engines share.
        ack_url: where prefillers acknowledge a stored prompt: the gateway's.
        max_bytes: what the store may hold; None: its own default.
        max_age_s: after which pages nobody asked for are removed.
        prefetch_threshold_tokens: shortest hit in the store that is loaded.
        extra: further keys for the transport, and SGLang's own (``prefetch_timeout_base``).
    """

    transport: str
    path: str
    ack_url: str
    max_bytes: int | None = None
    max_age_s: float
    prefetch_threshold_tokens: int = DEFAULT_PREFETCH_THRESHOLD_TOKENS
    extra: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangEngine:
    """One SGLang engine to start.

    Attributes:
        id: engine id; also its name in logs and messages.
        role: ``prefill``, ``decode`` or ``both``: what its store does.
        model: path or hub name of the weights.
        served_model_name: what clients call it; the same for all engines of a cluster.
        host, port: where it listens; port 0 takes a free one.
        tp: tensor-parallel size.
        gpus: what CUDA_VISIBLE_DEVICES is set to; None leaves it as it is.
        page_tokens: tokens of a KV page.
        kv_capacity_tokens: KV tokens on the device; None: what fits.
        host_kv_gb: host memory for KV, in 10^9 bytes for each rank; None: SGLang's own sizing.
        keeps_conversations: conversations live there between turns.
        python: interpreter of the environment that has SGLang.
        flags: further flags, as on a command line.
        omit: flags of ours to leave out, of `OPTIONAL_FLAGS`.
        env: further environment variables.
        log_level: SGLang's.
        ready_timeout_s: how long it may take to come up.
    """

    id: str
    role: str
    model: str
    served_model_name: str
    host: str = "127.0.0.1"
    port: int = 0
    tp: int = 1
    gpus: tuple[str, ...] | None = None
    page_tokens: int = 64
    kv_capacity_tokens: int | None = None
    host_kv_gb: int | None = None
    keeps_conversations: bool = True
    python: str
    flags: tuple[str, ...] = ()
    omit: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    log_level: str = "info"
    ready_timeout_s: float = 900.0


def server_arguments(engine: SglangEngine, store: StoreSettings) -> list[str]:
    """What follows ``python -m sglang.launch_server``, but for ``--host`` and ``--port``.

    Args:
        engine: what to start; its flags have passed `check_flags`.
        store: how KV is handed over.
    """
    ours: list[tuple[str, ...]] = [
        ("--model-path", engine.model),
        ("--served-model-name", engine.served_model_name),
        ("--page-size", str(engine.page_tokens)),
        ("--tp-size", str(engine.tp)),
        ("--log-level", engine.log_level),
        ("--log-level-http", "warning"),  # the gateway asks twice a second how it is
        # What the driver reads: occupancy, and how much of a prompt was cached.
        ("--enable-metrics",),
        ("--enable-cache-report",),
        # Tail turns go before first turns in an engine's own queue, and interrupt none.
        ("--enable-priority-scheduling",),
        ("--disable-priority-preemption",),
        # The hand-off: every page to the store when it is computed, all of them loaded before use.
        ("--enable-hierarchical-cache",),
        ("--hicache-write-policy", "write_through"),
        ("--hicache-storage-prefetch-policy", "wait_complete"),
        ("--hicache-mem-layout", "page_first"),
        ("--hicache-storage-backend", "dynamic"),
        ("--hicache-storage-backend-extra-config", json.dumps(store_config(engine, store))),
    ]
    if engine.keeps_conversations:
        ours.append(("--enable-session-radix-cache",))
    if engine.kv_capacity_tokens is not None:
        ours.append(("--max-total-tokens", str(engine.kv_capacity_tokens)))
    if engine.host_kv_gb is not None:
        ours.append(("--hicache-size", str(engine.host_kv_gb)))
    left_out = {*engine.omit, *(name for name, _ in named_flags(engine.flags))}
    kept = [part for flag in ours if flag[0] not in left_out for part in flag]
    return [*kept, *engine.flags]


def store_config(engine: SglangEngine, store: StoreSettings) -> dict[str, object]:
    """The value of ``--hicache-storage-backend-extra-config`` for our store."""
    config: dict[str, object] = {
        "backend_name": "conserve",
        "module_path": _STORE_MODULE,
        "class_name": _STORE_CLASS,
        "interface_v1": 1,
        # A hit shorter than a page is none, and SGLang takes whole pages only.
        "prefetch_threshold": max(engine.page_tokens, store.prefetch_threshold_tokens),
        "role": engine.role,
        "engine": engine.id,
        "ack_url": store.ack_url,
        "transport": store.transport,
        "path": store.path,
        "max_age_s": store.max_age_s,
    }
    if store.max_bytes is not None:
        config["max_bytes"] = store.max_bytes
    return {**config, **store.extra}


#: Keys of the store's configuration that settings of their own decide.
STORE_KEYS: Final = frozenset(
    {"backend_name", "module_path", "class_name", "interface_v1", "role", "engine", "transport"}
    | {"prefetch_threshold", "path", "ack_url", "max_bytes", "max_age_s"}
)


def environment(engine: SglangEngine) -> dict[str, str]:
    """Variables that the engine's process gets beyond those it inherits."""
    ours = {"PYTHONUNBUFFERED": "1"}  # its log is read while it runs
    if engine.gpus is not None:
        ours["CUDA_VISIBLE_DEVICES"] = ",".join(engine.gpus)
        ours["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # numbers as nvidia-smi and NVML count
    return {**ours, **engine.env}


def named_flags(flags: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """The flags in a command line with the first value of each, None where it has none."""
    for number, part in enumerate(flags):
        if not part.startswith("--"):
            continue
        name, equals, value = part.partition("=")
        if equals:
            yield name, value
            continue
        following = flags[number + 1] if number + 1 < len(flags) else "--"
        yield name, None if following.startswith("--") else following


def check_flags(flags: Sequence[str]) -> None:
    """Refuse flags that would break the hand-off.

    Raises:
        ValueError: names the flag, the reason and the remedy.
    """
    if flags and not flags[0].startswith("-"):
        raise ValueError(f"{flags[0]!r} belongs to no flag: the first item is a flag's name")
    for part in flags:
        if part.startswith("--") and " " in part.partition("=")[0]:
            raise ValueError(
                f"{part!r} holds a space: write flag and value as two items, "
                f"{', '.join(repr(word) for word in part.split(None, 1))}"
            )
    for name, value in named_flags(flags):
        setting = _SETTINGS.get(_unabbreviated(name, _SETTINGS))
        if setting is not None:
            raise ValueError(f"{name} has a setting of its own: write {setting} instead")
        harmless, why = _REFUSED.get(_unabbreviated(name, _REFUSED), ((), ""))
        if why and value not in harmless:
            remedy = (
                f"leave it out, or give it {' or '.join(harmless)}" if harmless else "remove it"
            )
            raise ValueError(f"{name} cannot be passed through: {why}; {remedy}")


def _unabbreviated(name: str, known: Mapping[str, object]) -> str:
    """The flag that SGLang's parser takes ``name`` for, when it is one of ``known``."""
    if name in known or len(name) < 5:
        return name
    return next((flag for flag in known if flag.startswith(name)), name)


def check_omit(omit: Sequence[str]) -> None:
    """Flags of ours that are left out must be such that can be.

    Raises:
        ValueError: names the flag and those that can.
    """
    for flag in omit:
        if flag not in OPTIONAL_FLAGS:
            raise ValueError(f"{flag!r} cannot be left out: only {', '.join(OPTIONAL_FLAGS)} can")


__all__ = [
    "DEFAULT_PREFETCH_THRESHOLD_TOKENS",
    "ENV_VARIABLE",
    "OPTIONAL_FLAGS",
    "STORE_KEYS",
    "SglangEngine",
    "StoreSettings",
    "check_flags",
    "check_omit",
    "environment",
    "named_flags",
    "server_arguments",
    "store_config",
]
