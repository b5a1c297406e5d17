"""Every pair of two lists of input features on some output directions, against all other pairs of the layer."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bilens.tensor.records import Record

from .groups import Group
from .layer import FeatureLayer


@dataclass(frozen=True, eq=False, repr=False)
class Singles(Record):
    """The interactions `d_aᵀ Q_o d_b` of single features of two groups, as far as their sign is the one asked for.

    p is the share of all pairs of different features of the layer, with either sign, whose interaction is as large. So
    a feature that interacts much with everything stands out too; `p_own` leaves that out: the same share for
    `d_aᵀ Q_o d_b / (r_a r_b)` with r the root mean square of a feature's interactions with all others.
    """

    left: Group
    right: Group
    outputs: tuple[str, ...]
    value: Float[Tensor, "left right out"]
    p: Float[Tensor, "left right out"]  # one-sided
    p_own: Float[Tensor, "left right out"]
    n_null: int  # pairs compared with, for each output


@torch.no_grad()
def singles(
    lens: FeatureLayer, left: Group, right: Group, outputs: Mapping[str, Float[Tensor, " d_model"]], sign: int = -1
) -> Singles:
    """Ask of each pair whether it acts on an output direction as no other pair of the layer does.

    Without a coupling a pair is like any pair of features, so its rank among all pairs is its p-value. The sign asked
    for is `sign` times that of the right feature's weight: with -1, the left feature turns what the right one is for.

    Cost: `features² · d_model` multiplications for each output, and a sort of `features²` numbers.

    Args:
        lens: The layer.
        left: Input features, e.g. negators; their weights do not matter.
        right: Input features, e.g. of sentiment; the signs of their weights matter.
        outputs: Output directions by name.
        sign: 1 or -1.
    """
    B, D = lens.tensor.without_constant(), lens.writers
    n, off = len(D), ~torch.eye(len(D), dtype=torch.bool, device=D.device)
    wanted = sign * right.weights.sign().to(D)
    found = []
    for direction in outputs.values():
        Q = D @ B.matrix(direction.to(D)) @ D.T
        own = (Q.pow(2).sum(1) - Q.diagonal().pow(2)).div(n - 1).sqrt().clamp(min=torch.finfo(D.dtype).tiny)
        tables = (Q, Q / own / own[:, None])
        found.append((Q[left.features][:, right.features], *(_share(one, off, left, right, wanted) for one in tables)))
    return Singles(
        left, right, tuple(outputs), *(torch.stack(some, -1) for some in zip(*found, strict=True)), n * (n - 1)
    )


def _share(Q: Tensor, off: Tensor, left: Group, right: Group, wanted: Tensor) -> Float[Tensor, "left right"]:
    """Return the share of all entries off the diagonal, with either sign, that are as large with the wanted sign."""
    null = torch.from_numpy(np.sort(Q[off].abs().cpu().numpy())).to(Q.device)  # ten times as fast as torch's
    value = Q[left.features][:, right.features] * wanted
    above = len(null) - torch.searchsorted(null, value.abs().contiguous())
    half = (1 + above).double() / (1 + len(null)) / 2  # either sign is as likely
    return torch.where(value > 0, half, 1 - half)
