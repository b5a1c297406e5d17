"""Edits of the running model, and what they say about a circuit that was read off the weights.

Every edit is a `with` block of hooks: no weight is touched, and at its end, also after an exception, the model is what
it was. `remove_pair` alone changes weights, those of a copy.
"""

# `test` is what users call it, not a test of ours
# ruff: noqa: PT028

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bilens import saes as _saes
from bilens.models.transformer import BilinearTransformer
from bilens.saes.rows import Rows, activations, text_of_rows, to_rows, trim
from bilens.tensor.bilinear import homogeneous

from .layer import FeatureLayer, NegationCircuit, top_eigen
from .motifs import Discovery

_ROWS = 32  # windows that run at a time
KS = (1, 2, 4, 8, 16, 32, 64)
_SIDES = {"inp": "input", "out": "output"}


@dataclass(frozen=True)
class Circuit:
    """Two input features whose product drives an output feature of one layer."""

    layer: int
    feature: int
    left: int
    right: int

    def __post_init__(self):
        if self.left == self.right:
            raise ValueError(f"left and right must be two different input features, got {self.left} twice")

    @classmethod
    def of(cls, lens: FeatureLayer, discovery: Discovery) -> "Circuit":
        """Return the pair of a motif with the largest coefficient: between its first two groups, or with its source.

        Args:
            lens: The layer that was searched.
            discovery: What `circuits.search` found.
        """
        strength = lens.coefficients(discovery.out).abs().fill_diagonal_(-1)
        left = discovery.groups[0].features
        right = discovery.groups[1].features if len(discovery.groups) > 1 else torch.arange(len(strength))
        i, j = divmod(int(strength[left][:, right].argmax()), len(right))
        return cls(lens.layer, discovery.out, int(left[i]), int(right[j]))


AnyCircuit = Circuit | NegationCircuit


# -- edits of the running model ---------------------------------------------------------------------------------------


@contextmanager
def without_feature(
    lens: FeatureLayer, feature: int, where: Bool[Tensor, "batch seq"] | None = None
) -> Iterator[BilinearTransformer]:
    """Take an input feature out of what enters the MLP, `x' = x - z_i d_i`; what its SAE does not explain stays.

    Args:
        lens: The layer.
        feature: Input feature.
        where: At which positions; everywhere if `None`.
    """
    _check_index("feature", feature, len(lens.writers), "input features", lens)

    def edit(x: Tensor, hook: object) -> Tensor:
        z = _codes(lens, x)[..., feature, None]
        return x - _at(where, z * lens.writers[feature]).to(x)

    with lens.model.hooks(fwd_hooks=[(lens.hook_in, edit)]) as model:
        yield model


@contextmanager
def without_pair(
    lens: FeatureLayer, left: int, right: int, where: Bool[Tensor, "batch seq"] | None = None
) -> Iterator[BilinearTransformer]:
    """Take the product of two input features out of what the MLP computes, `y' = y - 2 z_i z_j B(d_i, d_j)`.

    With `B(a, b)` symmetric, that is `y = ... + z_i² B(d_i, d_i) + 2 z_i z_j B(d_i, d_j) + z_j² B(d_j, d_j)` without
    its middle term (2410.08417, section 3.1): either feature alone acts as before, on every output direction.

    Args:
        lens: The layer.
        left: Input feature.
        right: Another input feature.
        where: At which positions; everywhere if `None`.
    """
    with without_pairs(lens, [left], [right], where) as model:
        yield model


@contextmanager
def without_pairs(
    lens: FeatureLayer, left: Sequence[int], right: Sequence[int], where: Bool[Tensor, "batch seq"] | None = None
) -> Iterator[BilinearTransformer]:
    """Take the products of two groups of input features out of what the MLP computes, `y' = y - 2 B(x_A, x_B)`.

    With `x_A = Σ_{i in A} z_i d_i` that is `Σ_{i,j} 2 z_i z_j B(d_i, d_j)`, every pair of one feature of either group
    at once; what each group does by itself stays.

    Args:
        lens: The layer.
        left: Input features.
        right: Other input features.
        where: At which positions; everywhere if `None`.
    """
    for name, group in (("left", left), ("right", right)):
        for index in group:
            _check_index(name, index, len(lens.writers), "input features", lens)
    if twice := set(left) & set(right):
        raise ValueError(f"left and right must be different input features, got {min(twice)} twice")

    def between(x: Tensor) -> Tensor:
        return product(lens, _codes(lens, x), left, right)

    with _without(lens, between, where) as model:
        yield model


@contextmanager
def without_eigenvector(
    lens: FeatureLayer, feature: int, index: int = 0, where: Bool[Tensor, "batch seq"] | None = None
) -> Iterator[BilinearTransformer]:
    """Take one eigenvector's share out of an output feature: `y' = y - λ (v·x)² r / ‖r‖²`.

    That changes the feature's pre-activation `r·y + offset` by exactly `-λ (v·x)²`, and is the smallest change of y
    that does: output directions orthogonal to the reader r keep what they had. (An eigenvector is one of a single
    output feature's matrix, so taking v out of x instead would say little about that feature alone.)

    Args:
        lens: The layer.
        feature: Output feature.
        index: Which eigenvector, 0 for that of the largest |λ|.
        where: At which positions; everywhere if `None`.
    """
    _check_index("feature", feature, len(lens.readers), "output features", lens)
    _check_index("index", index, lens.tensor.inp, "eigenvectors", lens)
    top, reader = top_eigen(lens, feature, index + 1), lens.readers[feature]

    def share(x: Tensor) -> Tensor:
        strength = (homogeneous(x.to(reader), lens.tensor) @ top.vectors[index]).pow(2) * top.values[index]
        return strength[..., None] * reader / reader.dot(reader)

    with _without(lens, share, where) as model:
        yield model


