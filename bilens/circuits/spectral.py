"""Output features of a layer by the spectra of their interaction matrices, and what a few eigenvectors predict."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens.models.texts import Texts
from bilens.models.windows import Windows
from bilens.tensor.bilinear import homogeneous
from bilens.tensor.extremes import two_strongest
from bilens.tensor.interactions import Interactions, top_interactions
from bilens.tensor.matrices import Matrices
from bilens.tensor.outputs import top_outputs
from bilens.tensor.precision import screen_dtype
from bilens.tensor.records import Record
from bilens.tensor.statistics import pearson

from .discovery import Discoveries
from .layer import FeatureLayer
from .records import plain
from .scoring import edge
from .textstages import text_stages

_MATRICES = 128  # decomposed at a time


# -- from the weights -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False, eq=False)
class Outliers(Record, rows="feature", tells=("strength", "ratio"), names={"feature": "out"}):
    """Output features of a layer, the one with the strongest spectral outliers first."""

    feature: Int[Tensor, " feature"]
    values: Float[Tensor, "feature 2"]  # the two eigenvalues of largest magnitude
    bulk: Float[Tensor, " feature"]  # edge of the other eigenvalues' spectrum if they were a random matrix's
    name: Callable[[str, int], str] | None = None  # of a feature, by its side and number

    @property
    def strength(self) -> Float[Tensor, " feature"]:
        """Sum of the magnitudes of the two strongest eigenvalues, the published ranking."""
        return self.values.abs().sum(1)

    @property
    def ratio(self) -> Float[Tensor, " feature"]:
        """How far the second outlier lies outside the bulk: `|λ₂| / edge`, about 1 for a random matrix."""
        return self.values[:, 1].abs() / self.bulk

    def __repr__(self) -> str:
        top = ", ".join(map(str, self.feature[:5].tolist()))
        return f"Outliers({len(self.feature)} features; first: {top} ...)"

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers as lists."""
        return plain({name: getattr(self, name) for name in ("feature", "values", "bulk", "strength", "ratio")})


def outliers(
    lens: FeatureLayer,
    by: Literal["strength", "ratio"] = "strength",
    k: int | None = None,
    found: Discoveries | None = None,
) -> Outliers:
    """Rank output features of a layer by their spectral outliers, from the weights alone; the k strongest, or all.

    `strength` is `|λ₁| + |λ₂|` (2410.08417, tutorial and section 5.2); `ratio` is `|λ₂|` over the edge
    `2 sqrt(Σ_{i>2} λ_i² / (n-2))` that the other eigenvalues would have as a random symmetric matrix (Wigner), so it
    finds features whose two outliers stand out whatever their scale. What biases add is linear or constant, no
    interaction, and left out. Cost: the ends of one `d_model × d_model` spectrum per feature; for the k
    strongest, where low precision is fast, only of those that `bilens.top_outputs` cannot exclude. A search of the
    layer has found the same ends: nothing is decomposed where it is given.

    Args:
        lens: The layer.
        by: The order.
        k: How many; all if `None`.
        found: What `circuits.search` found in this layer with outliers among its motifs; where it looked at some
            output features only, so does this.

    Raises:
        ValueError: An unknown order, `k` out of range or given with `by="ratio"`, which has no bound, or a search that
            is not of this layer or did not look for outliers.
    """
    if by not in ("strength", "ratio"):
        raise ValueError(f"by must be 'strength' or 'ratio', got {by!r}")
    if k is not None and by == "ratio":
        raise ValueError(f"k must be None with by='ratio', got {k}")
    B = lens.tensor.without_constant()
    n = len(lens.readers)
    some = torch.arange(n, device=lens.readers.device)
    if found is not None:
        if found.ends is None or found.n_outputs != n:
            raise ValueError(f"found must be a search for outliers among {n} output features, got {found!r}")
        some = some if found.outputs is None else found.outputs.to(some)
        return _ordered(lens, some, (found.ends.values, found.ends.others), by, k)
    if k is not None and screen_dtype(B.down.device) != torch.float32:  # else the bounds cost more than what they save
        some = top_outputs(B, lens.readers, min(k, n), "top2").out
    matrices = Matrices(B, len(some))
    parts = [two_strongest(matrices.of(readers)) for readers in lens.readers[some].split(_MATRICES)]
    values, others = (torch.cat(part) for part in zip(*parts, strict=True))
    return _ordered(lens, some, (values, others), by, k)


def _ordered(lens: FeatureLayer, some: Tensor, ends: tuple[Tensor, Tensor], by: str, k: int | None) -> Outliers:
    values, others = ends
    found = Outliers(some, values, edge(others), lens.name)
    order = getattr(found, by).argsort(descending=True, stable=True)[:k]
    return found[order]


