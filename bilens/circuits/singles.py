"""Every pair of two lists of input features on some output directions, against all other pairs of the layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .groups import Group
from .layer import FeatureLayer
from .records import plain


@dataclass(frozen=True, eq=False)
class Singles:
    """The interactions `d_aᵀ Q_o d_b` of single features of two groups, as far as their sign is the one asked for.

    `score = sign · d_aᵀ Q_o d_b R / (r_a r_b)` with r the root mean square of a feature's interactions with all
    others and R that of all, so that features which interact much with everything do not stand out. p is the share of
    all pairs of different features of the layer, with either sign, that score as high.
    """

    left: Group
    right: Group
    outputs: tuple[str, ...]
    value: Float[Tensor, "left right out"]
    score: Float[Tensor, "left right out"]
    p: Float[Tensor, "left right out"]  # one-sided
    n_null: int  # pairs compared with, for each output

    def to_dict(self) -> dict[str, Any]:
        """Return what was compared, without the numbers of every pair."""
        shape = list(self.p.shape)
        return plain({"tested": self.p.numel(), "shape": shape, "null": self.n_null, "least_p": self.p.min()})


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
    values, scores, ps = [], [], []
    for direction in outputs.values():
        Q = D @ B.matrix(direction.to(D)) @ D.T
        own = (Q.pow(2).sum(1) - Q.diagonal().pow(2)).div(n - 1).sqrt()
        size = own.pow(2).mean().sqrt()
        all_scores = Q * size / (own[:, None] * own).clamp(min=torch.finfo(D.dtype).tiny)
        null = all_scores[off].abs().sort().values
        value = Q[left.features][:, right.features]
        score = all_scores[left.features][:, right.features] * wanted
        above = (len(null) - torch.searchsorted(null, score.abs().contiguous())).double()
        half = (1 + above) / (1 + len(null)) / 2  # either sign is as likely
        values.append(value)
        scores.append(score)
        ps.append(torch.where(score > 0, half, 1 - half))
    stacked = (torch.stack(some, -1) for some in (values, scores, ps))
    return Singles(left, right, tuple(outputs), *stacked, n * (n - 1))
