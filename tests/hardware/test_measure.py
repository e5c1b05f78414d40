"""The measuring script as it is run, on a CPU at small size; what only a GPU does is not here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is in .venv-sglang: make test-hardware")

import measure  # noqa: E402 - needs torch
from attention import AttentionError  # noqa: E402
from bench import BenchError  # noqa: E402
from board import PowerWatch  # noqa: E402
from grid import CALLS, Cell, ordered  # noqa: E402
from make_mixed_profile import fit_power, make_table  # noqa: E402
from options import parse  # noqa: E402
from result import Result, ResultError, read_result  # noqa: E402
from runner import Measurement  # noqa: E402

from conserve_serving.energy.sampler import BoardReading  # noqa: E402

QUICK = ["--device", "cpu", "--model", "tiny", "--quick", "--rounds", "3", "--min-ms", "0.1"]


SCRIPT = Path(measure.__file__)


def run(*argv: str) -> tuple[Result | None, list[str]]:
    said: list[str] = []
    return measure.main([*QUICK, *argv], say=said.append), said


def test_from_the_command_line_to_a_table(tmp_path: Path) -> None:
    out = tmp_path / "tiny.json"
    # As on a lent machine: torch is there, and nothing that our package needs.
    code = (
        "import runpy, sys\n"
        "sys.modules |= dict.fromkeys(('msgspec', 'pydantic', 'click', 'httptools', 'uvloop'))\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    argv = [sys.executable, "-c", code, *QUICK, "--out", str(out), "--git-revision", "abc"]
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)  # noqa: S603
    assert ran.returncode == 0, ran.stderr
    assert "on a CPU: a test of the script, no figures of any GPU" in ran.stdout
    data = read_result(out)
    assert len(data["cells"]) == 16
    assert len(data["repeats"]) == 4
    assert data["power"] == []
    assert data["config"]["attention"] == "torch-sdpa"
    assert data["config"]["mixed_attention"] == ["two_calls"]
    assert data["config"]["graphs"] == []
    (session,) = data["sessions"]
    assert session["git"] == "abc"
    assert session["software"]["torch"] == torch.__version__
    for cell in data["cells"]:
        assert set(cell["parts"]) == {"prefill", "decode", "two_calls"}
        assert all(len(part["ms"]) == 3 for part in cell["parts"].values())
        assert all(ms > 0 for part in cell["parts"].values() for ms in part["ms"])
        (seen,) = cell["slowdown"].values()
        assert seen["low"] <= seen["median"] <= seen["high"]
    made = make_table(data, "two_calls")
    assert made.table.chunk_tokens == (16, 64)
    assert made.filled == 0


@pytest.mark.parametrize(
    ("more", "calls"),
    [
        (("--kv", "paged", "--page-tokens", "16"), ["two_calls"]),
        (("--attention", "reference"), ["one_call", "two_calls"]),
        (("--attention", "reference", "--mixed-attention", "two_calls"), ["two_calls"]),
        (("--dtype", "bfloat16", "--layers", "1"), ["two_calls"]),
    ],
    ids=["paged", "both", "two calls", "bfloat16"],
)
def test_variants_run(more: tuple[str, ...], calls: list[str]) -> None:
    result, _ = run(*more, "--chunks", "16", "--batches", "3", "--contexts", "32", "--repeats", "0")
    assert result is not None
    assert len(result.data["cells"]) == 2
    assert result.data["config"]["mixed_attention"] == calls
    assert list(result.data["cells"][0]["slowdown"]) == calls


def test_a_run_that_was_cut_short_is_gone_on_with(tmp_path: Path) -> None:
    out = str(tmp_path / "tiny.json")
    run("--out", out, "--batches", "1", "--repeats", "0")
    first = read_result(Path(out))["cells"]
    _, said = run("--out", out, "--repeats", "0")
    data = read_result(Path(out))
    assert "8 cells are there from before" in said
    assert data["cells"][: len(first)] == first
    assert len(data["cells"]) == 16
    assert [cell["session"] for cell in data["cells"]] == [0] * 8 + [1] * 8
    with pytest.raises(ResultError, match="measured with another dtype"):
        run("--out", out, "--dtype", "float16")


def test_check_says_what_is_here_and_measures_nothing(tmp_path: Path) -> None:
    out = tmp_path / "tiny.json"
    result, said = run("--check", "--out", str(out))
    assert result is None
    assert not out.exists()
    assert "attention: torch-sdpa" in said
    assert any(line.startswith("attention passed over: flashinfer") for line in said)


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        (("--tensor-parallel", "3"), ValueError, "--tensor-parallel 3: tiny has 2 KV heads"),
        (("--layers", "0"), ValueError, "--layers: at least 1"),
        (("--attention", "flash-attn"), AttentionError, "flash-attn: not installed"),
        (("--contexts", "100000000"), BenchError, "no cell fits into"),
    ],
)
def test_what_cannot_be_done_is_said(
    argv: tuple[str, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(*argv)


def test_cells_too_large_are_left_out_and_listed() -> None:
    result, said = run("--contexts", "32,100000000", "--repeats", "0")
    assert result is not None
    assert {cell["ctx_tokens"] for cell in result.data["left_out"]} == {100_000_000}
    assert {entry["cell"]["ctx_tokens"] for entry in result.data["cells"]} == {32}
    assert any("8 cells do not fit into" in line for line in said)


# --- a run's flow, with a machine of our own --------------------------------------------------


class Machine:
    """Steps that take model time: the GPU whose cells cost 2 s and whose board draws watts."""

    def __init__(self, watts: Callable[[str, int], float] = lambda *_: 100.0) -> None:
        self.now_s = 0.0
        self.joules = 0.0
        self.watts_of = watts
        self.state = ("idle", 0)
        self.cells: list[Cell] = []
        self.too_large: set[int] = set()
        self.silent = False

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        self.joules += self.watts_of(*self.state) * seconds

    # as a Bench
    def fits(self, cell: Cell) -> bool:
        return True

    def parts(self, cell: Cell) -> dict[str, Callable[[int], tuple[float, float]]]:
        self.cells.append(cell)
        if cell.batch in self.too_large:
            raise torch.OutOfMemoryError("CUDA out of memory")

        def part(name: str) -> Callable[[int], tuple[float, float]]:
            def once(count: int) -> tuple[float, float]:
                self.state = (name, cell.batch)
                self.pass_time(0.05 * count)
                self.state = ("idle", 0)
                return 50.0 * count, 1.0

            return once

        return {name: part(name) for name in ("prefill", "decode", *CALLS)}

    # as the board
    def read(self) -> BoardReading | None:
        if self.silent:
            return None
        return BoardReading(
            joules=self.joules, at_s=self.now_s, source="s", mig_devices=None, missing_s=0.0
        )


def flow(
    machine: Machine, *argv: str, budget_s: float | None = None, power: bool = False
) -> tuple[dict[str, Any], list[str]]:
    options = parse(["--chunks", "256,512,1024", "--batches", "1,4,16", *argv], "about")
    result = Result(None, {})
    result.begin({"notes": []})
    watch = PowerWatch(machine.read, lambda: "board gone", clock=lambda: machine.now_s)
    said: list[str] = []
    bench: Any = machine
    measurement = Measurement(
        result,
        bench,
        options,
        board=None,
        watch=watch if power else None,
        deadline_s=budget_s,
        clock=lambda: machine.now_s,
        say=said.append,
        idle=lambda: machine.pass_time(0.2) or 0,
    )
    measurement.run(ordered(options.axes, seed=options.seed))
    return result.data, said


def test_the_time_is_kept_with_the_coarse_grid_first_and_repeats_at_the_end() -> None:
    machine = Machine()
    data, _ = flow(machine, "--contexts", "1024,2048,4096,8192", "--prefixes", "0", budget_s=70.0)
    assert machine.now_s <= 70.0
    assert machine.now_s > 55.0  # and used
    assert 10 < len(data["cells"]) < 36
    coarse = [entry["cell"]["ctx_tokens"] for entry in data["cells"]]
    assert {1024, 2048, 8192} <= set(coarse[:27])
    assert 4096 not in coarse[:27]
    assert len(data["repeats"]) == 4
    assert "the time was up" in data["sessions"][0]["notes"][0]
    for again in data["repeats"]:
        assert again["over_first"]["slowdown"] == pytest.approx(dict.fromkeys(CALLS, 1.0))


def test_without_a_limit_everything_is_measured() -> None:
    data, _ = flow(Machine(), "--contexts", "1024,2048", "--prefixes", "0,512")
    assert len(data["cells"]) == 36
    assert data["sessions"][0]["notes"] == []


def test_a_cell_without_memory_is_noted_and_the_others_go_on() -> None:
    machine = Machine()
    machine.too_large = {16}
    data, _ = flow(machine, "--contexts", "1024", "--prefixes", "0")
    assert len(data["cells"]) == 6
    notes = data["sessions"][0]["notes"]
    assert len(notes) == 3
    assert all(note.startswith("out of memory") and "'batch': 16" in note for note in notes)


def test_power_of_every_state_after_the_coarse_grid() -> None:
    def watts(state: str, batch: int) -> float:
        table = {"idle": 110.0, "prefill": 650.0, "one_call": 600.0, "two_calls": 1.0}
        return table.get(state) or 300.0 + 10.0 * batch

    data, _ = flow(Machine(watts), "--contexts", "1024", "--prefixes", "0", power=True)
    seen = {(entry["state"], entry["batch"]): entry for entry in data["power"]}
    assert {key: round(entry["watts"]) for key, entry in seen.items()} == {
        ("idle_loaded", None): 110,
        ("prefill", 4): 650,
        ("mixed", 4): 600,
        ("decode", 4): 340,
        ("decode", 1): 310,
        ("decode", 16): 460,
    }
    assert seen["prefill", 4]["joules_per_step"] == pytest.approx(650 * 0.05)
    assert seen["idle_loaded", None]["joules_per_step"] is None
    assert seen["decode", 1]["seconds"] >= 6.0
    assert fit_power(data, 1).prefill_w == 650.0


def test_a_board_that_cannot_be_read_is_noted_and_the_grid_goes_on() -> None:
    machine = Machine()
    machine.silent = True
    data, _ = flow(machine, "--contexts", "1024", "--prefixes", "0", power=True)
    assert data["power"] == []
    assert data["sessions"][0]["notes"] == ["power of idle_loaded: board gone"]
    assert len(data["cells"]) == 9


def test_power_leaves_time_for_the_grid() -> None:
    data, _ = flow(
        Machine(), "--contexts", "1024", "--prefixes", "0,512", budget_s=60.0, power=True
    )
    assert 0 < len(data["power"]) < 6
    assert "not all power states: the time was up" in data["sessions"][0]["notes"]
    assert any(entry["cell"]["prefix_tokens"] for entry in data["cells"])


def test_no_gpu_is_no_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    argv = [sys.executable, str(SCRIPT), "--device", "cuda"]
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)  # noqa: S603
    assert ran.returncode == 1
    assert ran.stderr.startswith("measure.py: --device cuda: torch ")
    assert ran.stderr.rstrip().endswith("--device cpu runs the same code, for tests")
