"""The strongest pairs of features of heads, from the weights: which attends to which, and which writes which."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bilens.models.attention import Attention
from bilens.models.transformer import BilinearTransformer
from bilens.saes.directions import check_sae, readers, writers
from bilens.saes.stored import SAE
from bilens.tensor.forms import BilinearForm
from bilens.tensor.interactions import Interactions
from bilens.tensor.products import top_entries

from .attending import attention_hooks
from .places import check_layer
from .targets import fitting_hook


# nine parameters: features and heads on the one hand, which of a head's scores on the other
def top_attention(
    model: BilinearTransformer,
    layer: int,
    k: int,
    query: SAE | Float[Tensor, "n_query d_model"],
    key: SAE | Float[Tensor, "n_key d_model"] | None = None,
    *,
    head: int | None = None,
    distance: int | None = 0,
    branch: int | None = None,
    cosine: bool = False,
) -> Interactions:
    """Find the k pairs of a feature at the query and a feature at the key that add most to heads' scores, exactly.

    The value of a pair is what the two add at activation 1: the coefficient of `z_i z_j` in the score, or of
    `(z_i z_j)²` in a product of two scores. The norms' roots, which depend on the text, are left out: of the norm
    before attention, and of queries and keys. So where those are normalised, compare heads by `cosine`.

    Args:
        model: The model.
        layer: Which block.
        k: How many; all if there are fewer.
        query: SAE at the layer's `hook_resid_pre` or `ln1.hook_normalized`; or directions of the residual stream before
            the layer, one per row, such as `model.W_E`.
        key: The same for the other side; the same as `query` if `None`.
        head: One head; all of the layer if `None`.
        distance: Position of the query less that of the key; `None` leaves out the rotation.
        branch: One of two scores; `None` for what attention multiplies: the score, the product of both, the square.
        cosine: Rank by the cosine of the two in the head (the product of both cosines, ...) instead.

    Returns:
        `out` (head), `left` (query feature), `right` (key feature) and `value`, strongest first, with `certificate`:
        every pair of every head was screened, with the bound on rounding of `top_entries`.

    Raises:
        ValueError: No such layer, head or branch; an SAE that does not fit, directions of another width; `branch=None`
            of a difference of two softmaxes, which multiplies nothing.

    Cost: `n_query · n_key · d_head` multiplications for each head and branch.
    """
    check_layer(model, layer)
    attn, heads = model.blocks[layer].attn, _heads(model, head)
    forms = [_scores(attn, one, distance, branch) for one in heads]
    key = query if key is None else key
    sides = (_entering(model, layer, "query", query), _entering(model, layer, "key", key))
    return _of_heads(top_entries(forms, k, *sides, cosine=cosine), heads)


def top_writing(
    model: BilinearTransformer,
    layer: int,
    k: int,
    inp: SAE | Float[Tensor, "n_inp d_model"],
    out: SAE | Float[Tensor, "n_out d_model"],
    *,
    head: int | None = None,
    cosine: bool = False,
) -> Interactions:
    """Find the k pairs of a feature that heads attend to and a feature that they write most of, exactly.

    The value of a pair is what an input feature at activation 1 adds to the output feature's pre-activation where the
    pattern is 1: `reader · W_O W_V writer`. The root of the norm before attention is left out. With a value residual it
    is the share of the head's own values (`Attention.ov`).

    Args:
        model: The model.
        layer: Which block.
        k: How many; all if there are fewer.
        inp: As for `top_attention`.
        out: SAE at this layer's `hook_attn_out` or `hook_resid_mid`, or anywhere later in the residual stream
            (`hook_resid_pre`, `hook_resid_mid`, `hook_resid_post`), which is read with its encoder; or directions that
            are read, one per row, such as `bilens.models.logits.logit_directions(model)`.
        head: One head; all of the layer if `None`.
        cosine: Rank by the cosine of the two in the head instead.

    Returns:
        `out` (head), `left` (input feature), `right` (output feature) and `value`, strongest first, with `certificate`.

    Raises:
        ValueError: No such layer or head, an SAE that does not fit, directions of another width.
    """
    check_layer(model, layer)
    heads, forms = _heads(model, head), []
    for one in heads:
        ov = model.blocks[layer].attn.ov(one).detach()
        inner = ov.inp[:, :-1] if ov.constant else ov.inp
        forms.append([BilinearForm(inner, ov.out.T.contiguous())])
    sides = (_entering(model, layer, "inp", inp), _leaving(model, layer, out))
    return _of_heads(top_entries(forms, k, *sides, cosine=cosine), heads)


def _heads(model: BilinearTransformer, head: int | None) -> list[int]:
    return list(range(model.cfg.n_heads)) if head is None else [head]


def _of_heads(found: Interactions, heads: Sequence[int]) -> Interactions:
    """Name the matrices of a ranking by their heads."""
    return found._replace(out=torch.as_tensor(heads, device=found.out.device)[found.out])


def _scores(attn: Attention, head: int, distance: int | None, branch: int | None) -> list[BilinearForm]:
    """Return the forms whose values a head's pattern multiplies, without biases."""
    kind, branches = attn.config.kind, [branch]
    if branch is None and kind == "differential":
        raise ValueError("branch must be 0 or 1 for differential attention, which multiplies no scores, got None")
    if branch is None:
        branches = {"softmax": [0], "bilinear": [0, 1], "squared": [0, 0]}[kind]
    return [attn.score_tensor(head, distance, one).detach().without_constant() for one in branches]


def _entering(model: BilinearTransformer, layer: int, name: str, basis: SAE | Tensor) -> Float[Tensor, "n d_model"]:
    """Return what features write as attention reads it: the norm's gain, and its centring, without its division."""
    norm, before = model.blocks[layer].ln1, True
    if isinstance(basis, Tensor):
        rows = _directions(model, name, basis)
    else:
        hooks = attention_hooks(layer)
        before = fitting_hook(model, basis, name, hooks) == hooks[0]
        rows = writers(basis)
    rows = norm.center(rows) if before else rows
    return rows * norm.affine(rows)[0].detach()


def _leaving(model: BilinearTransformer, layer: int, basis: SAE | Tensor) -> Float[Tensor, "n d_model"]:
    """Return the rows that read what a head adds to the residual stream."""
    if isinstance(basis, Tensor):
        return _directions(model, "out", basis)
    here = [f"blocks.{layer}.{name}" for name in ("hook_attn_out", "hook_resid_mid", "hook_resid_post")]
    names = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
    later = [f"blocks.{i}.{name}" for i in range(layer + 1, model.cfg.n_layers) for name in names]
    check_sae(model, basis, fitting_hook(model, basis, "out", here + later))
    return readers(basis)


def _directions(model: BilinearTransformer, name: str, rows: Tensor) -> Tensor:
    if rows.ndim != 2 or rows.shape[1] != model.cfg.d_model:
        raise ValueError(f"{name} must have shape [n, {model.cfg.d_model}] (d_model), got {list(rows.shape)}")
    return rows.detach()
