"""Parts of a circuit taken out of the running model, against as much of something else taken out at the same places."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens.tensor.bilinear import homogeneous
from bilens.tensor.records import Record
from bilens.tensor.resuming import UNKEPT, Stages
from bilens.tensor.statistics import pearson

from .circuit import Circuit
from .edits import interaction, without_eigenvector, without_feature, without_pair
from .effects import Baseline, Effects, percentiles
from .removal import removal_change
from .steering import unit_directions


@dataclass(frozen=True, repr=False, eq=False)
class Edit(Record, rows="position", tells=("correlation", "error", "percentile")):
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
        return pearson(self.predicted, self.measured, self.min_active)

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


@dataclass(frozen=True, repr=False, eq=False)
class MatchedPairs(Record, rows="pair", along=("effects", "rescaled"), names={"left": "inp", "right": "inp"}):
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
    name: Callable[[str, int], str] | None = None  # of a feature, by its side and number

    def __repr__(self) -> str:
        near, far = (self.scale.min().item(), self.scale.max().item()) if len(self.scale) else (float("nan"),) * 2
        return f"MatchedPairs({len(self.left)} pairs, rms z z {near:.2f} to {far:.2f} times the circuit's)"


# -- edits ------------------------------------------------------------------------------------------------------------


def run_edits(
    base: Baseline,
    c: Circuit,
    n_directions: int,
    min_active: int,
    generator: torch.Generator,
    stages: Stages = UNKEPT,
) -> dict[str, Edit]:
    """Take each part of the circuit out of the running model, and the same amount of something random.

    Args:
        base: The model as it is, at the positions to edit.
        c: The circuit.
        n_directions: Random directions for each edit.
        min_active: Correlations over fewer positions are NaN.
        generator: Source of the directions.
        stages: Where the effects are kept, to go on from there.
    """
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
            resid, after = base.rerun()
        change = after - base.y
        measured = change @ base.reader
        effect = Effects(
            *(value[None] for value in (measured.abs().mean().double(), *base.compare(base.finish(resid))))
        )
        units = unit_directions(n_directions, len(base.reader), generator)
        random = random_changes(base, {"left": c.left, "right": c.right}.get(name), change, units)
        others = base.effects(random, n_directions, stages, f"directions-{name}")
        edits[name] = Edit(names[name], predicted[name], measured, effect, others, min_active)
    return edits


def _predictions(base: Baseline, c: Circuit) -> dict[str, Float[Tensor, " position"]]:
    """Return what the weights say about each edit: the change of the output feature's pre-activation."""
    lens = base.lens
    sides = {"left": c.left, "right": c.right}
    alone = {side: removal_change(lens, inp, c.feature, base.x, base.z[:, inp]) for side, inp in sides.items()}
    coefficient = base.reader @ interaction(lens, c.left, c.right)
    top = lens.eigen(c.feature, 1)
    along = homogeneous(base.x, lens.tensor) @ top.vectors[0]
    pair = -2 * coefficient * base.z[:, [c.left, c.right]].prod(1)
    return alone | {"pair": pair, "eigenvector": -top.values[0] * along.pow(2)}


def random_changes(
    base: Baseline, feature: int | None, change: Float[Tensor, "position d_model"], units: Float[Tensor, "edit d_model"]
) -> Iterator[Float[Tensor, "position d_model"]]:
    """Yield changes of the MLP's output along random directions, as large as the edit's at every position.

    In place of an input feature a random direction of the same norm is taken out of the input.
    """
    for unit in units.to(change):
        if feature is None:
            yield change.norm(dim=1, keepdim=True) * unit
        else:
            removed = base.z[:, feature, None] * base.lens.writers[feature].norm() * unit
            B = base.lens.tensor
            yield B.apply(base.x - removed) - B.apply(base.x)


def matched_pairs(base: Baseline, c: Circuit, n: int, stages: Stages = UNKEPT) -> MatchedPairs:
    """Remove the n other pairs that are most nearly as strong at the same positions; fewer if there are not so many."""
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
    terms = -2 * base.lens.tensor.polar(base.lens.writers[left], base.lens.writers[right])
    strengths = (base.z[:, left] * base.z[:, right]).T[..., None]
    as_they_are = (strength * term for strength, term in zip(strengths, terms, strict=True))
    rescaled = (strength * term for strength, term in zip(strengths, terms / scale[:, None], strict=True))
    effects = (
        base.effects(as_they_are, len(left), stages, "pairs"),
        base.effects(rescaled, len(left), stages, "pairs-rescaled"),
    )
    return MatchedPairs(left, right, scale, *effects, base.lens.name)
