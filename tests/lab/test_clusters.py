"""Clusters as data: what comes with the package, what one writes, and what it costs."""

from __future__ import annotations

import datetime
from pathlib import Path

import msgspec
import pytest

from conserve_serving.core.types import Tier
from conserve_serving.engines.profile import Confidence, list_profiles, load_profile
from conserve_serving.lab.boards import board_of, find_link, list_links
from conserve_serving.lab.cluster_spec import HOST_W_PER_GPU, ClusterSpec, EngineGroup
from conserve_serving.lab.clusters import cluster, list_clusters, parse_clusters, read_clusters
from conserve_serving.lab.errors import ClusterError
from conserve_serving.lab.worth import compare, right_sized, worth

H100, A100 = "NVIDIA H100 SXM 80 GB", "NVIDIA A100 SXM 80 GB"


@pytest.mark.parametrize("name", list_clusters())
def test_every_shipped_cluster_is_whole(name: str) -> None:
    spec = cluster(name)
    engines = spec.engines()
    assert spec.name == name
    assert len({engine.id for engine in engines}) == len(engines) == spec.engine_count
    assert {engine.profile.model for engine in engines} == {spec.model}
    assert [engine.tier for engine in engines] == sorted(
        (engine.tier for engine in engines), key=lambda tier: tier is Tier.DECODE
    )
    low, high = spec.dollars_between()
    assert 0 < low <= spec.dollars_per_hour <= high
    assert spec.rated_with_host_w == spec.rated_w + spec.boards * HOST_W_PER_GPU
    assert all(engine.config.store_writes for engine in engines)
    again = msgspec.json.decode(msgspec.json.encode(spec), type=ClusterSpec)
    assert again == spec
    assert hash(again) == hash(spec)


def test_the_promised_clusters_are_there() -> None:
    assert {
        "paper", "paper-capped", "h100-3a100", "h100-3a100-kv80", "h100-3l40s", "h100-4l40s",
        "h100-3a40", "h200-3a100", "h100-3h200", "4h100", "4a100", "3h100", "2h100",
        "32b-h100-3a100", "32b-4h100",
    } <= set(list_clusters())  # fmt: skip


def test_the_papers_testbed() -> None:
    engines = cluster("paper").engines()
    assert [(engine.id, engine.tier) for engine in engines] == [
        ("p0", Tier.PREFILL), ("d0", Tier.DECODE), ("d1", Tier.DECODE), ("d2", Tier.DECODE)
    ]  # fmt: skip
    assert all(engine.profile == load_profile("a40-qwen3-0.6b") for engine in engines)
    assert cluster("paper").rated_w == 4 * 300


def test_decoders_of_the_capped_testbed_are_limited() -> None:
    spec = cluster("paper-capped")
    free, capped = spec.engines()[0].profile, spec.engines()[1].profile
    assert spec.rated_w == 300 + 3 * 200
    assert (free.power.prefill_w, capped.power.prefill_w) == (295.0, 200.0)
    assert capped.power.decode_w(64) == 200.0 < free.power.decode_w(64)


def test_rent_and_power_by_hand() -> None:
    spec = cluster("h100-3a100")
    assert spec.dollars_per_hour == pytest.approx(3.49 + 3 * 1.59)
    assert spec.dollars_between() == pytest.approx((2.69 + 3 * 1.39, 6.88 + 3 * 3.43))
    assert spec.rated_w == 700 + 3 * 400
    two_each = cluster("32b-h100-3a100")
    assert two_each.boards == 8
    assert two_each.dollars_per_hour == pytest.approx(2 * (3.49 + 3 * 1.59))


def test_every_gpu_of_a_profile_has_rated_power_and_a_dated_rent() -> None:
    for name in list_profiles():
        board = board_of(load_profile(name).gpu)
        assert board.rated_w >= load_profile(name).power.prefill_w
        assert datetime.date.fromisoformat(board.price.date) > datetime.date(2026, 1, 1)
        assert board.price.source
        assert board.rated_source


def test_own_rents_replace_the_boards() -> None:
    spec = cluster("h100-3a100").with_prices({A100: 1.0})
    assert spec.dollars_per_hour == pytest.approx(3.49 + 3.0)
    assert spec.dollars_between() == pytest.approx((2.69 + 3.0, 6.88 + 3.0))
    assert spec.with_prices({H100: 2.0}).dollars_per_hour == pytest.approx(5.0)
    with pytest.raises(ClusterError, match=r"usd_per_hour names 'H100', its GPUs are NVIDIA A100"):
        spec.with_prices({"H100": 2.0})
    with pytest.raises(ClusterError, match=r"is 0\.0: it must be positive"):
        spec.with_prices({H100: 0.0})


