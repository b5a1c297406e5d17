"""Where input features came from: their pre-activations as sums over sources."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from bilens.saes.directions import offsets, readers, reading
from bilens.saes.scaling import scale_of
from bilens.saes.stored import SAE
from bilens.tensor.records import Record

from .attribution import Attribution
from .entry import MLP_IN, NORMALIZED, Entry, input_hooks
from .places import Places
from .sources import Sources
from .targets import fitting_hook


@dataclass(frozen=True, repr=False, eq=False)
class Trace(Record, rows="position", along=("places",)):
    """Where the pre-activations of input features came from: `values.sum(2) + bias` is `pre_activation`."""

    names: tuple[str, ...]
    places: Places
    features: Int[Tensor, "position feature"]
    values: Float[Tensor, "position feature source"]
    bias: Float[Tensor, "position feature"]  # the encoder's offset, and what a shift of the norm adds

    @property
    def pre_activation(self) -> Float[Tensor, "position feature"]:
        """What the encoder gives before its top-k or ReLU: of an active feature, the activation."""
        return self.values.sum(2) + self.bias

    def check(self, attribution: Attribution) -> None:
        """Make sure that these are the features of an attribution, at its positions.

        Raises:
            ValueError: They are others.
        """
        if not torch.equal(self.features, attribution.features):
            raise ValueError("traced must be a trace of attribution.features, at the same positions")

    def columns(self) -> dict[str, Any]:
        """Return the positions, and what each source and the bias add there, over all features asked for."""
        parts = dict(zip(self.names, self.values.sum(1).T, strict=True))
        return self.places.columns() | parts | {"bias": self.bias.sum(1)}

    def facts(self) -> dict[str, Any]:
        """Return how many features there are."""
        return {"features": self.features.shape[1]}

    def __repr__(self) -> str:
        return f"Trace({self.features.shape[1]} features at {len(self.features)} positions, {len(self.names)} sources)"


@torch.no_grad()
def trace(
    came: Sources, inp: SAE, features: Int[Tensor, " feature"] | Int[Tensor, "position feature"] | Sequence[int]
) -> Trace:
    """Trace input features one step back: how much of each pre-activation came from which source.

    `pre_i = Σ_s readers_i · source_s + offset_i`. An active feature's activation is its pre-activation, so a pair's
    term is a table over sources as well: `2 Q_ij pre_i[s] pre_j[t]`. Where the norm, or the SAE itself, divides by a
    size, every source is divided by it as it is measured.

    Args:
        came: The sources.
        inp: SAE at the same layer's `hook_mlp_in`, `ln2.hook_normalized` or `hook_resid_mid`.
        features: Which features: the same at all positions, or for each position its own, such as the `features` of an
            attribution. The -1 that fills those up has values of zero.

    Raises:
        ValueError: An SAE that does not fit or has no encoder, a feature that does not exist.
    """
    hook = fitting_hook(came.model, inp, "inp", input_hooks(came.layer)[:-1])
    if reading(inp, None) != "encoder":
        raise ValueError(f"inp must be an SAE with a linear encoder, got {inp.cfg.architecture()}")
    ids = torch.atleast_2d(torch.as_tensor(features, device=came.values.device)).expand(len(came.values), -1)
    if ids.numel() and not -1 <= ids.min() <= ids.max() < inp.cfg.d_sae:
        bad = ids[(ids < -1) | (ids >= inp.cfg.d_sae)][0].item()
        raise ValueError(f"features must hold ids from 0 to {inp.cfg.d_sae - 1} (or -1 for none), got {bad}")
    factor, shift = _norm_before(came, hook)
    seen = came.values.sum(1) * factor + shift
    rows = readers(inp).to(came.values.device)[ids.clamp(min=0)].to(came.values)
    rows = rows / scale_of(inp, seen).read[:, None]
    parts = came.values * factor[:, None]
    values = einsum(rows, parts, "position feature d, position source d -> position feature source")
    bias = offsets(inp).to(came.values)[ids.clamp(min=0)] + rows @ shift
    none = ids == -1
    return Trace(came.names, came.places, ids, values.masked_fill(none[..., None], 0), bias.masked_fill(none, 0))


def _norm_before(came: Sources, hook: str) -> tuple[Float[Tensor, "position d_model"], Float[Tensor, " d_model"]]:
    """Return factor and shift: a hook point sees `factor * resid_mid + shift`."""
    if hook.endswith(MLP_IN):
        return came.factor, came.shift
    x, entry = came.values.sum(1), Entry.of(came.model, came.layer, hook)
    factor = torch.ones_like(x)
    if hook.endswith(NORMALIZED):
        factor = factor / entry.norm.rms(x)
    return factor, torch.zeros_like(came.shift)


def trace_pair(
    attribution: Attribution, traced: Trace, left: int, right: int, n: int = 0
) -> Float[Tensor, "part part"]:
    """Trace one pair of features one step back: its term as a table, bias and sources of `left` × those of `right`.

    `2 Q_ij pre_i[s] pre_j[t]` (`Q_ii` for a feature with itself), which sums to the pair's term exactly.

    Args:
        attribution: Where the pair is from.
        traced: Where its features came from: `trace(sources(...), inp, attribution.features)`.
        left: Feature id, gives the rows: bias first, then `traced.names`.
        right: Feature id, gives the columns.
        n: Which of the attribution's positions.

    Raises:
        ValueError: A trace of other features, or a feature that is not active there.
    """
    traced.check(attribution)
    active = attribution.features[n].tolist()
    for name, feature in (("left", left), ("right", right)):
        if feature not in active or feature < 0:
            raise ValueError(f"{name} must be a feature that is active at {n}, got {feature}")
    i, j = active.index(left), active.index(right)
    coefficient = attribution.pairs[n, min(i, j), max(i, j)] / attribution.activations[n, [i, j]].prod()
    shares = torch.cat((traced.bias[n, :, None], traced.values[n]), 1)
    return coefficient * torch.outer(shares[i], shares[j])
