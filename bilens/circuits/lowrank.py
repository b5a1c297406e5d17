"""How well a few eigenvectors predict an output feature on text, with intervals from resampled texts."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from bilens.tensor.records import Record, tabular

from .records import plain


@tabular(rows="k")
class Estimate(NamedTuple):
    """A number for each k, and the ends of its bootstrap interval; NaN where too few positions are active."""

    value: Float[Tensor, " k"]
    low: Float[Tensor, " k"]
    high: Float[Tensor, " k"]


@dataclass(frozen=True, repr=False, eq=False)
class LowRank(Record, rows="k", along=("k", "pearson_active", "pearson", "r2"), unit="numbers of eigenvectors"):
    """How well the k strongest eigenvectors predict an output feature, `ŷ = Σ_{i≤k} λ_i (v_i·x)²`, by one protocol.

    The actual activation is after the top-k, zero where the feature is not active. BOS and padding are left out.
    `pearson_active` is over the positions where the feature is active, `pearson` over all. `r2` is over the active
    ones, `1 - Var(y - ŷ) / Var(y)`: slope one, the intercept free, which stands for the constants that eigenvectors
    leave out, so it can be negative. Intervals are percentiles of a bootstrap over texts. With fewer than `min_active`
    active positions all are NaN; resamples with fewer do not count.
    """

    k: tuple[int, ...]
    pearson_active: Estimate
    pearson: Estimate
    r2: Estimate
    n_active: int
    n_positions: int
    n_texts: int
    min_active: int
    n_bootstrap: int
    confidence: float

    def __repr__(self) -> str:
        curve = ", ".join(f"{k}: {v:.3f}" for k, v in zip(self.k, self.pearson_active.value.tolist(), strict=True))
        return f"LowRank(active-only Pearson by k = {{{curve}}} at {self.n_active} of {self.n_positions} positions)"

    def to_dict(self) -> dict[str, Any]:
        """Return the curve of the active-only correlation by k, with its interval."""
        rows = zip(self.k, *(part.tolist() for part in self.pearson_active), strict=True)
        return plain({str(k): {"pearson_active": value, "low": low, "high": high} for k, value, low, high in rows})


@tabular(rows="position")
class Predictions(NamedTuple):
    """An output feature at every position of text, and what the k strongest eigenvectors say of it."""

    k: tuple[int, ...]
    actual: Float[Tensor, " position"]
    predicted: Float[Tensor, "position k"]
    text: Int[Tensor, " position"]  # which text a position belongs to


def low_rank(
    found: Predictions, *, min_active: int, n_bootstrap: int, confidence: float, generator: torch.Generator
) -> LowRank:
    """Score predictions, and resample texts.

    Args:
        found: The predictions.
        min_active: Correlations over fewer positions are NaN.
        n_bootstrap: Resamples of the texts.
        confidence: Of the intervals.
        generator: Source of the resamples.
    """
    actual, predicted, text = found.actual.cpu(), found.predicted.cpu(), found.text.cpu().unique(return_inverse=True)[1]
    n_texts, active = int(text.max()) + 1, actual != 0
    everywhere = _moments(actual, predicted, text, n_texts)
    where = _moments(actual[active], predicted[active], text[active], n_texts)
    n = n_bootstrap
    drawn = torch.randint(n_texts, (n, n_texts), generator=generator)
    counts = torch.zeros(n, n_texts, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(n, n_texts).double())
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)

    def estimate(moments: Tensor, score: int) -> Estimate:
        n_active = where[..., 0].sum(0)
        value = _scores(moments.sum(0))[score].masked_fill(n_active < min_active, torch.nan)
        enough = einsum(counts, where[..., 0], "sample text, text k -> sample k") >= min_active
        resampled = _scores(einsum(counts, moments, "sample text, text k moment -> sample k moment"))[score]
        low, high = resampled.masked_fill(~enough | value.isnan(), torch.nan).nanquantile(tails, dim=0)
        return Estimate(value, low, high)

    return LowRank(
        found.k, estimate(where, 0), estimate(everywhere, 0), estimate(where, 1), int(active.sum()), len(active),
        n_texts, min_active, n, confidence,
    )  # fmt: skip


def _moments(y: Tensor, predicted: Tensor, text: Tensor, n_texts: int) -> Float[Tensor, "text k 6"]:
    """Sum 1, y, ŷ, y², ŷ², y ŷ over the positions of each text, about the mean of all positions, in float64."""
    y, p = y.double()[:, None].expand_as(predicted), predicted.double()
    if len(y):
        y, p = y - y.mean(0), p - p.mean(0)
    terms = torch.stack((torch.ones_like(y), y, p, y * y, p * p, y * p), -1)
    return terms.new_zeros(n_texts, *terms.shape[1:]).index_add_(0, text, terms)


def _scores(moments: Float[Tensor, "*batch 6"]) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Return the Pearson correlation and `1 - Var(y - ŷ) / Var(y)`; NaN where something does not vary."""
    n, y, p, yy, pp, yp = moments.unbind(-1)
    var_y, var_p, covariance = yy - y * y / n, pp - p * p / n, yp - y * p / n
    return covariance / (var_y * var_p).sqrt(), 1 - (var_y + var_p - 2 * covariance) / var_y
