"""Blocks, with transformer_lens' hook points: what they read from the residual stream and what they add to it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .attention import Attention, Frame, KeyValue
from .hooks import Point
from .layers import Norm
from .mlp import MLP, NoMLP


@dataclass(frozen=True)
class StreamConfig:
    """How the residual stream runs from block to block."""

    restart: bool = False  # whether every block first mixes in the start of the stream x₀: x ← λ₀ x + λ₁ x₀
    interpolate: bool = False  # whether attention's scale s interpolates, x + s (o - x), rather than adds, x + s o


class Block(nn.Module):
    """One pre-norm transformer block; every `hook_*_out` is exactly what is added to the residual stream.

    `hook_resid_pre` is the stream that attention's output is added to: after the start of the stream was mixed in, if
    the config says so. A block without an MLP has no `hook_resid_mid` either.
    """

    def __init__(self, config: StreamConfig, ln1: Norm, attn: Attention, ln2: Norm, mlp: MLP | NoMLP):
        super().__init__()
        self.config = config
        self.lambdas = nn.Parameter(torch.tensor([1.0, 0.0])) if config.restart else None
        self.ln1, self.attn, self.ln2, self.mlp = ln1, attn, ln2, mlp
        self.hook_resid_pre, self.hook_attn_out, self.hook_resid_post = Point(), Point(), Point()
        if isinstance(mlp, MLP):
            self.hook_resid_mid, self.hook_mlp_in, self.hook_mlp_out = Point(), Point(), Point()

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], frame: Frame, past: KeyValue | None = None
    ) -> tuple[Float[Tensor, "batch seq d_model"], KeyValue, Frame]:
        """Return the stream after the block, the keys and values of all positions so far, and the next one's frame."""
        x = self.hook_resid_pre(self.entering(x, frame.start))
        attn_out, past, frame = self.attn(self.ln1(x), frame, past)
        if self.config.interpolate:
            attn_out = attn_out - self.attn.config.scale * x
        x = x + self.hook_attn_out(attn_out)
        if isinstance(self.mlp, MLP):
            x = self.hook_resid_mid(x)
            x = x + self.hook_mlp_out(self.mlp(self.hook_mlp_in(self.ln2(x))))
        return self.hook_resid_post(x), past, frame

    def entering(
        self, x: Float[Tensor, "*batch d_model"], start: Float[Tensor, "*batch d_model"] | None
    ) -> Float[Tensor, "*batch d_model"]:
        """Return the stream that attention's output is added to, from what the block before left; no hook sees it."""
        return x if self.lambdas is None else self.lambdas[0] * x + self.lambdas[1] * start
