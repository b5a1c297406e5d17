"""The precision to compute in, and the one to screen in: which a device multiplies faster is measured, not guessed."""

from functools import cache

import torch
from torch.utils.benchmark import Timer

SCREENS = (torch.float32, torch.bfloat16)  # devices sum products of these in float32
_LEAST_TIME = 1e-3  # seconds of float32: long beside the start of a kernel
_SIDES = (256, 512, 1024, 2048, 4096, 8192)
_HOPELESS = 5.0  # times as slow as float32 on a small product: no faster on a large one, where it may take seconds


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: that of the inputs, but not below float32."""
    return torch.promote_types(dtype, torch.float32)


def product_roundoff() -> float:
    """Return what a product of float32 numbers may take from each, relative to it.

    A faster mode of float32 products keeps as few bits as bfloat16 (`torch.set_float32_matmul_precision`).
    """
    return 2.0**-24 if torch.get_float32_matmul_precision() == "highest" else 2.0**-8


@cache
def product_rates(device: torch.device) -> dict[torch.dtype, float]:
    """Measure matrix products in each of `SCREENS`, in floating-point operations per second; once for each process.

    No flag tells what it is worth: a CPU may emulate bfloat16 at a hundredth of the speed of float32. The product is
    the smallest square one that takes float32 a millisecond, as the tiles of a screened layer do; in a dtype that takes
    several times as long for the smallest of all, that one.
    """
    small = {dtype: _seconds(_SIDES[0], dtype, device) for dtype in SCREENS}
    able = [dtype for dtype, seconds in small.items() if seconds <= _HOPELESS * small[torch.float32]]
    side = next((n for n in _SIDES if _seconds(n, torch.float32, device) > _LEAST_TIME), _SIDES[-1])
    rates = {dtype: 2 * _SIDES[0] ** 3 / seconds for dtype, seconds in small.items()}
    return rates | {dtype: 2 * side**3 / _seconds(side, dtype, device) for dtype in able}


def screen_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of `SCREENS` whose products are faster on this device."""
    return fastest(product_rates(device))


def fastest(rates: dict[torch.dtype, float]) -> torch.dtype:
    """Return the dtype of the highest rate; the first wins a tie."""
    return max(rates, key=rates.__getitem__)


def _seconds(side: int, dtype: torch.dtype, device: torch.device) -> float:
    """Time one product, after a warm-up and synchronised."""
    a = torch.ones(side, side, dtype=dtype, device=device)
    timer = Timer("torch.mm(a, a)", globals={"torch": torch, "a": a}, num_threads=torch.get_num_threads())
    return timer.timeit(3).mean
