"""The store's settings and the stamp of its folder: what cannot be is refused by name."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conserve_serving.engines.sglang import desk, marks
from conserve_serving.engines.sglang.errors import (
    LayoutMismatchError,
    StoreConfigError,
    StoreError,
)
from conserve_serving.engines.sglang.layout import Layout
from conserve_serving.engines.sglang.store_config import parse

GOOD: dict[str, Any] = {
    "backend_name": "conserve",
    "module_path": "conserve_serving.engines.sglang.store",
    "class_name": "HandoffStore",
    "interface_v1": 1,
    "prefetch_threshold": 256,
    "role": "prefill",
    "engine": "p0",
    "ack_url": "http://127.0.0.1:8000/conserve/v1/handoffs",
    "path": "/shared",
}
#: Modules beside them that run in our own environment.
OURS = {"__init__", "launch", "diagnose", "environment", "flags", "guard"}
LAYOUT = Layout(
    model="m",
    page_tokens=64,
    dtype="bfloat16",
    memory_layout="page_first",
    tp_size=1,
    pp_size=1,
    page_bytes=4096,
)


def test_a_good_configuration() -> None:
    config = parse({**GOOD, "max_bytes": 10, "max_age_s": 5})
    assert (config.role, config.engine, config.path) == ("prefill", "p0", "/shared")
    assert (config.max_bytes, config.max_age_s, config.stores) == (10, 5.0, True)


def test_a_decoder_needs_no_ack_url() -> None:
    config = parse({**GOOD, "role": "decode", "ack_url": ""})
    assert not config.stores


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"role": "prefiller"}, "role is 'prefiller': use one of prefill, decode, both"),
        ({"role": None}, "role is None: give a string"),
        ({"engine": ""}, "engine is empty"),
        ({"ack_url": "ftp://x"}, "ack_url is 'ftp://x': give the gateway's"),
        ({"ack_url": "http://x:99999/"}, "ack_url is"),
        ({"path": ""}, "path is missing"),
        ({"max_bytes": 0}, "max_bytes is 0: give a positive integer"),
        ({"max_bytes": True}, "max_bytes is True"),
        ({"max_age_s": -1}, "max_age_s is -1: give a number of seconds"),
        ({"max_age_s": float("nan")}, "max_age_s is nan"),
        ({"transport": "carrier pigeon"}, "transport is 'carrier pigeon': use one of file"),
        ({"max_byte": 5}, "unknown setting 'max_byte'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(StoreConfigError) as caught:
        parse({**GOOD, **changes})
    assert str(caught.value).startswith("ConServe hand-off store: ")
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["role", "engine"])
def test_what_is_missing_is_named(name: str) -> None:
    with pytest.raises(StoreConfigError, match=f"{name} is missing"):
        parse({key: value for key, value in GOOD.items() if key != name})


def test_other_transports_keep_their_own_keys() -> None:
    config = parse({**GOOD, "transport": "mooncake", "path": "", "master_server_address": "h:1"})
    assert config.transport == "mooncake"


# --- the stamp ---------------------------------------------------------------------------------
def test_engines_of_one_layout_share_a_folder(tmp_path: Path) -> None:
    LAYOUT.check_stamp(tmp_path)
    LAYOUT.check_stamp(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["stamp.json"]


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("model", "another"),
        ("page_tokens", 16),
        ("dtype", "float16"),
        ("memory_layout", "layer_first"),
        ("tp_size", 2),
        ("pp_size", 2),
        ("page_bytes", 8192),
    ],
)
def test_another_layout_is_refused_and_both_values_are_named(
    tmp_path: Path, name: str, other: object
) -> None:
    LAYOUT.check_stamp(tmp_path)
    with pytest.raises(LayoutMismatchError) as caught:
        dataclasses.replace(LAYOUT, **{name: other}).check_stamp(tmp_path)
    text = str(caught.value)
    assert f"{name} is {other!r} here and {getattr(LAYOUT, name)!r} in {tmp_path}" in text


def test_a_damaged_stamp_and_a_missing_folder_are_told(tmp_path: Path) -> None:
    (tmp_path / "stamp.json").write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        LAYOUT.check_stamp(tmp_path)
    with pytest.raises(StoreError, match="cannot keep a stamp in"):
        LAYOUT.check_stamp(tmp_path / "nowhere")


def test_the_digest_names_the_layout() -> None:
    others = {dataclasses.replace(LAYOUT, page_tokens=size).digest() for size in (16, 32, 64)}
    assert len(others) == 3
    assert LAYOUT.digest() in others


# --- what SGLang loads -------------------------------------------------------------------------
def test_what_sglang_loads_needs_the_standard_library_only() -> None:
    """All but the modules that need torch and SGLang themselves, in an empty environment."""
    needs_sglang = {"store", "transport"}
    folder = Path(desk.__file__).parent
    names = {path.stem for path in folder.glob("*.py")} - needs_sglang - OURS
    assert names >= {"desk", "files", "plugin", "poster"}
    program = "import json\n"
    program += "".join(f"import conserve_serving.engines.sglang.{name}\n" for name in names)
    program += "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    source = Path(__file__).resolve().parents[2] / "serving"
    done = subprocess.run(  # noqa: S603 - our own interpreter and text
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.insert(0, {str(source)!r})\n" + program,
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    loaded = set(json.loads(done.stdout))
    assert loaded <= set(sys.stdlib_module_names) | {"__main__", "conserve_serving"}


def test_marks_are_told_from_names() -> None:
    assert marks.split("cs-1") == ("cs-1", None)
    assert marks.split("cs-1" + marks.FREE) == ("cs-1", marks.FREE)
    assert marks.split("cs-1" + marks.END) == ("cs-1", marks.END)
