"""Single coefficients of a layer between two bases, in float64: what a ranking is verified with."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .bilinear import BilinearTensor, with_constant


@dataclass(frozen=True, eq=False)
class Coefficients:
    """The coefficients of `z_i z_j` in each output feature of a layer, computed where they are asked for."""

    B: BilinearTensor
    out: Float[Tensor, "n_out out"] | None
    inp: Float[Tensor, "n_in inp"] | None
    memory: int

    @property
    def n_out(self) -> int:
        """Number of output features."""
        return self.B.out if self.out is None else len(self.out)

    @property
    def n_in(self) -> int:
        """Number of input features, the constant included."""
        return self.B.inp if self.inp is None else len(self.inp) + self.B.constant

    @property
    def wide(self) -> bool:
        """Whether any argument is in float64."""
        return torch.float64 in {t.dtype for t in (self.B.down, self.out, self.inp) if t is not None}

    def __call__(
        self, out: Int[Tensor, " n"], left: Int[Tensor, " n"], right: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """Compute coefficients in float64, `Σ_h down_oh (left_hi right_hj + left_hj right_hi)`, half if `i = j`."""
        at_once = max(1, min(1024, self.memory // 16 // (64 * self.B.hidden)))
        parts = zip(*(part.split(at_once) for part in (out, left, right)), strict=True)
        values = [self._some(*some) for some in parts]
        return torch.cat(values) if values else self.B.down.new_empty(0, dtype=torch.float64)

    @cached_property
    def legs(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the factors in the feature bases, in float64, if they are small beside the memory granted."""
        hidden, device = self.B.hidden, self.B.down.device
        if 8 * hidden * (2 * self.n_in + self.n_out) > self.memory // 8:
            return None
        return self._legs(torch.arange(self.n_out, device=device), torch.arange(self.n_in, device=device))

    def _legs(self, outs: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B = self.B
        down = B.down[outs].double() if self.out is None else self.out[outs].double() @ B.down.double()
        if self.inp is None:
            return down, B.left.double().T[features], B.right.double().T[features]
        D = with_constant(self.inp, B)[features].double()
        return down, D @ B.left.double().T, D @ B.right.double().T

    def _some(self, out: Tensor, left: Tensor, right: Tensor) -> Tensor:
        o, i, j, legs = out, left, right, self.legs
        if legs is None:
            outs, o = out.unique(return_inverse=True)
            features, ij = torch.cat((left, right)).unique(return_inverse=True)
            legs, (i, j) = self._legs(outs, features), ij.chunk(2)
        down, lefts, rights = legs
        at_once = max(1, (1 << 17) // self.B.hidden)  # small enough for the cache
        values = [
            (down[o] * (lefts[i] * rights[j]).addcmul_(lefts[j], rights[i])).sum(1)
            for o, i, j in zip(*(part.split(at_once) for part in (o, i, j)), strict=True)
        ]
        return torch.cat(values) * torch.where(left == right, 0.5, 1.0)
