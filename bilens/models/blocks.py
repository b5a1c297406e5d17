"""Blocks, with transformer_lens' hook points, and what all blocks of one run are told."""

from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from .attention import Attention, Frame, KeyValue
from .layers import Norm
from .mlp import MLP


class Block(nn.Module):
    """One pre-norm transformer block; every `hook_*_out` is exactly what is added to the residual stream."""

    def __init__(self, ln1: Norm, attn: Attention, ln2: Norm, mlp: MLP):
        super().__init__()
        self.ln1, self.attn, self.ln2, self.mlp = ln1, attn, ln2, mlp
        self.hook_resid_pre, self.hook_attn_out, self.hook_resid_mid = HookPoint(), HookPoint(), HookPoint()
        self.hook_mlp_in, self.hook_mlp_out, self.hook_resid_post = HookPoint(), HookPoint(), HookPoint()

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], frame: Frame, past: KeyValue | None = None
    ) -> tuple[Float[Tensor, "batch seq d_model"], KeyValue, Frame]:
        """Return the stream after the block, the keys and values of all positions so far, and the next one's frame."""
        x = self.hook_resid_pre(x)
        attn_out, past, frame = self.attn(self.ln1(x), frame, past)
        x = self.hook_resid_mid(x + self.hook_attn_out(attn_out))
        mlp_out = self.mlp(self.hook_mlp_in(self.ln2(x)))
        return self.hook_resid_post(x + self.hook_mlp_out(mlp_out)), past, frame
