"""The reckoning of a ranking: which candidates may still be among the strongest, and which surely are.

Screening knows half the magnitude of a coefficient, `|½ coefficient|` in scaled units, up to a slack. A candidate is
out when `size + slack` stays below the floor, which k others surely reach with `size - slack`.
"""

from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .candidates import Pool, in_order


@runtime_checkable
class Screened(Protocol):
    """What is screened: `|½ coefficient| = 2 ** exponent · size`."""

    exponent: int
    n_in: int
    device: torch.device
    dtype: torch.dtype


@runtime_checkable
class Exact(Protocol):
    """Coefficients that are computed in float64 where they are asked for."""

    wide: bool

    def __call__(self, out: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Compute coefficients by the indices of their three features."""


@dataclass(frozen=True)
class Wanted:
    """What a ranking is asked for."""

    k: int
    per_output: int | None
    exclude_self: bool
    features: int | None = None  # of each output feature, those with the largest coefficient

    def count(self, name: str) -> int:
        """Return how many are wanted in the pool `all`, or of each output feature in the pool `each`."""
        return self.k if name == "all" else self.per_output

    def n_pairs(self, n_in: int) -> int:
        """Return the number of coefficients of one output feature."""
        return n_in * (n_in + (-1 if self.exclude_self else 1)) // 2


@dataclass(frozen=True, eq=False)
class Search:
    """One ranking: the layer as it is screened, its coefficients as they are, and what was verified so far."""

    layer: Screened
    coefficients: Exact
    wanted: Wanted
    tally: dict = field(default_factory=lambda: {"verified": 0, "bound": 0.0, "error": 0.0})
    features: Tensor | None = None  # [n_out, most], -1 for output features that were not screened yet

    @property
    def n_pairs(self) -> int:
        """Number of coefficients of one output feature."""
        return self.wanted.n_pairs(self.layer.n_in)

    def pools(self) -> dict[str, Pool]:
        """Return the pools that are filled, empty."""
        names = ["all"] if self.wanted.per_output is None else ["all", "each"]
        return {name: Pool.empty(self.layer.device) for name in names}

    def verified(self, pool: Pool) -> Tensor:
        """Compute candidates in float64, and hold what was screened against it."""
        exact = self.coefficients(pool.out, pool.left, pool.right)
        self.compare(pool, self._halved(exact), 0.0)
        self.tally["verified"] += int(pool.unsure().sum())
        return exact

    def compare(self, pool: Pool, size: Tensor, slack: Tensor | float) -> None:
        """Hold what was screened against what is known better."""
        off = (size - pool.size).abs()
        if (off > pool.slack + slack).any():
            raise RuntimeError(
                f"a coefficient screened in {self.layer.dtype} was off by {(off / pool.slack).max():.2g} times its "
                "bound: products on this device are less exact than granted; pass screen=torch.float32"
            )
        for name, what in (("bound", pool.slack), ("error", off)):
            if len(what):
                self.tally[name] = max(self.tally[name], what.max().item() * 2.0 ** (self.layer.exponent + 1))

    def strongest(self, pool: Pool, name: str, enough: int = 0) -> Pool:
        """Drop what surely is not among the strongest; verify the likely ones if more than enough are left."""
        pool, k = self._above_floor(pool, name), self.wanted.count(name)
        if len(pool) <= enough:
            return pool
        likely = in_order(pool, pool.size, name, k)
        pool = self._above_floor(self._settled(pool, likely[pool.unsure()[likely]]), name)
        if len(pool) > 2 * len(likely) + (1 << 14):  # too many to tell apart: ties, which go by index
            pool = self._settled(pool, pool.unsure().nonzero()[:, 0])
            pool = pool[in_order(pool, self._key(pool.size), name, k)]
        return pool

    def ranked(self, pool: Pool, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Verify the candidates and sort them by strength, then by index: out, left, right and value."""
        pool = self.strongest(pool, name)
        best = pool[in_order(pool, self._key(self.verified(pool)), name, self.wanted.count(name))]
        index = (best.out * self.layer.n_in + best.left) * self.layer.n_in + best.right
        some = best[index.argsort()]
        value = torch.empty_like(best.size)
        # once more and in the order of their index, so that they do not depend on what else was verified
        value[index.argsort()] = self.coefficients(some.out, some.left, some.right)
        return best.out, best.left, best.right, value if self.coefficients.wide else value.float()

    def _above_floor(self, pool: Pool, name: str) -> Pool:
        if name == "all":
            floor = pool.floor(self.wanted.k)
        elif len(pool):
            first, last = int(pool.out.min()), int(pool.out.max())
            floor = pool.floor_of_each(self.wanted.per_output, first, last - first + 1)[pool.out - first]
        else:
            return pool
        return pool[pool.size + pool.slack >= floor]

    def _settled(self, pool: Pool, which: Tensor) -> Pool:
        """Replace what was screened by what is exact, up to the order in which float64 sums it."""
        size, slack, sure = pool.size.clone(), pool.slack.clone(), pool.sure.clone()
        size[which] = self._halved(self.verified(pool[which]))
        slack[which] = torch.maximum(1e-12 * size[which], 1e-6 * slack[which])
        sure[which] = 1
        return replace(pool, size=size, slack=slack, sure=sure)

    def _halved(self, exact: Tensor) -> Tensor:
        """Return half the magnitude of exact coefficients, in scaled units: what screening computes."""
        return exact.abs() * 2.0 ** (-self.layer.exponent - 1)

    def _key(self, exact: Tensor) -> Tensor:
        """Round what is sorted by, so that equal coefficients tie whatever the order of their summation."""
        if not self.coefficients.wide:
            return exact.abs().float()
        mantissa, exponent = exact.abs().frexp()
        return torch.ldexp((mantissa * 2.0**40).round(), exponent.double())