def pairs(lens: FeatureLayer, feature: int, k: int = 10) -> Interactions:
    """Return the strongest pairs of input features of one output feature, from the weights alone."""
    return pairs_of(lens, [feature], k)[0]


def pairs_of(lens: FeatureLayer, features: Sequence[int], k: int = 10) -> list[Interactions]:
    """Do what `pairs` does for several output features, in one pass over the weights."""
    features = list(features)
    for feature in features:
        lens.check_feature("out", feature)
    if not features:
        return []
    every = top_interactions(lens.tensor, k, out=lens.readers[features], inp=lens.writers, per_output=k)
    found = []
    for number, feature in enumerate(features):
        out, *columns = (column[every.per_output.out == number] for column in every.per_output)
        found.append(Interactions(torch.full_like(out, feature), *columns, every.certificate, name=lens.name))
    return found


# -- weights against the running model --------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False, eq=False)
class Prediction(Record, rows="position", tells=("pearson", "pearson_active", "n_active")):
    """What a few eigenvectors say an output feature does, against what it does on text."""

    actual: Float[Tensor, " position"]  # activation, zero where the feature is not among the k largest
    predicted: Float[Tensor, " position"]  # Σ_i λ_i (v_i · x)² over the chosen eigenpairs
    factor: str = "measured"  # how the norm before the layer was taken into x

    @property
    def pearson(self) -> float:
        """Correlation over all positions; NaN below three."""
        return pearson(self.predicted, self.actual)

    @property
    def pearson_active(self) -> float:
        """Correlation over the positions where the feature is active; NaN below three."""
        active = self.actual != 0
        return pearson(self.predicted[active], self.actual[active])

    @property
    def n_active(self) -> int:
        """At how many positions the feature is active."""
        return int((self.actual != 0).sum())

    def __repr__(self) -> str:
        told = "" if self.factor == "measured" else ", the norm's factor at its mean"
        return (
            f"Prediction(pearson={self.pearson:.3f}, active only {self.pearson_active:.3f} at {self.n_active} of "
            f"{len(self.actual)} positions{told})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return correlations and counts, without the positions."""
        names = ("pearson_active", "pearson", "n_active")
        about = {name: getattr(self, name) for name in names} | {"n_positions": len(self.actual)}
        return plain(about | {"factor": self.factor})


def predict(
    lens: FeatureLayer, feature: int, texts: Texts, k: int = 2, factor: Literal["measured", "mean"] = "measured"
) -> Prediction:
    """Predict an output feature's activation from its k strongest eigenvectors, and correlate with the real one.

    `ŷ = Σ_{i≤k} λ_i (v_i · x)²` with x what enters the MLP (2410.08417, section 5.2 and figure 9). BOS and padding are
    left out. A correlation over fewer than three positions is NaN.

    Args:
        lens: The layer.
        feature: Output feature.
        texts: Texts, or windows of token ids.
        k: How many eigenvectors.
        factor: What the norm before the layer divides by: `"measured"` takes `1 / sqrt(mean(x²) + eps)` at every
            position, so that x is what enters the MLP; `"mean"` its mean over all positions, the same for all, as
            whoever predicts from the residual stream without the norm does.
    """
    return predict_all(lens, [feature], texts, k, factor)[0]


def predict_all(
    lens: FeatureLayer,
    features: Sequence[int],
    texts: Texts,
    k: int = 2,
    factor: Literal["measured", "mean"] = "measured",
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> list[Prediction]:
    """Do what `predict` does for several output features, in one pass over the texts.

    Holds two numbers for each feature at each position, and one batch of activations; with the mean factor it goes over
    the texts twice. With `progress` it shows how far it is; with a folder as `checkpoint` it keeps its state there, and
    the same call goes on after a kill.

    Raises:
        ValueError: Another factor than the two, or a checkpoint that is damaged or of another call.
    """
    if factor not in ("measured", "mean"):
        raise ValueError(f"factor must be 'measured' or 'mean', got {factor!r}")
    features, windows = list(features), Windows.of(lens.model, texts)
    tops = [lens.eigen(feature, k) for feature in features]
    stages = text_stages(lens, windows, checkpoint, progress, (features, k, factor))
    mean = None
    if factor == "mean":
        mean = lens.at_positions(windows, lambda x, y: 1 / lens.rms(x), stages, "text-factor").mean()

    def both(x: Tensor, y: Tensor) -> Tensor:
        entering = homogeneous(lens.entering(x, mean), lens.tensor)
        predicted = torch.stack([(entering @ top.vectors.T).pow(2) @ top.values for top in tops], 1)
        return torch.stack((lens.outputs(x, y)[:, features], predicted * lens.out_factor(y)), 2)

    found = lens.at_positions(windows, both, stages, "text-predicted") if features else []
    return [Prediction(*found[:, i].unbind(1), factor) for i in range(len(features))]