@contextmanager
def steer(
    lens: FeatureLayer,
    feature: int,
    amount: float,
    side: Literal["inp", "out"] = "out",
    where: Bool[Tensor, "batch seq"] | None = None,
) -> Iterator[BilinearTransformer]:
    """Add `amount` times a feature's decoder direction: to the MLP's input, or to its output.

    The MLP's output is what is added to the residual stream, so an output feature goes straight into the latter.

    Args:
        lens: The layer.
        feature: Input or output feature, by `side`.
        amount: In units of the feature's activation.
        side: `"inp"` or `"out"`.
        where: At which positions; everywhere if `None`.
    """
    directions, hook = _side(lens, side)
    _check_index("feature", feature, len(directions), f"{_SIDES[side]} features", lens)
    with _push(lens.model, hook, amount * directions[feature], where) as model:
        yield model


@contextmanager
def _push(
    model: BilinearTransformer, hook: str, push: Float[Tensor, " d_model"], where: Bool[Tensor, "batch seq"] | None
) -> Iterator[BilinearTransformer]:
    """Add a vector at a hook point."""

    def edit(value: Tensor, hook: object) -> Tensor:
        return value + _at(where, push.expand_as(value)).to(value)

    with model.hooks(fwd_hooks=[(hook, edit)]):
        yield model


@contextmanager
def _without(
    lens: FeatureLayer,
    part: Callable[[Float[Tensor, "b s d"]], Float[Tensor, "b s d"]],
    where: Bool[Tensor, "batch seq"] | None,
) -> Iterator[BilinearTransformer]:
    """Subtract `part(x)` from what the MLP makes of x."""
    seen = {}

    def look(x: Tensor, hook: object) -> None:
        seen["part"] = part(x)

    def edit(y: Tensor, hook: object) -> Tensor:
        return y - _at(where, seen.pop("part")).to(y)

    with lens.model.hooks(fwd_hooks=[(lens.hook_in, look), (lens.hook_out, edit)]) as model:
        yield model


def _side(lens: FeatureLayer, side: str) -> tuple[Float[Tensor, "feature d_model"], str]:
    """Return the decoder directions of one side and the hook point they belong to."""
    if side not in _SIDES:
        raise ValueError(f"side must be 'inp' or 'out', got {side!r}")
    return (lens.writers, lens.hook_in) if side == "inp" else (_saes.writers(lens.out), lens.hook_out)


