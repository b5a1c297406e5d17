"""The loss of a language model: the cross entropy of each token given those before it."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def next_token_loss(
    logits: Float[Tensor, "batch seq vocab"],
    tokens: Int[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"] | None,
    per_token: bool = False,
) -> Float[Tensor, ""] | Float[Tensor, "batch next"]:
    """Return the mean over unmasked pairs of neighbours, in nats, at least in float32; or each, zero where masked.

    Raises:
        ValueError: There is no such pair.
    """
    if tokens.shape[1] < 2:
        raise ValueError("a loss needs at least two tokens (BOS and one more), got one")
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    losses = losses.unflatten(0, tokens[:, 1:].shape)
    weight = torch.ones_like(losses) if mask is None else (mask[:, 1:] & mask[:, :-1]).to(losses)
    if per_token:
        return losses * weight
    if mask is not None and not torch.compiler.is_compiling() and weight.sum() == 0:
        raise ValueError("a loss needs two neighbouring unmasked tokens, the attention_mask leaves none")
    return (losses * weight).sum() / weight.sum()
