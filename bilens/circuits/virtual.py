"""The first MLP over virtual tokens: each token's embedding, and what each head makes of it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bilens.models.logits import logit_directions
from bilens.models.text import Text
from bilens.models.transformer import BilinearTransformer
from bilens.models.windows import observe
from bilens.tensor.bilinear import BilinearTensor

from .bigrams import checked_tokens
from .places import check_adds, locate


@dataclass(frozen=True, repr=False, eq=False)
class VirtualTokens:
    """The first MLP as a tensor over virtual tokens: each token's embedding, and what each head makes of it.

    Input legs are those of `legs`, each with all of `tokens`: embedding, then heads. If the first norm has a shift,
    what each head makes of that follows, one input per head; the constant is last, if the tensor has one.
    """

    tensor: BilinearTensor
    writers: Float[Tensor, "virtual d_model"]  # what one unit of each input is at the MLP's input
    legs: tuple[str, ...]
    tokens: Int[Tensor, " token"]  # ids
    words: tuple[str, ...]

    def index(self, leg: str, token: int) -> int:
        """Return the input that stands for a token, by its id, in a leg.

        Raises:
            ValueError: No such leg or token.
        """
        if leg not in self.legs:
            raise ValueError(f"leg must be one of {', '.join(self.legs)}, got {leg!r}")
        place = (self.tokens == token).nonzero().flatten().tolist()
        if not place:
            raise ValueError(f"token must be the id of one of these {len(self.words)} tokens, got {token}")
        return self.legs.index(leg) * len(self.words) + place[0]

    def name(self, index: int) -> str:
        """Return leg and token of an input: `"head 0.1 of 'girl'"`.

        Raises:
            ValueError: No such input.
        """
        if not 0 <= index < self.tensor.inp:
            raise ValueError(f"index must lie between 0 and {self.tensor.inp - 1}, got {index}")
        if index >= len(self.writers):
            return "constant"
        leg, place = divmod(index, len(self.words))
        if index >= len(self.legs) * len(self.words):
            return f"{self.legs[1 + index - len(self.legs) * len(self.words)]} of the norm's shift"
        return f"{self.legs[leg]} of {self.words[place]!r}"

    def nearest(self, direction: Float[Tensor, " d_model"], k: int = 10) -> list[tuple[str, float]]:
        """Return the virtual tokens whose cosine with a direction at the MLP's input is largest in size.

        Args:
            direction: For example an eigenvector of the layer (of a layer with biases, without its last entry).
            k: How many.

        Raises:
            ValueError: A direction of another width.
        """
        if direction.shape != self.writers.shape[1:]:
            raise ValueError(f"direction must have shape {list(self.writers.shape[1:])}, got {list(direction.shape)}")
        cosines = F.normalize(self.writers, dim=1) @ F.normalize(direction.to(self.writers), dim=0)
        best = cosines.abs().topk(min(k, len(cosines))).indices
        return [(self.name(i), value) for i, value in zip(best.tolist(), cosines[best].tolist(), strict=True)]

    def __repr__(self) -> str:
        return f"VirtualTokens({len(self.words)} tokens in {len(self.legs)} legs; {self.tensor!r})"


@torch.no_grad()
def virtual_tokens(
    model: BilinearTransformer,
    out: Float[Tensor, "n_out d_model"] | None = None,
    tokens: Int[Tensor, " token"] | None = None,
) -> VirtualTokens:
    """Return the first layer's MLP over virtual tokens, `E` and `E W_V W_O` of each head (2305.03452, path expansion).

    The inputs of a prompt are in `virtual_input`: `tensor.apply` of them is what the MLP writes, read by `out`. The
    gains of both norms are in the writers, their root mean squares in the inputs. Kept in factors: of the pairs of
    virtual tokens, `((heads + 1) · vocab)²` for each output, none is computed before `tensor.matrix` or
    `top_interactions` asks for it; for the latter, choose some hundred `tokens`.

    Cost: `hidden · (heads + 1) · vocab` numbers, twice.

    Args:
        model: The model; its first MLP must be bilinear.
        out: Readers of what the MLP writes; the tokens' logit directions if `None`. In a model of one layer those give
            the MLP's part of the logits, times the root mean square of the last residual stream.
        tokens: Ids of the tokens to take; the vocabulary if `None`.

    Raises:
        ValueError: `out` of another width, a token outside the vocabulary, attention biases, which belong to no
            token, or norms after attention and MLP.
        TypeError: The layer is not bilinear.
    """
    check_adds(model)
    if any(model.cfg.attention.bias):
        raise ValueError(
            f"model must have no attention biases, which belong to no token, got {model.cfg.attention.bias}"
        )
    tokens = torch.arange(model.cfg.d_vocab) if tokens is None else checked_tokens(model, tokens)
    block, E = model.blocks[0], model.embedded(tokens.to(model.W_E.device)).detach()
    E = block.entering(E, E).detach()
    W_OV = block.attn.W_V.detach() @ block.attn.W_O.detach()
    (gain_1, shift_1), (gain_2, shift_2) = block.ln1.affine(E), block.ln2.affine(E)
    writers = torch.cat((E[None], (E * gain_1) @ W_OV)).flatten(0, 1)
    if shift_1.any():
        writers = torch.cat((writers, shift_1 @ W_OV))
    writers = writers * gain_2
    out = logit_directions(model) if out is None else out
    tensor = block.mlp.tensor().detach().project(out, writers, inp_bias=shift_2 if shift_2.any() else None)
    legs = ("embedding", *(f"head 0.{head}" for head in range(model.cfg.n_heads)))
    return VirtualTokens(tensor, writers, legs, tokens, tuple(model.labels(tokens.tolist())))


@torch.no_grad()
def virtual_input(
    model: BilinearTransformer, text: Text | Int[Tensor, "text seq"] | Int[Tensor, " seq"], position: int = -1
) -> Float[Tensor, "text virtual"]:
    """Return how much of each virtual token, of the whole vocabulary, enters the first MLP at one position of a text.

    `1 / rms_2` of the position's own token in the embedding leg, and `pattern[position, s] / (rms_1(s) rms_2)` of the
    token at s in a head's leg. Cost: `(heads + 1) · vocab` numbers per text.

    Args:
        model: The model.
        text: As for `expand`.
        position: As for `expand`.

    Raises:
        ValueError: No text, or no such position.
    """
    places, block = locate(model, text, position), model.blocks[0]
    tokens, attend = places.windows.tokens, places.windows.attend
    pre, mid, pattern = (f"blocks.0.{name}" for name in ("hook_resid_pre", "hook_resid_mid", "attn.hook_pattern"))
    seen = observe(model, places.windows, [pre, mid, pattern])
    weight = seen[pattern][places.row, :, places.position].masked_fill(~attend[:, None], 0)  # text head key
    rms_1, rms_2 = block.ln1.rms(seen[pre])[..., 0], block.ln2.rms(seen[mid][places.row, places.position])
    n_vocab, n_heads = model.cfg.d_vocab, model.cfg.n_heads
    z = weight.new_zeros(len(weight), 1 + n_heads, n_vocab)
    z[:, 0].scatter_(1, tokens[places.row, places.position][:, None], 1)
    keys = tokens[places.row, None].expand(-1, n_heads, -1)
    z[:, 1:].scatter_add_(2, keys, weight / rms_1[places.row, None])
    shifted = block.ln1.affine(model.W_E)[1].any()
    z = torch.cat((z.flatten(1), weight.sum(2)), 1) if shifted else z.flatten(1)
    return z / rms_2
