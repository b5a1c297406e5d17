"""Times of two contestants in turn, and the table they go to: what `benchmark.py` and its parts measure with."""

import time
from collections.abc import Callable
from statistics import median

import torch


def timed(function: Callable[[], object], device: str = "cpu") -> float:
    """Return the seconds a call takes."""
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def duel(ours: Callable, theirs: Callable, runs: int = 5, device: str = "cpu") -> tuple[float, float]:
    """Return the median seconds of two functions run alternately, after one warm-up each."""
    timed(ours, device), timed(theirs, device)
    times = [(timed(ours, device), timed(theirs, device)) for _ in range(runs)]
    return tuple(median(column) for column in zip(*times, strict=True))


def row(what: str, ours: float, theirs: float, note: str = "") -> None:
    """Print one line of the table."""
    print(f"| {what} | {in_seconds(ours)} | {in_seconds(theirs)} | {theirs / ours:.2f}x | {note} |", flush=True)


def in_seconds(number: float) -> str:
    """Return a time in seconds or milliseconds."""
    return f"{number:.3g} s" if number >= 1 else f"{number * 1e3:.3g} ms"
