"""Gains of norms folded into the weights that read them, exactly."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from .layers import RMSNorm


def read_gains(model: nn.Module) -> Iterator[tuple[str, RMSNorm, str]]:
    """Yield the norms whose gains a linear map reads, by name, and the weight that does.

    Those after attention or MLP, of the embeddings, and of queries and keys are read by no linear map alone.
    """
    for layer, block in enumerate(model.blocks):
        for norm, reader in (("ln1", "attn.qkv"), ("ln2", "mlp.w")):
            yield f"blocks.{layer}.{norm}", getattr(block, norm), f"blocks.{layer}.{reader}.weight"
    yield "ln_final", model.ln_final, "unembed.weight"


def folded_gains(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in which gains are 1 and part of the weights that read them: `W (g ⊙ n) = (W g) n`.

    A shift b becomes `b / g`. A gain of 0, by which nothing can be divided, stays one, and its column as it is. The
    model computes the same, up to one rounding of each weight.

    Args:
        model: The model whose state it is.
        state: Its `state_dict()`, which is left alone.
    """
    state = dict(state)
    for name, norm, reader in read_gains(model):
        if not isinstance(norm, RMSNorm) or norm.weight is None:
            continue
        gain = state[f"{name}.weight"] + norm.offset
        factor = torch.where(gain == 0, 1, gain)
        state[reader] = state[reader] * factor
        state[f"{name}.weight"] = (gain != 0).to(gain) - norm.offset
        if norm.bias is not None:
            state[f"{name}.bias"] = state[f"{name}.bias"] / factor
    return state


@torch.no_grad()
def process_weights(model: nn.Module, fold: bool, center: bool) -> None:
    """Fold gains, and take the mean over the vocabulary from the unembedding, in place.

    An unembedding that was the embedding becomes a matrix of its own.

    Args:
        model: The model.
        fold: Whether to fold gains (`folded_gains`).
        center: Whether to take the mean of each logit's weights away: log probabilities stay, logits do not.

    Raises:
        ValueError: `center` of a model whose logits are capped.
    """
    if center and model.cfg.unembed.cap is not None:
        raise ValueError("center_unembed must be False: the logits of this model are capped, so their mean matters")
    state = dict(model.state_dict())
    state = folded_gains(model, state) if fold else state
    if center:
        state["unembed.weight"] = state["unembed.weight"] - state["unembed.weight"].mean(0)
    if model.cfg.unembed.tied and not torch.equal(state["unembed.weight"], state["embed.weight"]):
        model.cfg = replace(model.cfg, unembed=replace(model.cfg.unembed, tied=False))
        model.unembed.weight = nn.Parameter(model.embed.weight.detach().clone())
    model.load_state_dict(state)
