"""A number as a sum over pairs of parts: what both kinds of attribution have in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bilens.tensor.records import Record, Rows, tabular

from .places import Places
from .targets import Target

_POSITIONS = 256  # whose parts are held at a time


@tabular()
class Term(NamedTuple):
    """One pair of parts at one position, and what it adds to the target."""

    row: int
    position: int
    word: str
    left: int
    right: int
    labels: tuple[str, str]
    value: float

    def __repr__(self) -> str:
        return f"{self.labels[0]} × {self.labels[1]} at {self.position} {self.word!r}: {self.value:+.4g}"


@dataclass(frozen=True, repr=False, eq=False)
class Terms(Record, ABC, rows="position", along=("places",)):
    """A target as a sum over unordered pairs of parts, position by position; the first part is the bias.

    `table[n, a, b]` with `a <= b` is the term of parts a and b; below the diagonal is zero. Terms are float64: they sum
    to the model's own value up to the rounding of the model's own arithmetic.
    """

    target: Target
    layer: int
    places: Places
    table: Float[Tensor, "position part part"]
    pre_activation: Float[Tensor, " position"]  # what the running model gives

    @property
    @abstractmethod
    def pairs(self) -> Float[Tensor, "position n n"]:
        """Terms of two named parts."""

    @abstractmethod
    def part(self, n: int, index: int) -> tuple[int, str]:
        """Return id and label of a named part at the n-th position."""

    @property
    def bias(self) -> Float[Tensor, " position"]:
        """What is there without any input: bias × bias, the layer's output bias, the target's offset."""
        return self.table[:, 0, 0]

    @property
    def total(self) -> Float[Tensor, " position"]:
        """Sum of all terms."""
        return self.table.sum((1, 2))

    @property
    def miss(self) -> Float[Tensor, " position"]:
        """How far the sum is from the running model, relative to the terms: `|total - pre_activation| / Σ |term|`."""
        scale = self.table.abs().sum((1, 2)).clamp(min=torch.finfo(self.table.dtype).tiny)
        return (self.total - self.pre_activation).abs() / scale

    def columns(self) -> dict[str, Any]:
        """Return position and word, what the model gives there, and the sums of terms by kind."""
        sums = {name: values for name, values in self.sums.items() if name != "model"}  # the pre-activation, once more
        return self.places.columns() | {"pre_activation": self.pre_activation, "total": self.total} | sums

    def facts(self) -> dict[str, Any]:
        """Return the target and the layer, how far the sums are off at most, and the strongest terms."""
        miss = self.miss.max().item() if len(self) else 0.0
        return {"target": self.target.name, "layer": self.layer, "miss": miss, "strongest": self.top(10)}

    @property
    @abstractmethod
    def sums(self) -> dict[str, Float[Tensor, " position"]]:
        """The sums of all terms of a kind, by its name."""

    def top(self, k: int = 10) -> Rows[Term]:
        """Return the k pairs that add or take away most, over all positions, strongest first; fewer if there are fewer.

        Raises:
            ValueError: `k` is below 1.
        """
        return Rows(self._term(*index, value) for index, value in strongest(self.pairs, k))

    def _term(self, n: int, a: int, b: int, value: float) -> Term:
        (left, one), (right, other) = self.part(n, a), self.part(n, b)
        row, position = self.places.row[n].item(), self.places.position[n].item()
        return Term(row, position, self.places.word(n), left, right, (one, other), value)

    def __repr__(self) -> str:
        strongest = self.top(1)
        first = f"; first: {strongest[0]!r}" if strongest else ""
        return (
            f"{type(self).__name__}({self.target.name} in layer {self.layer}, {len(self.table)} positions, "
            f"{self.pairs.shape[1]} parts, sum within {self.miss.max().item():.1e}{first})"
        )


def strongest(values: Float[Tensor, "..."], k: int) -> list[tuple[list[int], float]]:
    """Return where the k entries of largest magnitude are, and what they are, strongest first; zeros are left out.

    Raises:
        ValueError: `k` is below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    flat = values.flatten()
    best = flat.abs().topk(min(k, flat.numel()))
    best = best.indices[best.values > 0]
    where = torch.stack(torch.unravel_index(best, values.shape), 1).tolist()
    return list(zip(where, flat[best].tolist(), strict=True))


def in_pieces(x: Float[Tensor, "position ..."]) -> Sequence[Int[Tensor, " some"]]:
    """Return the positions of x a few at a time, so that the parts of not too many are held at once."""
    return torch.arange(len(x), device=x.device).split(_POSITIONS)


def with_unit(
    parts: Float[Tensor, "position part d_model"],
    factor: Float[Tensor, "position d_model"],
    shift: Float[Tensor, " d_model"],
) -> Float[Tensor, "position part leg"]:
    """Take parts through a norm, `factor * x + shift`, into homogeneous coordinates.

    The shift and the 1 go to the first part, the bias.
    """
    parts = F.pad(parts * factor[:, None], (0, 1))
    parts[:, 0, :-1] += shift
    parts[:, 0, -1] = 1
    return parts
