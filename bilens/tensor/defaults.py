"""A bilinear layer as default features and what modifies them: one factor is what is written, the other how much."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .bilinear import BilinearTensor, homogeneous
from .records import Record

Method = Literal["svd", "ica"]
Side = Literal["left", "right"]
_RANK = 1e-10  # singular values below this, relative to the largest, are rounding


@dataclass(frozen=True, repr=False, eq=False)
class FactorFeatures(Record, rows="feature"):
    """Features of one factor of a layer, strongest first: `factor x = mean + Σ_i (readers_i·x + offsets_i) patterns_i`.

    Exactly so if there are as many as the factor has rank on the inputs, else up to what the weaker ones carry.
    Patterns have unit length and their largest entry is positive.
    """

    side: Side
    method: Method
    patterns: Float[Tensor, "feature hidden"]  # over hidden units
    readers: Float[Tensor, "feature inp"]  # the constant leg of a layer with biases included
    offsets: Float[Tensor, " feature"]
    strengths: Float[Tensor, " feature"]  # root mean square of the activation
    mean: Float[Tensor, " hidden"]  # zero for SVD

    def activations(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch feature"]:
        """Return `readers_i·x + offsets_i`.

        Args:
            x: Inputs of the layer, without the constant coordinate.

        Raises:
            ValueError: Inputs of another width.
        """
        width = self.readers.shape[1]
        if x.shape[-1] == width - 1:
            x = torch.cat((x, x.new_ones(*x.shape[:-1], 1)), -1)
        if x.shape[-1] != width:
            raise ValueError(f"x must have {width} features, or one less and a constant, got shape {list(x.shape)}")
        return x @ self.readers.T + self.offsets

    def __repr__(self) -> str:
        n, strongest = len(self.patterns), self.strengths[:3].tolist()
        first = ", ".join(f"{one:.3g}" for one in strongest)
        return f"FactorFeatures({n} of the {self.side} factor by {self.method}; strengths: {first} ...)"


@dataclass(frozen=True, repr=False, eq=False)
class Modified(Record, rows="k", unit="features"):
    """The default features that one input feature modifies most, most first.

    One unit of the input feature adds `written_i` to the output for each unit of default feature i. `gain_i` is how
    much of that lies along what the default feature writes when nothing modifies it: positive where it is amplified,
    negative where it is suppressed, in multiples of the default. `change_i` is the size of `written_i` times the
    feature's strength; `excess_i` is the same in multiples of what a modifier of this length gives in a random
    direction over hidden units (root mean square), so that a feature which is merely strong has about one.
    """

    feature: Int[Tensor, " k"]
    change: Float[Tensor, " k"]
    excess: Float[Tensor, " k"]
    gain: Float[Tensor, " k"]
    written: Float[Tensor, "k out"]

    def __repr__(self) -> str:
        top = zip(self.feature[:3].tolist(), self.change.tolist(), self.excess.tolist(), strict=False)
        first = ", ".join(f"#{feature} {change:.3g} ({excess:.1f} x chance)" for feature, change, excess in top)
        return f"Modified({len(self.feature)} default features; first: {first} ...)"


@torch.no_grad()
def default_features(
    B: BilinearTensor,
    method: Method = "svd",
    k: int | None = None,
    *,
    inputs: Float[Tensor, "n d"] | None = None,
    side: Side = "right",
    max_iter: int = 200,
    generator: torch.Generator | None = None,
) -> FactorFeatures:
    """Find the default features of a layer `down((left x) ⊙ (right x))`: linear features of one factor's `W x`.

    With the other factor held at one the layer is the linear map `down · right`, and its features can be found as
    those of any linear map; the other factor then modifies them, input by input (2305.03452, default and modifier
    features). Which factor is the default is a choice: the layer is the same with both exchanged.

    `"svd"` takes the singular vectors of `W x` over the inputs, uncentred, or of W without inputs. `"ica"` takes the
    independent components of `W x` (scikit-learn's FastICA, which warns if it does not converge).

    Cost: `n · hidden · inp` and a decomposition of `[n, hidden]`.

    Args:
        B: The layer, as `mlp.tensor()` gives it: projecting it changes what is found only through `inputs`.
        method: `"svd"` or `"ica"`.
        k: How many; as many as `W x` has rank if `None`.
        inputs: What enters the layer (`hook_mlp_in`), without the constant coordinate; needed for `"ica"`.
        side: Which factor is the default.
        max_iter: Of FastICA.
        generator: Where FastICA starts from; torch's default one if `None`.

    Raises:
        ValueError: No inputs for ICA, inputs of another width, or k out of range.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}")
    if method not in ("svd", "ica"):
        raise ValueError(f"method must be 'svd' or 'ica', got {method!r}")
    weights = getattr(B, side).detach().to(torch.float64)
    rows = weights.T if inputs is None else _checked_inputs(B, inputs).to(weights) @ weights.T
    if method == "svd":
        scale = 1 if inputs is None else len(rows) ** 0.5
        patterns, strengths = _svd(rows, k)
        parts = (patterns, patterns, strengths / scale, torch.zeros_like(rows[0]))
    elif inputs is None:
        raise ValueError("inputs must be given for method='ica': independence is a property of data, not of weights")
    else:
        parts = _ica(rows, k, max_iter, generator)
    patterns, read, strengths, mean = _oriented(*parts)
    numbers = (patterns, read @ weights, -read @ mean, strengths, mean)
    return FactorFeatures(side, method, *(part.to(B.left.dtype) for part in numbers))


