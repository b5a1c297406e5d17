"""Blocks, with transformer_lens' hook points, and what all blocks of one run are told."""

from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from .attention import Attention, Frame, KeyValue
from .layers import NormConfig, make_norm
from .mlp import MLP


class Block(nn.Module):
    """One transformer block; every `hook_*_out` is exactly what is added to the residual stream.

    `ln1` and `ln2` stand before attention and MLP, `ln1_post` and `ln2_post` after them, before the addition.

    Args:
        norm: The shape of its norms, which says where they are; `None` if there are none.
        attn: Attention.
        mlp: The MLP.
        d_model: Width of the residual stream.
    """

    def __init__(self, norm: NormConfig | None, attn: Attention, mlp: MLP, d_model: int):
        super().__init__()
        before, after = (norm if norm and norm.place in (place, "both") else None for place in ("before", "after"))
        self.ln1, self.attn, self.ln1_post = make_norm(before, d_model), attn, make_norm(after, d_model)
        self.ln2, self.mlp, self.ln2_post = make_norm(before, d_model), mlp, make_norm(after, d_model)
        self.hook_resid_pre, self.hook_attn_out, self.hook_resid_mid = HookPoint(), HookPoint(), HookPoint()
        self.hook_mlp_in, self.hook_mlp_out, self.hook_resid_post = HookPoint(), HookPoint(), HookPoint()

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], frame: Frame, past: KeyValue | None = None
    ) -> tuple[Float[Tensor, "batch seq d_model"], KeyValue, Frame]:
        """Return the stream after the block, the keys and values of all positions so far, and the next one's frame."""
        x = self.hook_resid_pre(x)
        attn_out, past, frame = self.attn(self.ln1(x), frame, past)
        x = self.hook_resid_mid(x + self.hook_attn_out(self.ln1_post(attn_out)))
        mlp_out = self.ln2_post(self.mlp(self.hook_mlp_in(self.ln2(x))))
        return self.hook_resid_post(x + self.hook_mlp_out(mlp_out)), past, frame
