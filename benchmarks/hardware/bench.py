"""The steps of a cell, ready to be run: model, pool, batches, CUDA graphs, timers."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from attention import Attention
from grid import CALLS, Cell
from kv import KvPool, Sequence, kv_tokens_needed, lay_out
from model import DecoderStack
from shapes import Shape

DTYPES: Final = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
#: Left to the driver, the kernels' own buffers and fragmentation.
_RESERVE_BYTES: Final = 2 << 30
#: KV on a CPU is for tests.
_CPU_KV_BYTES: Final = 1 << 30


class BenchError(Exception):
    """The model or the grid does not fit this machine."""


class Bench:
    """Runs cells on one device.

    Args:
        shape: the model.
        attention: kernels that work here.
        page_tokens: None for contiguous KV.
        calls: mixed steps to run, of `grid.CALLS`.
        graphs: parts replayed as CUDA graphs.
        cells: all that might be run; the pool is made for the largest that fits.
        seed: of weights, KV, ids and layout.

    Attributes:
        room_tokens: KV tokens that fit beside weights and activations.

    Raises:
        BenchError: not even the weights fit, or none of the cells.
    """

    def __init__(
        self,
        shape: Shape,
        attention: Attention,
        *,
        device: torch.device,
        dtype: torch.dtype,
        page_tokens: int | None,
        calls: tuple[str, ...],
        graphs: frozenset[str],
        cells: list[Cell],
        seed: int,
    ) -> None:
        self._attention, self._page, self._calls = attention, page_tokens, calls
        self._graphs, self._seed, self._device = graphs, seed, device
        bytes_each = torch.empty((), dtype=dtype).element_size()
        kv_bytes = shape.kv_values_per_token * bytes_each
        room_bytes = _CPU_KV_BYTES
        if device.type == "cuda":
            free_bytes = torch.cuda.mem_get_info(device)[0]
            rows = max(cell.chunk_tokens + cell.batch for cell in cells)
            wide = 8 * shape.hidden + 6 * (shape.heads + shape.kv_heads) * shape.head_dim
            # A graph keeps its activations; prefill and mixed have as many rows.
            activations = 3 * rows * (wide + 5 * shape.intermediate) * bytes_each
            room_bytes = free_bytes - shape.weights * bytes_each - activations - _RESERVE_BYTES
            if room_bytes < kv_bytes:
                weights = f"{shape.weights * bytes_each / 2**30:.1f} GiB of weights"
                raise BenchError(
                    f"{shape.name} takes {weights} and {activations / 2**30:.1f} GiB of "
                    f"activations, {free_bytes / 2**30:.1f} GiB "
                    "are free: use --layers, --tensor-parallel or smaller --chunks"
                )
        self.room_tokens = room_bytes // kv_bytes
        fitting = [cell for cell in cells if self.fits(cell)]
        if not fitting:
            raise BenchError(f"no cell fits into {self.room_tokens} KV tokens: make them smaller")
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self.model = DecoderStack(shape, dtype=dtype, generator=self._generator)
        self._pool = KvPool(
            shape,
            max(self._needed(cell) for cell in fitting),
            page_tokens=page_tokens,
            dtype=dtype,
            generator=self._generator,
        )

    def fits(self, cell: Cell) -> bool:
        """Whether a cell has room."""
        return bool(self._needed(cell) <= self.room_tokens)

    def _needed(self, cell: Cell) -> int:
        return kv_tokens_needed(_sequences(cell), self._page)

    def parts(self, cell: Cell) -> dict[str, Callable[[int], tuple[float, float]]]:
        """``run(n)``, as `grid.take_turns` wants it, of ``prefill``, ``decode`` and mixed steps.

        Those of the cell before must not be used any more.
        """
        gc.collect()  # the graphs of the cell before
        if self._device.type == "cuda":  # their memory, which a capture cannot ask for
            torch.cuda.empty_cache()
        group = lay_out(self._pool, _sequences(cell), seed=self._seed)
        ids = torch.randint(
            self.model.shape.vocab,
            (group.new_tokens,),
            device=self._device,
            generator=self._generator,
        )
        chunk = cell.chunk_tokens
        runs = {}
        for name, members, own in (
            ("prefill", slice(0, 1), ids[:chunk]),
            ("decode", slice(1, None), ids[chunk:]),
            *((calls, slice(None), ids) for calls in self._calls),
        ):
            split = 1 if name == "two_calls" else None
            batch = self.model.batch(group.of(members), self._attention, own, split=split)
            runs[name] = self._run(partial(self.model.step, batch, self._pool), name)
        return runs

    def _run(self, step: Callable[[], Any], name: str) -> Callable[[int], tuple[float, float]]:
        if self._device.type != "cuda":
            return lambda n: _on_host(step, n)
        again = _Captured(step) if name in self._graphs else step
        return lambda n: _on_cuda(again, n)


def _sequences(cell: Cell) -> list[Sequence]:
    return [
        Sequence(cell.chunk_tokens, cell.prefix_tokens),
        *[Sequence(1, cell.ctx_tokens - 1)] * cell.batch,
    ]


class _Captured:
    """A step as a CUDA graph, by PyTorch's own recipe: runs on a side stream, then the capture.

    Keeps the step: the graph reads its tensors where they were.
    """

    def __init__(self, step: Callable[[], Any]) -> None:
        self._step = step
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            step()

    def __call__(self) -> None:
        self._graph.replay()


def _on_cuda(step: Callable[[], Any], count: int) -> tuple[float, float]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began = time.perf_counter()
    begin.record()
    for _ in range(count):
        step()
    end.record()
    host_ms = (time.perf_counter() - began) * 1e3
    end.synchronize()
    return begin.elapsed_time(end), host_ms


def _on_host(step: Callable[[], Any], count: int) -> tuple[float, float]:
    began = time.perf_counter()
    for _ in range(count):
        step()
    took_ms = (time.perf_counter() - began) * 1e3
    return took_ms, took_ms


#: What may be captured.
GRAPHS: Final = {
    "all": frozenset({"prefill", "decode", *CALLS}),
    "decode": frozenset({"decode"}),
    "none": frozenset(),
}
