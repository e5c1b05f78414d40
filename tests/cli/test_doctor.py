"""`conserve doctor`: machines and clusters that lack something, by injection; and real ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from conserve_serving.cli import run
from conserve_serving.cli.doctor_cluster import check_cluster
from conserve_serving.cli.doctor_machine import Machine, check_machine
from conserve_serving.cli.doctor_model import check_model
from conserve_serving.cli.errors import GatewayUnreachableError
from conserve_serving.cli.findings import Finding, Findings, Level, as_lines, verdict, works
from conserve_serving.cli.gateway_http import ClusterStatus, EngineStatus, GatewayStatus
from conserve_serving.engines.client_types import EngineDescription
from conserve_serving.engines.http_errors import ConnectFailed
from conserve_serving.gateway.config import Config, parse_config

GIB = 1024**3
BOARDS = """\
0, GPU-aaaa, NVIDIA H100 80GB HBM3, 81559, 4, 570.86.15
1, GPU-bbbb, NVIDIA H100 80GB HBM3, 81559, 70000, 570.86.15
"""
GOOD_PYTHON = {
    "python": "3.11.9",
    "sglang": "0.5.23",
    "torch": "2.13.0",
    "conserve": True,
    "plugin": True,
    "plugin_allowed": True,
}


def commands(
    python: Mapping[str, Any] | None = None, cuda: str | None = "13.0", smi: str | None = BOARDS
) -> Callable[[list[str], Mapping[str, str]], tuple[int, str, str]]:
    """Answers in place of interpreters and of nvidia-smi."""

    def answer(argv: list[str], env: Mapping[str, str]) -> tuple[int, str, str]:
        if argv[0] == "nvidia-smi":
            if smi is None:
                raise FileNotFoundError("nvidia-smi")
            return (0, smi, "") if smi else (9, "", "NVIDIA-SMI has failed\nmore")
        if "torch.version" in argv[-1]:
            return 0, json.dumps({"cuda": cuda, "devices": 2 if cuda else 0}), ""
        return 0, "noise\n" + json.dumps({**GOOD_PYTHON, **(python or {})}), ""

    return answer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """One on which everything is well."""
    return Machine(
        run=commands(),
        environ={},
        open_files=lambda: 65536,
        memory_bytes=lambda: 256 * GIB,
        port_is_free=lambda host, port: True,
        is_ours=lambda host: host.startswith("127."),
        free_bytes=lambda folder: 64 * GIB,
        shared=tmp_path,
    )


def tiers(model: object, prefill: str = "", decode: str = "", *, before: str = "") -> Config:
    rows = "".join(
        f'[[tiers]]\nrole = "{role}"\nengine = "sglang"\nmodel = "{model}"\n'
        f"host_kv_gb = 8\n{more}\n"
        for role, more in (("prefill", prefill), ("decode", decode))
    )
    return parse_config(before + rows)


def bad(findings: list[Finding]) -> list[str]:
    return [f.what for f in findings if f.level is Level.BAD]


def warned(findings: list[Finding]) -> list[str]:
    return [f.what for f in findings if f.level is Level.WARN and "energy" not in f.what]


# --- a machine --------------------------------------------------------------------------------


def test_machine_that_has_everything(machine: Machine, model: Path) -> None:
    quiet = commands(smi=BOARDS.replace("70000", "0"))
    found = check_machine(tiers(model), dataclasses.replace(machine, run=quiet))
    assert works(found)
    assert warned(found) == []
    text = "\n".join(as_lines(found))
    for said in ("SGLang 0.5.23", "GPU 1: NVIDIA H100 80GB HBM3, 85.5 GB", "d0 has GPU 1"):
        assert said in text
    assert "16.0 GB of 274.9 GB" in text


def test_machine_without_gpu_and_sglang_is_told_plainly(machine: Machine) -> None:
    nothing = dataclasses.replace(machine, run=commands({"sglang": None}, smi=None))
    found = check_machine(None, nothing)
    sglang, gpu = bad(found)
    assert "SGLang is not installed" in sglang
    assert "no NVIDIA driver" in gpu
    assert any("emulated engines run here" in f.what for f in found)
    assert not works(found)


@pytest.mark.parametrize(
    ("python", "says"),
    [
        ({"conserve": False}, "cannot import our hand-off store"),
        ({"plugin": False}, "does not list our plug-in"),
        ({"plugin_allowed": False}, "SGLANG_PLUGINS"),
    ],
)
def test_environment_that_lacks_something_of_ours(
    machine: Machine, model: Path, python: dict[str, Any], says: str
) -> None:
    found = check_machine(tiers(model), dataclasses.replace(machine, run=commands(python)))
    (what,) = bad(found)
    assert says in what


def test_other_version_is_a_warning(machine: Machine, model: Path) -> None:
    other = dataclasses.replace(machine, run=commands({"sglang": "0.6.0"}))
    found = check_machine(tiers(model), other)
    assert works(found)
    assert any("SGLang 0.6.0" in what for what in warned(found))


def test_interpreter_that_is_not_there(machine: Machine, model: Path) -> None:
    real = dataclasses.replace(machine, run=Machine().run)
    config = tiers(model, 'python = "/no/python"\ngpus = []', 'python = "/no/python"\ngpus = []')
    assert bad(check_machine(config, real))[0].startswith("/no/python cannot be run")


def test_pytorch_without_cuda(machine: Machine, model: Path) -> None:
    cpu_only = dataclasses.replace(machine, run=commands(cuda=None))
    assert bad(check_machine(tiers(model), cpu_only)) == ["this PyTorch is built without CUDA"]
    device = 'flags = ["--device", "cpu"]'
    without = dataclasses.replace(machine, run=commands(cuda=None, smi=None))
    assert works(check_machine(tiers(model, device, device), without)), "and none is wanted"


def test_gpus_that_are_not_there_busy_or_too_small(machine: Machine, model: Path) -> None:
    found = check_machine(tiers(model, "gpus = [0]", 'gpus = [2, "GPU-bbbb"]'), machine)
    assert bad(found) == ["d0 wants GPU 2; there are 0, 1"]
    assert any("d1: GPU 1 has 73.4 GB in use" in what for what in warned(found))
    with (model / "model.safetensors").open("r+b") as weights:
        weights.truncate(100 * GIB)  # sparse
    found = check_machine(tiers(model, "gpus = [0]", "gpus = [1]"), machine)
    assert [what.partition(":")[2] for what in bad(found)] == [
        " 107.4 GB of weights do not fit on 85.5 GB of GPU memory"
    ] * 2


def test_driver_that_fails_is_quoted(machine: Machine, model: Path) -> None:
    broken = dataclasses.replace(machine, run=commands(smi=""))
    assert "nvidia-smi failed: NVIDIA-SMI has failed" in bad(check_machine(tiers(model), broken))


def test_host_memory(machine: Machine, model: Path) -> None:
    small = dataclasses.replace(machine, memory_bytes=lambda: 10 * 10**9)
    assert "host_kv_gb asks for 16.0 GB in all; 10.0 GB are free" in bad(
        check_machine(tiers(model), small)
    )
    unsized = parse_config(
        f'[[tiers]]\nrole = "decode"\nengine = "sglang"\nmodel = "{model}"\ncount = 2\n'
    )
    assert any(
        "d0, d1 size their host memory" in w for w in warned(check_machine(unsized, machine))
    )


def test_limits_and_ports(machine: Machine, model: Path) -> None:
    poor = dataclasses.replace(
        machine, open_files=lambda: 1024, port_is_free=lambda host, port: False
    )
    config = tiers(model, 'urls = ["http://127.0.0.1:30000"]')
    found = check_machine(config, poor)
    assert bad(found) == ["p0: port 30000 on 127.0.0.1 is in use"]
    assert any("1024 files open" in what for what in warned(found))
    assert any("port 8000" in what for what in warned(found))


def test_engines_of_other_machines_are_not_looked_for_here(machine: Machine) -> None:
    far = 'urls = ["http://192.0.2.1:{}"]'
    config = tiers("/not/here", far.format(30000), far.format(30001))
    assert works(check_machine(config, machine))


def test_store(machine: Machine, model: Path, tmp_path: Path) -> None:
    small = dataclasses.replace(machine, free_bytes=lambda folder: 64 * 1024**2)
    assert any("67 MB free" in what for what in warned(check_machine(tiers(model), small)))
    short = tiers(model, before="[scheduler]\nhandoff_floor_tokens = 16\n")
    assert any("first turns of 16 to 256" in what for what in warned(check_machine(short, machine)))
    shared = tiers(model, before=f'[handoff]\npath = "{tmp_path}/kv"\n')
    assert works(check_machine(shared, machine))
    assert any("67 MB free; full stores" in w for w in warned(check_machine(shared, small)))
    unwritable = tiers(model, before='[handoff]\npath = "/proc/kv"\n')
    assert any(
        "nothing can be written to /proc" in w for w in bad(check_machine(unwritable, machine))
    )
    other = tiers(model, before='[handoff]\ntransport = "mooncake"\n')
    assert works(check_machine(other, machine))


def test_models(model: Path, tmp_path: Path) -> None:
    def found(name: str, **environ: str) -> list[Finding]:
        into = Findings("model")
        check_model(name, {"HF_HOME": str(tmp_path / "hf"), **environ}, into)
        return into.all

    assert works(found(str(model)))
    assert bad(found("/no/model")) == ["/no/model: there is no such folder"]
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
    )
    assert "lacks model-2.safetensors" in bad(found(str(model)))[0]
    for file in model.iterdir():
        file.unlink()
    assert "config.json, a tokenizer" in bad(found(str(model)))[0]
    assert "SGLang will download it" in warned(found("org/name"))[0]
    assert "HF_HUB_OFFLINE" in bad(found("org/name", HF_HUB_OFFLINE="1"))[0]
    snapshot = tmp_path / "hf" / "hub" / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert "lacks" in bad(found("org/name"))[0]


# --- a cluster --------------------------------------------------------------------------------

URL = "http://127.0.0.1:8000"
DESCRIPTION = EngineDescription(
    model="q",
    page_tokens=64,
    kv_capacity_tokens=1000,
    max_context_tokens=1000,
    kv_layout="page=64",
    keeps_sessions=True,
    takes_priority=True,
    low_priority_first=False,
    version="0.5.23",
    emulated=None,
)


def settings(role: str, engine: str, /, **others: Any) -> dict[str, Any]:
    store = {
        "module_path": "conserve_serving.engines.sglang.store",
        "role": role,
        "engine": engine,
        "path": "/kv",
        "ack_url": f"{URL}/conserve/v1/handoffs",
    }
    store |= others.pop("store", {})
    return {
        "enable_metrics": True,
        "enable_cache_report": True,
        "enable_hierarchical_cache": True,
        "hicache_write_policy": "write_through",
        "hicache_storage_prefetch_policy": "wait_complete",
        "hicache_storage_backend": "dynamic",
        "hicache_storage_backend_extra_config": json.dumps(store),
        **others,
    }


@dataclasses.dataclass
class FakeEngine:
    said: dict[str, Any]
    description: EngineDescription = DESCRIPTION
    gone: bool = False

    async def describe(self) -> EngineDescription:
        if self.gone:
            raise ConnectFailed("127.0.0.1:1", "refused")
        return self.description

    async def settings(self) -> dict[str, object]:
        return self.said

    def close(self) -> None:
        pass


async def look(
    p0: FakeEngine | None = None, d0: FakeEngine | None = None, **status: Any
) -> list[Finding]:
    engines = {
        "http://p0": p0 or FakeEngine(settings("prefill", "p0")),
        "http://d0": d0 or FakeEngine(settings("decode", "d0")),
    }
    cluster = ClusterStatus(
        gateway=GatewayStatus(policy=status.pop("policy", "conserve")),
        engines=[
            EngineStatus(id="p0", url="http://p0", tier="prefill", state="ready"),
            EngineStatus(id="d0", url="http://d0", tier="decode", state="ready", **status),
        ],
    )
    return await check_cluster(URL, lambda: cluster, engines.__getitem__)


async def test_cluster_that_has_everything() -> None:
    found = await look()
    assert verdict(found) == "all is well"
    assert "agree on model, KV layout and store" in found[-1].what


@pytest.mark.parametrize(
    ("said", "says", "fix"),
    [
        ({"enable_metrics": False}, "does not report its occupancy", "--enable-metrics"),
        ({"enable_cache_report": False}, "how much of a prompt", "--enable-cache-report"),
        ({"enable_hierarchical_cache": False}, "no hierarchical", "--enable-hierarchical-cache"),
        ({"hicache_storage_backend": "file"}, "back end is file", "conserve engine"),
        ({"hicache_storage_backend": None}, "back end is none", "docs/operations.md"),
        ({"hicache_storage_backend_extra_config": "{}"}, "not ConServe's", "conserve engine"),
        ({"hicache_write_policy": "write_back"}, "'write_back'", "write_through"),
        ({"store": {"role": "decode"}}, "role 'decode'", '"role": "prefill"'),
        ({"store": {"ack_url": ""}}, "acknowledges to nobody", f"{URL}/conserve/v1/handoffs"),
        ({"store": {"ack_url": "http://127.0.0.1:9/conserve/v1/handoffs"}}, "not this", URL),
    ],
)
async def test_prefiller_that_lacks_something(said: dict[str, Any], says: str, fix: str) -> None:
    found = await look(p0=FakeEngine(settings("prefill", "p0", **said)))
    (finding,) = [f for f in found if f.level is Level.BAD]
    assert finding.subject == "engine p0 (prefill, http://p0)"
    assert says in finding.what
    assert fix in finding.remedy


async def test_decoder_that_lacks_something() -> None:
    forgetful = dataclasses.replace(DESCRIPTION, keeps_sessions=False, takes_priority=False)
    said = settings("decode", "d0", hicache_storage_prefetch_policy="best_effort")
    found = await look(d0=FakeEngine(said, forgetful))
    assert len(bad(found)) == 2
    assert "cannot hold idle conversations" in bad(found)[0]
    assert "prefills them again" in bad(found)[1]
    assert "order of arrival" in warned(found)[0]


async def test_what_must_be_the_same_everywhere() -> None:
    other = dataclasses.replace(DESCRIPTION, kv_layout="page=16", version="0.6.0", model="r")
    found = await look(d0=FakeEngine(settings("decode", "d1", store={"path": "/else"}), other))
    assert bad(found) == [
        "model differs: p0: q; d0: r",
        "KV layout differs: p0: page=64; d0: page=16",
        "store's path differs: p0: /kv; d0: /else",
    ]
    assert any("SGLang 0.6.0" in what for what in warned(found))
    assert any("calls itself 'd1'" in what for what in warned(found))


async def test_store_is_needed_only_where_kv_is_handed_over() -> None:
    bare = FakeEngine(settings("", "", enable_hierarchical_cache=False))
    assert works(await look(p0=bare, d0=bare, policy="collocated"))


async def test_engines_that_do_not_answer() -> None:
    gone = FakeEngine({}, gone=True)
    (what,) = warned(await look(d0=gone))
    assert "the gateway reaches it, this machine does not" in what
    found = await check_cluster(
        URL,
        lambda: ClusterStatus(
            engines=[EngineStatus(id="d0", url="http://d0", tier="decode", state="lost", note="x")]
        ),
        lambda url: gone,
    )
    assert bad(found)[0] == "the gateway says it is lost: x"


async def test_gateway_that_is_not_there_or_has_no_decoder() -> None:
    def nobody() -> ClusterStatus:
        raise GatewayUnreachableError("no gateway answers", remedy="start one")

    assert bad(await check_cluster(URL, nobody, lambda url: FakeEngine({}))) == [
        "no gateway answers"
    ]
    assert bad(await check_cluster(URL, ClusterStatus, lambda url: FakeEngine({}))) == [
        "it has no decoder"
    ]


# --- the command ------------------------------------------------------------------------------


def test_command_on_this_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[gateway]\nport = 0\n")
    assert run(["doctor", "--config", str(path)]) == 0
    assert "emulated engines run here" in capsys.readouterr().out
    path.write_text('[[tiers]]\nrole = "decode"\nengine = "sglang"\nmodel = "/no/model"\n')
    assert run(["doctor", "--config", str(path), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is False
    assert any("/no/model" in row["what"] and row["remedy"] for row in said["findings"])
    assert run(["doctor", "--config", str(path), "--engine", "emulated"]) == 0
    assert run(["doctor", "--url", "http://127.0.0.1:1"]) == 1
    assert "no gateway answers" in capsys.readouterr().out
    assert run(["doctor", "--config", "/no/file"]) == 2
    assert run(["doctor", "--url", "ftp://x"]) == 2