def modifier_features(
    B: BilinearTensor,
    method: Method = "svd",
    k: int | None = None,
    *,
    inputs: Float[Tensor, "n d"] | None = None,
    side: Side = "right",
    max_iter: int = 200,
    generator: torch.Generator | None = None,
) -> FactorFeatures:
    """Find the features of the factor that modifies, the one that is not `side` (2305.03452).

    Args:
        B: As for `default_features`.
        method: As for `default_features`.
        k: As for `default_features`.
        inputs: As for `default_features`.
        side: Which factor is the default, as for `default_features`.
        max_iter: As for `default_features`.
        generator: As for `default_features`.

    Raises:
        ValueError: As for `default_features`.
    """
    other = _other(side)
    return default_features(B, method, k, inputs=inputs, side=other, max_iter=max_iter, generator=generator)


@torch.no_grad()
def most_modified(B: BilinearTensor, defaults: FactorFeatures, feature: Float[Tensor, " d"], k: int = 10) -> Modified:
    """Find the default features that an input feature modifies most (2305.03452, equation 16, for one input feature).

    With the right factor as default, `change_i = strength_i ‖down((left·f) ⊙ pattern_i)‖`: what a unit of the input
    feature f adds to, or takes from, what default feature i writes at its usual strength. It is the effect through the
    modifying factor alone; f's own part in the default factor is `defaults.activations(f)`.

    Args:
        B: The layer.
        defaults: Its default features.
        feature: A direction at the layer's input, such as an SAE's decoder row, without the constant coordinate.
        k: How many; all if there are fewer.

    Raises:
        ValueError: `defaults` of another layer, a feature of another width, or `k` below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    _check_layer("defaults", defaults, B)
    expected = B.inp - B.constant
    if feature.shape != (expected,):
        raise ValueError(f"feature must have shape [{expected}], got {list(feature.shape)}")
    factor = getattr(B, _other(defaults.side)).detach()
    modifier = factor[:, :expected] @ feature.to(factor)
    down = B.down.detach()
    written, plain = (defaults.patterns * modifier) @ down.T, defaults.patterns @ down.T
    change = written.norm(dim=1) * defaults.strengths
    tiny = torch.finfo(plain.dtype).tiny
    gain = (written * plain).sum(1) / plain.square().sum(1).clamp(min=tiny)
    chance = (defaults.patterns.square() @ down.square().sum(0)).sqrt() * modifier.norm() / B.hidden**0.5
    excess = written.norm(dim=1) / chance.clamp(min=tiny)
    best = change.argsort(descending=True, stable=True)[:k]
    return Modified(best, change[best], excess[best], gain[best], written[best])


@torch.no_grad()
def modification(
    B: BilinearTensor, defaults: FactorFeatures, modifiers: FactorFeatures
) -> Float[Tensor, "default modifier"]:
    """Return how strongly each modifier feature modifies each default feature: `s_i s_j ‖down(pattern_i ⊙ pattern_j)‖`.

    Cost: `defaults · modifiers · hidden · out`.

    Args:
        B: The layer.
        defaults: Features of one factor.
        modifiers: Features of the other.

    Raises:
        ValueError: Features of another layer, or both of the same factor.
    """
    _check_layer("defaults", defaults, B)
    _check_layer("modifiers", modifiers, B)
    if defaults.side == modifiers.side:
        raise ValueError(
            f"modifiers must be features of the {_other(defaults.side)} factor, got {modifiers.side!r} too"
        )
    down = B.down.detach()
    rows = [((modifiers.patterns * pattern) @ down.T).norm(dim=1) for pattern in defaults.patterns]
    return torch.stack(rows) * torch.outer(defaults.strengths, modifiers.strengths)


def _svd(rows: Float[Tensor, "n hidden"], k: int | None) -> tuple[Tensor, Tensor]:
    """Return the right singular vectors as rows, and the singular values."""
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    k = _checked_k(k, values)
    return vectors[:k], values[:k]


def _ica(rows: Float[Tensor, "n hidden"], k: int | None, max_iter: int, generator: torch.Generator | None) -> tuple:
    """Return patterns, how they are read from `W x`, strengths and mean."""
    from sklearn.decomposition import FastICA  # scikit-learn takes a second to import

    mean = rows.mean(0)
    scores, values, vectors = torch.linalg.svd(rows - mean, full_matrices=False)
    k = _checked_k(k, values)
    # Whitened here, not by FastICA, which fails on a hidden unit that is constant, as that of an output bias is.
    scores, spread, vectors = scores[:, :k] * len(rows) ** 0.5, values[:k] / len(rows) ** 0.5, vectors[:k]
    device = "cpu" if generator is None else generator.device
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device=device))
    ica = FastICA(whiten=False, random_state=seed, max_iter=max_iter).fit(scores.cpu().numpy())
    rotation = torch.from_numpy(ica.components_).to(rows)
    mixing, components = rotation @ (spread[:, None] * vectors), rotation @ (vectors / spread[:, None])
    strengths = mixing.norm(dim=1)  # of components with unit variance
    patterns, read = mixing / strengths[:, None], components * strengths[:, None]
    order = strengths.argsort(descending=True)
    return patterns[order], read[order], strengths[order], mean


def _oriented(patterns: Tensor, read: Tensor, strengths: Tensor, mean: Tensor) -> tuple[Tensor, ...]:
    """Turn each feature so that its pattern's largest entry is positive."""
    sign = patterns.gather(1, patterns.abs().argmax(1, keepdim=True)).sign()
    return patterns * sign, read * sign, strengths, mean


def _checked_k(k: int | None, values: Float[Tensor, " n"]) -> int:
    rank = int((values > _RANK * values[0]).sum())
    if k is not None and not 1 <= k <= rank:
        raise ValueError(f"k must lie between 1 and {rank}, the rank of the factor on these inputs, got {k}")
    return k or rank


def _checked_inputs(B: BilinearTensor, inputs: Float[Tensor, "n d"]) -> Float[Tensor, "n inp"]:
    expected = B.inp - B.constant
    if inputs.ndim != 2 or inputs.shape[1] != expected or len(inputs) < 2:
        raise ValueError(f"inputs must be at least two rows [n, {expected}], got shape {list(inputs.shape)}")
    return homogeneous(inputs, B)


def _other(side: Side) -> Side:
    return "left" if side == "right" else "right"


def _check_layer(name: str, features: FactorFeatures, B: BilinearTensor) -> None:
    if features.patterns.shape[1] != B.hidden or features.readers.shape[1] != B.inp:
        got = f"{features.patterns.shape[1]} hidden units and {features.readers.shape[1]} inputs"
        raise ValueError(f"{name} must be features of this layer, {B!r}, got ones of {got}")
