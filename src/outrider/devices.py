"""Which device to run on, what it is called, and how fast it could be."""

from __future__ import annotations

import os
import platform
import re
import time
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from outrider.errors import ConfigError

#: Dense BF16 peak in FLOP/s by a part of the device's name (makers' data sheets). The first match counts.
PEAK_BF16 = {
    "B200": 2.25e15, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "GH200": 989e12, "L40S": 362e12,
    "A100": 312e12, "A10G": 70e12, "L4": 121e12, "V100": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
    "MI355": 2.5e15, "MI325": 1307e12, "MI300X": 1307e12, "MI250": 181e12,  # one of MI250's two dies
}
_FP32_SHARE = 1 / 16
_PROBE_SIZE = 1_024


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called `name`; `auto` prefers CUDA or ROCm, then Apple's MPS, then the CPU.

    Raises:
        ConfigError: not a device this machine has.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"no device '{name}'; use auto, cpu, cuda, cuda:1 or mps") from error
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(device.type) or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"this machine or this torch build has no device '{name}'; 'outrider doctor' says more")
    return device


def device_name(device: torch.device) -> str:
    """Return what the maker calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple {platform.machine()} GPU"
    return f"{_processor()}, {torch.get_num_threads()} threads"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given (nothing to do on a CPU)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return the context in which matrix products run in `precision` ("fp32" or "bf16")."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the peak FLOP/s that utilisation is measured against, or None where it is not known.

    GPUs: the data sheet's dense BF16 figure (FP32: a sixteenth, without tensor cores). CPUs have no such
    figure that holds across makers, so a square matrix product is timed once.
    """
    if device.type == "cpu":
        return measured_matmul(torch.bfloat16 if precision == "bf16" else torch.float32)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = look_up(PEAK_BF16, name)
    return peak if peak is None or precision == "bf16" else peak * _FP32_SHARE


def look_up(figures: dict[str, float], name: str) -> float | None:
    """Return the figure of the first part that the device's name holds; "L4" is no part of "L40"."""
    return next((figure for part, figure in figures.items() if re.search(rf"{part}(?!\d)", name)), None)


@cache
def measured_matmul(dtype: torch.dtype, seconds: float = 0.4) -> float:
    """Return FLOP/s of a square matrix product on the CPU: the best of the repetitions that fit in `seconds`."""
    a, b = (torch.randn(_PROBE_SIZE, _PROBE_SIZE).to(dtype) for _ in range(2))
    torch.mm(a, b)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * _PROBE_SIZE**3 / best


def cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def physical_memory() -> int | None:
    """Return the machine's memory in bytes, or None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
