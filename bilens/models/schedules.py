"""How fast a gate goes from its activation to a linear map, while a model is trained."""

import math
from collections.abc import Callable

Schedule = Callable[[float], float]


def linear(progress: float) -> float:
    """Return `p`: the gate changes at a constant pace (2410.08417, appendix J)."""
    return progress


def exponential(progress: float, sharpness: float = 1.05) -> float:
    """Return `min(p exp(k - k p), 1)`: most of the change early.

    With `k > 1` it is complete before the end, at `-W(-k exp(-k)) / k` with Lambert's W: 0.906 for k = 1.05.
    """
    return min(progress * math.exp(sharpness * (1 - progress)), 1.0)


def logistic(progress: float, sharpness: float = 10.0) -> float:
    """Return `σ(k (p - ½))`, shifted and stretched so that it starts at 0 and ends at 1: most of the change midway."""
    return 0.5 + 0.5 * math.tanh(sharpness / 2 * (progress - 0.5)) / math.tanh(sharpness / 4)


def smootherstep(progress: float) -> float:
    """Return `6p⁵ - 15p⁴ + 10p³`: the first two derivatives vanish at both ends."""
    return progress**3 * (progress * (6 * progress - 15) + 10)


SCHEDULES: dict[str, Schedule] = {
    "linear": linear,
    "exponential": exponential,
    "logistic": logistic,
    "smootherstep": smootherstep,
}


def alpha_at(schedule: str | Schedule, progress: int | float) -> float:
    """Return how far the gates are to be on their way, 0 to 1, at a `progress` from 0 to 1.

    Args:
        schedule: A name in `SCHEDULES`, or a function of the progress.
        progress: Fraction of the annealing that is done.

    Raises:
        ValueError: No schedule has that name, `progress` is outside [0, 1], or what the schedule returned is.
    """
    if isinstance(schedule, str) and schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)} or a function, got {schedule!r}")
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must lie in [0, 1], got {progress}")
    function = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
    alpha = float(function(float(progress)))
    if not -1e-9 <= alpha <= 1 + 1e-9:
        raise ValueError(f"schedule must stay in [0, 1], but at progress {progress:g} it is {alpha:g}")
    return min(max(alpha, 0.0), 1.0)
