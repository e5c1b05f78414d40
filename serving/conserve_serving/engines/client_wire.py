"""SGLang's replies as they are on the wire, and what they mean. Used by ``client`` only.

Field names are SGLang 0.5.23's; unknown fields are ignored, so newer servers may add some.
"""

from __future__ import annotations

import msgspec

from conserve_serving.core.types import EngineSpeeds, Link
from conserve_serving.engines.client_types import (
    EmulatedExtension,
    EngineDescription,
    Loads,
    ModelCard,
)
from conserve_serving.engines.http_errors import BadReply


class LinkInfo(msgspec.Struct):
    setup_s: float
    bytes_per_s: float
    kv_bytes_per_token: int


class SpeedsInfo(msgspec.Struct):
    prefill_tokens_per_s: float
    decode_step_s: float
    decode_step_s_per_kv_token: float = 0.0
    mixed_slowdown: float = 1.0


class ConserveInfo(msgspec.Struct):
    profile: str
    speed: float
    host_capacity_tokens: int
    link: LinkInfo
    speeds: SpeedsInfo
    energy_j: float = 0.0
    energy_source: str = ""
    model_time_s: float = 0.0

    def value(self) -> EmulatedExtension:
        return EmulatedExtension(
            profile=self.profile,
            speed=self.speed,
            host_capacity_tokens=self.host_capacity_tokens,
            link=Link(**msgspec.structs.asdict(self.link)),
            speeds=EngineSpeeds(**msgspec.structs.asdict(self.speeds)),
            energy_j=self.energy_j,
            energy_source=self.energy_source,
            model_time_s=self.model_time_s,
        )


class ServerInfo(msgspec.Struct):
    max_total_num_tokens: int
    page_size: int
    context_length: int | None = None
    dp_size: int = 1
    tp_size: int = 1
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    hicache_mem_layout: str = ""
    enable_session_radix_cache: bool = False
    enable_streaming_session: bool = False
    enable_priority_scheduling: bool = False
    schedule_low_priority_values_first: bool = False
    version: str = ""
    hicache_storage_backend_extra_config: str | None = None
    conserve: ConserveInfo | None = None


class ModelInfo(msgspec.Struct):
    served_model_name: str
    is_generation: bool = True
    disaggregation_mode: str | None = None


class ModelEntry(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class ModelList(msgspec.Struct):
    data: list[ModelEntry]


class RankLoad(msgspec.Struct):
    num_running_reqs: int
    num_waiting_reqs: int
    total_prefill_uncached_tokens: int
    total_prefill_busy_us: int
    num_waiting_uncached_tokens: int = 0
    #: steps, Σbatch, Σµs, Σbatch², Σbatch·µs, Σgenerated; null before the first decode step.
    decode_moments: tuple[float, float, float, float, float, float] | None = None


class LoadsReply(msgspec.Struct):
    loads: list[RankLoad]


class TokenizeReply(msgspec.Struct):
    tokens: list[int]
    max_model_len: int | None = None


class GenerateMeta(msgspec.Struct):
    prompt_tokens: int
    cached_tokens: int = 0
    finish_reason: dict[str, object] | None = None


class GenerateReply(msgspec.Struct):
    meta_info: GenerateMeta


def describe(
    origin: str, info: ServerInfo, model: ModelInfo, cards: list[ModelCard]
) -> EngineDescription:
    """What three replies say together.

    Raises:
        BadReply: they lack something, or the engine is of a kind that cannot serve here.
    """

    def need(holds: bool, what: str) -> None:
        if not holds:
            raise BadReply(origin, what)

    need(
        model.disaggregation_mode in (None, "null"),
        f"/model_info: disaggregation_mode is {model.disaggregation_mode!r}: start the engine "
        "without --disaggregation-mode (its decode servers cannot prefill a tail turn)",
    )
    need(model.is_generation, "/model_info: not a generation model: serve a causal language model")
    need(
        info.dp_size == 1,
        f"/server_info: dp_size is {info.dp_size}: start one engine per data-parallel replica, "
        "or its own router would scatter a conversation's turns",
    )
    need(info.page_size >= 1, f"/server_info: page_size is {info.page_size}: must be at least 1")
    need(
        info.max_total_num_tokens > 0,
        f"/server_info: max_total_num_tokens is {info.max_total_num_tokens}: no room for KV",
    )
    served = {card.id: card for card in cards}.get(model.served_model_name)
    longest = served.max_context_tokens if served is not None else None
    longest = longest if longest is not None else info.context_length
    if longest is None:
        raise BadReply(
            origin,
            f"/v1/models has no max_model_len for {model.served_model_name!r} and /server_info no "
            "context_length: start the engine with --context-length",
        )
    return EngineDescription(
        model=model.served_model_name,
        page_tokens=info.page_size,
        kv_capacity_tokens=info.max_total_num_tokens,
        max_context_tokens=longest,
        kv_layout=(
            f"page={info.page_size} dtype={info.dtype} kv={info.kv_cache_dtype} "
            f"layout={info.hicache_mem_layout or '-'} tp={info.tp_size}"
        ),
        keeps_sessions=info.enable_session_radix_cache or info.enable_streaming_session,
        takes_priority=info.enable_priority_scheduling,
        low_priority_first=info.schedule_low_priority_values_first,
        version=info.version,
        emulated=info.conserve.value() if info.conserve is not None else None,
        handoff_role=_handoff_role(info.hicache_storage_backend_extra_config),
    )


class _StoreExtra(msgspec.Struct):
    module_path: str = ""
    role: str | None = None


def _handoff_role(extra_config: str | None) -> str | None:
    """The role of our store, where the engine runs it."""
    try:
        extra = msgspec.json.decode(extra_config or "{}", type=_StoreExtra)
    except msgspec.MsgspecError:  # of somebody else's storage back end
        return None
    return extra.role if extra.module_path.startswith("conserve_serving.") else None


def sum_loads(reply: LoadsReply) -> Loads:
    """One reading for the whole engine."""
    ranks = reply.loads
    moments = [rank.decode_moments for rank in ranks if rank.decode_moments is not None]
    return Loads(
        running_requests=sum(rank.num_running_reqs for rank in ranks),
        waiting_requests=sum(rank.num_waiting_reqs for rank in ranks),
        waiting_uncached_tokens=sum(rank.num_waiting_uncached_tokens for rank in ranks),
        prefill_tokens=sum(rank.total_prefill_uncached_tokens for rank in ranks),
        prefill_busy_us=sum(rank.total_prefill_busy_us for rank in ranks),
        decode_steps=int(sum(m[0] for m in moments)),
        decode_batch_sum=sum(m[1] for m in moments),
        decode_us=sum(m[2] for m in moments),
        decode_generated_tokens=sum(m[5] for m in moments),
    )


def error_message(body: bytes) -> str:
    """The human part of an error body; SGLang has several shapes of them.

    ``{"error": {"message"}}``, ``{"error": "…"}``, ``{"message"}``, ``{"detail"}``, or text.
    """
    try:
        reply = msgspec.json.decode(body)
    except msgspec.MsgspecError:
        reply = None
    if isinstance(reply, dict):
        inner = reply.get("error", reply)
        if isinstance(inner, dict):
            inner = inner.get("message", inner.get("detail", inner))
        return str(inner)
    return body[:200].decode("utf-8", "replace") or "no message"
