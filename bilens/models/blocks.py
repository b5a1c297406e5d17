"""Blocks, with transformer_lens' hook points: what they read from the residual stream and what they add to it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .attention import Attention, Frame, KeyValue
from .hooks import Point
from .layers import NormConfig, make_norm
from .mlp import MLP, NoMLP


@dataclass(frozen=True)
class StreamConfig:
    """How the residual stream runs from block to block."""

    restart: bool = False  # whether every block first mixes in the start of the stream x₀: x ← λ₀ x + λ₁ x₀
    interpolate: bool = False  # whether attention's scale s interpolates, x + s (o - x), rather than adds, x + s o


class Block(nn.Module):
    """One transformer block; every `hook_*_out` is exactly what is added to the residual stream.

    `hook_resid_pre` is the stream that attention's output is added to: after the start of the stream was mixed in, if
    the config says so. `ln1` and `ln2` stand before attention and MLP, `ln1_post` and `ln2_post` after them, before the
    addition. A block without an MLP has no `hook_resid_mid` either.

    Args:
        config: What it does to the stream beside adding to it.
        norm: The shape of its norms, which says where they are; `None` if there are none.
        attn: Attention.
        mlp: The MLP, or what stands in its place.
    """

    def __init__(self, config: StreamConfig, norm: NormConfig | None, attn: Attention, mlp: MLP | NoMLP):
        super().__init__()
        self.config = config
        self.lambdas = nn.Parameter(torch.tensor([1.0, 0.0])) if config.restart else None
        before, after = (norm if norm and norm.place in (place, "both") else None for place in ("before", "after"))
        d_model, has_mlp = attn.o.out_features, isinstance(mlp, MLP)
        self.ln1, self.attn, self.ln1_post = make_norm(before, d_model), attn, make_norm(after, d_model)
        self.ln2, self.mlp = make_norm(before if has_mlp else None, d_model), mlp
        self.ln2_post = make_norm(after if has_mlp else None, d_model)
        self.hook_resid_pre, self.hook_attn_out, self.hook_resid_post = Point(), Point(), Point()
        if has_mlp:
            self.hook_resid_mid, self.hook_mlp_in, self.hook_mlp_out = Point(), Point(), Point()

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], frame: Frame, past: KeyValue | None = None
    ) -> tuple[Float[Tensor, "batch seq d_model"], KeyValue, Frame]:
        """Return the stream after the block, the keys and values of all positions so far, and the next one's frame."""
        x = self.hook_resid_pre(self.entering(x, frame.start))
        attn_out, past, frame = self.attn(self.ln1(x), frame, past)
        attn_out = self.ln1_post(attn_out)
        if self.config.interpolate:
            attn_out = attn_out - self.attn.config.scale * x
        x = x + self.hook_attn_out(attn_out)
        if isinstance(self.mlp, MLP):
            x = self.hook_resid_mid(x)
            x = x + self.hook_mlp_out(self.ln2_post(self.mlp(self.hook_mlp_in(self.ln2(x)))))
        return self.hook_resid_post(x), past, frame

    def entering(
        self, x: Float[Tensor, "*batch d_model"], start: Float[Tensor, "*batch d_model"] | None
    ) -> Float[Tensor, "*batch d_model"]:
        """Return the stream that attention's output is added to, from what the block before left; no hook sees it."""
        return x if self.lambdas is None else self.lambdas[0] * x + self.lambdas[1] * start
