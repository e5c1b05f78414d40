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
    HandoffAffine,
    HardwareProfile,
    PowerLevel,
    PrefillTable,
    list_profiles,
    load_profile,
    parse_profile,
)
from conserve_serving.engines.steptime import StepTimes

TABULATED = [
    name for name in list_profiles() if isinstance(load_profile(name).prefill, PrefillTable)
]


def test_the_promised_profiles_are_there() -> None:
    assert {
        "a40-qwen3-0.6b",
        "h100-qwen3-8b",
        "h200-qwen3-8b",
        "a100-qwen3-8b",
        "l40s-qwen3-8b",
        "a40-qwen3-8b",
        "a100-kv80-qwen3-8b",
        "h100-qwen3-32b-tp2",
        "h200-qwen3-32b",
        "a100-qwen3-32b-tp2",
        "a100-kv80-qwen3-32b-tp2",
        "l40s-qwen3-32b-tp4",
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
            # 0.3 %: where a table's first slope falls, by its noise, it is taken as level
            assert ms == pytest.approx(decode.ms[i][j] + overhead, rel=0.003)
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
    gpus = profile.tensor_parallel
    memory_bytes = {"a40": 48e9, "l40s": 48e9, "h200": 151e9}.get(
        name.split("-", maxsplit=1)[0], 86e9
    )
    weights_bytes = {"Qwen/Qwen3-0.6B": 1.2e9, "Qwen/Qwen3-8B": 16.4e9, "Qwen/Qwen3-32B": 65.5e9}
    kv_bytes = profile.kv_capacity_tokens * profile.kv_bytes_per_token
    assert kv_bytes + weights_bytes[profile.model] < 0.95 * gpus * memory_bytes
    assert profile.power.boards == gpus


@pytest.mark.parametrize("name", list_profiles())
def test_power_has_a_band_and_decode_rises_in_each(name: str) -> None:
    profile = load_profile(name)
    low, mid, high = (profile.power_at(level) for level in PowerLevel)
    assert mid == profile.power
    for batch in (1, 8, 64, 256):
        assert low.decode_w(batch) < mid.decode_w(batch) < high.decode_w(batch)
    for figure in ("idle_w", "prefill_w", "decode_p0_w", "decode_ps_w"):
        ends = [getattr(power, figure) for power in (low, mid, high)]
        assert ends == sorted(ends)
    assert len({power.boards for power in (low, mid, high)}) == 1


def test_a_profile_without_a_band_gets_a_quarter_either_way() -> None:
    profile = load_profile("h100-qwen3-8b").replace(power_low=None, power_high=None)
    low, high = profile.power_at(PowerLevel.LOW), profile.power_at(PowerLevel.HIGH)
    assert (low.idle_w, high.idle_w) == (90.0, 150.0)
    assert high.decode_w(32) == pytest.approx(1.25 * profile.power.decode_w(32))


def test_a_derived_gpu_is_its_table_scaled_and_says_so() -> None:
    a40, l40s = load_profile("a40-qwen3-8b"), load_profile("l40s-qwen3-8b")
    assert a40.parts["prefill"].confidence is a40.parts["decode"].confidence is Confidence.DERIVED
    assert StepTimes(a40).prefill_s(4096, 8192) == pytest.approx(
        1.51 * StepTimes(l40s).prefill_s(4096, 8192), rel=1e-4
    )
    overhead_s = (0.5 + 0.06 * 8) / 1e3
    assert StepTimes(a40).decode_s(8, 65_536) - overhead_s == pytest.approx(
        1.241 * (StepTimes(l40s).decode_s(8, 65_536) - overhead_s), rel=1e-4
    )
    assert a40.kv_capacity_tokens == l40s.kv_capacity_tokens  # the same memory


def test_a_variant_that_reads_kv_well_differs_in_nothing_else() -> None:
    table, well = load_profile("a100-qwen3-8b"), load_profile("a100-kv80-qwen3-8b")
    assert well.prefill == table.prefill
    assert well.parts["decode"].confidence is Confidence.DERIVED
    ns_per_token = table.kv_bytes_per_token / (0.8 * 2039e9) * 1e9
    for batch in (1, 16, 128):
        few, many = (StepTimes(well).decode_s(batch, batch * ctx) for ctx in (512, 32_768))
        slope_ns = (many - few) / (batch * (32_768 - 512)) * 1e9
        assert slope_ns == pytest.approx(ns_per_token, rel=0.01)
        assert many < StepTimes(table).decode_s(batch, batch * 32_768)
    empty = [StepTimes(profile).decode_s(16, 0) for profile in (table, well)]
    assert empty[0] == pytest.approx(empty[1], rel=0.001)


def test_a_power_limit_stretches_what_would_draw_more() -> None:
    free = load_profile("a40-qwen3-0.6b")
    capped = free.capped(200.0)
    assert capped.name == "a40-qwen3-0.6b@200W"
    assert capped.parts["power"].confidence is Confidence.ASSUMED
    assert capped.parts["decode"].confidence is Confidence.DERIVED
    assert capped.power.prefill_w == 200.0
    before, after = StepTimes(free), StepTimes(capped)
    assert after.prefill_s(2048, 4096) == pytest.approx(before.prefill_s(2048, 4096) * 295 / 200)
    # 190 + 95 (1 - exp(-b/64)) W: 4 requests draw 196 W, 64 draw 250 W
    assert capped.power.decode_w(4) == free.power.decode_w(4) < 200
    assert after.decode_s(4, 40_000) == before.decode_s(4, 40_000)
    assert capped.power.decode_w(64) == 200.0
    watts = free.power.decode_w(64)
    for kv in (20_000, 200_000):
        assert after.decode_s(64, kv) == pytest.approx(before.decode_s(64, kv) * watts / 200)
        line = after.decode_line(64, kv)
        assert line.base_s + line.s_per_kv_token * kv == pytest.approx(after.decode_s(64, kv))
    assert capped.speeds().prefill_tokens_per_s < free.speeds().prefill_tokens_per_s
    high = capped.power_at(PowerLevel.HIGH)
    assert high.prefill_w == high.decode_w(64) == 200.0


def test_a_power_limit_may_cost_decode_nothing() -> None:
    free = load_profile("a40-qwen3-0.6b")
    capped = free.capped(200.0, exponent=0.0)
    assert StepTimes(capped).decode_s(64, 200_000) == StepTimes(free).decode_s(64, 200_000)
    assert capped.power.decode_w(64) == 200.0


@pytest.mark.parametrize(
    ("cap_w", "exponent", "message"),
    [(75.0, 1.0, "above idle power"), (-1.0, 1.0, "above idle"), (200.0, 2.0, "between 0 and 1")],
)
def test_impossible_power_limits_are_refused(cap_w: float, exponent: float, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        load_profile("a40-qwen3-0.6b").capped(cap_w, exponent=exponent)


def test_a_limit_that_binds_nothing_changes_nothing_but_the_name() -> None:
    free = load_profile("a40-qwen3-0.6b")
    capped = free.capped(300.0)
    assert capped.prefill == free.prefill
    assert StepTimes(capped).decode_s(128, 200_000) == StepTimes(free).decode_s(128, 200_000)


def test_hand_off_is_out_and_in() -> None:
    profile = load_profile("h100-qwen3-8b")
    tokens = 10_000
    link = profile.link()
    whole_s = link.setup_s + tokens * link.kv_bytes_per_token / link.bytes_per_s
    assert profile.handoff_s(tokens) + profile.ingress_s(tokens) == pytest.approx(whole_s)
    assert profile.handoff_s(0) == 0.0


def test_a_direct_link_costs_the_receiver_nothing() -> None:
    direct = HandoffAffine(setup_ms=0.1, bytes_per_s=130e9, via_store=False)
    profile = load_profile("h100-qwen3-8b").replace(handoff=direct)
    assert profile.ingress_s(10_000) == 0.0
    assert profile.link().bytes_per_s == pytest.approx(130e9)
    with pytest.raises(ValueError, match="bytes_per_s must be positive"):
        HandoffAffine(setup_ms=0.1, bytes_per_s=0.0)


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
    seen = StepTimes(profile).mixed_s(0.1, 0.02, chunk_tokens=512, batch=8, kv_tokens=9000)
    assert seen == pytest.approx(0.15)
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
