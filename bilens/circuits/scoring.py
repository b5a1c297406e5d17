"""All motifs of the outputs of a layer, scored from its weights a chunk at a time; notation as in `motifs`."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens.tensor.bilinear import BilinearTensor
from bilens.tensor.extremes import two_strongest
from bilens.tensor.frames import Frame
from bilens.tensor.matrices import Matrices, frobenius, output_gram
from bilens.tensor.records import tabular

from .motifs import GROUPED

MOTIFS = ("outlier", *GROUPED, "copy")
NUMBERS = 1 << 24  # held at once by the matrices of a chunk of outputs


@tabular(rows="out")
class Strongest(NamedTuple):
    """The features of each output with the strongest coefficients."""

    features: Int[Tensor, "out m"]
    T: Float[Tensor, "out m m"]
    unit: Float[Tensor, " out"]
    own: Float[Tensor, "out n"]  # self terms of all features


class Ends(NamedTuple):
    """The ends of the spectrum of each output's matrix."""

    values: Float[Tensor, "out 2"]  # the two eigenvalues of largest magnitude
    others: Float[Tensor, " out"]  # mean square of all others


class Shared:
    """What all outputs of a layer share: its matrices come from half the cube, in the residual and the writers' basis.

    `‖D M_u Dᵀ‖_F²` of a direction u is `uᵀ G u` with the Gram matrix G of the outputs' coefficients.
    """

    def __init__(self, B: BilinearTensor, D: Float[Tensor, "n d"], n: int):
        self.D, self.frame = D, Frame.of(D)
        self.residual, self.inner = Matrices(B, n), Matrices(B.project(inp=self.frame.base), n)
        self.gram = feature_gram(B, D)
        self.own = B.down @ ((B.left @ D.T) * (B.right @ D.T))  # self terms of every feature

    def strongest(
        self, readers: Float[Tensor, "some out"], m: int, known: Int[Tensor, "some m"] | None = None
    ) -> tuple[Float[Tensor, "some d d"], Strongest]:
        """Return the matrices of some directions, and their m strongest features, which may be known already."""
        M, energy = self.residual.of(readers), frobenius(self.gram, readers).pow(2).to(readers)
        if known is not None:
            return M, _strongest(M, self.D, known, readers @ self.own, energy)
        largest, own = self.frame.largest(self.inner.of(readers), NUMBERS)
        return M, _strongest(M, self.D, _first(largest, m), own, energy)


def feature_gram(B: BilinearTensor, D: Float[Tensor, "n d"]) -> Float[Tensor, "out out"]:
    """Return G with `‖D M_u Dᵀ‖_F² = uᵀ G u`, in float64."""
    return output_gram(B.project(inp=torch.linalg.qr(D.double(), mode="r").R.to(D)))


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
        """How many outputs are drawn and dealt with at once where they share nothing."""
        n, d = self.writers.shape
        return max(1, min(64, NUMBERS // max(n * n, d * d, self.B.hidden * d)))

    @cached_property
    def shared(self) -> Shared:
        """What all outputs of the layer share."""
        return Shared(self.B, self.writers, len(self.readers))

    def observe(
        self,
        readers: Float[Tensor, "some out"],
        motifs: tuple[str, ...],
        known: Int[Tensor, "some m"] | None = None,
        start: int = 0,
    ) -> Iterator[tuple[Float[Tensor, "some motif"], Strongest, Ends | None]]:
        """Score directions of the layer, a chunk at a time; the spectra's ends where outliers are asked for.

        From the direction `start` on, with which a chunk begins if all are to be dealt with as from the first on.
        """
        n, d = self.writers.shape
        m, together = min(self.features, n), max(1, min(64, NUMBERS // max(n * d, self.B.hidden * d)))
        for which in torch.arange(start, len(readers), device=readers.device).split(together):
            M, found = self.shared.strongest(readers[which], m, None if known is None else known[which])
            ends = Ends(*two_strongest(M)) if "outlier" in motifs else None
            yield self.score(M, self.writers, found, motifs, ends), found, ends

    def score(
        self,
        M: Float[Tensor, "out d d"],
        D: Float[Tensor, "n d"],
        found: Strongest,
        motifs: tuple[str, ...],
        ends: Ends | None = None,
    ) -> Float[Tensor, "out motif"]:
        """Score motifs in some matrices among features with the writers D, given the strongest of them."""
        parts = {"outlier": lambda: _outlier(ends or Ends(*two_strongest(M)))}
        parts |= {"copy": lambda: squares(M, D, found.own).amax(1)}
        columns = {
            motif: parts[motif]() if motif in parts else GROUPED[motif](found.T, self.group).score
            for motif in dict.fromkeys(motifs)  # once each
        }
        return torch.stack([columns[motif] for motif in motifs], 1)


def strongest_features(M: Float[Tensor, "out d d"], D: Float[Tensor, "n d"], m: int) -> Strongest:
    """Find the m features with the largest coefficient in each output, and the coefficients among them over their σ."""
    largest, own = Frame.plain(D).largest(M, NUMBERS)
    image = (D.T @ D) @ M
    return _strongest(M, D, _first(largest, m), own, (image * image.mT).sum((1, 2)))


def _first(largest: Float[Tensor, "out n"], m: int) -> Int[Tensor, "out m"]:
    """Choose features by their largest coefficient; the two of a pair tie, and go by index."""
    return largest.argsort(dim=1, descending=True, stable=True)[:, :m]


def _strongest(M: Tensor, D: Tensor, features: Tensor, own: Tensor, energy: Tensor) -> Strongest:
    """Compute the coefficients among features; `energy` is `‖D M Dᵀ‖_F²`."""
    n = len(D)
    cross = (energy - own.pow(2).sum(1)) / (n * (n - 1))
    unit = 2 * cross.clamp(min=0).sqrt().clamp(min=torch.finfo(D.dtype).tiny)
    few = D[features]
    T = 2 * (few @ M @ few.mT) / unit[:, None, None]
    T.diagonal(dim1=1, dim2=2).div_(2)
    return Strongest(features, T, unit, own)


def _outlier(ends: Ends) -> Float[Tensor, " out"]:
    """Return `|λ₂|` over the bulk edge of the other eigenvalues, as in `circuits.outliers`."""
    return ends.values[:, 1].abs() / edge(ends.others)


def edge(others: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
    """Return the edge of a random symmetric matrix's spectrum (Wigner), given the mean square of its eigenvalues."""
    return (2 * others.sqrt()).clamp(min=torch.finfo(others.dtype).tiny)


def squares(M: Float[Tensor, "out d d"], D: Float[Tensor, "n d"], own: Float[Tensor, "out n"]) -> Tensor:
    """Return the cosine of each matrix and the square of each feature, `|d_kᵀ M d_k| / (|d_k|² ‖M‖_F)`."""
    return own.abs() / (D.pow(2).sum(1) * M.norm(dim=(1, 2))[:, None]).clamp(min=torch.finfo(M.dtype).tiny)
