"""What features read from the embedding and write to the logits: names from weights alone."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from bilens.models.logits import written_logits
from bilens.models.transformer import BilinearTransformer
from bilens.models.windows import layer_of

from .directions import encoders, reads_at, writers, writes_at
from .naming import WIDEST, word

if TYPE_CHECKING:
    from .stored import SAE

_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_in", "ln2.hook_normalized")
_WORDS = 3


def residual_writers(model: BilinearTransformer, sae: "SAE", hook: str | None = None) -> Float[Tensor, "feature d"]:
    """Return what features write, as directions of the residual stream.

    An SAE at `hook_mlp_in` writes to a normalised copy of the stream, and is read as if to the stream itself, the
    norm's gain taken out.

    Args:
        model: The model.
        sae: The SAE.
        hook: Where it reads, if it does not say.
    """
    rows, at = writers(sae), writes_at(sae) or hook
    if at is None or not at.endswith("hook_mlp_in"):
        return rows
    return rows / model.blocks[layer_of(at)].ln2.affine(rows)[0].detach()


def logit_effects(model: BilinearTransformer, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n vocab"]:
    """Return what directions of the residual stream add to the logits: see `FeatureCards`."""
    effects = written_logits(model, rows)
    return effects - effects.mean(1, keepdim=True)


def embedding_scores(
    model: BilinearTransformer, sae: "SAE", rows: Float[Tensor, "n d"], hook: str | None = None
) -> Float[Tensor, "n vocab"] | None:
    """Return how much directions read of each token's embedding, less the mean; None where no embedding is read.

    The embedding goes through the norm where the SAE reads behind one. What attention and earlier layers write is left
    out, so this says less the later the layer.

    Args:
        model: The model.
        sae: The SAE whose readers the directions are, or sums of them.
        rows: The directions.
        hook: Where it reads, if it does not say.
    """
    at = reads_at(sae) or hook
    if at is None or not at.endswith(_STREAM):
        return None
    embedded = model.W_E.detach().to(rows)
    if at.endswith(_STREAM[:3]):
        scores = rows @ embedded.T
    else:  # a shift would be the same for all tokens
        norm = model.blocks[layer_of(at)].ln2
        gain = norm.affine(rows)[0].detach() if at.endswith("hook_mlp_in") else 1
        scores = (rows * gain) @ embedded.T / norm.rms(embedded)[:, 0]
    return scores - scores.mean(1, keepdim=True)


@torch.no_grad()
def name_from_weights(
    model: BilinearTransformer,
    sae: "SAE",
    features: list[int],
    weights: list[float] | None = None,
    hook: str | None = None,
) -> str:
    """Name features by the tokens that they read from the embedding, in braces, and an arrow to those they promote.

    A group is named by its weighted sum. Nothing is run: what a feature does on text is told by cards.

    Args:
        model: Owner of the tokenizer; without one a feature is called by its number.
        sae: The SAE.
        features: Which.
        weights: Of a group; equal if `None`.
        hook: Where it reads, if it does not say.
    """
    if model.tokenizer is None:
        return ", ".join(f"#{feature}" for feature in features)
    share = writers(sae).new_tensor([1.0] * len(features) if weights is None else weights)
    read = embedding_scores(model, sae, share[None] @ encoders(sae)[features], hook)
    promoted = logit_effects(model, share[None] @ residual_writers(model, sae, hook)[features])
    for n in range(_WORDS, 0, -1):
        text = f"→ {_words(model, promoted, n)}"
        text = text if read is None else f"{{{_words(model, read, n)}}} {text}"
        if len(text) <= WIDEST:
            break
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 1]}…"


def _words(model: BilinearTransformer, scores: Float[Tensor, "1 vocab"], n: int) -> str:
    best = scores[0].topk(min(n, scores.shape[1])).indices.tolist()
    return " / ".join(word(model, token) for token in best)