@pytest.mark.parametrize("name", list_links())
def test_a_link_replaces_every_profiles_hand_off(name: str) -> None:
    link = find_link(name)
    tokens = 10_000
    for of, gpus in (("h100-3a100", 1), ("32b-h100-3a100", 2)):
        for engine in cluster(of).engines(link=name):
            profile = engine.profile
            width = gpus if link.per_gpu else 1
            bytes_moved = tokens * profile.kv_bytes_per_token
            out_s = link.setup_ms / 1e3 + bytes_moved / (link.bytes_per_s * width)
            assert profile.handoff_s(tokens) == pytest.approx(out_s)
            into_s = bytes_moved / (25e9 * gpus) if link.via_store else 0.0
            assert profile.ingress_s(tokens) == pytest.approx(into_s)
            assert profile.parts["handoff"].confidence is link.confidence
    through = cluster("h100-3a100").with_link(name)
    assert through.engines()[0].profile == cluster("h100-3a100").engines(link=name)[0].profile
    assert through.name == f"h100-3a100@{name}"


def test_links_come_fastest_first() -> None:
    profiles = [cluster("4h100").engines(link=name)[0].profile for name in list_links()]
    whole_s = [profile.handoff_s(16_000) + profile.ingress_s(16_000) for profile in profiles]
    assert whole_s[0] == min(whole_s)
    assert whole_s[-1] == max(whole_s)


def test_interference_and_power_level_reach_the_engines() -> None:
    for engine in cluster("h100-3a100").engines(mixed_slowdown=1.25, power="low"):
        known = load_profile(engine.profile.name)
        assert engine.profile.mixed_slowdown == 1.25
        assert engine.profile.power == known.power_low
        assert engine.profile.power != known.power
    with pytest.raises(ClusterError, match="mixed_slowdown is 0"):
        cluster("paper").engines(mixed_slowdown=0.0)


def test_other_ratios_of_the_tiers() -> None:
    spec = cluster("paper").with_ratio(2, 2)
    assert [engine.id for engine in spec.engines()] == ["p0", "p1", "d0", "d1"]
    assert spec.name == "paper@2p2d"
    assert [engine.id for engine in cluster("paper").with_ratio(0, 4).engines()] == [
        "d0", "d1", "d2", "d3"
    ]  # fmt: skip
    with pytest.raises(ClusterError, match="needs a decode tier"):
        cluster("paper").with_ratio(4, 0)
    with pytest.raises(ClusterError, match="0 groups of tier prefill"):
        cluster("paper").with_ratio(0, 4).with_ratio(1, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cluster("h300"), r"no cluster 'h300': choose one of paper, "),
        (lambda: find_link("string"), r"no link 'string': choose one of nvlink, "),
        (lambda: cluster("paper").engines(link="string"), "no link 'string'"),
        (lambda: cluster("paper").with_link("string"), "no link 'string'"),
        (lambda: board_of("GT 710"), "no board for GPU 'GT 710'"),
    ],
)
def test_unknown_names_are_refused_with_the_choices(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ClusterError, match=message):
        call()


