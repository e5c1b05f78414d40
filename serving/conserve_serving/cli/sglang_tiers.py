"""From tiers in the file to SGLang engines: ids, GPUs, addresses, and the store they share."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from conserve_serving.cli.errors import BadInputError
from conserve_serving.cli.store_place import default_max_bytes
from conserve_serving.core.types import Tier, TierMode
from conserve_serving.engines.sglang.flags import SglangEngine, StoreSettings, named_flags
from conserve_serving.gateway.config import Config, TierSection

#: Where a gateway takes acknowledgements.
ACK_PATH = "/conserve/v1/handoffs"


def engine_ids(config: Config) -> list[list[str]]:
    """The ids the gateway gives to each tier's engines, tier by tier."""
    result: list[list[str]] = []
    next_number: dict[str, int] = {}
    for tier in config.tiers:
        prefix = tier.name or ("p" if tier.role is Tier.PREFILL else "d")
        count = len(tier.urls) if tier.engine == "attach" else tier.count
        start = next_number.get(prefix, 0)
        next_number[prefix] = start + count
        result.append([f"{prefix}{number}" for number in range(start, start + count)])
    return result


def sglang_engines(config: Config, *, environ: Mapping[str, str]) -> list[SglangEngine]:
    """The SGLang engines that the file describes, wherever they run.

    Args:
        config: the configuration.
        environ: the environment that engines inherit; its CUDA_VISIBLE_DEVICES is what tiers
            without ``gpus`` take from.
    """
    # Other policies than ours know no tiers: conversations live everywhere.
    scheduler = config.scheduler
    hosting = scheduler.tier_mode is TierMode.HOSTING or scheduler.policy != "conserve"
    free = _FreeGpus(config, environ)
    engines: list[SglangEngine] = []
    for tier, ids in zip(config.tiers, engine_ids(config), strict=True):
        if tier.engine != "sglang":
            continue
        for number, id_ in enumerate(ids):
            address = urlsplit(tier.urls[number]) if tier.urls else None
            gpus: tuple[str, ...] | None
            if tier.gpus is None and not _without_gpu(tier):
                gpus = free.take(address.hostname if address is not None else None, tier.tp)
            else:
                gpus = tier.gpus[number] if tier.gpus else None
            prefills = tier.role is Tier.PREFILL
            engines.append(
                SglangEngine(
                    id=id_,
                    role="both" if prefills and hosting else tier.role.value,
                    model=tier.model or "",  # checked: it is there
                    served_model_name=tier.served_name or "",
                    host=(address.hostname or "") if address is not None else "127.0.0.1",
                    port=(address.port or 0) if address is not None else 0,
                    tp=tier.tp,
                    gpus=gpus,
                    page_tokens=tier.page_tokens,
                    kv_capacity_tokens=tier.kv_capacity_tokens,
                    host_kv_gb=tier.host_kv_gb,
                    keeps_conversations=hosting or not prefills,
                    python=tier.python or sys.executable,
                    flags=tier.flags,
                    omit=tier.omit,
                    env=tier.env,
                    log_level=tier.log_level,
                    ready_timeout_s=tier.ready_timeout_s,
                )
            )
    return engines


class _FreeGpus:
    """GPUs that no tier names, machine by machine, in order: those this process may see, else all.

    There is always a next one: CUDA says what is wrong with a GPU that is not there, and `conserve
    doctor` says it before.
    """

    def __init__(self, config: Config, environ: Mapping[str, str]) -> None:
        self._named: dict[str | None, set[str]] = {}
        for tier in config.tiers:
            hosts = [urlsplit(url).hostname for url in tier.urls] or [None] * tier.count
            for host, row in zip(hosts, tier.gpus or (), strict=False):
                self._named.setdefault(host, set()).update(row)
        visible = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        self._visible = [gpu.strip() for gpu in visible if gpu.strip()]
        self._free: dict[str | None, Iterator[str]] = {}

    def take(self, host: str | None, number: int) -> tuple[str, ...]:
        """The next so many of a machine."""
        free = self._free.setdefault(host, self._of(self._named.get(host, set())))
        return tuple(itertools.islice(free, number))

    def _of(self, named: set[str]) -> Iterator[str]:
        taken = set(named)
        for gpu in itertools.chain(self._visible, map(str, itertools.count())):
            if gpu not in taken:
                taken.add(gpu)
                yield gpu


def _without_gpu(tier: TierSection) -> bool:
    return any(
        name == "--device" and value not in (None, "cuda")
        for name, value in named_flags(tier.flags)
    )


def store_settings(
    config: Config, ack_url: str, *, far_away: Sequence[SglangEngine]
) -> StoreSettings:
    """How engines hand KV over; ``path`` is empty where the file names none.

    Args:
        config: the configuration.
        ack_url: where the gateway takes acknowledgements, as this machine reaches it.
        far_away: engines on other machines.

    Raises:
        BadInputError: engines on other machines need a shared folder, or the gateway's address.
    """
    handoff = config.handoff
    if far_away and handoff.transport == "file" and handoff.path is None:
        raise BadInputError(
            f"{far_away[0].id} runs on another machine ({far_away[0].host}), and handoff.path is "
            "not set",
            remedy="set it to a folder on a file system that all machines share",
        )
    near_only = (urlsplit(ack_url).hostname or "").startswith("127.")
    if far_away and near_only and handoff.ack_url is None:
        raise BadInputError(
            f"{far_away[0].id} runs on another machine ({far_away[0].host}), and cannot "
            f"acknowledge hand-offs at {ack_url}",
            remedy="set gateway.host to this machine's address, or handoff.ack_url to the "
            f"gateway's URL as other machines reach it, with {ACK_PATH}",
        )
    path = handoff.path or ""
    return StoreSettings(
        transport=handoff.transport,
        path=path,
        ack_url=handoff.ack_url or ack_url,
        max_bytes=handoff.max_bytes or (default_max_bytes(Path(path)) if path else None),
        max_age_s=handoff.max_age_s,
        prefetch_threshold_tokens=handoff.prefetch_threshold_tokens,
        extra=handoff.extra,
    )
