"""Two groups of input features that act together: whether the weights couple them, and what the model does without.

A single pair of features is often too small a part of a circuit to stand out: sentiment and negation are spread over
dozens of features each. Here the groups are given (by what their features respond to in text, say), one number of the
weights answers whether their products drive an output direction, and null models say how often chance would.
"""

# `test_coupling` is what users call it, not a test of ours
# ruff: noqa: PT028

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bilens.models.logits import logit_directions
from bilens.models.texts import Texts
from bilens.models.windows import Windows
from bilens.tensor.keeping import fingerprint_of
from bilens.tensor.records import Record
from bilens.tensor.statistics import pearson

from .discovery import q_values
from .edits import product, without_pairs
from .effects import Baseline, Effects, percentiles
from .groups import Group
from .layer import FeatureLayer
from .records import plain
from .textstages import text_stages

COUPLING_NULLS = ("features", "weights")
NEGATORS = ("not", "no", "never", "t", "nothing", "none", "nobody", "nor", "neither", "without", "hardly")
ADJECTIVES = {
    "positive": ("good", "great", "funny", "interesting", "beautiful", "entertaining", "convincing", "believable"),
    "negative": ("bad", "boring", "terrible", "awful", "stupid", "predictable", "horrible", "ridiculous"),
}


@dataclass(frozen=True, repr=False, eq=False)
class Coupling(Record, rows="out", along=("outputs",), unit="outputs"):
    """How strongly two groups of input features act together on output directions, from the weights alone.

    `value_o = Σ_{a,b} w_a w_b d_aᵀ Q_o d_b / (Σ|w_a| Σ|w_b|)`, the mean interaction `Q_ab` under the groups' weights.
    `z` is its distance from the mean of the null model that it stands out from least, in standard deviations.
    """

    layer: int
    left: Group
    right: Group
    outputs: tuple[str, ...]
    directions: Float[Tensor, "out d_model"]
    value: Float[Tensor, " out"]
    z: Float[Tensor, " out"]
    p: Float[Tensor, " out"]  # two-sided; the largest over the null models
    n: int  # draws of each null model

    def __repr__(self) -> str:
        best = int(self.p.argmin())
        return (
            f"Coupling({len(self.left.features)} {self.left.role} × {len(self.right.features)} {self.right.role} in "
            f"layer {self.layer}, {len(self.p)} outputs; first: {self.outputs[best]} {self.value[best]:+.3g}, "
            f"z={self.z[best]:+.2f}, p={self.p[best]:.2g})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the groups and all numbers, without the directions."""
        names = ("layer", "outputs", "value", "z", "p", "n")
        about = {name: getattr(self, name) for name in names}
        return plain(about | {"left": self.left.to_dict(), "right": self.right.to_dict()})


@torch.no_grad()
def couple(
    lens: FeatureLayer,
    left: Group,
    right: Group,
    outputs: Mapping[str, Float[Tensor, " d_model"]] | None = None,
    *,
    generator: torch.Generator,
    null: Sequence[Literal["features", "weights"]] = COUPLING_NULLS,
    n: int = 10_000,
) -> Coupling:
    """Ask whether two groups of input features act together on output directions, against null models.

    Null models:

    - features: as many input features, chosen at random from all but the right group, in place of the left group. Do
      *these* features act on the right group? (As the left group may be drawn too, this is a permutation test: without
      a coupling p-values are uniform however few features there are.)
    - weights: the right group's weights dealt out anew among its features. Does the left group act on them *as the
      weights say*, or on all of them alike?

    Cost: one product of two vectors per output, and `n` sums of `len(left)` numbers: seconds for a thousand outputs.

    Args:
        lens: The layer.
        left: Input features with weights, e.g. negators.
        right: Other input features with weights, e.g. features of sentiment, positive and negative.
        outputs: Output directions by name; the readers of all output features if `None`.
        generator: Source of the random numbers.
        null: Which null models.
        n: Draws of each; no p-value is below `1 / (n + 1)`.

    Raises:
        ValueError: Groups that overlap or are empty, a feature that does not exist, weights that are all equal under
            the null model that deals them out, or an unknown null model.
    """
    _check_groups(lens, left, right, null)
    if outputs is None:
        outputs = {f"#{i}": reader for i, reader in enumerate(lens.readers)}
    if not outputs:
        raise ValueError("outputs must hold at least one direction, got none")
    directions = torch.stack(list(outputs.values())).to(lens.writers)
    a, b = (_unit_weights(group).to(lens.writers) for group in (left, right))
    against = _row(lens, directions, lens.writers[right.features].T @ b)  # [out, feature]
    value = against[:, left.features] @ a
    each = _row(lens, directions, lens.writers[left.features].T @ a)[:, right.features]
    draws = {
        "features": lambda: _other_features(right, against, a, n, generator),
        "weights": lambda: _other_weights(each, b, n, generator),
    }
    z, p = [], []
    for name in null:
        scores = draws[name]()
        center, spread = scores.mean(1), scores.std(1)
        far = (scores - center[:, None]).abs() >= (value - center).abs()[:, None]
        z.append((value - center) / spread)
        p.append((1 + far.sum(1)).double() / (1 + n))
    z = torch.stack(z)
    least = z.gather(0, z.abs().argmin(0, keepdim=True))[0]
    return Coupling(lens.layer, left, right, tuple(outputs), directions, value, least, torch.stack(p).amax(0), n)


def _unit_weights(group: Group) -> Float[Tensor, " k"]:
    return group.weights / group.weights.abs().sum()


def _row(
    lens: FeatureLayer, directions: Float[Tensor, "out d_model"], x: Float[Tensor, " d_model"]
) -> Float[Tensor, "out feature"]:
    """Return `d_iᵀ Q_o x` for every input feature i."""
    return directions @ lens.tensor.polar(lens.writers, x).T


def _other_features(
    right: Group, against: Float[Tensor, "out feature"], a: Float[Tensor, " k"], n: int, generator: torch.Generator
) -> Float[Tensor, "out draw"]:
    """Return what random features in place of the left group give."""
    n_features = against.shape[1]
    free = torch.ones(n_features, dtype=torch.bool)
    free[right.features] = False
    pool = free.nonzero()[:, 0]
    picks = torch.stack([pool[torch.randperm(len(pool), generator=generator)[: len(a)]] for _ in range(n)])
    weights = torch.zeros(n, n_features, dtype=torch.float32).scatter_(1, picks, a.cpu().float().expand(n, -1))
    return against @ weights.to(against).T


def _other_weights(
    each: Float[Tensor, "out right"], b: Float[Tensor, " right"], n: int, generator: torch.Generator
) -> Float[Tensor, "out draw"]:
    """Return what the right group gives with its weights dealt out anew, each feature alone giving so much."""
    dealt = torch.stack([b[torch.randperm(len(b), generator=generator)] for _ in range(n)])
    return each @ dealt.T


def _check_groups(lens: FeatureLayer, left: Group, right: Group, null: Sequence[str]) -> None:
    last = len(lens.writers) - 1
    for name, group in (("left", left), ("right", right)):
        if not len(group.features):
            raise ValueError(f"{name} must hold at least one input feature, got none")
        if not 0 <= int(group.features.min()) <= int(group.features.max()) <= last:
            raise ValueError(f"{name} must hold input features between 0 and {last}, got {group.features.tolist()}")
    shared = sorted({*left.features.tolist()} & {*right.features.tolist()})
    if shared:
        raise ValueError(f"left and right must be different input features, got {shared} in both")
    if not null or any(name not in COUPLING_NULLS for name in null):
        raise ValueError(f"null must be among {COUPLING_NULLS}, got {list(null)}")
    if "weights" in null and len(right.weights.unique()) < 2:
        raise ValueError("right must have weights that differ, to be dealt out anew; leave out null model 'weights'")


# -- sentiment negation -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False, eq=False)
class NegationCouplings(Record, rows="layer", along=("layers",)):
    """Whether negators flip sentiment in each layer: negative values on the direction from bad to good mean a flip."""

    layers: tuple[Coupling, ...]
    q: Float[Tensor, " layer"]  # Benjamini-Hochberg over the layers

    def columns(self) -> dict[str, Any]:
        """Return each layer's groups, and how its coupling compares with chance; the first output is meant."""
        numbers = {name: torch.stack([getattr(one, name)[0] for one in self.layers]) for name in ("value", "z", "p")}
        groups = {side: [getattr(one, side) for one in self.layers] for side in ("left", "right")}
        return {"layer": [one.layer for one in self.layers]} | groups | numbers | {"q": self.q}

    def __repr__(self) -> str:
        each = ", ".join(
            f"layer {one.layer}: z={one.z[0]:+.2f} q={q:.2g}"
            for one, q in zip(self.layers, self.q.tolist(), strict=True)
        )
        return f"NegationCouplings({each})"

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers of each layer, and the features of its groups by their roles."""
        layers = [
            {"layer": one.layer, "value": one.value[0], "z": one.z[0], "p": one.p[0], "q": q}
            | {group.role: group.features for group in (one.left, one.right)}
            for one, q in zip(self.layers, self.q, strict=True)
        ]
        return plain({"layers": layers})


def negation_couplings(
    lenses: Mapping[int, FeatureLayer],
    *,
    generator: torch.Generator,
    positive: str = "positive",
    words: Sequence[str] = NEGATORS,
    share: float = 0.6,
    tells: float = 0.12,
    n: int = 10_000,
) -> NegationCouplings:
    """Search layers for {negators} × {sentiment} → flipped sentiment, as groups (compare 2410.08417, section 5.1).

    The groups come from the feature cards of the input SAE, so from text alone: negators are the features with a
    negating word at or up to three tokens before their peaks (`FeatureCards.near`), sentiment the features whose AUROC
    for the label differs from one half, weighted by that difference (`FeatureCards.telling`). The output direction is
    the mean unembedding of `ADJECTIVES`, positive less negative. The weights then say how both groups together
    act on it: negators flip sentiment if the value is negative.

    Args:
        lenses: Layers with cards that have the label.
        generator: Source of the random numbers.
        positive: Name of the label.
        words: Negating words.
        share: Of a negator's activation at its strongest positions that must be near such a word.
        tells: Least `|AUROC - ½|` of a sentiment feature.
        n: Draws of each null model.

    Raises:
        ValueError: A layer without cards, without the label, or without such features.
    """
    found = []
    for layer, lens in lenses.items():
        if lens.inp_cards is None:
            raise ValueError(f"lenses must have feature cards (bilens.saes.collect), layer {layer} has none")
        negators = lens.inp_cards.near(words, share)
        feeling, weights = lens.inp_cards.telling(positive, tells)
        keep = ~torch.isin(feeling, negators)
        left = Group("negators", negators, torch.ones(len(negators)), lens.name)
        right = Group("sentiment", feeling[keep], weights[keep], lens.name)
        direction = {"bad to good": sentiment_direction(lens)}
        found.append(couple(lens, left, right, direction, generator=generator, n=n))
    return NegationCouplings(tuple(found), q_values(torch.cat([one.p for one in found])))


def sentiment_direction(lens: FeatureLayer) -> Float[Tensor, " d_model"]:
    """Return the residual direction from bad to good: mean `logit_directions` of `ADJECTIVES`, positive less negative.

    Words that are not one token of the model are left out.

    Raises:
        ValueError: No word of either list is a single token.
    """
    means = {}
    for name, words in ADJECTIVES.items():
        ids = lens.model.tokens_of(words)
        if not ids:
            raise ValueError(f"the model's tokenizer must have a token for a word of {words}, it has none")
        means[name] = logit_directions(lens.model, ids).to(lens.writers).mean(0)
    return means["positive"] - means["negative"]


# -- against the running model ----------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False, eq=False)
class CouplingTest(Record, rows="position", tells=("correlation", "percentile", "percentile_rescaled")):
    """What the running model does without the products of two groups, at the positions where both are active.

    `predicted` is the change of `direction · mlp_out / rms` that the weights and the activations say, with the final
    root mean square as it is; `measured` the change of `direction · final residual / rms` in the edited model, so later
    layers and the norm count too. Controls are the products of the right group with as many other features that are
    active at those positions, chosen at random; `rescaled` at the root mean square of the circuit's change.
    """

    coupling: Coupling
    output: str
    predicted: Float[Tensor, " position"]
    measured: Float[Tensor, " position"]
    effect: Effects
    controls: Effects
    rescaled: Effects
    scale: Float[Tensor, " control"]  # root mean square of the change of mlp_out relative to the circuit's
    n_windows: int
    n_all: int  # positions with both groups active in all of the text

    @property
    def correlation(self) -> float:
        """Pearson correlation of predicted and measured change."""
        return pearson(self.predicted, self.measured)

    @property
    def percentile(self) -> dict[str, float]:
        """Share, in percent, of the controls with a smaller effect; ties count half."""
        return percentiles(self.effect, self.controls)

    @property
    def percentile_rescaled(self) -> dict[str, float]:
        """The same among the controls at the circuit's strength."""
        return percentiles(self.effect, self.rescaled)

    def __repr__(self) -> str:
        p, again = self.percentile, self.percentile_rescaled
        c, equal = self.coupling, f"{again['kl']:.1f}, {again['loss']:.1f}"
        return (
            f"CouplingTest({c.left.role} × {c.right.role} → {self.output} in layer {c.layer}, {len(self.measured)} "
            f"positions: predicted and measured correlate {self.correlation:.3f}; percentile among {len(self.scale)} "
            f"controls: KL {p['kl']:.1f}, loss {p['loss']:.1f}; at equal strength {equal})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return effect and ranks, without the positions."""
        about = {"layer": self.coupling.layer, "output": self.output, "positions": len(self.measured)}
        about |= {"correlation": self.correlation, "controls": len(self.scale)}
        about |= {"effect": {name: value[0] for name, value in self.effect._asdict().items()}}
        return plain(about | {"percentile": self.percentile, "percentile_rescaled": self.percentile_rescaled})


@torch.no_grad()
def test_coupling(
    lens: FeatureLayer,
    coupling: Coupling,
    texts: Texts,
    *,
    generator: torch.Generator,
    output: int = 0,
    n_controls: int = 200,
    max_windows: int = 64,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> CouplingTest:
    """Take the products of two groups out of the running model, and compare with the prediction and with controls.

    Args:
        lens: The layer.
        coupling: What `couple` or `negation_couplings` returned for it.
        texts: Texts, or token windows.
        generator: Source of the controls.
        output: Which of the coupling's output directions is read.
        n_controls: Groups of other features in place of the left one.
        max_windows: Windows of text with both groups active that are edited.
        progress: Show how far it is.
        checkpoint: Folder to keep in what was measured: the same call goes on from there after a kill.

    Raises:
        ValueError: A coupling of another layer, no such output, text in which the groups are never active together, or
            a checkpoint that is damaged or of another call.
    """
    if lens.layer != coupling.layer:
        raise ValueError(f"coupling must be one of layer {lens.layer}, where the lens is, got layer {coupling.layer}")
    if not 0 <= output < len(coupling.outputs):
        raise ValueError(f"output must lie between 0 and {len(coupling.outputs) - 1}, got {output}")
    left, right = coupling.left.features.tolist(), coupling.right.features.tolist()
    windows = Windows.of(lens.model, texts)
    direction = coupling.directions[output].to(lens.writers)
    said = (left, right, fingerprint_of([direction]), n_controls, max_windows)
    stages = text_stages(lens, windows, checkpoint, progress, said, generator)

    def both(x: Tensor, y: Tensor) -> Tensor:
        z = lens.codes(x)
        return (z[:, left] != 0).any(1) & (z[:, right] != 0).any(1)

    together = torch.zeros_like(windows.counts)
    together[windows.counts] = lens.at_positions(windows, both, stages, "groups-text")
    if not together.any():
        n = int(windows.counts.sum())
        raise ValueError(f"texts must hold a position where both groups are active, none of {n} is")
    base = Baseline.run(lens, direction, windows, together, max_windows)
    change = -product(lens, base.z, left, right)
    before, scale = _read(base)
    with without_pairs(lens, left, right, base.where):
        after, _ = _read(base)
    predicted = (change @ direction) * scale
    groups = _control_groups(base, left, right, n_controls, generator)
    changes = [-product(lens, base.z, group, right) for group in groups]
    sizes = torch.stack([one.norm() for one in changes]) / change.norm()
    rescaled = (one / size for one, size in zip(changes, sizes, strict=True))
    effects = (
        base.effects([change], 1, stages, "groups"),
        base.effects(changes, len(changes), stages, "groups-others"),
        base.effects(rescaled, len(changes), stages, "groups-rescaled"),
    )
    n_windows, n_all = len(base.windows), int(together.sum())
    name = coupling.outputs[output]
    return CouplingTest(coupling, name, predicted, after - before, *effects, sizes, n_windows, n_all)


def _read(base: Baseline) -> tuple[Float[Tensor, " position"], Float[Tensor, " position"]]:
    """Return `direction · final residual / rms` and `1 / rms`, by running the model from the layer on."""
    resid = base.rerun()[0][base.where].to(base.reader)
    scale = 1 / base.lens.model.ln_final.rms(resid)[:, 0]
    return (resid @ base.reader) * scale, scale


def _control_groups(
    base: Baseline, left: Sequence[int], right: Sequence[int], n: int, generator: torch.Generator
) -> list[list[int]]:
    """Draw groups as large as the left one from the other features that are active at a hundredth of the positions."""
    often = (base.z != 0).double().mean(0) >= 0.01
    often[[*left, *right]] = False
    pool = often.nonzero()[:, 0]
    if len(pool) < len(left):
        raise ValueError(f"texts must hold {len(left)} other active features for the controls, they have {len(pool)}")
    return [pool[torch.randperm(len(pool), generator=generator)[: len(left)]].tolist() for _ in range(n)]