def _at(where: Bool[Tensor, "batch seq"] | None, change: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
    """Keep a change at some positions only."""
    if where is None:
        return change
    if where.shape != change.shape[:2]:
        raise ValueError(f"where must have the tokens' shape {list(change.shape[:2])}, got {list(where.shape)}")
    return change * where[..., None].to(change)


def _codes(lens: FeatureLayer, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch feature"]:
    """Activations of the input features."""
    return lens.inp.encode(x.to(lens.writers))


def _check_index(name: str, index: int, n: int, what: str, lens: FeatureLayer) -> None:
    if not 0 <= index < n:
        raise ValueError(f"{name} must lie between 0 and {n - 1} (layer {lens.layer} has {n} {what}), got {index}")


# -- what the weights say ---------------------------------------------------------------------------------------------


def interaction(lens: FeatureLayer, left: int, right: int) -> Float[Tensor, " d_model"]:
    """Return what the product of two input features writes to the residual stream, `B(d_i, d_j)` with B symmetric.

    The layer's output contains it `2 z_i z_j` times for i ≠ j (2410.08417, section 3.1).
    """
    return _interactions(lens, torch.tensor([left]), torch.tensor([right]))[0]


def product(
    lens: FeatureLayer, z: Float[Tensor, "*batch feature"], left: Sequence[int], right: Sequence[int]
) -> Float[Tensor, "*batch d_model"]:
    """Return what two groups of input features write together, `2 B(x_A, x_B)` with `x_A = Σ_{i in A} z_i d_i`.

    Args:
        lens: The layer.
        z: Activations of all input features.
        left: The features of the one group.
        right: Those of the other.
    """
    left, right = list(left), list(right)
    return 2 * _polar(lens, *(z[..., group] @ lens.writers[group] for group in (left, right)))


def _interactions(
    lens: FeatureLayer, left: Int[Tensor, " pair"], right: Int[Tensor, " pair"]
) -> Float[Tensor, "pair d_model"]:
    return _polar(lens, lens.writers[left], lens.writers[right])


def _polar(
    lens: FeatureLayer, a: Float[Tensor, "*batch d_model"], b: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch d_model"]:
    """Return `B(a, b)` with B symmetric; a difference of inputs has no constant coordinate."""
    B, d = lens.tensor, a.shape[-1]
    L, R = (factor[:, :d].T for factor in (B.left, B.right))
    a, b = a.to(L), b.to(L)
    return ((a @ L) * (b @ R) + (b @ L) * (a @ R)) @ B.down.T / 2


def remove_pair(
    model_or_lens: BilinearTransformer | FeatureLayer, circuit: AnyCircuit, saes: str | Path = "bilens-mini"
) -> BilinearTransformer:
    """Return a copy of the model in which two input features no longer interact in the output feature.

    The layer's tensor changes by as little as possible in Frobenius norm under `r · (B + ΔB)(d_i, d_j) = 0`:
    `ΔB = -Q_ij / (‖r‖² ‖S‖²) · r ⊗ S` with `Q_ij = r · B(d_i, d_j)`, `S = (d_i d_jᵀ + d_j d_iᵀ) / 2` and
    `‖S‖² = (‖d_i‖² ‖d_j‖² + (d_i·d_j)²) / 2`. As only the symmetric part of a rank-one term acts, it is one more hidden
    unit, `(d_i·x)(d_j·x)`. A config has one `d_hidden` for all layers, so every other layer gets a unit of zeros, and
    the copy, which has no hooks, can be saved and loaded; those layers compute what they did, up to the order of
    summation.

    It is not what `without_pair` does. The change reads `d·x` and not the code z, so it also acts on inputs that
    overlap with both directions, and it writes along r alone: see `removal_bound` for the other output features.

    Args:
        model_or_lens: The layer between its SAEs; or a model, with the SAEs stored under `saes`.
        circuit: The pair and the output feature.
        saes: For a model, `"bilens-mini"` or a folder that `bilens.saes.fit` wrote.
    """
    lens, circuit = _resolve(model_or_lens, circuit, saes)
    reader, d = lens.readers[circuit.feature].double(), lens.writers[[circuit.left, circuit.right]].double()
    model = copy.deepcopy(lens.model)
    model.reset_hooks(including_permanent=True)
    unit = {"left": d[0], "right": d[1], "down": -_excess(lens, circuit) * reader}
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            _append_unit(block.mlp, unit if layer == circuit.layer else {})
    model.cfg = replace(model.cfg, d_hidden=model.cfg.d_hidden + 1)
    return model


def removal_bound(lens: FeatureLayer, circuit: AnyCircuit) -> Float[Tensor, " feature"]:
    """Bound what `remove_pair` does to each output feature, per squared norm of what enters the MLP.

    `|Δpre_o| ≤ |Q_ij| |r_o·r| / ‖r‖² · ‖S‖_2 / ‖S‖_F² · ‖x‖²` with `‖S‖_2 = (‖d_i‖ ‖d_j‖ + |d_i·d_j|) / 2`, S and Q_ij
    as in `remove_pair`. After an RMS norm without gain `‖x‖²` is at most `d_model`.
    """
    lens, circuit = _resolve(lens, circuit, "")
    d = lens.writers[[circuit.left, circuit.right]].double()
    spectral = (d.norm(dim=1).prod() + d[0].dot(d[1]).abs()) / 2
    overlap = lens.readers.double() @ lens.readers[circuit.feature].double()
    return (_excess(lens, circuit).abs() * spectral * overlap.abs()).to(lens.readers.dtype)


def _excess(lens: FeatureLayer, circuit: Circuit) -> Float[Tensor, ""]:
    """Return `Q_ij / (‖r‖² ‖S‖²)`, in float64."""
    reader, (one, other) = lens.readers[circuit.feature].double(), lens.writers[[circuit.left, circuit.right]].double()
    coefficient = reader @ interaction(lens, circuit.left, circuit.right).double()
    squared = (one.dot(one) * other.dot(other) + one.dot(other) ** 2) / 2
    return coefficient / (reader.dot(reader) * squared)


def _append_unit(mlp: nn.Module, unit: dict[str, Tensor]) -> None:
    """Give an MLP one more hidden unit, of zeros where nothing is said."""
    w, p = mlp.w, mlp.p
    rows = [unit.get(name, w.weight.new_zeros(w.in_features)).to(w.weight)[None] for name in ("left", "right")]
    halves = zip(w.weight.chunk(2), rows, strict=True)
    _replace(w, "weight", torch.cat([part for half in halves for part in half]))
    if w.bias is not None:
        _replace(w, "bias", torch.cat([part for half in w.bias.chunk(2) for part in (half, half.new_zeros(1))]))
    column = unit.get("down", p.weight.new_zeros(p.out_features)).to(p.weight)
    _replace(p, "weight", torch.cat((p.weight, column[:, None]), 1))
    w.out_features, p.in_features = w.out_features + 2, p.in_features + 1


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    setattr(module, name, nn.Parameter(value, requires_grad=getattr(module, name).requires_grad))


def _resolve(
    model_or_lens: BilinearTransformer | FeatureLayer, circuit: AnyCircuit, saes: str | Path
) -> tuple[FeatureLayer, Circuit]:
    """Return the layer and the circuit in it, after a look at both."""
    if isinstance(circuit, NegationCircuit):
        circuit = Circuit(circuit.layer, circuit.feature, circuit.negation, circuit.sentiment)
    is_lens = isinstance(model_or_lens, FeatureLayer)
    lens = model_or_lens if is_lens else FeatureLayer.load(model_or_lens, circuit.layer, saes)
    if lens.layer != circuit.layer:
        raise ValueError(f"circuit must be one of layer {lens.layer}, where the lens is, got one of {circuit.layer}")
    lens.model.blocks[lens.layer].mlp.tensor()  # raises if the layer is none
    width = lens.model.cfg.d_model
    if lens.inp.cfg.d_in != width or lens.out.cfg.d_in != width:
        raise ValueError(f"saes must be of width {width}, the model's, got {lens.inp.cfg.d_in}, {lens.out.cfg.d_in}")
    _check_index("feature", circuit.feature, len(lens.readers), "output features", lens)
    for name in ("left", "right"):
        _check_index(name, getattr(circuit, name), len(lens.writers), "input features", lens)
    return lens, circuit


# -- records ----------------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A number for each k, and the ends of its bootstrap interval; NaN where too few positions are active."""

    value: Float[Tensor, " k"]
    low: Float[Tensor, " k"]
    high: Float[Tensor, " k"]


@dataclass(frozen=True, repr=False)
class LowRank:
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


class Effects(NamedTuple):
    """Mean effects of edits over the positions where the circuit's pair is active."""

    pre: Float[Tensor, " edit"]  # |change| of the output feature's pre-activation
    kl: Float[Tensor, " edit"]  # KL(as it is ‖ edited) of the next-token distribution, nats
    logits: Float[Tensor, " edit"]  # Euclidean norm of the change of the logits
    loss: Float[Tensor, " edit"]  # change of the next token's loss, nats; NaN if no such position has a next token


@dataclass(frozen=True, repr=False)
class Edit:
    """One edit of the running model at the positions where the pair is active: predicted, measured, and controls.

    `directions` holds the same edit along random directions, of the same norm at every position: at the MLP's input
    for an input feature, at its output otherwise.
    """

    name: str
    predicted: Float[Tensor, " position"]  # change of the output feature's pre-activation, from the weights
    measured: Float[Tensor, " position"]
    effect: Effects
    directions: Effects
    min_active: int

    @property
    def correlation(self) -> float:
        """Pearson correlation of predicted and measured change; NaN below `min_active` positions."""
        return _pearson(self.predicted, self.measured, self.min_active)

    @property
    def error(self) -> float:
        """Largest difference of the two, relative to the largest measured change."""
        scale = self.measured.abs().max().clamp(min=torch.finfo(self.measured.dtype).tiny)
        return ((self.predicted - self.measured).abs().max() / scale).item()

    @property
    def percentile(self) -> dict[str, float]:
        """Share, in percent, of the random directions with a smaller effect; ties count half."""
        return percentiles(self.effect, self.directions)

    def __repr__(self) -> str:
        one = {name: value[0].item() for name, value in self.effect._asdict().items()}
        return (
            f"Edit({self.name}: predicted and measured correlate {self.correlation:.4f}, error {self.error:.1e}; "
            f"KL {one['kl']:.4g}, loss {one['loss']:+.4g} at {len(self.measured)} positions)"
        )


@dataclass(frozen=True, repr=False)
class MatchedPairs:
    """What removing other pairs does at the same positions: those nearest in the root mean square of z_k z_l there.

    They are pairs active together at no less than a tenth of the positions, which may share a feature with the
    circuit's; where a pair is not active, removing it does nothing. `effects` are of removing them as they are,
    `rescaled` with z_k z_l multiplied by `1 / scale`, which leaves the weights alone to differ. Coefficients are not
    matched: whether the circuit's is special is what is tested.
    """

    left: Int[Tensor, " pair"]
    right: Int[Tensor, " pair"]
    scale: Float[Tensor, " pair"]  # root mean square of z_k z_l relative to the circuit's
    effects: Effects
    rescaled: Effects

    def __repr__(self) -> str:
        near, far = (self.scale.min().item(), self.scale.max().item()) if len(self.scale) else (float("nan"),) * 2
        return f"MatchedPairs({len(self.left)} pairs, rms z z {near:.2f} to {far:.2f} times the circuit's)"


@dataclass(frozen=True, repr=False)
class Steering:
    """What adding a feature does to the log-odds of one list of next tokens against another, on prompts.

    `log P(positive) - log P(negative)` after the prompt, each the sum over its list, averaged over prompts. Controls
    are random directions of the same norm.
    """

    amounts: tuple[float, ...]  # in units of the feature's activation
    log_odds: Float[Tensor, " amount"]
    controls: Float[Tensor, "direction amount"]
    before: float
    feature: int
    side: str
    n_prompts: int

    def __repr__(self) -> str:
        moved, spread = (self.log_odds[-1] - self.before).item(), (self.controls[:, -1] - self.before).abs().max()
        return (
            f"Steering({self.side} feature {self.feature}, {self.n_prompts} prompts: log-odds {moved:+.3f} at amount "
            f"{self.amounts[-1]:.3g}, random directions up to {spread.item():.3f})"
        )


@dataclass(frozen=True, repr=False)
class CircuitTest:
    """A circuit against the running model.

    Edits are made at once at all positions where the pair is active, in the first `n_windows` windows of text in which
    it is, and measured at those `n_pair` positions.
    """

    circuit: Circuit
    low_rank: LowRank
    edits: dict[str, Edit]  # "left", "right", "pair", "eigenvector"
    matched: MatchedPairs
    n_windows: int
    n_pair: int
    n_pair_all: int  # positions with the pair active in all of the text
    steering: Steering | None = None

    @property
    def percentile(self) -> dict[str, float]:
        """Share, in percent, of the matched pairs whose removal has a smaller effect than that of the circuit's pair.

        The change of the loss is compared with its sign: a high one means that the model predicts worse without.
        """
        return percentiles(self.edits["pair"].effect, self.matched.effects)

    @property
    def percentile_rescaled(self) -> dict[str, float]:
        """The same among the matched pairs at the circuit's strength."""
        return percentiles(self.edits["pair"].effect, self.matched.rescaled)

    def __repr__(self) -> str:
        c, p = self.circuit, self.percentile
        return (
            f"CircuitTest({c.left} × {c.right} -> {c.feature} in layer {c.layer}, {self.n_pair} positions: predicted "
            f"{self.edits['pair'].correlation:.3f}, percentile among {len(self.matched.left)} pairs: "
            f"KL {p['kl']:.0f}, loss {p['loss']:.0f})"
        )


def percentiles(effect: Effects, others: Effects) -> dict[str, float]:
    """Return the share, in percent, of other edits with a smaller effect, ties half; NaN where one is unknown."""
    return {
        name: 100 * ((other < one).double() + 0.5 * (other == one).double()).mean().item()
        if len(other) and not (one.isnan().any() or other.isnan().any())
        else float("nan")
        for name, one, other in zip(Effects._fields, effect, others, strict=True)
    }


def _pearson(a: Tensor, b: Tensor, least: int) -> float:
    if len(a) < max(least, 2):
        return float("nan")
    return torch.corrcoef(torch.stack((a.double(), b.double())))[0, 1].item()


# -- the test ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test(
    model_or_lens: BilinearTransformer | FeatureLayer,
    circuit: AnyCircuit,
    texts: Sequence[str] | Int[Tensor, "row seq"],
    *,
    generator: torch.Generator,
    saes: str | Path = "bilens-mini",
    ks: Sequence[int] | None = None,
    min_active: int = 10,
    n_bootstrap: int = 1000,
    confidence: float = 0.95,
    n_pairs: int = 100,
    n_directions: int = 20,
    max_windows: int = 32,
    prompts: Sequence[str] = (),
    words: tuple[Sequence[str], Sequence[str]] | None = None,
    multiples: Sequence[float] = (-2.0, -1.0, 1.0, 2.0),
) -> CircuitTest:
    """Test a circuit on text: low-rank prediction, interventions against their controls, and steering.

    (i) `LowRank`: the k strongest eigenvectors against the real activation (2410.08417, section 5.2 and figure 9).
    (ii) Each input feature, the pair's product, and the top eigenvector are taken out of the running model; the change
    of the output feature's pre-activation is predicted from the weights: `-2 z_i d_iᵀQx + z_i² d_iᵀQd_i`,
    `-2 z_i z_j d_iᵀQd_j` and `-λ (v·x)²`. The effects on logits and loss are compared with random directions of
    matched norm and with `MatchedPairs`. (iii) With prompts and words, `steering` with the output feature, in multiples
    of its mean activation where active.

    Cost: one pass over the texts up to the layer; then `2 n_pairs + 4 n_directions` passes of at most `max_windows`
    windows through the layers after it: some two minutes for the embedded model on one core.

    Args:
        model_or_lens: The layer between its SAEs; or a model, with the SAEs stored under `saes`.
        circuit: What is tested.
        texts: Texts, or windows of token ids.
        generator: Source of randomness of the bootstrap and the random directions.
        saes: For a model, `"bilens-mini"` or a folder that `bilens.saes.fit` wrote.
        ks: Numbers of eigenvectors; 1, 2, 4, ..., 64 as far as there are so many if `None`.
        min_active: Correlations over fewer positions are NaN.
        n_bootstrap: Resamples of the texts.
        confidence: Of the bootstrap intervals.
        n_pairs: Matched pairs, fewer if there are not so many.
        n_directions: Random directions, for each edit and for steering.
        max_windows: Windows of text with the pair active that are edited.
        prompts: For steering: texts to continue.
        words: For steering: positive and negative next tokens.
        multiples: For steering: how much to add.

    Raises:
        ValueError: No text, or none in which the pair is active; an index out of range; a circuit of another layer.
        TypeError: The layer is not bilinear.
    """
    lens, circuit = _resolve(model_or_lens, circuit, saes)
    if isinstance(texts, str):
        raise ValueError(f"texts must be a list of texts, got one string: {texts[:40]!r}")
    if bool(len(prompts)) != (words is not None):
        raise ValueError("prompts and words go together: steering needs both")
    ks = tuple(k for k in KS if k <= lens.tensor.inp) if ks is None else tuple(ks)
    if not ks or min(ks) < 1 or max(ks) > lens.tensor.inp:
        raise ValueError(f"ks must lie between 1 and {lens.tensor.inp}, got {ks}")
    if max_windows < 1:
        raise ValueError(f"max_windows must be at least 1, got {max_windows}")
    scan = _scan(lens, circuit, texts, ks)
    low_rank = _low_rank(scan, ks, min_active, n_bootstrap, confidence, generator)
    base = _windows(lens, circuit, scan, max_windows)
    edits = _edits(base, circuit, n_directions, min_active, generator)
    steered = None
    if words is not None:
        amounts = [multiple * _mean_active(scan, circuit) for multiple in multiples]
        options = {"n_directions": n_directions, "generator": generator}
        steered = steering(lens, circuit.feature, prompts, words, amounts, **options)
    matched = _matched(base, circuit, n_pairs)
    n_all = int(scan.together.sum())
    return CircuitTest(circuit, low_rank, edits, matched, len(base.rows.tokens), len(base.x), n_all, steered)


@torch.no_grad()
def steering(
    lens: FeatureLayer,
    feature: int,
    prompts: Sequence[str],
    words: tuple[Sequence[str], Sequence[str]],
    amounts: Sequence[float],
    *,
    generator: torch.Generator,
    side: Literal["inp", "out"] = "out",
    n_directions: int = 20,
) -> Steering:
    """Add a feature at every position of prompts but BOS, and see which next tokens become more likely.

    Cost: `len(amounts) · (n_directions + 1) + 1` passes of the prompts from the layer on.

    Args:
        lens: The layer.
        feature: Input or output feature, by `side`.
        prompts: Texts to continue.
        words: Positive and negative next tokens, each word a single token.
        amounts: How much to add, in units of the feature's activation.
        generator: Source of the control directions.
        side: `"inp"` adds to the MLP's input, `"out"` to its output.
        n_directions: Random directions of the same norm.

    Raises:
        ValueError: A word that is not a single token, a prompt longer than the context, nothing to do.
    """
    directions, hook = _side(lens, side)
    _check_index("feature", feature, len(directions), f"{_SIDES[side]} features", lens)
    if not (len(amounts) and all(map(len, words))):
        raise ValueError(f"amounts and both lists of words must not be empty, got {list(amounts)} and {words}")
    if n_directions < 1:
        raise ValueError(f"n_directions must be at least 1, got {n_directions}")
    rows = to_rows(lens.model, list(prompts))
    windows = torch.bincount(text_of_rows(lens.model, prompts), minlength=len(prompts))
    if (windows != 1).any():
        bad, most = int((windows != 1).nonzero()[0]), lens.model.cfg.n_ctx - 1
        raise ValueError(f"prompts must each have 1 to {most} tokens, got number {bad}: {prompts[bad][:40]!r}")
    rows = Rows(*(part.to(lens.model.W_E.device) for part in trim(rows)))
    ids = [torch.tensor([lens.model.to_single_token(word) for word in some]) for some in words]
    resid = lens.model(rows.tokens, attention_mask=rows.attend, stop_at_layer=lens.layer)
    along, last = directions[feature], (torch.arange(len(rows.tokens)), rows.attend.sum(1) - 1)
    random = _unit(n_directions, len(along), generator).to(along) * along.norm()

    def log_odds(push: Tensor) -> float:
        with _push(lens.model, hook, push, rows.counts):
            span = {"start_at_layer": lens.layer, "stop_at_layer": lens.model.cfg.n_layers}
            after = lens.model(resid, attention_mask=rows.attend, **span)
        logits = lens.model.unembed(lens.model.ln_final(after[last]))
        positive, negative = (logits[:, some].logsumexp(1) for some in ids)
        return (positive - negative).mean().item()

    moved = torch.tensor([log_odds(amount * along) for amount in amounts])
    controls = torch.tensor([[log_odds(amount * one) for amount in amounts] for one in random])
    before = log_odds(torch.zeros_like(along))
    return Steering(tuple(amounts), moved, controls, before, feature, side, len(rows.tokens))


def _mean_active(scan: "_Scan", circuit: Circuit) -> float:
    """Mean activation of the output feature where it is active."""
    active = scan.actual[scan.actual != 0]
    if not len(active):
        raise ValueError(f"texts must activate output feature {circuit.feature} to scale steering by, none does")
    return active.mean().item()


def _unit(n: int, d: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
    return nn.functional.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


# -- (i) low-rank prediction ------------------------------------------------------------------------------------------


class _Scan(NamedTuple):
    """One pass over the text."""

    rows: Rows
    text: Int[Tensor, " position"]  # which text a position belongs to
    actual: Float[Tensor, " position"]
    predicted: Float[Tensor, "position k"]
    together: Bool[Tensor, "row seq"]  # where both features of the pair are active


def _scan(lens: FeatureLayer, circuit: Circuit, texts: Sequence[str] | Tensor, ks: tuple[int, ...]) -> _Scan:
    """Run the texts as far as the layer; keep the output feature, its predictions, and where the pair is active."""
    rows = to_rows(lens.model, texts)
    if not rows.counts.any():
        raise ValueError("texts must hold at least one token besides BOS and padding, got none")
    top = top_eigen(lens, circuit.feature, max(ks))
    together, actual, predicted = torch.zeros_like(rows.counts), [], []
    for start in range(0, len(rows.tokens), _ROWS):
        some = trim(Rows(*(part[start : start + _ROWS] for part in rows)))
        found = activations(lens.model, some, [lens.hook_in, lens.hook_out])
        x, y = (found[hook][some.counts].to(lens.readers) for hook in (lens.hook_in, lens.hook_out))
        parts = ((homogeneous(x, lens.tensor) @ top.vectors.T).pow(2) * top.values).cumsum(1)
        predicted.append(parts[:, [k - 1 for k in ks]].cpu())
        actual.append(lens.out.encode(y)[:, circuit.feature].cpu())
        both = (_codes(lens, x)[:, [circuit.left, circuit.right]] != 0).all(1)
        together[start : start + _ROWS, : some.tokens.shape[1]][some.counts] = both.cpu()
    text = text_of_rows(lens.model, texts)[:, None].expand_as(rows.counts)[rows.counts]
    return _Scan(rows, text, torch.cat(actual), torch.cat(predicted), together)


def _low_rank(
    scan: _Scan, ks: tuple[int, ...], least: int, n: int, confidence: float, generator: torch.Generator
) -> LowRank:
    """Score the predictions, and resample texts."""
    text = scan.text.unique(return_inverse=True)[1]
    n_texts, active = int(text.max()) + 1, scan.actual != 0
    everywhere = _moments(scan.actual, scan.predicted, text, n_texts)
    where = _moments(scan.actual[active], scan.predicted[active], text[active], n_texts)
    drawn = torch.randint(n_texts, (n, n_texts), generator=generator)
    counts = torch.zeros(n, n_texts, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(n, n_texts).double())
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)

    def estimate(moments: Tensor, score: int) -> Estimate:
        n_active = where[..., 0].sum(0)
        value = _scores(moments.sum(0))[score].masked_fill(n_active < least, torch.nan)
        enough = einsum(counts, where[..., 0], "sample text, text k -> sample k") >= least
        resampled = _scores(einsum(counts, moments, "sample text, text k moment -> sample k moment"))[score]
        low, high = resampled.masked_fill(~enough | value.isnan(), torch.nan).nanquantile(tails, dim=0)
        return Estimate(value, low, high)

    return LowRank(
        ks, estimate(where, 0), estimate(everywhere, 0), estimate(where, 1), int(active.sum()), len(active), n_texts,
        least, n, confidence,
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


# -- (ii) interventions -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """Windows of text that are edited at some positions, and what the model makes of them as they are."""

    lens: FeatureLayer
    reader: Float[Tensor, " d_model"]  # what is read of the layer's output
    rows: Rows
    where: Bool[Tensor, "row seq"]
    resid: Float[Tensor, "row seq d_model"]  # entering the layer
    resid_post: Float[Tensor, "row seq d_model"]  # leaving it
    x: Float[Tensor, "position d_model"]  # `position` runs over `where`
    y: Float[Tensor, "position d_model"]
    z: Float[Tensor, "position feature"]
    logits: Float[Tensor, "position vocab"]
    following: Int[Tensor, " position"]  # the next token, -100 where there is none

    @classmethod
    def run(
        cls,
        lens: FeatureLayer,
        reader: Float[Tensor, " d_model"],
        rows: Rows,
        where: Bool[Tensor, "row seq"],
        most: int,
    ) -> "Windows":
        """Run the first windows with a position in `where`, cut after the token that follows the last such position."""
        chosen = where.any(1).nonzero()[:most, 0]
        stop = int(where[chosen].any(0).nonzero().max()) + 2
        model, n = lens.model, lens.model.cfg.n_layers
        rows = Rows(*(part[chosen, :stop].to(model.W_E.device) for part in rows))
        where = where[chosen, :stop].to(model.W_E.device)
        hooks = [f"blocks.{lens.layer}.{name}" for name in ("hook_resid_pre", "hook_mlp_in", "hook_mlp_out")]
        hooks.append(f"blocks.{lens.layer}.hook_resid_post")
        resid, found = model.run_with_cache(
            rows.tokens, attention_mask=rows.attend, names_filter=hooks, stop_at_layer=n, return_cache_object=False
        )
        before, x, y, after = (found[hook] for hook in hooks)
        following = torch.full_like(rows.tokens, -100)
        following[:, :-1] = rows.tokens[:, 1:].masked_fill(~rows.attend[:, 1:], -100)
        logits = model.unembed(model.ln_final(resid[where]))
        parts = (x[where], y[where], _codes(lens, x[where]), logits, following[where])
        return cls(lens, reader, rows, where, before, after, *parts)

    def finish(self, resid: Float[Tensor, "row seq d_model"]) -> Float[Tensor, "position vocab"]:
        """Return the logits that a residual stream after the last layer gives."""
        model = self.lens.model
        return model.unembed(model.ln_final(resid[self.where]))

    def with_change(self, change: Float[Tensor, "position d_model"]) -> Float[Tensor, "position vocab"]:
        """Return the logits with a change added to the layer's output at those positions."""
        model, resid = self.lens.model, self.resid_post.clone()
        resid[self.where] += change.to(resid)
        span = {"start_at_layer": self.lens.layer + 1, "stop_at_layer": model.cfg.n_layers}
        return self.finish(model(resid, attention_mask=self.rows.attend, **span))

    def effects(self, changes: Iterable[Float[Tensor, "position d_model"]]) -> Effects:
        """Add changes to the layer's output at those positions, one after the other, and measure."""
        measured = []
        for change in changes:
            pre = (change.to(self.reader) @ self.reader).abs().mean().double()
            measured.append(torch.stack((pre, *self.compare(self.with_change(change)))))
        return Effects(*torch.stack(measured).T) if measured else Effects(*self.x.new_zeros(4, 0))

    def compare(self, logits: Float[Tensor, "position vocab"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean divergence, change of the logits, and change of the loss; in float64, as they can be tiny."""
        before, after = self.logits.double(), logits.double()
        log_before, log_after = before.log_softmax(-1), after.log_softmax(-1)
        kl = (log_before.exp() * (log_before - log_after)).sum(-1).mean()
        known = self.following != -100
        change = (log_before - log_after)[known].gather(1, self.following[known, None])
        return kl, (after - before).norm(dim=1).mean(), change.mean()


def _windows(lens: FeatureLayer, circuit: Circuit, scan: _Scan, most: int) -> Windows:
    """Run the first windows in which the pair is active."""
    if not scan.together.any():
        n = int(scan.rows.counts.sum())
        raise ValueError(
            f"texts must hold a position where input features {circuit.left} and {circuit.right} are both active, "
            f"none of {n} is one"
        )
    return Windows.run(lens, lens.readers[circuit.feature], scan.rows, scan.together, most)


def _edits(base: Windows, c: Circuit, n_directions: int, least: int, generator: torch.Generator) -> dict[str, Edit]:
    """Take each part of the circuit out of the running model, and the same amount of something random."""
    lens = base.lens
    managers = {
        "left": without_feature(lens, c.left, base.where),
        "right": without_feature(lens, c.right, base.where),
        "pair": without_pair(lens, c.left, c.right, base.where),
        "eigenvector": without_eigenvector(lens, c.feature, 0, base.where),
    }
    names = {"left": f"without input feature {c.left}", "right": f"without input feature {c.right}"}
    names |= {"pair": f"without {c.left} × {c.right}", "eigenvector": f"without the top eigenvector of {c.feature}"}
    predicted, edits = _predictions(base, c), {}
    for name, manager in managers.items():
        with manager:
            after, logits = _run(base)
        change = after - base.y
        measured = change.to(base.reader) @ base.reader
        effect = Effects(*(value[None] for value in (measured.abs().mean().double(), *base.compare(logits))))
        random = _random_changes(
            base, {"left": c.left, "right": c.right}.get(name), change, _unit(n_directions, len(base.reader), generator)
        )
        edits[name] = Edit(names[name], predicted[name], measured, effect, base.effects(random), least)
    return edits


def _predictions(base: Windows, c: Circuit) -> dict[str, Float[Tensor, " position"]]:
    """Return what the weights say about each edit: the change of the output feature's pre-activation."""
    lens = base.lens
    x, matrix = homogeneous(base.x.to(base.reader), lens.tensor), lens.tensor.matrix(base.reader)
    width = base.x.shape[1]

    def alone(feature: int) -> Tensor:
        gone = torch.zeros_like(x)
        gone[:, :width] = base.z[:, feature, None] * lens.writers[feature]
        return einsum(gone, matrix, gone - 2 * x, "position i, i j, position j -> position")

    both = base.z[:, [c.left, c.right]].prod(1)
    coefficient = lens.writers[c.left] @ matrix[:width, :width] @ lens.writers[c.right]
    values, vectors = top_eigen(lens, c.feature, 1)
    eigenvector = -values[0] * (x @ vectors[0]).pow(2)
    return {"left": alone(c.left), "right": alone(c.right), "pair": -2 * coefficient * both, "eigenvector": eigenvector}


def _run(base: Windows) -> tuple[Float[Tensor, "position d_model"], Float[Tensor, "position vocab"]]:
    """Run the windows from the layer on, under whatever hooks there are; return the MLP's output and the logits."""
    resid, found = base.lens.model.run_with_cache(
        base.resid,
        attention_mask=base.rows.attend,
        start_at_layer=base.lens.layer,
        stop_at_layer=base.lens.model.cfg.n_layers,
        names_filter=base.lens.hook_out,
        return_cache_object=False,
    )
    return found[base.lens.hook_out][base.where], base.finish(resid)


def _random_changes(
    base: Windows, feature: int | None, change: Float[Tensor, "position d_model"], units: Float[Tensor, "edit d_model"]
) -> Iterator[Float[Tensor, "position d_model"]]:
    """Yield changes of the MLP's output along random directions, as large as the edit's at every position.

    In place of an input feature a random direction of the same norm is taken out of the input.
    """
    for unit in units.to(change):
        if feature is None:
            yield change.norm(dim=1, keepdim=True) * unit
        else:
            removed = base.z[:, feature, None] * base.lens.writers[feature].norm() * unit
            B, x = base.lens.tensor, base.x.to(base.reader)
            yield B.apply(x - removed) - B.apply(x)


def _matched(base: Windows, c: Circuit, n: int) -> MatchedPairs:
    """Remove the n other pairs that are most nearly as strong at the same positions."""
    least = max(1.0, 0.1 * len(base.z))
    often = ((base.z != 0).sum(0) >= least).nonzero()[:, 0]
    z = base.z[:, often]
    active = (z != 0).to(z)
    left, right = (active.T @ active >= least).triu(1).nonzero().T
    own = base.z[:, [c.left, c.right]].prod(1).norm()
    scale = (z.pow(2).T @ z.pow(2))[left, right].sqrt() / own
    left, right = often[left], often[right]
    distance = scale.log().abs()
    distance[(left == min(c.left, c.right)) & (right == max(c.left, c.right))] = torch.inf
    near = distance.argsort(stable=True)[: min(n, len(distance) - 1)]
    left, right, scale = left[near], right[near], scale[near]
    terms = -2 * _interactions(base.lens, left, right)
    strengths = (base.z[:, left] * base.z[:, right]).T[..., None]
    as_they_are = (strength * term for strength, term in zip(strengths, terms, strict=True))
    rescaled = (strength * term for strength, term in zip(strengths, terms / scale[:, None], strict=True))
    return MatchedPairs(left, right, scale, base.effects(as_they_are), base.effects(rescaled))
