"""The residual directions that raise logits."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .hooks import HookedModel


def token_ids(model: HookedModel, tokens: Sequence[str | int]) -> list[int]:
    """Return the ids of tokens that are named by text or id.

    Raises:
        ValueError: A text that is not one token, or an id outside the vocabulary.
    """
    ids = [model.to_single_token(token) if isinstance(token, str) else token for token in tokens]
    for index in ids:
        if not 0 <= index < model.cfg.d_vocab:
            raise ValueError(f"token must be an id from 0 to {model.cfg.d_vocab - 1}, or a text, got {index}")
    return ids


def logit_direction(model: HookedModel, token: str | int) -> Float[Tensor, " d_model"]:
    """Return the residual direction that raises one token's logit: see `logit_directions`."""
    return logit_directions(model, token_ids(model, [token]))[0]


def logit_directions(
    model: HookedModel, tokens: Sequence[int] | Int[Tensor, "*token"] | None = None
) -> Float[Tensor, "*token d_model"]:
    """Return the residual directions that raise tokens' logits: unembedding times the final norm's gain.

    `logit_t = direction_t · resid_post / rms + const`, with `rms` what the final norm divides by (and, where logits are
    capped, the logit before its cap). A norm that takes the mean away does so to the directions. The constant is the
    norm's shift, `shift · W_U[:, t]`.

    Args:
        model: The model.
        tokens: Ids; the vocabulary if `None`.
    """
    return trained_logit_directions(model, tokens).detach()


def trained_logit_directions(
    model: HookedModel, tokens: Sequence[int] | Int[Tensor, "*token"] | None = None
) -> Float[Tensor, "*token d_model"]:
    """Return `logit_directions`, through which gradients reach the unembedding and the final norm's gain."""
    rows = model.W_U.T
    rows = rows if tokens is None else rows[torch.as_tensor(tokens, device=rows.device)]
    return model.ln_final.center(rows * model.ln_final.affine(rows)[0])


def written_logits(model: HookedModel, rows: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocab"]:
    """Return `rows @ logit_directions(model).T`, in the rows' dtype: what each adds to the logits, times `rms`.

    Nothing of the size of the unembedding is built.
    """
    gain = model.ln_final.affine(rows)[0].detach()
    return (model.ln_final.center(rows) * gain) @ model.W_U.detach().to(rows)
