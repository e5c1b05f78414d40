"""Why an SGLang engine ended, in plain words, from the last lines it wrote.

Wordings are those of SGLang 0.5.23, PyTorch 2.13, transformers 5.19, huggingface_hub and uvicorn.
The first pattern of the table that is found anywhere wins, so causes come before consequences.
Patterns begin with fixed text: SGLang prints lines of many thousand characters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Why an engine ended.

    Attributes:
        what: what failed, in one line.
        remedy: what to do about it, in one line.
        evidence: the line of the log that says so; empty when none does.
    """

    what: str
    remedy: str
    evidence: str = ""


#: (pattern, what, remedy); the two may name the pattern's groups.
_TABLE: Final[Sequence[tuple[str, str, str]]] = (
    # --- our own store ---------------------------------------------------------------------
    (
        r"(?:Error|'conserve'): ConServe hand-off store: (?P<why>.+)",
        "the hand-off store refuses to start: {why}",
        "make the engines agree, or empty the store's folder (handoff.path) when its pages are of "
        "another model",
    ),
    (
        r"Failed to import backend 'conserve'|No module named 'conserve_serving",
        "SGLang cannot import ConServe's hand-off store",
        "install our package in SGLang's environment: pip install --no-deps conserve-agents",
    ),
    # --- the command line --------------------------------------------------------------------
    (
        r"error: unrecognized arguments: (?P<flag>.+)",
        "SGLang does not know the flag {flag}",
        "correct it in tiers.flags; `python -m sglang.launch_server --help` lists all",
    ),
    (
        r"error: ambiguous option: (?P<flag>\S+) could match (?P<which>.+)",
        "the flag {flag} is ambiguous: {which}",
        "write it out in tiers.flags",
    ),
    (
        r"error: argument (?P<flag>[^:]+): (?P<why>.+)",
        "SGLang does not accept the flag {flag}: {why}",
        "correct it in tiers.flags",
    ),
    (
        r"--enable-session-radix-cache requires UnifiedRadixCache",
        "this model's cache cannot hold conversations (session radix cache)",
        'write omit = ["--enable-session-radix-cache"] in the tier; idle conversations are then '
        "evicted like anything else",
    ),
    (
        r"No module named '?sglang'?",
        "SGLang is not installed in the environment of this interpreter",
        "install sglang==0.5.23 there, or name another interpreter: python = … in the tier",
    ),
    # --- the GPU -------------------------------------------------------------------------------
    (
        r"The NVIDIA driver on your system is too old"
        r"|CUDA driver version is insufficient for CUDA runtime version"
        r"|the provided PTX was compiled with an unsupported toolchain",
        "the NVIDIA driver is too old for this PyTorch",
        "update the driver, or install a PyTorch built for an older CUDA (`nvidia-smi` shows what "
        "the driver supports)",
    ),
    (
        r"Found no NVIDIA driver on your system|libcuda\.so\.1: cannot open shared object"
        r"|NVML: Driver/library version mismatch",
        "the NVIDIA driver is missing, or not the one that is loaded",
        "install it, or restart the machine after an update; in a container pass the GPUs in "
        "(docker run --gpus all)",
    ),
    (
        r"CUDA error: invalid device ordinal",
        "SGLang was given a GPU that is not there",
        "tiers.gpus (and tp) must fit the machine: `conserve doctor` lists its GPUs",
    ),
    (
        r"No CUDA GPUs are available|No accelerator \(CUDA|no CUDA-capable device"
        r"|Torch not compiled with CUDA enabled|No CUDA devices found via torch\.cuda",
        "there is no GPU that SGLang can see",
        "check `nvidia-smi`, tiers.gpus and that PyTorch is a CUDA build; without a GPU use "
        'engine = "emulated"',
    ),
    (
        r"no kernel image is available for execution on the device",
        "this PyTorch or sgl-kernel was not built for this GPU",
        "install a build for the GPU's compute capability",
    ),
    (
        r"CUDA out of memory|CUDA error: out of memory|Triton Error \[CUDA\]: out of "
        r"memory|torch\.OutOfMemoryError|torch\.cuda\.OutOfMemoryError",
        "the GPU is out of memory",
        "end other programs on it (`nvidia-smi` lists them), give the engine more GPUs (tp, gpus), "
        'or lower flags = ["--mem-fraction-static", "0.8"]',
    ),
    (
        r"Not enough memory\. Please try to increase --mem-fraction-static\.",
        "the weights leave no room for KV on the GPU",
        "use a larger GPU, more of them (tp, gpus), or raise --mem-fraction-static in tiers.flags",
    ),
    (
        r"NCCL error|ncclSystemError|ncclUnhandledCudaError",
        "the GPUs of this engine cannot talk to each other (NCCL)",
        'set NCCL_DEBUG = "INFO" in tiers.env and read the log; in a container give it shared '
        "memory (docker run --ipc=host)",
    ),
    # --- the host's memory -----------------------------------------------------------------
    (
        r"Not enough host memory",
        "there is not enough host memory for KV that leaves the device",
        "lower tiers.host_kv_gb (without it SGLang takes twice the device's KV)",
    ),
    (
        r"Cannot automatically size HiCache host memory",
        "SGLang cannot tell how much host memory its container may use",
        "set tiers.host_kv_gb",
    ),
    (
        r"cudaHostRegister failed|Pinned host memory allocation of",
        "host memory for KV could not be pinned",
        "raise `ulimit -l`, or lower tiers.host_kv_gb",
    ),
    (
        r"DefaultCPUAllocator: .*(?:not enough|can't allocate) memory|MemoryError\b"
        r"|\[Errno 12\] Cannot allocate memory",
        "the machine is out of memory",
        "lower tiers.host_kv_gb, or start fewer engines",
    ),
    (
        r"exit code: -7\)|exit code -7\b|ended: killed by SIGBUS|Bus error",
        "shared memory is full (SIGBUS)",
        "make /dev/shm larger (docker run --shm-size 16g), or handoff.path another folder",
    ),
    (
        r"\[Errno 28\] No space left on device",
        "a disk, or shared memory, is full",
        "`df -h` shows which; handoff.max_bytes bounds the hand-off store",
    ),
    # --- the weights -----------------------------------------------------------------------
    (
        r"Access to model \S+ is restricted|You are trying to access a gated repo"
        r"|GatedRepoError",
        "the model is gated: the hub wants to know who asks",
        "accept its terms on the hub, and set HF_TOKEN in tiers.env",
    ),
    (
        r"We couldn't connect to|LocalEntryNotFoundError|offline mode is enabled"
        r"|Failed to resolve 'huggingface|outgoing traffic has been disabled",
        "the model is not on this machine, and its hub cannot be reached",
        "download it where there is a connection, and give tiers.model its folder",
    ),
    (
        r"is not a local folder and is not a valid model identifier"
        r"|Repository Not Found|RepositoryNotFoundError"
        r"|Repo id must (?:be in the form|use alphanumeric)"
        r"|is not a local folder or a valid repository name",
        "there is no such model: neither a folder of that path nor a name the hub knows",
        "correct tiers.model",
    ),
    (
        r"Cannot find any model weights with"
        r"|does not appear to have a file named \S*(?:safetensors|bin)",
        "the model's folder has no weights",
        "complete the download (*.safetensors), or correct tiers.model",
    ),
    (
        r"does not appear to have a file named (?P<file>\S+?)\.? "
        r"|Can't load the configuration of|Unrecognized model in"
        r"|Can't load tokenizer for",
        "the model's folder is incomplete",
        "complete the download (config.json, tokenizer files), or correct tiers.model",
    ),
    (
        r"Model architectures (?P<which>\[.*?\]) are not supported",
        "this SGLang cannot run the model's architecture {which}",
        "choose another model, or a version of SGLang that knows it",
    ),
    # --- ports -----------------------------------------------------------------------------
    (
        r"error while attempting to bind on address \('(?P<host>[^']*)', (?P<port>\d+)\)",
        "port {port} on {host} is in use",
        "choose another in tiers.urls, or stop the program that listens there",
    ),
    (
        r"EADDRINUSE|[Aa]ddress already in use|at \d+ is not available in \d+ seconds",
        "a port that the engine needs is in use",
        "stop the other program (another engine on the same ports?), or give the engine others: "
        "--dist-init-addr, --nccl-port in tiers.flags",
    ),
    # --- later -------------------------------------------------------------------------------
    (
        r"watchdog timeout \(.*soft=False",
        "a step took longer than SGLang's watchdog allows, and it ended itself",
        "look for a hung GPU (`dmesg -T | grep -i xid`); raise --watchdog-timeout in tiers.flags",
    ),
    # --- when nothing else was said ----------------------------------------------------------
    (
        r"exit code: -9\)|exit code -9\b|ended: killed by SIGKILL",
        "a process of the engine was killed (SIGKILL); most often the machine is out of memory",
        "look with `dmesg -T | grep -i oom`; lower tiers.host_kv_gb, or start fewer engines",
    ),
)
_PATTERNS: Final = tuple((re.compile(pattern), what, remedy) for pattern, what, remedy in _TABLE)
#: What is looked at of a line: the first of SGLang's lists all its settings.
_LONGEST_CHARS: Final = 2000
#: Time, rank and the like in front of what a line says.
_PREFIX: Final = re.compile(r"^\[\d{4}-[^\]]*\] *")
#: The last line of a Python traceback.
_EXCEPTION: Final = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Interrupt)\b(?:: .*)?$")
#: SGLang ends itself by SIGKILL, after an error as well as when it is told to.
_ENDS_ITSELF: Final = "kill_process_tree called"


def diagnose(lines: Sequence[str], *, ended: str = "") -> Diagnosis | None:
    """The reason that an engine's last lines give; None when they give none.

    Args:
        lines: the end of its log, oldest first.
        ended: how its first process ended: ``killed by SIGKILL``.
    """
    said = [_PREFIX.sub("", line).strip()[:_LONGEST_CHARS] for line in lines]
    if ended and not any(_ENDS_ITSELF in line for line in said):
        said.append(f"SGLang ended: {ended}")
    for pattern, what, remedy in _PATTERNS:
        for line in reversed(said):
            match = pattern.search(line)
            if match is not None:
                groups = {name: text or "?" for name, text in match.groupdict().items()}
                return Diagnosis(what=what.format(**groups), remedy=remedy, evidence=line)
    raised = next((line for line in reversed(said) if _EXCEPTION.match(line)), None)
    if raised is None:
        return None
    return Diagnosis(
        what=f"SGLang ended with {raised[:300]}",
        remedy="the lines above it in the log say where it came from",
        evidence=raised,
    )
