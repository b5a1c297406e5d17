"""Unembedding, one layer and embedding: what a token predicts by itself, and what tells tokens apart."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens.models.logits import logit_directions, token_ids
from bilens.models.transformer import BilinearTransformer
from bilens.tensor.records import Rows, tabular

from .places import check_layer


@tabular()
class Bigram(NamedTuple):
    """A token that follows, and its logit."""

    token: str
    score: float


@torch.no_grad()
def bigram_scores(
    model: BilinearTransformer, tokens: Int[Tensor, " token"], layer: int = 0
) -> Float[Tensor, "token vocab"]:
    """Return the diagonal of unembedding, layer and embedding: what each token alone predicts without attention.

    `score(in -> out) = Σ_h (U_out·down_h)(left_h·e_in)(right_h·e_in) + U_out·e_in` (2406.03947, language part). A model
    with norms has them here too, each measured on what it then sees: the scores are the model's logits with attention
    and the other layers switched off. So it is with what blocks do to the stream before they read it, and with a cap.

    Cost: `tokens · (hidden · d_model + d_model · vocab)`.

    Args:
        model: The model.
        tokens: Ids of the tokens that are read.
        layer: Which MLP.

    Raises:
        ValueError: No such layer, no tokens, or one outside the vocabulary.
        TypeError: The layer is not bilinear.
    """
    check_layer(model, layer)
    start = x = model.embedded(checked_tokens(model, tokens).to(model.W_E.device))
    for i, block in enumerate(model.blocks):
        x = block.entering(x, start)
        x = x + block.mlp.tensor().apply(block.ln2(x)) if i == layer else x
    return model.unembed(model.ln_final(x))


def bigrams(model: BilinearTransformer, token: str | int, k: int = 10, layer: int = 0) -> Rows[Bigram]:
    """Return the k tokens that a token predicts most by itself, strongest first: see `bigram_scores`.

    Args:
        model: The model.
        token: As text or id.
        k: How many.
        layer: Which MLP.

    Raises:
        ValueError: A text that is not one token, no such layer, or `k` below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    best = bigram_scores(model, torch.tensor(token_ids(model, [token])), layer)[0].topk(min(k, model.cfg.d_vocab))
    found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Rows(Bigram(model.label(i), value) for i, value in found)


def contrast(model: BilinearTransformer, token: str | int, others: Sequence[str | int]) -> Float[Tensor, " d_model"]:
    """Return the output direction of one token against the mean of others: "swim" minus run, climb, eat, ...

    What the tokens have in common, as being verbs, drops out (2406.03947, language part). Eigenvectors of the layer
    for it are named by `virtual_tokens(model).nearest`, and the pairs of virtual tokens that tell "swim" apart are

        direction = contrast(model, "swim", ["run", "climb", "eat", "see", "walk", "fly", "sit", "sleep"])
        virtual = virtual_tokens(model, direction[None], tokens=frequent)
        pairs = bilens.top_interactions(virtual.tensor, 10)  # virtual.name(pairs.left[0].item()), ...

    Args:
        model: The model.
        token: As text or id.
        others: The same, at least one.

    Raises:
        ValueError: No others, or a text that is not one token.
    """
    if not others:
        raise ValueError("others must hold at least one token, got none")
    one, *rest = logit_directions(model, token_ids(model, [token, *others]))
    return one - torch.stack(rest).mean(0)


def checked_tokens(model: BilinearTransformer, tokens: Int[Tensor, " token"]) -> Int[Tensor, " token"]:
    """Return token ids, which must be of the vocabulary.

    Raises:
        ValueError: There are none, or one is not.
    """
    if not len(tokens) or not 0 <= tokens.min() <= tokens.max() < model.cfg.d_vocab:
        raise ValueError(f"tokens must hold ids from 0 to {model.cfg.d_vocab - 1}, got {tokens.tolist()}")
    return tokens
