"""Statistics of paired measurements that the rest of the library shares."""

import torch
from jaxtyping import Float
from torch import Tensor


def pearson(a: Float[Tensor, " n"], b: Float[Tensor, " n"], least: int = 3) -> float:
    """Return the Pearson correlation of paired numbers, in float64.

    NaN for fewer than `least` pairs, where it says nothing (any two points lie on a line), and where one side does not
    vary, where it is not defined; the rounding of a mean is not taken for variance.
    """
    if len(a) < max(least, 2) or any((x == x[0]).all() for x in (a, b)):
        return float("nan")
    return torch.corrcoef(torch.stack((a.double(), b.double())))[0, 1].item()
