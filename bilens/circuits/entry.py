"""How a hook point before an MLP leads into it: through the norm, or part of it, or not at all."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bilens.models.layers import Norm
from bilens.models.transformer import BilinearTransformer

from .places import check_layer

RESID_PRE, RESID_MID, NORMALIZED, MLP_IN = "hook_resid_pre", "hook_resid_mid", "ln2.hook_normalized", "hook_mlp_in"


@dataclass(frozen=True, eq=False)
class Entry:
    """A hook point before an MLP; what it sees enters the MLP as `gain · x / rms + shift`, exactly.

    At `hook_resid_mid` the norm is still to come: `rms` is `sqrt(mean(x²) + eps)`, one number for each position, and
    gain and shift are the norm's. At `ln2.hook_normalized` the rms is 1, and at `hook_mlp_in` gain and shift too are
    those of nothing. At `hook_resid_pre` attention is still to come as well: there `x` is the stream after it, of
    which the hook point sees one summand.
    """

    hook: str
    norm: Norm

    @classmethod
    def of(cls, model: BilinearTransformer, layer: int, hook: str) -> "Entry":
        """Return the entry at a hook point of a layer, one of `input_hooks`.

        Raises:
            ValueError: No such layer, or another hook point.
        """
        check_layer(model, layer)
        there = [one for one in input_hooks(layer) if one in model.hook_dict]  # without a norm nothing is normalised
        if hook not in there:
            raise ValueError(f"hook must be one of {', '.join(there)}, got {hook!r}")
        return cls(hook, model.blocks[layer].ln2)

    @property
    def summed(self) -> str:
        """The hook point of the `x` of this class: its own, but `hook_resid_mid` for `hook_resid_pre`."""
        return self.hook.replace(RESID_PRE, RESID_MID)

    def rms(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        """Return what x is divided by on its way in."""
        return self.norm.rms(x) if self.summed.endswith(RESID_MID) else torch.ones_like(x[..., :1])

    def affine(self, like: Float[Tensor, "*batch d_model"]) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
        """Return gain and shift, of the dtype and device of `like`."""
        if self.hook.endswith(MLP_IN):
            return like.new_ones(like.shape[-1]), like.new_zeros(like.shape[-1])
        return self.norm.affine(like)

    def enter(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Return what enters the MLP."""
        gain, shift = self.affine(x)
        return x / self.rms(x) * gain + shift

    def linear(self, x: Float[Tensor, "*batch d_model"]) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, " d"]]:
        """Return factor and shift: what enters the MLP is `factor * x + shift`, exactly."""
        gain, shift = self.affine(x)
        return gain / self.rms(x), shift

    def seen_at(self, later: "Entry", x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Return what another hook point, further on, sees of the same position.

        Raises:
            ValueError: It is not further on.
        """
        here, there = (_order(one) for one in (self, later))
        if there < here:
            raise ValueError(f"{later.hook} must not come before {self.hook}")
        if here == there:
            return x
        return self.enter(x) if later.hook.endswith(MLP_IN) else x / self.rms(x)


def first(one: Entry, other: Entry) -> Entry:
    """Return which of two entries of a layer comes first."""
    return min(one, other, key=_order)


def _order(entry: Entry) -> int:
    return next(i for i, name in enumerate((RESID_PRE, RESID_MID, NORMALIZED, MLP_IN)) if entry.hook.endswith(name))


def input_hooks(layer: int) -> list[str]:
    """Return the hook points at which a dictionary can split what enters a layer's MLP, the last first."""
    return [f"blocks.{layer}.{name}" for name in (MLP_IN, NORMALIZED, RESID_MID, RESID_PRE)]
