"""The GPUs of this machine, as ``nvidia-smi`` lists them, and whether engines fit on them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from conserve_serving.cli.findings import Findings, size
from conserve_serving.engines.sglang.environment import Runner
from conserve_serving.engines.sglang.flags import SglangEngine

_QUERY: Final = "index,uuid,name,memory.total,memory.used,driver_version"
_MIB: Final = 1024**2
#: More than this in use on a GPU before we start is somebody else's program.
_IDLE_BYTES: Final = 2 * 1024**3


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """One GPU. Sizes in bytes."""

    index: str
    uuid: str
    name: str
    total_bytes: int
    used_bytes: int
    driver: str


def list_boards(run: Runner, env: Mapping[str, str]) -> list[Board] | str:
    """The GPUs there are, or why they cannot be listed."""
    try:
        code, out, err = run(
            ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"], env
        )
    except FileNotFoundError:
        return "there is no nvidia-smi: no NVIDIA driver is installed (or no GPU is passed in)"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi cannot be run: {error}"
    if code != 0:
        words = (err or out).strip().splitlines()
        return f"nvidia-smi failed: {words[0] if words else f'exit code {code}'}"
    boards = []
    for line in out.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == len(_QUERY.split(",")):
            index, uuid, name, total, used, driver = fields
            boards.append(
                Board(
                    index=index,
                    uuid=uuid,
                    name=name,
                    total_bytes=_mib(total),
                    used_bytes=_mib(used),
                    driver=driver,
                )
            )
    return boards or "nvidia-smi lists no GPU"


def _mib(text: str) -> int:
    return int(text) * _MIB if text.isdigit() else 0  # "[N/A]" on a board divided by MIG


def check_boards(boards: list[Board] | str, into: Findings) -> None:
    """Say which GPUs there are."""
    if isinstance(boards, str):
        into.bad(
            boards,
            "install the driver, or pass the GPUs into the container (docker run --gpus all); "
            "without a GPU use emulated engines: `conserve up`",
        )
        return
    for board in boards:
        into.ok(
            f"GPU {board.index}: {board.name}, {size(board.total_bytes)}, driver {board.driver}"
        )


def check_engine_gpus(
    engines: Sequence[SglangEngine],
    boards: list[Board],
    weights_bytes: Callable[[SglangEngine], int | None],
    into: Findings,
) -> None:
    """Whether each engine's GPUs are there, free, and large enough.

    Args:
        engines: those of this machine that want GPUs.
        boards: those there are.
        weights_bytes: the size of an engine's weights, when it is known.
        into: takes the findings.
    """
    known = {board.index: board for board in boards} | {board.uuid: board for board in boards}
    for engine in engines:
        gpus = engine.gpus or ()
        absent = [gpu for gpu in gpus if gpu not in known and not gpu.startswith("MIG-")]
        if absent:
            into.bad(
                f"{engine.id} wants GPU {', '.join(absent)}; there are "
                f"{', '.join(board.index for board in boards)}",
                "correct gpus (or count, or tp) in the tier",
            )
            continue
        mine = [known[gpu] for gpu in gpus if gpu in known]
        for board in mine:
            if board.used_bytes > _IDLE_BYTES:
                into.warn(
                    f"{engine.id}: GPU {board.index} has {size(board.used_bytes)} in use already",
                    "end the programs that `nvidia-smi` lists, or lower --mem-fraction-static",
                )
        weights = weights_bytes(engine)
        room = sum(board.total_bytes for board in mine)
        if weights is not None and room and weights > room:
            into.bad(
                f"{engine.id}: {size(weights)} of weights do not fit on {size(room)} of GPU memory",
                "give it more GPUs (gpus, tp), or use a quantized model",
            )
        elif mine:
            into.ok(f"{engine.id} has GPU {', '.join(board.index for board in mine)}")
