"""Norms and blocks, with transformer_lens' hook points.

A module's hook points see exactly the quantity that their name says, in transformer_lens' shapes: a hook that returns
a tensor replaces that quantity for everything downstream.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .attention import Attention, KeyValue
from .hooks import Point
from .mlp import MLP
from .rotary import Angles


@dataclass(frozen=True)
class NormConfig:
    """The shape of an `RMSNorm`."""

    eps: float = 1e-8  # added to the mean square; that of the published bilinear models
    gain: bool = False  # whether there is a gain `weight` (the 2024 checkpoints' have one)
    shift: bool = False  # whether there is a shift `bias` too

    def __post_init__(self):
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
        self.eps = config.eps
        self.weight = nn.Parameter(torch.ones(d_model)) if config.gain else None
        self.bias = nn.Parameter(torch.zeros(d_model)) if config.shift else None
        self.hook_scale = Point()
        self.hook_normalized = Point()

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Return the normalised `x`; `hook_scale` sees the root mean square, `hook_normalized` the ratio."""
        x = self.hook_normalized(x / self.hook_scale(self.rms(x)))
        x = x if self.weight is None else x * self.weight
        return x if self.bias is None else x + self.bias

    def rms(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... 1"]:
        """Return what `x` is divided by, `sqrt(mean(x²) + eps)`; no hook sees it."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt().to(x.dtype)

    def affine(self, like: Float[Tensor, "... d_model"]) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
        """Return gain and shift, ones and zeros where the norm has none, of the dtype and device of `like`."""
        gain = like.new_ones(like.shape[-1]) if self.weight is None else self.weight.to(like)
        return gain, torch.zeros_like(gain) if self.bias is None else self.bias.to(like)

    def linear(self, x: Float[Tensor, "... d_model"]) -> tuple[Float[Tensor, "... d_model"], Float[Tensor, " d_model"]]:
        """Return factor and shift: `norm(x) = factor * x + shift` exactly, `factor = gain / rms(x)`."""
        gain, shift = self.affine(x)
        return gain / self.rms(x), shift


class NoNorm(nn.Module):
    """What stands where a model has no norm: it answers as a norm does."""

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Return `x` itself."""
        return x

    def rms(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... 1"]:
        """Return ones: `x` is divided by nothing."""
        return torch.ones_like(x[..., :1])

    def affine(self, like: Float[Tensor, "... d_model"]) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
        """Return a gain of one and a shift of zero."""
        return like.new_ones(like.shape[-1]), like.new_zeros(like.shape[-1])

    def linear(self, x: Float[Tensor, "... d_model"]) -> tuple[Float[Tensor, "... d_model"], Float[Tensor, " d_model"]]:
        """Return a factor of one and a shift of zero."""
        return torch.ones_like(x), self.affine(x)[1]


Norm: TypeAlias = RMSNorm | NoNorm


def make_norm(config: NormConfig | None, d_model: int) -> Norm:
    """Return the norm of that shape, or what stands in its place."""
    return NoNorm() if config is None else RMSNorm(config, d_model)


class Block(nn.Module):
    """One pre-norm transformer block; every `hook_*_out` is exactly what is added to the residual stream."""

    def __init__(self, ln1: Norm, attn: Attention, ln2: Norm, mlp: MLP):
        super().__init__()
        self.ln1, self.attn, self.ln2, self.mlp = ln1, attn, ln2, mlp
        self.hook_resid_pre, self.hook_attn_out, self.hook_resid_mid = Point(), Point(), Point()
        self.hook_mlp_in, self.hook_mlp_out, self.hook_resid_post = Point(), Point(), Point()

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        rotary: Angles,
        mask: Bool[Tensor, "batch seq keys"] | None = None,
        past: KeyValue | None = None,
    ) -> tuple[Float[Tensor, "batch seq d_model"], KeyValue]:
        """Return the residual stream after the block, and the keys and values of all positions so far."""
        x = self.hook_resid_pre(x)
        attn_out, past = self.attn(self.ln1(x), rotary, mask, past)
        x = self.hook_resid_mid(x + self.hook_attn_out(attn_out))
        mlp_out = self.mlp(self.hook_mlp_in(self.ln2(x)))
        return self.hook_resid_post(x + self.hook_mlp_out(mlp_out)), past
