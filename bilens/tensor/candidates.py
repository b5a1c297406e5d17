"""Candidates of a ranking: coefficients that may be among the strongest, as far as is known yet."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

_TIE = 1 - 2.0**-20  # coefficients closer than this may tie, and then the index decides


@dataclass(frozen=True, eq=False)
class Pool:
    """Coefficients that may be among the strongest: |½ coefficient| as screened, and how far off it may be."""

    out: Tensor
    left: Tensor
    right: Tensor
    size: Tensor  # float64, in scaled units
    slack: Tensor
    sure: Tensor  # 1 where it was verified in float64

    @classmethod
    def empty(cls, device: torch.device) -> "Pool":
        """Return a pool of no candidates."""
        index, number = torch.empty(0, dtype=torch.long, device=device), torch.empty(0, device=device).double()
        return cls(index, index, index, number, number, index.to(torch.uint8))

    def __len__(self) -> int:
        return len(self.out)

    def unsure(self) -> Tensor:
        """Return which candidates have not been verified."""
        return (self.sure == 0) & (self.slack > 0)

    def parts(self) -> dict[str, Tensor]:
        """Return the columns by name."""
        return {name: getattr(self, name) for name in PARTS}

    def __getitem__(self, which: Tensor) -> "Pool":
        return Pool(**{name: part[which] for name, part in self.parts().items()})

    def __add__(self, other: "Pool") -> "Pool":
        return self.joined([other])

    def joined(self, others: "list[Pool]") -> "Pool":
        """Return the candidates of this pool and then those of others."""
        if not others:
            return self
        return Pool(**{name: torch.cat([getattr(pool, name) for pool in (self, *others)]) for name in PARTS})

    def floor(self, k: int) -> Tensor:
        """Return what the k-th strongest of the pool surely reaches, less what counts as a tie."""
        if len(self) < k:
            return self.size.new_tensor(-torch.inf)
        return (self.size - self.slack).topk(k).values[-1] * _TIE

    def floor_of_each(self, k: int, first: int, n: int) -> Tensor:
        """Return the same for each of n output features, counted from `first`."""
        lower, floors = self.size - self.slack, self.size.new_full((n,), -torch.inf)
        order = lower.argsort(descending=True)
        order = order[self.out[order].argsort(stable=True)]
        features, counts = self.out[order].unique_consecutive(return_counts=True)
        full, starts = counts >= k, counts.cumsum(0) - counts
        floors[features[full] - first] = lower[order[starts[full] + k - 1]] * _TIE
        return floors


PARTS = tuple(part.name for part in fields(Pool))


def in_order(pool: Pool, key: Tensor, name: str, k: int) -> Tensor:
    """Return the k strongest (of each output feature), ties by index, as indices into the pool."""
    order = pool.right.argsort(stable=True)
    for part in (pool.left, pool.out):
        order = order[part[order].argsort(stable=True)]
    order = order[key[order].argsort(descending=True, stable=True)]
    if name == "all":
        return order[:k]
    order = order[pool.out[order].argsort(stable=True)]
    _, counts = pool.out[order].unique_consecutive(return_counts=True)
    rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return order[rank < k]
