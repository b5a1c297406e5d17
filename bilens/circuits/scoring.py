"""All motifs of the outputs of a layer, scored from its weights a chunk at a time; notation as in `motifs`."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens.tensor.bilinear import BilinearTensor

from .motifs import GROUPED
from .spectral import two_strongest

MOTIFS = ("outlier", *GROUPED, "copy")
_BLOCKS = 8  # of rows, in the products for the strongest coefficients
NUMBERS = 1 << 24  # held at once by the matrices of a chunk of outputs


class Strongest(NamedTuple):
    """The features of each output with the strongest coefficients."""

    features: Int[Tensor, "out m"]
    T: Float[Tensor, "out m m"]
    unit: Float[Tensor, " out"]
    own: Float[Tensor, "out n"]  # self terms of all features


@dataclass(frozen=True, eq=False)
class Scoring:
    """What is scored of a layer, and how."""

    B: BilinearTensor
    readers: Tensor
    writers: Tensor
    motifs: tuple[str, ...]
    features: int  # input features of each output that are looked at for groups
    most: int  # features of a group

    @property
    def group(self) -> int:
        """Largest size of a group, so that three groups and a reference always find place."""
        return min(self.most, (min(self.features, len(self.writers)) - 1) // 3)

    @property
    def chunk(self) -> int:
        """How many outputs are dealt with at once."""
        n, d = self.writers.shape
        return max(1, min(64, NUMBERS // max(n * n, d * d, self.B.hidden * d)))

    def observe(self, keep: bool) -> tuple[Tensor, Tensor | None]:
        """Score every output; keep the strongest coefficients too if they are wanted."""
        scores, kept = [], []
        for readers in self.readers.split(self.chunk):
            one, strongest = self.score(self.B.matrix(readers), self.writers)
            scores.append(one)
            kept += [strongest.T] if keep else []
        return torch.cat(scores), torch.cat(kept) if keep else None

    def score(self, M: Float[Tensor, "out d d"], D: Float[Tensor, "n d"]) -> tuple[Tensor, Strongest]:
        """Score the motifs in some matrices among features with the writers D; and the strongest features."""
        found = strongest_features(M, D, min(self.features, len(D)))
        parts = {"outlier": lambda: _outlier(M), "copy": lambda: squares(M, D, found.own).amax(1)}
        columns = [
            parts[motif]() if motif in parts else GROUPED[motif](found.T, self.group).score for motif in self.motifs
        ]
        return torch.stack(columns, 1), found

    def score_groups(self, T: Float[Tensor, "out m m"]) -> Float[Tensor, "out motif"]:
        """Score the motifs that T says all of."""
        return torch.stack([GROUPED[motif](T, self.group).score for motif in self.motifs], 1)


def strongest_features(M: Float[Tensor, "out d d"], D: Float[Tensor, "n d"], m: int) -> Strongest:
    """Find the m features with the largest coefficient in each output, and the coefficients among them over their σ."""
    n, c = len(D), len(M)
    largest, own = M.new_zeros(c, n), M.new_empty(c, n)
    step = max(1, min(NUMBERS // (n * c), n // _BLOCKS))
    for start in range(0, n, step):  # coefficients are symmetric: each block of rows from its diagonal on
        rows = D[start : start + step]
        S = ((rows @ M).flatten(0, 1) @ D[start:].T).unflatten(0, (c, len(rows)))
        diagonal = S.diagonal(0, 1, 2)
        own[:, start : start + step] = diagonal
        diagonal.div_(2)  # a self term counts once, a cross term twice
        S.abs_()
        across, down = largest[:, start : start + step], largest[:, start:]
        torch.maximum(across, S.amax(2), out=across)
        torch.maximum(down, S.amax(1), out=down)
    features = largest.argsort(dim=1, descending=True, stable=True)[:, :m]  # the two of a pair tie: by index
    image = (D.T @ D) @ M
    cross = ((image * image.mT).sum((1, 2)) - own.pow(2).sum(1)) / (n * (n - 1))
    unit = 2 * cross.clamp(min=0).sqrt().clamp(min=torch.finfo(D.dtype).tiny)
    few = D[features]
    T = 2 * (few @ M @ few.mT) / unit[:, None, None]
    T.diagonal(dim1=1, dim2=2).div_(2)
    return Strongest(features, T, unit, own)


def _outlier(M: Float[Tensor, "out d d"]) -> Float[Tensor, " out"]:
    """Return `|λ₂|` over the bulk edge of the other eigenvalues, as in `circuits.outliers`."""
    values, bulk = two_strongest(M)
    return values[:, 1].abs() / bulk


def squares(M: Float[Tensor, "out d d"], D: Float[Tensor, "n d"], own: Float[Tensor, "out n"]) -> Tensor:
    """Return the cosine of each matrix and the square of each feature, `|d_kᵀ M d_k| / (|d_k|² ‖M‖_F)`."""
    return own.abs() / (D.pow(2).sum(1) * M.norm(dim=(1, 2))[:, None]).clamp(min=torch.finfo(M.dtype).tiny)
