"""Profiles as data: complete, sane, and refused by name when they are not."""

from __future__ import annotations

import json

import msgspec
import pytest

from conserve_serving.engines.errors import ProfileError
from conserve_serving.engines.profile import (
    PARTS,
    Confidence,
    DecodeTable,
    HardwareProfile,
    PrefillTable,
    list_profiles,
    load_profile,
    parse_profile,
)
from conserve_serving.engines.steptime import StepTimes

TABULATED = [name for name in list_profiles() if not name.startswith("a40")]


def test_the_promised_profiles_are_there() -> None:
    assert {
        "a40-qwen3-0.6b",
        "h100-qwen3-8b",
        "h200-qwen3-8b",
        "a100-qwen3-8b",
        "l40s-qwen3-8b",
    } <= set(list_profiles())


@pytest.mark.parametrize("name", list_profiles())
def test_every_part_says_where_it_comes_from(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert set(profile.parts) == set(PARTS)
    assert all(part.source for part in profile.parts.values())
    assert profile.parts["mixed"].confidence is Confidence.ASSUMED


@pytest.mark.parametrize("name", TABULATED)
def test_tables_are_reproduced_at_their_cells_and_between(name: str) -> None:
    profile = load_profile(name)
    times = StepTimes(profile)
    prefill, decode = profile.prefill, profile.decode
    assert isinstance(prefill, PrefillTable)
    assert isinstance(decode, DecodeTable)
    for i, new in enumerate(prefill.new_tokens):
        for j, prefix in enumerate(prefill.prefix_tokens):
            assert times.prefill_s(new, prefix) * 1e3 == pytest.approx(prefill.ms[i][j])
    for i, batch in enumerate(decode.batch):
        overhead = decode.overhead_ms + decode.overhead_ms_per_request * batch
        for j, ctx in enumerate(decode.ctx_tokens):
            ms = times.decode_s(batch, batch * ctx) * 1e3
            assert ms == pytest.approx(decode.ms[i][j] + overhead)
    between = times.prefill_s(3072, 4096)
    assert times.prefill_s(2048, 4096) < between < times.prefill_s(4096, 4096)
    assert times.decode_s(24, 24 * 4096) < times.decode_s(24, 24 * 8192)


@pytest.mark.parametrize("name", list_profiles())
def test_times_and_capacities_are_sane(name: str) -> None:
    profile = load_profile(name)
    times = StepTimes(profile)
    assert 0 < times.prefill_s(1) <= times.prefill_s(profile.chunk_tokens)
    assert times.decode_s(1, 1) <= times.decode_s(256, profile.kv_capacity_tokens)
    assert times.decode_s(0, 0) == times.prefill_s(0) == 0.0
    speeds, link = profile.speeds(), profile.link()
    assert 1_000 < speeds.prefill_tokens_per_s < 1_000_000
    assert speeds.decode_step_s_per_kv_token > 0
    assert link.kv_bytes_per_token == profile.kv_bytes_per_token
    memory_bytes = {"a40": 48e9, "l40s": 48e9, "h200": 151e9}.get(
        name.split("-", maxsplit=1)[0], 86e9
    )
    assert profile.kv_capacity_tokens * profile.kv_bytes_per_token < 0.8 * memory_bytes


def test_hand_off_is_out_and_in() -> None:
    profile = load_profile("h100-qwen3-8b")
    tokens = 10_000
    link = profile.link()
    whole_s = link.setup_s + tokens * link.kv_bytes_per_token / link.bytes_per_s
    assert profile.handoff_s(tokens) + profile.ingress_s(tokens) == pytest.approx(whole_s)
    assert profile.handoff_s(0) == 0.0


def test_several_chunks_cost_their_tokens_and_their_pairs() -> None:
    times = StepTimes(load_profile("h100-qwen3-8b"))
    alone = times.prefill_s(4096, 8192)
    assert times.prefill_batch_s([(4096, 8192)]) == pytest.approx(alone)
    apart = times.prefill_s(2048, 8192) + times.prefill_s(2048)
    assert times.prefill_batch_s([(2048, 8192), (2048, 0)]) == pytest.approx(apart, rel=0.01)
    apart = times.prefill_s(64, 8192) + times.prefill_s(64)  # mostly the fixed cost, paid once
    assert times.prefill_batch_s([(64, 8192), (64, 0)]) < 0.6 * apart
    split = times.prefill_batch_s([(2048, 0), (2048, 2048)])  # one prompt, cut in two
    assert split == pytest.approx(times.prefill_s(4096, 0))
    assert times.prefill_batch_s([]) == 0.0


def test_mixed_step_is_the_stated_factor_times_the_sum() -> None:
    profile = load_profile("h100-qwen3-8b").replace(mixed_slowdown=1.25)
    assert StepTimes(profile).mixed_s(0.1, 0.02) == pytest.approx(0.15)
    assert profile.speeds().mixed_slowdown == 1.25


def test_decode_lines_join_the_curve() -> None:
    for name in list_profiles():
        times = StepTimes(load_profile(name))
        for batch in (1, 3, 64, 200):
            for kv in (batch, 10_000, 64_000, 250_000):
                line = times.decode_line(batch, kv)
                assert kv <= line.until_kv_tokens
                value = line.base_s + line.s_per_kv_token * kv
                assert value == pytest.approx(times.decode_s(batch, kv))


def test_unknown_profile_is_named_with_the_choices() -> None:
    with pytest.raises(ProfileError, match=r"no hardware profile 'b300'.*h100-qwen3-8b"):
        load_profile("b300")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_capacity_tokens": 0}, "kv_capacity_tokens is 0"),
        ({"mixed_slowdown": -1.0}, "mixed_slowdown is -1.0"),
        ({"parts": {}}, "parts lacks prefill"),
        ({"colour": "green"}, "colour"),
        ({"chunk_tokens": "many"}, "chunk_tokens"),
        ({"decode": {"kind": "table", "batch": [1], "ctx_tokens": [1, 2], "ms": [[1, 2]]}}, "2"),
        ({"decode": {"kind": "magic"}}, "magic"),
        ({"host_capacity_tokens": -1}, "host_capacity_tokens is -1"),
    ],
)
def test_bad_profiles_are_refused_naming_the_field(change: dict[str, object], message: str) -> None:
    good = json.loads(msgspec.json.encode(load_profile("h100-qwen3-8b")))
    data = json.dumps(good | change).encode()
    with pytest.raises(ProfileError, match=message):
        parse_profile(data, origin="mine.json")


def test_replace_checks_too() -> None:
    profile = load_profile("h100-qwen3-8b")
    assert isinstance(profile.replace(chunk_tokens=64), HardwareProfile)
    with pytest.raises(ProfileError, match="chunk_tokens is 0"):
        profile.replace(chunk_tokens=0)
    with pytest.raises(ProfileError, match="colour"):
        profile.replace(colour="green")