OWN = """
[links.mine]
title = "a wire"
setup_ms = 2.0
bytes_per_s = 5e9
via_store = true
per_gpu = false
confidence = "measured"
source = "iperf"

[clusters.lab]
title = "what we have"
link = "mine"
usd_per_hour = { "NVIDIA L40S 48 GB" = 0.5 }
groups = [
  { count = 1, tier = "prefill", profile = "h100-qwen3-8b" },
  { count = 2, tier = "decode", profile = "l40s-qwen3-8b", cap_w = 250 },
]
"""


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(OWN)
    spec = read_clusters(path)["lab"]
    assert spec.dollars_per_hour == pytest.approx(3.49 + 2 * 0.5)
    assert spec.rated_w == 700 + 2 * 250
    engines = spec.engines()
    assert [engine.profile.name for engine in engines][1:] == ["l40s-qwen3-8b@250W"] * 2
    assert engines[0].profile.parts["handoff"].confidence is Confidence.MEASURED
    assert engines[0].profile.handoff_s(1000) == pytest.approx(0.002 + 147_456_000 / 5e9)
    again = msgspec.json.decode(msgspec.json.encode(spec), type=ClusterSpec)
    assert again.engines() == engines  # a link of one's own travels with its cluster


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('link = "mine"', 'link = "yours"', r"mine\.toml: cluster lab: no link 'yours'"),
        ('"h100-qwen3-8b"', '"h100-gpt"', r"cluster lab: no hardware profile 'h100-gpt'"),
        ('"l40s-qwen3-8b"', '"a40-qwen3-0.6b"', r"serve Qwen/Qwen3-0.6B and Qwen/Qwen3-8B"),
        ("count = 2", "count = 0", r"count is 0.*clusters.*groups"),
        ("count = 2", "number = 2", "number"),
        ('tier = "decode"', 'tier = "both"', r"'both'.*tier"),
        ("cap_w = 250", "cap_w = 50", "cap_w is 50.0: it must be above idle power"),
        ("bytes_per_s = 5e9", "bytes_per_s = 0", "bytes_per_s must be positive"),
        ("[clusters.lab]", "[clusters.Lab]", "name 'Lab': lower-case"),
        ("[clusters.lab]", "[clusters.lab", "mine.toml: "),
        ('"NVIDIA L40S 48 GB"', '"L40S"', "usd_per_hour names 'L40S'"),
    ],
)
def test_bad_files_are_refused_naming_the_place(old: str, new: str, message: str) -> None:
    assert old in OWN
    with pytest.raises(ClusterError, match=message):
        parse_clusters(OWN.replace(old, new).encode(), origin="mine.toml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"none\.toml: No such file"):
        read_clusters(tmp_path / "none.toml")


# --- worth ----------------------------------------------------------------------------------------


def test_worth_by_hand() -> None:
    found = worth(cluster("h100-3a100"), 1.0)
    assert found.per_board_hour == 900.0
    assert found.per_dollar == pytest.approx(3600 / 8.26)
    assert found.per_rated_kwh == pytest.approx(3600 / 1.9)
    assert found.per_rated_kwh_with_host == pytest.approx(3600 / 2.2)


def test_ratios_and_what_rents_can_make_of_them() -> None:
    found = compare(cluster("h100-3a100"), 1.2, cluster("4h100"), 2.4)
    assert found.as_is == found.per_board == 0.5
    assert found.per_dollar == pytest.approx(0.5 * 13.96 / 8.26)
    assert found.per_rated_w == pytest.approx(0.5 * 2800 / 1900)
    # dear H100 and cheap A100 speak for the unlike tiers, the other way round against them
    assert found.per_dollar_high == pytest.approx(0.5 * 4 * 6.88 / (6.88 + 3 * 1.39))
    assert found.per_dollar_low == pytest.approx(0.5 * 4 * 2.69 / (2.69 + 3 * 3.43))
    fixed = {H100: 3.0, A100: 1.5}
    own = compare(
        cluster("h100-3a100").with_prices(fixed),
        1.2,
        cluster("4h100").with_prices({H100: 3.0}),
        2.4,
    )
    assert own.per_dollar_low == own.per_dollar_high == pytest.approx(own.per_dollar)
    same = compare(cluster("4h100"), 2.0, cluster("2h100"), 1.0)
    assert same.per_dollar == same.per_dollar_low == pytest.approx(1.0)  # one GPU, one rent
    with pytest.raises(ClusterError, match="4h100 carries nothing"):
        compare(cluster("2h100"), 1.0, cluster("4h100"), 0.0)


def test_right_sized_equal_tiers() -> None:
    like = cluster("h100-3a100")  # 8.26 USD, 2,200 W with hosts
    by_rent = right_sized(like, "h100-qwen3-8b")
    assert [(group.tier, group.count) for group in by_rent.groups] == [
        (Tier.PREFILL, 1), (Tier.DECODE, 1)
    ]  # fmt: skip
    assert right_sized(like, "a100-qwen3-8b").boards == 5  # 8.26 / 1.59
    assert right_sized(like, "h100-qwen3-8b", by="watts").boards == 3  # 2,200 / 775
    one = right_sized(cluster("2h100").with_ratio(0, 1), "h200-qwen3-8b")
    assert one.groups == (EngineGroup(count=1, tier=Tier.DECODE, profile="h200-qwen3-8b"),)
    cheap = right_sized(like.with_prices({H100: 1.0}), "h100-qwen3-8b")
    assert cheap.boards == 6  # 5.77 / 1.0
    assert cheap.dollars_per_hour == pytest.approx(6.0)
    with pytest.raises(ClusterError, match="serves Qwen/Qwen3-8B"):
        right_sized(like, "h100-qwen3-32b-tp2")
