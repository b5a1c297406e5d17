"""What records hold, as plain Python: their `to_dict()` is this."""

import math
from typing import Any

from torch import Tensor


def plain(value: Any) -> Any:
    """Return tensors as lists, tuples with names as dicts, and numbers that JSON does not have as None."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
