"""From tiers in a file to engines that are started, and what the gateway is told of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from conserve_serving.cli import store_place
from conserve_serving.cli.cluster_file import (
    attached_config,
    plan_cluster,
    read_config,
)
from conserve_serving.cli.commands import EmulatedEngine
from conserve_serving.cli.errors import BadInputError
from conserve_serving.cli.ports import is_ours
from conserve_serving.cli.sglang_tiers import sglang_engines
from conserve_serving.cli.store_place import default_max_bytes, make_store_folder
from conserve_serving.cli.supervisor import ClusterPlan
from conserve_serving.engines.sglang.flags import SglangEngine
from conserve_serving.gateway.config import Config, parse_config
from conserve_serving.gateway.errors import ConfigError

TIERS = """
[[tiers]]
role = "prefill"
engine = "sglang"
model = "/models/q"
{prefill}
[[tiers]]
role = "decode"
engine = "sglang"
model = "/models/q"
{decode}
"""
#: An address of nobody (RFC 5737).
FAR = "http://192.0.2.1:30000"


def config(prefill: str = "", decode: str = "", *, before: str = "") -> Config:
    return parse_config(before + TIERS.format(prefill=prefill, decode=decode))


def engines(config: Config, **environ: str) -> list[SglangEngine]:
    return sglang_engines(config, environ=environ)


def plan(config: Config, folder: Path) -> ClusterPlan:
    planned = plan_cluster(config, port=0, run_dir=folder, environ={})
    planned.reserved.release()
    return planned


def test_engines_take_gpus_in_the_files_order() -> None:
    found = engines(config(decode="count = 2"))
    assert [(e.id, e.role, e.gpus) for e in found] == [
        ("p0", "prefill", ("0",)),
        ("d0", "decode", ("1",)),
        ("d1", "decode", ("2",)),
    ]
    assert [e.keeps_conversations for e in found] == [False, True, True]
    assert {e.python for e in found} == {sys.executable}
    two_each = engines(config("tp = 2", "tp = 2"), CUDA_VISIBLE_DEVICES="4, 5,6,GPU-7")
    assert [e.gpus for e in two_each] == [("4", "5"), ("6", "GPU-7")]


def test_gpus_that_are_named_are_not_taken_by_others() -> None:
    found = engines(config("", "gpus = [0, 2]"))
    assert [e.gpus for e in found] == [("1",), ("0",), ("2",)]


def test_every_machine_has_its_own_gpus() -> None:
    far = f'urls = ["http://127.0.0.1:30001", "{FAR}", "http://192.0.2.1:30001"]'
    found = engines(config('urls = ["http://127.0.0.1:30000"]', far))
    assert [e.gpus for e in found] == [("0",), ("1",), ("0",), ("1",)]


def test_no_gpus_where_none_are_wanted() -> None:
    cpu = 'flags = ["--device", "cpu"]'
    assert {e.gpus for e in engines(config(cpu, cpu))} == {None}
    assert {e.gpus for e in engines(config("gpus = []", "gpus = []"))} == {None}


def test_count_and_tp_follow_from_gpus() -> None:
    found = engines(config("gpus = [[0, 1]]", 'gpus = [[2, 3], ["GPU-a", "GPU-b"]]'))
    assert [(e.id, e.tp, e.gpus) for e in found] == [
        ("p0", 2, ("0", "1")),
        ("d0", 2, ("2", "3")),
        ("d1", 2, ("GPU-a", "GPU-b")),
    ]


def test_prefillers_that_host_conversations_keep_them() -> None:
    found = engines(config(before='[scheduler]\ntier_mode = "hosting"\n'))
    assert [(e.role, e.keeps_conversations) for e in found] == [("both", True), ("decode", True)]
    found = engines(config(before='[scheduler]\npolicy = "collocated"\n'))
    assert [e.keeps_conversations for e in found] == [True, True]


@pytest.mark.parametrize(
    ("decode", "says"),
    [
        ("gpus = [0, 0]", "tiers.1.gpus: 0 is given to two engines"),
        ("gpus = [[0, 1], [2]]\ntp = 2", "gpus.1 has 1 GPUs, but tp is 2"),
        ("gpus = [0, 1]\ncount = 3", "gpus has entries for 2 engines, but there are 3"),
        ("gpus = [0.5]", "neither a GPU's number nor its UUID"),
        ("page_tokens = 16", "page_tokens = 64, but tiers.1.page_tokens = 16"),
        ("tp = 2", "tiers.0.tp = 1, but tiers.1.tp = 2"),
        ('served_model_name = "x"', "tiers.1.model = 'x'"),
        ("speed = 2.0", "speed is for emulated engines"),
        ('urls = ["http://h"]', "names no port"),
        ('flags = ["--api-key", "k"]', "gateway.engine_api_key"),
        ('flags = ["--page-size", "1"]', "write tiers.page_tokens instead"),
        ('omit = ["--enable-metrics"]', "cannot be left out"),
    ],
)
def test_tiers_that_cannot_be_are_refused_by_key(decode: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config(decode=decode)


def test_settings_of_other_kinds_of_engines() -> None:
    with pytest.raises(ConfigError, match="model is missing"):
        parse_config('[[tiers]]\nrole = "decode"\nengine = "sglang"\n')
    with pytest.raises(ConfigError, match='flags is given, but engine is "emulated"'):
        parse_config('[[tiers]]\nrole = "decode"\nflags = ["--x"]\n')
    with pytest.raises(ConfigError, match=r"tiers\.0\.engine = 'sglang'"):
        parse_config(
            TIERS.format(prefill="", decode="")
            .replace('"sglang"', '"emulated"', 2)
            .replace('"emulated"', '"sglang"', 1)
        )
    with pytest.raises(ConfigError, match="'role' is set by conserve"):
        config(before='[handoff.extra]\nrole = "both"\n')
    with pytest.raises(ConfigError, match="http://host:port/path"):
        config(before='[handoff]\nack_url = "gateway:8000"\n')


def test_command_line_says_what_silent_tiers_run(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(TIERS.format(prefill="", decode="").replace('engine = "sglang"\n', ""))
    assert {t.engine for t in read_config(path, engine="sglang").tiers} == {"sglang"}
    path.write_text("[gateway]\nport = 0\n")
    with pytest.raises(BadInputError, match="no \\[\\[tiers\\]\\]"):
        read_config(path, engine="sglang")
    path.write_text('[[tiers]]\nrole = "decode"\nmodel = "m"\ngpus = [0.5]\n')
    with pytest.raises(BadInputError, match="neither a GPU's number"):
        read_config(path, engine="sglang")
    with pytest.raises(BadInputError, match="needs a configuration file"):
        read_config(None, engine="sglang")


def test_description_of_gpu_engines_runs_emulated_too(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        TIERS.format(prefill="gpus = [0]", decode='gpus = [1, 2]\nflags = ["--x"]')
        + '[[tiers]]\nrole = "decode"\nname = "a"\nengine = "attach"\nurls = ["http://h:1"]\n'
    )
    read = read_config(path, engine="emulated")
    assert [(t.engine, t.count, t.model) for t in read.tiers[:2]] == [
        ("emulated", 1, "/models/q"),
        ("emulated", 2, "/models/q"),
    ]
    assert read.tiers[2].engine == "attach"
    assert all(isinstance(e, EmulatedEngine) for e in plan(read, tmp_path).engines)


def test_gateway_is_told_urls_names_and_the_store(tmp_path: Path) -> None:
    written = config(
        'served_model_name = "q"\nenv = {A = "b"}',
        'served_model_name = "q"\ncount = 2\nkv_capacity_tokens = 9000',
        before=f'[handoff]\npath = "{tmp_path}/kv"\n[handoff.extra]\ngrace_s = 1\n',
    )
    planned = plan(written, tmp_path)
    assert not planned.remove_store
    assert planned.store.extra == {"grace_s": 1}
    assert planned.store.ack_url.endswith(f":{planned.reserved.port}/conserve/v1/handoffs")
    urls = {e.id: f"http://127.0.0.1:{n}" for n, e in enumerate(planned.engines, start=4000)}
    told = parse_config(planned.gateway_config(urls))
    assert [tier.urls for tier in told.tiers] == [
        ("http://127.0.0.1:4000",),
        ("http://127.0.0.1:4001", "http://127.0.0.1:4002"),
    ]
    assert {tier.engine for tier in told.tiers} == {"attach"}
    assert {tier.served_name for tier in told.tiers} == {"q"}
    assert [tier.gpus for tier in told.tiers] == [(("0",),), (("1",), ("2",))]
    assert told.handoff.path == f"{tmp_path}/kv"
    assert told.handoff.max_bytes == planned.store.max_bytes
    assert told.handoff.max_bytes is not None


def test_engines_elsewhere_are_attached_and_need_to_be_told_where(tmp_path: Path) -> None:
    assert is_ours("127.0.0.1")
    assert not is_ours("192.0.2.1")
    decode = f'urls = ["http://127.0.0.1:30001", "{FAR}"]'
    with pytest.raises(BadInputError, match=r"d1 runs on another machine.*handoff\.path"):
        plan(config(decode=decode), tmp_path)
    shared = f'[handoff]\npath = "{tmp_path}/kv"\n'
    with pytest.raises(BadInputError, match="cannot acknowledge") as caught:
        plan(config(decode=decode, before=shared), tmp_path)
    assert "handoff.ack_url" in caught.value.remedy
    ack = 'ack_url = "http://192.0.2.9:8000/conserve/v1/handoffs"\n'
    whole = config(decode=decode, before=shared + ack)
    planned = plan(whole, tmp_path)
    assert [(e.id, getattr(e, "port", None)) for e in planned.engines] == [("p0", 0), ("d0", 30001)]
    assert planned.store.ack_url == "http://192.0.2.9:8000/conserve/v1/handoffs"
    told = parse_config(planned.gateway_config({"p0": "http://127.0.0.1:4000"}))
    assert told.tiers[1].urls == ("http://127.0.0.1:30001", FAR)
    assert told.tiers[1].gpus == (("0",), ()), "GPUs elsewhere are not for this machine to measure"


def test_gateway_alone_reads_the_same_file() -> None:
    written = config('urls = ["http://127.0.0.1:30000"]', f'urls = ["{FAR}"]\ngpus = [0]')
    told = parse_config(attached_config(written, environ={}))
    assert {tier.engine for tier in told.tiers} == {"attach"}
    assert told.tiers[1].urls == (FAR,)
    assert told.tiers[1].gpus is None


EXAMPLES = Path(__file__).parents[2] / "docs" / "deploy"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_examples_can_be_used(path: Path) -> None:
    read = read_config(path)
    given = [(engine.id, engine.gpus) for engine in engines(read)]
    assert {
        "attach": [],
        "tensor-parallel": [
            ("p0", ("0", "1")),
            ("d0", ("2", "3")),
            ("d1", ("4", "5")),
            ("d2", ("6", "7")),
        ],
        "three-gpus": [("p0", ("0",)), ("d0", ("1",)), ("d1", ("2",))],
        "two-machines": [("p0", ("0",)), ("d0", ("0",)), ("d1", ("1",))],
    }[path.stem] == given
    if path.stem != "attach":
        assert {t.engine for t in read_config(path, engine="emulated").tiers} == {"emulated"}


# --- where the store is ---------------------------------------------------------------------


def test_store_goes_to_shared_memory_where_that_is_large(tmp_path: Path) -> None:
    run, shared = tmp_path / "run", tmp_path / "shm"
    shared.mkdir()
    folder = make_store_folder(run, shared=shared, enough_bytes=0)
    assert folder.parent == shared
    assert folder.stat().st_mode & 0o077 == 0
    assert make_store_folder(run, shared=shared, enough_bytes=1 << 62) == run / "store"
    assert make_store_folder(run, shared=tmp_path / "none") == run / "store"
    assert folder.exists(), "its run is alive"


def test_stores_of_killed_runs_are_removed(tmp_path: Path) -> None:
    gone = tmp_path / "conserve-store-999999999-x"
    others = [tmp_path / "conserve-store-x", tmp_path / f"conserve-store-{os.getpid()}-x"]
    for folder in (gone, *others, tmp_path / "else"):
        folder.mkdir()
    store_place.remove_stale(tmp_path)
    assert not gone.exists()
    assert [folder.exists() for folder in others] == [True, True]


def test_store_may_take_half_of_what_is_free(tmp_path: Path) -> None:
    limit = default_max_bytes(tmp_path / "not" / "yet")
    assert limit is not None
    assert limit > 0
    memory = tmp_path / "meminfo"
    memory.write_text("MemTotal: 9 kB\nMemAvailable:      4096 kB\n")
    assert store_place.available_memory_bytes(memory) == 4096 * 1024
    memory.write_text("MemAvailable: much\n")
    assert store_place.available_memory_bytes(memory) is None
