"""What failed, told from logs as SGLang, PyTorch and the hub's client write them."""

from __future__ import annotations

import pytest

from conserve_serving.engines.sglang.diagnose import diagnose

#: Excerpts: the line that matters among what stands around it.
TRACEBACK = """\
[2026-11-25 18:06:01 TP0] Scheduler hit an exception: Traceback (most recent call last):
  File "/x/sglang/srt/managers/scheduler.py", line 6320, in run_scheduler_process
    scheduler = Scheduler(server_args, port_args)
"""
AFTER = """
[2026-11-25 18:06:01] Received sigquit from a child process. It usually means the child failed.
[2026-11-25 18:06:02] kill_process_tree called: parent_pid=1, include_parent=True, pid=1
"""

CASES = [
    (
        "LayoutMismatchError: ConServe hand-off store: page size is 64 here and 16 in the store",
        "the hand-off store refuses to start: page size is 64 here and 16 in the store",
        "handoff.path",
    ),
    (
        "ImportError: Failed to import backend 'conserve' from "
        "'conserve_serving.engines.sglang.store': No module named 'conserve_serving'",
        "SGLang cannot import ConServe's hand-off store",
        "pip install --no-deps conserve-agents",
    ),
    (
        "sglang serve: error: unrecognized arguments: --frobnicate 3",
        "SGLang does not know the flag --frobnicate 3",
        "tiers.flags",
    ),
    (
        "sglang serve: error: ambiguous option: --hicache could match --hicache-ratio, "
        "--hicache-size",
        "the flag --hicache is ambiguous: --hicache-ratio, --hicache-size",
        "tiers.flags",
    ),
    (
        "sglang serve: error: argument --attention-backend: invalid choice: 'fa9' (choose from "
        "'triton', 'torch_native')",
        "SGLang does not accept the flag --attention-backend: invalid choice: 'fa9'",
        "tiers.flags",
    ),
    (
        "ValueError: --enable-session-radix-cache requires UnifiedRadixCache, but tree_cache is "
        "ChunkCache. Drop the flag or the option that selected another tree cache for this model.",
        "this model's cache cannot hold conversations",
        "omit",
    ),
    (
        "/opt/venv/bin/python: Error while finding module specification for "
        "'sglang.launch_server' (ModuleNotFoundError: No module named 'sglang')",
        "SGLang is not installed",
        "sglang==0.5.23",
    ),
    (
        "RuntimeError: The NVIDIA driver on your system is too old (found version 11040). Please "
        "update your GPU driver",
        "the NVIDIA driver is too old",
        "update the driver",
    ),
    (
        "RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA "
        "GPU and installed a driver",
        "the NVIDIA driver is missing",
        "--gpus all",
    ),
    (
        "torch.AcceleratorError: CUDA error: invalid device ordinal",
        "SGLang was given a GPU that is not there",
        "conserve doctor",
    ),
    ("RuntimeError: No CUDA GPUs are available", "there is no GPU", "nvidia-smi"),
    (
        "RuntimeError: No accelerator (CUDA, XPU, HPU, NPU, MUSA, MPS) or platform plugin is "
        "available.",
        "there is no GPU",
        "emulated",
    ),
    (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total "
        "capacity of 79.11 GiB of which 512.00 MiB is free. Process 4711 has 76.0 GiB in use.",
        "the GPU is out of memory",
        "nvidia-smi",
    ),
    (
        "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static. Current "
        "value: mem_fraction_static=0.5",
        "the weights leave no room for KV",
        "--mem-fraction-static",
    ),
    (
        "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:77, unhandled system "
        "error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5",
        "cannot talk to each other",
        "NCCL_DEBUG",
    ),
    (
        "ValueError: Not enough host memory available. Requesting 256.00 GB but only have 100.00 "
        "GB free. Please reduce the size of the hierarchical cache.",
        "there is not enough host memory for KV",
        "host_kv_gb",
    ),
    (
        "RuntimeError: Rank 0 scheduler died during initialization (exit code: -9). If exit code "
        "is -9 (SIGKILL), a common cause is the OS OOM killer. Run `dmesg -T | grep -i oom` to "
        "check.",
        "killed (SIGKILL)",
        "dmesg",
    ),
    (
        "[2026-11-25 18:06:01] Subprocess scheduler_0 (pid=28330) crashed with exit code -9. "
        "Triggering SIGQUIT for cleanup...",
        "killed (SIGKILL)",
        "dmesg",
    ),
    (
        "RuntimeError: [enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate "
        "memory: you tried to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)",
        "the machine is out of memory",
        "host_kv_gb",
    ),
    (
        "OSError: [Errno 28] No space left on device: '/dev/shm/conserve-store-1/x'",
        "a disk, or shared memory, is full",
        "df -h",
    ),
    (
        "OSError: You are trying to access a gated repo.",
        "the model is gated",
        "HF_TOKEN",
    ),
    (
        "OSError: We couldn't connect to 'https://huggingface.co' to load the files, and couldn't "
        "find them in the cached files.",
        "its hub cannot be reached",
        "tiers.model",
    ),
    (
        "OSError: no/such is not a local folder and is not a valid model identifier listed on "
        "'https://huggingface.co/models'",
        "there is no such model",
        "tiers.model",
    ),
    (
        "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or "
        "'namespace/repo_name': '/models/nothing'. Use `repo_type` argument if needed.",
        "there is no such model",
        "tiers.model",
    ),
    (
        "RuntimeError: Cannot find any model weights with `/models/half`",
        "the model's folder has no weights",
        "safetensors",
    ),
    (
        "OSError: /models/half does not appear to have a file named config.json. Checkout "
        "'https://huggingface.co//models/half/tree/main' for available files.",
        "the model's folder is incomplete",
        "config.json",
    ),
    (
        "ValueError: Model architectures ['NewForCausalLM'] are not supported for now. Supported "
        "architectures: dict_keys([])",
        "cannot run the model's architecture ['NewForCausalLM']",
        "another model",
    ),
    (
        "[2026-11-25 18:06:01] ERROR:    [Errno 98] error while attempting to bind on address "
        "('127.0.0.1', 30000): address already in use",
        "port 30000 on 127.0.0.1 is in use",
        "tiers.urls",
    ),
    (
        "torch.distributed.DistNetworkError: The server socket has failed to listen on any local "
        "network address. port: 31000, useIpv6: false, code: -98, name: EADDRINUSE, message: "
        "address already in use",
        "a port that the engine needs is in use",
        "--nccl-port",
    ),
    (
        "[2026-11-25 18:06:01] Scheduler watchdog timeout (self.watchdog_timeout=300, "
        "self.soft=False)",
        "a step took longer",
        "xid",
    ),
]


