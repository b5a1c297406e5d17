"""Bilinear autoencoders: latents that are quadratic forms of what they read."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bilens.tensor.bilinear import BilinearTensor


@dataclass(frozen=True, repr=False, eq=False)
class BilinearAutoencoder:
    """Latents `f_j = (l_j · u)(r_j · u)` of the unit vector `u = x / ‖x‖` (2510.16820).

    They stand for `u uᵀ`, which `Σ_j f_j l_j r_jᵀ` reconstructs, not for u: so a bilinear layer is linear in them. A
    latent's form is a difference of two squares, `(((l+r)·u)² - ((l-r)·u)²) / 4`, so it has two eigenvectors.

    Args:
        left: The `l_j` as rows.
        right: The `r_j` as rows.
        hook: The hook point it reads, if it is to be remembered.

    Raises:
        ValueError: Rows of different numbers or widths.
    """

    left: Float[Tensor, "feature d"]
    right: Float[Tensor, "feature d"]
    hook: str | None = None

    def __post_init__(self):
        if self.left.ndim != 2 or self.left.shape != self.right.shape:
            shapes = f"{list(self.left.shape)} and {list(self.right.shape)}"
            raise ValueError(f"left and right must have one shape [feature, d], got {shapes}")

    def __len__(self) -> int:
        return len(self.left)

    def __repr__(self) -> str:
        at = f" at {self.hook}" if self.hook else ""
        return f"BilinearAutoencoder({len(self)} latents of {self.left.shape[1]} dimensions{at})"

    def encode(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch feature"]:
        """Return the latents of activations, whatever their length."""
        u = torch.nn.functional.normalize(x.to(self.left), dim=-1)
        return (u @ self.left.T) * (u @ self.right.T)

    def loss(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Return `‖u uᵀ - Σ_j f_j l_j r_jᵀ‖²` at each position, `1 - 2 Σ f_j² + fᵀ K f` with `K = (L Lᵀ) ∘ (R Rᵀ)`.

        Cost: `feature²` numbers, no `d²`.
        """
        f = self.encode(x)
        kernel = (self.left @ self.left.T) * (self.right @ self.right.T)
        return 1 - 2 * f.pow(2).sum(-1) + (f @ kernel * f).sum(-1)

    def matrix(self, feature: int) -> Float[Tensor, "d d"]:
        """Return a latent's form, symmetrised: `f_j = uᵀ M u`, `M = (l_j r_jᵀ + r_j l_jᵀ) / 2`."""
        half = torch.outer(self.left[feature], self.right[feature]) / 2
        return half + half.T

    def eigen(self, feature: int) -> tuple[Float[Tensor, " 2"], Float[Tensor, "2 d"]]:
        """Return the two eigenvalues of a latent's form, `(l·r ± ‖l‖ ‖r‖) / 2`, and their unit eigenvectors as rows.

        A vector along the sum of the normalised l and r goes with the first, which is not negative, one along their
        difference with the second; it is zero where they are parallel.
        """
        l, r = self.left[feature], self.right[feature]
        size, dot = l.norm() * r.norm(), l.dot(r)
        a, b = torch.nn.functional.normalize(torch.stack((l, r)), dim=1)
        vectors = torch.nn.functional.normalize(torch.stack((a + b, a - b)), dim=1)
        return torch.stack((dot + size, dot - size)) / 2, vectors

    def writes(self, B: BilinearTensor) -> Float[Tensor, "feature out"]:
        """Return what each latent adds to a bilinear layer's output, per unit and per `‖x‖²`: `B(l_j, r_j)`.

        The layer's quadratic part is `‖x‖² Σ_j f_j B(l_j, r_j)` as far as the latents reconstruct `u uᵀ`: no pairs of
        latents, for each of them is one already.
        """
        return B.polar(self.left.to(B.down), self.right.to(B.down))
