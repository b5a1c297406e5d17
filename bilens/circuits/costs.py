"""What the ranking and the search of a layer cost, and which output features to look at where all would take hours."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from bilens.tensor.matrices import frobenius
from bilens.tensor.precision import product_rates

from .discovery import Layer, check_names
from .nulls import NULLS, n_draws
from .scoring import feature_gram

BUDGET = 2e13  # operations: ten minutes of one core at 35 GFLOP/s, half a minute of a desktop computer's sixteen
_TRIDIAGONAL = 3  # the spectrum's ends, in units of the width cubed of fast products
_DEAR = {"readers": 1.0, "rotation": 2.0, "untrained": 3.0, "signs": 0.0}  # a null output, beside a random direction
DRAWS = 512
_LEAST_DRAWS = 256


@dataclass(frozen=True)
class Cost:
    """Floating-point operations for a layer of some sizes, as products at their measured rate would take as long.

    Attributes:
        n_out: Output features that are looked at.
        n_in: Input features.
        width: Of the residual stream.
        hidden: Of the MLP.
    """

    n_out: int
    n_in: int
    width: int
    hidden: int

    @classmethod
    def of(cls, layer: Layer, n_out: int | None = None) -> "Cost":
        """Take the sizes of a layer, with all its output features or so many."""
        n, B = len(layer.readers), layer.tensor
        return cls(n if n_out is None else n_out, len(layer.writers), layer.writers.shape[1], B.hidden)

    @property
    def pairs(self) -> float:
        """Coefficients of one output feature: half of `A Dᵀ`, and `A = D M`."""
        return float(self.n_in**2 * self.width + 2 * self.n_in * self.width**2)

    @property
    def matrix(self) -> float:
        """Its matrix from the factors, `(B.left · u)ᵀ B.right`."""
        return 2.0 * self.hidden * self.width**2

    @property
    def ranking(self) -> float:
        """`bilens.top_interactions` of all."""
        return self.n_out * (self.pairs + self.matrix / 2)

    def search(self, null: tuple[str, ...] | list[str], n: int) -> float:
        """`circuits.search` of all where the ranking has told which input features to look at, and its null models."""
        spectrum = _TRIDIAGONAL * self.width**3
        drawn = sum(_DEAR[name] * n_draws(name, n, self.n_out) for name in null)
        return self.n_out * (self.matrix + spectrum) + drawn * (self.pairs + 2 * self.matrix + spectrum)


def seconds(operations: float, device: torch.device) -> float:
    """Return how long products of so many operations take on a device, by the rate measured on it."""
    return operations / max(product_rates(device).values())


def affordable(layer: Layer) -> int:
    """Return how many output features of a layer `BUDGET` ranks: all, or a power of two of them."""
    n = len(layer.readers)
    most = int(BUDGET / Cost.of(layer, 1).ranking)
    return n if n <= most else 1 << max(0, most.bit_length() - 1)


def affordable_draws(layer: Layer) -> int:
    """Return how many null outputs of each null model `BUDGET` scores: 512, or 256 of a layer where these cost more."""
    return DRAWS if DRAWS * Cost.of(layer, 1).pairs <= BUDGET else _LEAST_DRAWS


@torch.no_grad()
def strongest_outputs(layer: Layer, n: int) -> Int[Tensor, " n"]:
    """Return the n output features with the largest interactions, `‖D M Dᵀ‖_F` over all pairs of input features.

    No coefficient of a feature exceeds `sqrt(2)` times that norm. In the order of their numbers. Cost: the Gram matrix
    of the layer's outputs, `4 hidden² · d_model` multiplications in float64, nothing for each feature.

    Raises:
        ValueError: n below 1 or above the number of output features.
    """
    if not 1 <= n <= len(layer.readers):
        raise ValueError(f"n must lie between 1 and {len(layer.readers)}, got {n}")
    B = layer.tensor.detach().without_constant()
    norm = frobenius(feature_gram(B, layer.writers.detach()), layer.readers.detach())
    return norm.argsort(descending=True, stable=True)[:n].sort().values


@dataclass(frozen=True)
class Plan:
    """What of a layer is ranked and searched, and about how many seconds that takes.

    Attributes:
        outputs: The output features; None for all.
        n_outputs: Of the layer.
        draws: Null outputs of each null model.
        fewer: Whether these are fewer than `DRAWS` because more would take too long.
        ranking: Seconds of the ranking.
        search: Seconds of the search.
        every: Seconds of both for all output features.
    """

    outputs: Int[Tensor, " some"] | None
    n_outputs: int
    draws: int
    fewer: bool
    ranking: float
    search: float
    every: float

    @classmethod
    def of(cls, layer: Layer, n: int | None, draws: int | None, null: tuple[str, ...] | list[str]) -> "Plan":
        """Plan for n output features, those with the largest interactions, and some draws; what is affordable if None.

        Raises:
            ValueError: More output features than there are, or an unknown null model.
        """
        check_names("null", null, tuple(NULLS))
        n_all, device, fewer = len(layer.readers), layer.readers.device, draws is None
        n, draws = affordable(layer) if n is None else n, affordable_draws(layer) if draws is None else draws
        outputs = None if n == n_all else strongest_outputs(layer, n)
        some, every = Cost.of(layer, n), Cost.of(layer)
        both = every.ranking + every.search(null, draws)
        took = (seconds(one, device) for one in (some.ranking, some.search(null, draws), both))
        return cls(outputs, n_all, draws, fewer and draws < DRAWS, *took)