@pytest.mark.parametrize(("line", "what", "remedy"), CASES, ids=[case[1] for case in CASES])
def test_reason_is_found_among_the_rest(line: str, what: str, remedy: str) -> None:
    found = diagnose((TRACEBACK + line + AFTER).splitlines())
    assert found is not None
    assert what in found.what
    assert remedy in found.remedy
    assert found.evidence in line


def test_cause_comes_before_its_consequences() -> None:
    found = diagnose(
        [
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.50 GiB.",
            "RuntimeError: Rank 0 scheduler died during initialization (exit code: -9). If exit",
            "RuntimeError: Initialization failed. Please see the error messages above.",
        ]
    )
    assert found is not None
    assert found.what == "the GPU is out of memory"


def test_unknown_exceptions_are_quoted() -> None:
    line = "sglang.srt.utils.common.NewKindOfError: the frobnicator is bent"
    found = diagnose((TRACEBACK + line + AFTER).splitlines(), ended="killed by SIGKILL")
    assert found is not None
    assert found.what == f"SGLang ended with {line}"
    assert found.evidence == line


def test_sglang_kills_itself_after_an_error() -> None:
    line = "RuntimeError: Cannot find any model weights with `/models/half`"
    lines = (TRACEBACK + line + AFTER).splitlines()
    found = diagnose(lines, ended="killed by SIGKILL")
    assert found is not None
    assert found.what == "the model's folder has no weights"
    assert diagnose(AFTER.splitlines(), ended="killed by SIGKILL") is None
    found = diagnose(["[2026-11-25 18:05:31] Load weight begin."], ended="killed by SIGKILL")
    assert found is not None
    assert "out of memory" in found.what


def test_ordinary_logs_say_nothing() -> None:
    lines = [
        "[2026-11-25 18:05:31] ConServe hand-off store: decode, file, Layout(model='tiny')",
        "[2026-11-25 18:06:01] Prefill batch, #new-seq: 1, #new-token: 495",
        "If exit code is -9 (SIGKILL), a common cause is the OS OOM killer.",
        "[2026-11-25 18:05:30] post-warmup freeze_gc failed",
    ]
    assert diagnose(lines) is None
    assert diagnose([]) is None
