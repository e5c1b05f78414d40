"""What an SGLang engine is started with, and what may not be passed through."""

from __future__ import annotations

import dataclasses
import json

import pytest

from conserve_serving.engines.sglang.flags import (
    SglangEngine,
    StoreSettings,
    check_flags,
    check_omit,
    environment,
    named_flags,
    server_arguments,
    store_config,
)
from conserve_serving.engines.sglang.store_config import parse

STORE = StoreSettings(
    transport="file",
    path="/dev/shm/x",  # noqa: S108 - a name
    ack_url="http://10.0.0.1:8000/conserve/v1/handoffs",
    max_bytes=1000,
    max_age_s=60.0,
)
ENGINE = SglangEngine(
    id="d0", role="decode", model="/models/q", served_model_name="q", python="python3"
)


def test_engine_gets_what_the_hand_off_and_the_driver_need() -> None:
    given = dict(named_flags(server_arguments(ENGINE, STORE)))
    assert given["--model-path"] == "/models/q"
    assert given["--served-model-name"] == "q"
    assert given["--page-size"] == "64"
    assert given["--hicache-write-policy"] == "write_through"
    assert given["--hicache-storage-prefetch-policy"] == "wait_complete"
    assert given["--hicache-storage-backend"] == "dynamic"
    assert given.keys() >= {
        "--enable-metrics",
        "--enable-cache-report",
        "--enable-hierarchical-cache",
        "--enable-session-radix-cache",
        "--enable-priority-scheduling",
        "--disable-priority-preemption",
    }
    assert "--max-total-tokens" not in given
    assert json.loads(given["--hicache-storage-backend-extra-config"] or "") == store_config(
        ENGINE, STORE
    )


def test_prefiller_holds_no_conversations() -> None:
    engine = dataclasses.replace(ENGINE, keeps_conversations=False, host_kv_gb=8, tp=2)
    given = dict(named_flags(server_arguments(engine, STORE)))
    assert "--enable-session-radix-cache" not in given
    assert given["--hicache-size"] == "8"
    assert given["--tp-size"] == "2"


def test_users_flags_come_last_and_in_place_of_ours() -> None:
    flags = ("--hicache-mem-layout", "layer_first", "--log-level=debug", "--attention-backend", "x")
    engine = dataclasses.replace(ENGINE, flags=flags, omit=("--enable-session-radix-cache",))
    given = server_arguments(engine, STORE)
    assert tuple(given[-5:]) == flags
    assert given.count("--hicache-mem-layout") == 1
    assert "--log-level" not in given
    assert "--enable-session-radix-cache" not in given


@pytest.mark.parametrize("role", ["prefill", "decode", "both"])
def test_our_store_understands_its_configuration(role: str) -> None:
    engine = dataclasses.replace(ENGINE, role=role)
    store = dataclasses.replace(STORE, extra={"prefetch_timeout_base": 2, "grace_s": 5})
    config = parse(store_config(engine, store))
    assert (config.role, config.engine, config.transport) == (role, "d0", "file")
    assert (config.path, config.ack_url) == (STORE.path, STORE.ack_url)
    assert (config.max_bytes, config.max_age_s, config.grace_s) == (1000, 60.0, 5.0)


def test_hits_are_loaded_by_the_page_at_least() -> None:
    store = dataclasses.replace(STORE, prefetch_threshold_tokens=16)
    assert store_config(ENGINE, store)["prefetch_threshold"] == 64
    small = dataclasses.replace(ENGINE, page_tokens=16)
    assert store_config(small, store)["prefetch_threshold"] == 16
    assert "max_bytes" not in store_config(ENGINE, dataclasses.replace(STORE, max_bytes=None))


def test_gpus_are_numbered_as_nvidia_smi_does() -> None:
    engine = dataclasses.replace(ENGINE, gpus=("2", "3"), env={"HF_HOME": "/hub"})
    given = environment(engine)
    assert given["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert given["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert given["HF_HOME"] == "/hub"
    assert "CUDA_VISIBLE_DEVICES" not in environment(ENGINE)
    mine = dataclasses.replace(engine, env={"CUDA_VISIBLE_DEVICES": "MIG-1"})
    assert environment(mine)["CUDA_VISIBLE_DEVICES"] == "MIG-1", "the file has the last word"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--disaggregation-mode", "decode"], "cannot prefill a tail turn"),
        (["--disaggregation-mode=prefill"], "give it null"),
        (["--disagg", "decode"], "cannot be passed through"),
        (["--disable-radix-cache"], "remove it"),
        (["--hicache-write-policy", "write_back"], "write_through"),
        (["--hicache-storage-prefetch-policy", "best_effort"], "wait_complete or timeout"),
        (["--hicache-storage-backend", "file"], "write handoff.transport instead"),
        (["--page-size", "16"], "write tiers.page_tokens instead"),
        (["--tp-size=2"], "write tiers.tp instead"),
        (["--dp-size", "2"], "scatter"),
        (["--enable-lmcache"], "another cache"),
        (["--ssl-certfile", "x"], "TLS"),
        (["--config", "x.yaml"], "write them in flags"),
        (["--attention-backend fa3"], "'--attention-backend', 'fa3'"),
        (["fa3"], "belongs to no flag"),
    ],
)
def test_flags_that_break_the_hand_off_are_refused_by_name(flags: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        check_flags(flags)
    assert flags[0].partition("=")[0].split()[0] in str(caught.value)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--disaggregation-mode", "null", "--dp-size", "1"],
        ["--attention-backend", "fa3", "--chunked-prefill-size", "-1", "--enable-mixed-chunk"],
        ["--json-model-override-args", '{"a b": 1}', "--grpc-port", "1"],
    ],
)
def test_other_flags_pass(flags: list[str]) -> None:
    check_flags(flags)


def test_only_what_can_be_missing_is_left_out() -> None:
    check_omit(["--enable-session-radix-cache"])
    with pytest.raises(ValueError, match="--enable-metrics' cannot be left out"):
        check_omit(["--enable-metrics"])
