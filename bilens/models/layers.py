"""Norms, with transformer_lens' hook points.

A module's hook points see exactly the quantity that their name says, in transformer_lens' shapes: a hook that returns
a tensor replaces that quantity for everything downstream.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .hooks import Point

PLACES = ("before", "after", "both")


@dataclass(frozen=True)
class NormConfig:
    """The shape of a norm: an `RMSNorm`, a `LayerNorm` or a `ConstantNorm`."""

    eps: float = 1e-8  # added to the mean square; that of the published bilinear models
    gain: bool = False  # whether there is a gain `weight` (the 2024 checkpoints' have one)
    shift: bool = False  # whether there is a shift `bias` too
    plus_one: bool = False  # whether the gain is 1 + `weight` (Gemma)
    place: Literal["before", "after", "both"] = "before"  # where attention and MLP have one; the last is always there
    kind: Literal["rms", "layer", "constant"] = "rms"

    def __post_init__(self):
        if self.place not in PLACES:
            raise ValueError(f"place must be one of {', '.join(PLACES)}, got {self.place!r}")
        if self.kind not in NORMS:
            raise ValueError(f"kind must be one of {', '.join(NORMS)} for a norm, got {self.kind!r}")
        if self.kind == "constant" and (self.gain or self.shift):
            raise ValueError("gain and shift must be False for a constant norm")
        if self.plus_one and not (self.gain and self.kind == "rms"):
            raise ValueError("plus_one must be False unless the norm is an RMS norm with gain, got True")
        if not self.eps >= 0:
            raise ValueError(f"eps must not be negative, got {self.eps}")


class RMSNorm(nn.Module):
    """Divide by the root mean square, `x / sqrt(mean(x²) + eps)`, then optionally scale and shift.

    The mean square of half precision is taken in float32, where it neither overflows nor swallows eps.

    Args:
        config: Its shape.
        d_model: Width of the residual stream.
    """

    def __init__(self, config: NormConfig, d_model: int):
        super().__init__()
        self.eps, self.offset = config.eps, float(config.plus_one)
        self.weight = nn.Parameter(torch.full((d_model,), 1 - self.offset)) if config.gain else None
        self.bias = nn.Parameter(torch.zeros(d_model)) if config.shift else None
        self.hook_scale = Point()
        self.hook_normalized = Point()

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Return the normalised `x`; `hook_scale` sees the root mean square, `hook_normalized` the ratio."""
        x = self.hook_normalized(self.center(x) / self.hook_scale(self.rms(x)))
        x = x if self.weight is None else x * self.gain
        return x if self.bias is None else x + self.bias

    @property
    def gain(self) -> Float[Tensor, " d_model"]:
        """What the ratio is multiplied by: the weight, or 1 + weight."""
        if self.weight is None:
            raise AttributeError("this norm has no gain")
        return self.weight + self.offset if self.offset else self.weight

    def rms(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... 1"]:
        """Return what `x` is divided by, `sqrt(mean(x²) + eps)`; no hook sees it."""
        wide = self.center(x.to(torch.promote_types(x.dtype, torch.float32)))
        return (wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt().to(x.dtype)

    def center(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Return `x` itself: nothing is taken away before the norm divides."""
        return x

    def affine(self, like: Float[Tensor, "... d_model"]) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
        """Return gain and shift, ones and zeros where the norm has none, of the dtype and device of `like`."""
        gain = like.new_ones(like.shape[-1]) if self.weight is None else self.gain.to(like)
        return gain, torch.zeros_like(gain) if self.bias is None else self.bias.to(like)

    def linear(self, x: Float[Tensor, "... d_model"]) -> tuple[Float[Tensor, "... d_model"], Float[Tensor, " d_model"]]:
        """Return factor and shift: `norm(x) = factor * x + shift` exactly, `factor = gain / rms(x)`."""
        gain, shift = self.affine(x)
        return gain / self.rms(x), shift


class LayerNorm(RMSNorm):
    """Divide what is left without the mean by its root mean square, `(x - mean) / sqrt(var + eps)`; scale and shift.

    `hook_out` sees what it returns.

    Args:
        config: Its shape.
        d_model: Width of the residual stream.
    """

    def __init__(self, config: NormConfig, d_model: int):
        super().__init__(config, d_model)
        self.hook_out = Point()

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Return the normalised `x`; `hook_scale` sees the standard deviation, `hook_normalized` the ratio."""
        return self.hook_out(super().forward(x))

    def center(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Return `x` without its mean over the residual dimensions."""
        return x - x.mean(-1, keepdim=True)

    def linear(
        self, x: Float[Tensor, "... d_model"]
    ) -> tuple[Float[Tensor, "... d_model"], Float[Tensor, "... d_model"]]:
        """Return factor and shift: `norm(x) = factor * x + shift`; the shift takes the mean of this `x` away."""
        factor, shift = super().linear(x)
        return factor, shift - factor * x.mean(-1, keepdim=True)


class ConstantNorm(RMSNorm):
    """Divide by a number that training left behind, `x / sqrt(energy + eps)`: a linear map.

    `hook_out` sees what it returns.

    Args:
        config: Its shape.
        d_model: Width of the residual stream.
    """

    def __init__(self, config: NormConfig, d_model: int):
        super().__init__(config, d_model)
        self.register_buffer("energy", torch.ones(1))
        self.hook_out = Point()

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Return the scaled `x`; `hook_scale` sees the number at each position, `hook_normalized` the ratio."""
        return self.hook_out(super().forward(x))

    def rms(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... 1"]:
        """Return what `x` is divided by, the same everywhere; no hook sees it."""
        return (self.energy + self.eps).sqrt().to(x.dtype).expand(*x.shape[:-1], 1)


class NoNorm(nn.Module):
    """What stands where a model has no norm: it answers as a norm does."""

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Return `x` itself."""
        return x

    def rms(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... 1"]:
        """Return ones: `x` is divided by nothing."""
        return torch.ones_like(x[..., :1])

    def center(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Return `x` itself: nothing is taken away before the norm divides."""
        return x

    def affine(self, like: Float[Tensor, "... d_model"]) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
        """Return a gain of one and a shift of zero."""
        return like.new_ones(like.shape[-1]), like.new_zeros(like.shape[-1])

    def linear(self, x: Float[Tensor, "... d_model"]) -> tuple[Float[Tensor, "... d_model"], Float[Tensor, " d_model"]]:
        """Return a factor of one and a shift of zero."""
        return torch.ones_like(x), self.affine(x)[1]


NORMS = {"rms": RMSNorm, "layer": LayerNorm, "constant": ConstantNorm}
Norm: TypeAlias = RMSNorm | NoNorm


def make_norm(config: NormConfig | None, d_model: int) -> Norm:
    """Return the norm of that shape, or what stands in its place."""
    return NoNorm() if config is None else NORMS[config.kind](config, d_model)
