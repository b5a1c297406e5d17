"""Reading a spectrum: eigenspaces where eigenvalues (nearly) coincide, and how many eigenvalues there are in effect."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .decompositions import Eigen
from .records import Record, Rows


@dataclass(frozen=True, repr=False, eq=False)
class Eigenspace(Record, tells=("dim",)):
    """The space of eigenvalues that lie so close together that no single eigenvector of theirs means anything.

    `separation` is the distance to the nearest eigenvalue outside, infinite if there is none: a change E of the matrix
    turns the space by `sin θ ≤ ‖E‖₂ / (separation - ‖E‖₂)` at most, once it stands apart (Davis and Kahan's theorem for
    an interval and its surroundings), whatever happens to the vectors within it.
    """

    values: Float[Tensor, " dim"]  # strongest |value| first
    vectors: Float[Tensor, "dim inp"]  # one orthonormal basis of many, as rows
    separation: float
    complete: bool  # False if eigenvalues that were left out of the decomposition may belong here

    @property
    def dim(self) -> int:
        """Number of eigenvalues."""
        return len(self.values)

    @property
    def projector(self) -> Float[Tensor, "inp inp"]:
        """The orthogonal projector `P = Σ_i v_i v_iᵀ`, the same for every basis of the space."""
        return self.vectors.T @ self.vectors

    def cosines(self, other: "Eigenspace") -> Float[Tensor, " angles"]:
        """Return the cosines of the principal angles to another space, the largest first."""
        if self.vectors.shape[1] != other.vectors.shape[1]:
            raise ValueError(f"other must lie in {self.vectors.shape[1]} dimensions, got {other.vectors.shape[1]}")
        return torch.linalg.svdvals(self.vectors @ other.vectors.T)

    def __repr__(self) -> str:
        low, high = self.values.min().item(), self.values.max().item()
        span = f"λ={low:+.3g}" if self.dim == 1 else f"λ={low:+.3g} to {high:+.3g}"
        cut = "" if self.complete else ", perhaps incomplete"
        return f"Eigenspace(dim={self.dim}, {span}, separation={self.separation:.3g}{cut})"


def eigenspaces(eigen: Eigen, gap: float) -> Rows[Eigenspace]:
    """Group the eigenvalues of one matrix into spaces that are at least `gap` apart.

    Eigenvectors of equal eigenvalues are any rotation of each other, and those of nearly equal ones turn at a touch;
    only the projector onto their space is a property of the matrix. Neighbours closer than `gap` belong together.

    Args:
        eigen: The decomposition of one output direction's matrix.
        gap: In the units of the eigenvalues, e.g. the spectral norm of the change that readings should survive.

    Returns:
        The spaces, in the order of the strongest |value| in each. Where the decomposition was cut to its k strongest
        eigenvalues, those left out may be anything up to the weakest |value| kept, and `separation` allows for that.

    Raises:
        ValueError: A batch of decompositions, or a gap that is not positive.
    """
    if eigen.values.ndim != 1:
        raise ValueError(f"eigen must be of one output direction, values [k], got {list(eigen.values.shape)}")
    if not 0 < gap < math.inf:
        raise ValueError(f"gap must be positive and finite, got {gap}")
    order = eigen.values.argsort()
    values = eigen.values[order]
    breaks = (values.diff() >= gap).nonzero()[:, 0] + 1
    groups = torch.tensor_split(order, breaks.tolist())
    spaces = [_space(eigen, group.sort().values, gap) for group in groups]
    return Rows(sorted(spaces, key=lambda space: -space.values[0].abs().item()))


def _space(eigen: Eigen, members: Tensor, gap: float) -> Eigenspace:
    values, k = eigen.values[members], len(eigen.values)
    low, high = values.min().item(), values.max().item()
    others = torch.ones(k, dtype=torch.bool, device=values.device).index_fill(0, members, False)
    separation = min((max(low - x, x - high) for x in eigen.values[others].tolist()), default=math.inf)
    if k < eigen.vectors.shape[1]:
        weakest = eigen.values.abs().min().item()
        separation = min(separation, max(0.0, low - weakest, -high - weakest))
    return Eigenspace(values, eigen.vectors[members], separation, separation >= gap)


# -- effective ranks --------------------------------------------------------------------------------------------------


def participation_ratio(values: Float[Tensor, "*n k"]) -> Float[Tensor, "*n"]:
    """Return `(Σ λ²)² / Σ λ⁴`, over how many eigenvalues the energy `Σ λ²` is spread.

    Like the others between 1 (one eigenvalue that is not zero) and k (all of one magnitude), and blind to scale and
    sign; weak eigenvalues count least in this one.
    """
    energy = _scaled(values) ** 2
    return energy.sum(-1) ** 2 / (energy**2).sum(-1)


def entropy_rank(values: Float[Tensor, "*n k"]) -> Float[Tensor, "*n"]:
    """Return `exp(-Σ p log p)` with `p = |λ| / Σ |λ|` (Roy and Vetterli 2007, "The effective rank", section 2)."""
    size = _scaled(values)
    return torch.special.entr(size / size.sum(-1, keepdim=True)).sum(-1).exp()


def l1l2_rank(values: Float[Tensor, "*n k"]) -> Float[Tensor, "*n"]:
    """Return `(Σ |λ|)² / Σ λ²`, the sparsity measure of 2410.08417, appendix E.

    As a measure of a vector's entries it counts those that matter; of a spectrum, the eigenvalues.
    """
    size = _scaled(values)
    return size.sum(-1) ** 2 / (size**2).sum(-1)


def _scaled(values: Float[Tensor, "*n k"]) -> Float[Tensor, "*n k"]:
    """Return magnitudes with the largest at 1, which no power of them overflows."""
    if not values.numel() or not values.isfinite().all():
        raise ValueError(f"values must be finite and at least one, got shape {list(values.shape)}")
    size = values.abs().to(torch.promote_types(values.dtype, torch.float32))
    largest = size.amax(-1, keepdim=True)
    if (largest == 0).any():
        raise ValueError("values must not all be zero: a zero matrix has no effective rank")
    return size / largest
