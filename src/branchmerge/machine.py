"""Properties of this machine: devices, CPU features, cores."""

import ctypes
import os
import platform
import resource
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from branchmerge.errors import UserError

if TYPE_CHECKING:  # imported only where a device is needed: a merge on a CPU does not need torch
    import torch


def device_of(accelerator: str) -> "torch.device":
    """auto, cpu, gpu or a torch device's name -> device; auto takes the GPU where there is one.

    Raises:
        UserError: no such device is known, or none is here
    """
    import torch

    if accelerator == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device("cuda" if accelerator == "gpu" else accelerator)
    except RuntimeError as error:
        raise UserError(f"device {accelerator}: there is none of that name; use auto, cpu, gpu or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UserError(f"device {accelerator}: torch finds {found} CUDA devices here; use auto, cpu or one of those")
    return device


def computes_bf16(device: "torch.device") -> bool:
    """Whether bfloat16 matrix products are faster than float32 there: on CUDA, and on CPUs with such instructions."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_computes_bf16()


def cpu_computes_bf16() -> bool:
    """Whether this CPU has bfloat16 instructions; needs no torch, for plans."""
    flags = cpu_flags()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent() -> None:
    """Ask for SIGTERM when the parent process dies, however it does (Linux), so that no training is orphaned."""
    set_death_signal = 1  # PR_SET_PDEATHSIG
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)


def allow_open_files(many: int) -> None:
    """Let this process have so many files and sockets open besides its usual ones, as far as the hard limit allows.

    The soft limit is often 1024, and 256 on macOS, unless a process raises it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = many + 256 if hard == resource.RLIM_INFINITY else min(many + 256, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def give_back_memory() -> None:
    """Return freed memory to the system: the C library keeps that of many small objects, such as a corpus's texts."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def cpu_flags() -> set[str]:
    """Instruction set extensions of the CPU; empty if the system does not list them."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return set()
    lines = (line for line in path.read_text().splitlines() if line.startswith("flags"))
    return set(next(lines, "").partition(":")[2].split())


def describe(device: "torch.device") -> str:
    """The device in words, for manifests: what a number was measured on."""
    import torch

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}"
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if line.startswith("model name")] if path.is_file() else []
    name = names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def signal_name(number: int) -> str:
    """Name of the signal that ended a process, with its likely reason."""
    name = signal.Signals(number).name
    return f"{name} (by the system, if it ran out of memory)" if name == "SIGKILL" else name
