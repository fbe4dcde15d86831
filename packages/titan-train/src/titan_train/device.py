"""The device of this process: which one, its peak FLOP/s, its memory in use."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import torch

from titan_train.errors import ConfigError

# Dense bf16 peak in FLOP/s, from the vendors' data sheets (without sparsity). The longest matching name counts.
_BF16_PEAKS = {
    "A100": 312e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
}


@dataclass(frozen=True)
class Peak:
    """Peak arithmetic of one process's device, which MFU refers to.

    Attributes:
        flops: FLOP/s.
        source: Where the number comes from, for the summary.
    """

    flops: float
    source: str


def choose_device(wanted: str, local_rank: int, local_world_size: int) -> torch.device:
    """Return this process's device.

    Args:
        wanted: `auto`, `cpu` or `cuda`.
        local_rank: This process's number on its machine.
        local_world_size: Number of processes on this machine.

    Raises:
        ConfigError: If CUDA is asked for and not available, or there are more processes than devices.
    """
    count = torch.cuda.device_count() if wanted != "cpu" and torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise ConfigError('run.device is "cuda", but torch sees no CUDA device here; use "auto" or "cpu"')
    if local_world_size > count:
        raise ConfigError(
            f"{local_world_size} processes on a machine with {count} CUDA device(s): "
            f"start at most {count}, or set --run.device cpu"
        )
    return torch.device("cuda", local_rank)


def find_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """Return the device's peak for matrix products: from the data sheet if known, else measured now."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        known = [key for key in _BF16_PEAKS if key in name]
        if known:
            key = max(known, key=len)
            return Peak(_BF16_PEAKS[key], f"{key} data sheet, bf16 dense")
    short = str(dtype).removeprefix("torch.")
    return Peak(_measure_matmul(device, dtype), f"{short} matrix product measured here")


def memory_in_use(device: torch.device) -> int:
    """Return this process's peak memory so far, in bytes: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best FLOP/s of a large matrix product within about half a second; others may share the machine."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    best, end = float("inf"), time.perf_counter() + 0.5
    while (start := time.perf_counter()) < end:
        float((a @ a)[0, 0])  # reading one number waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
