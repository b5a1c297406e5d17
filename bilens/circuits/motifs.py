"""Groups of features that interact in one shape, `and`, `xor` or `negation`: how they are scored and found.

Notation of the code: for one output feature, `M` is the interaction matrix in the residual basis, `D` the writers and
`Q = D M Dᵀ`. `T` holds its coefficients in units of their root mean square `σ` over all pairs: `t_ij = 2 Q_ij / σ`,
`t_ii = Q_ii / σ`, among the features with the strongest ones. A pair scores for either sign
`x±_ij = ± t_ij - |t_ii| - |t_jj|`, which is positive only if `[[Q_ii, Q_ij], [Q_ij, Q_jj]]` is indefinite: the square
of one direction, however its features overlap, scores nothing.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from einops import einsum, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bilens.tensor.records import tabular

_SEEDS = 8  # features from which a search for groups starts
_REFERENCES = 3  # features whose couplings may be the effects that negators flip
_ROUNDS = 4  # of coordinate ascent; it rarely moves after three


@tabular(rows="out")
class Found(NamedTuple):
    """Groups of a motif for each output as masks over its strongest features, and what they score.

    And: the two sides. Xor: C, A, B. Negation: C, A, B and the reference, empty where the self terms are the effects.
    """

    score: Float[Tensor, " out"]
    masks: tuple[Bool[Tensor, "out m"], ...]


def _pair_scores(T: Float[Tensor, "out m m"]) -> tuple[Tensor, Tensor]:
    """Return `x±_ij = ± t_ij - |t_ii| - |t_jj|`."""
    own = T.diagonal(dim1=1, dim2=2).abs()
    small = own[:, :, None] + own[:, None, :]
    return tuple(X.masked_fill(_eye(T), -math.inf) for X in (T - small, -T - small))


def _eye(T: Tensor) -> Bool[Tensor, "m m"]:
    return torch.eye(T.shape[-1], dtype=torch.bool, device=T.device)


def _and(T: Float[Tensor, "out m m"], group: int) -> Found:
    X = torch.stack(_pair_scores(T), 1)  # [out, sign, m, m]
    B = _one_hot(X.amax(-1).topk(min(_SEEDS, X.shape[-1]), dim=-1).indices, X.shape[-1])
    X = X.masked_fill(_eye(T), 0)
    for _ in range(_ROUNDS):
        A, _ = _grow(_sums(X, B), B, group)
        B, score = _grow(_sums(X, A), A, group)
    score, at = score.flatten(1).max(1)  # over signs and seeds
    return Found(score, tuple(_take(mask.flatten(1, 2), at) for mask in (A, B)))


def _xor(T: Float[Tensor, "out m m"], group: int) -> Found:
    plus, minus = _pair_scores(T)
    seeds = torch.minimum(plus.amax(-1), minus.amax(-1)).topk(min(_SEEDS, T.shape[-1]), dim=-1).indices
    eye = _eye(T)
    never = torch.zeros_like(seeds[:, :1], dtype=torch.bool).expand(T.shape[:2])
    return _oppose(plus.masked_fill(eye, 0), minus.masked_fill(eye, 0), seeds, never, group)


def _negation(T: Float[Tensor, "out m m"], group: int) -> Found:
    found = []
    eye = _eye(T)
    for Y_plus, Y_minus, reference in _flips(T):
        strength = torch.minimum(*(Y.masked_fill(eye, -math.inf).amax(-1) for Y in (Y_plus, Y_minus)))
        seeds = strength.masked_fill(reference, -math.inf).topk(min(_SEEDS, T.shape[-1]), dim=-1).indices
        score, masks = _oppose(Y_plus.masked_fill(eye, 0), Y_minus.masked_fill(eye, 0), seeds, reference, group)
        found.append(Found(score, (*masks, reference)))
    score, best = torch.stack([one.score for one in found], 1).max(1)
    masks = zip(*(one.masks for one in found), strict=True)
    return Found(score, tuple(_take(torch.stack(parts, 1), best) for parts in masks))


def _flips(T: Float[Tensor, "out m m"]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield `y±` and the reference: the effects are the self terms, then the couplings to each of a few features."""
    own = T.diagonal(dim1=1, dim2=2)
    guard, effect = own.abs()[:, :, None], own[:, None, :]
    nothing = torch.zeros_like(own, dtype=torch.bool)
    yield torch.minimum(effect, -T) - guard, torch.minimum(-effect, T) - guard, nothing
    plus, minus = _pair_scores(T)
    for r in _references(plus, minus).unbind(1):
        reference = _one_hot(r, T.shape[-1])
        x_plus, x_minus = (_take(X, r)[:, None].clamp(min=-1e6) for X in (plus, minus))
        yield torch.minimum(x_plus, minus), torch.minimum(x_minus, plus), reference


def _references(plus: Tensor, minus: Tensor) -> Int[Tensor, "out r"]:
    """Return the features that couple most strongly with both signs."""
    return torch.minimum(plus.amax(-1), minus.amax(-1)).topk(min(_REFERENCES, plus.shape[-1]), dim=-1).indices


GROUPED: dict[str, Callable[[Tensor, int], Found]] = {"and": _and, "xor": _xor, "negation": _negation}


# -- growing groups ---------------------------------------------------------------------------------------------------


def _oppose(
    plus: Float[Tensor, "out m m"],
    minus: Float[Tensor, "out m m"],
    seeds: Int[Tensor, "out seed"],
    blocked: Bool[Tensor, "out m"],
    group: int,
) -> Found:
    """Find C, A and B with large `min(Σ_{c,a} plus, Σ_{c,b} minus)`, each over the root of its number of terms."""
    C = _one_hot(seeds, plus.shape[-1])
    never, best = blocked[:, None].expand_as(C), None
    for _ in range(_ROUNDS):
        A, positive = _grow(_sums(plus, C), C | never, group)
        B, negative = _grow(_sums(minus, C), C | A | never, group)
        score = torch.minimum(positive, negative)
        if best is None:
            best = score, (C, A, B)
        else:
            better = score > best[0]
            masks = tuple(torch.where(better[..., None], new, old) for new, old in zip((C, A, B), best[1], strict=True))
            best = torch.where(better, score, best[0]), masks
        C, _ = _grow(_sums(plus.mT, A) + _sums(minus.mT, B), A | B | never, group)
    score, at = best[0].max(1)
    return Found(score, tuple(_take(mask, at) for mask in best[1]))


def _sums(X: Float[Tensor, "*n m m"], mask: Bool[Tensor, "*n seed m"]) -> Float[Tensor, "*n seed m"]:
    """Return `Σ_{i in mask} x_ij / sqrt(|mask|)` for every j."""
    return einsum(mask.to(X), X, "... s i, ... i j -> ... s j") / mask.sum(-1, keepdim=True).sqrt()


def _grow(sums: Float[Tensor, "*n m"], blocked: Bool[Tensor, "*n m"], most: int) -> tuple[Tensor, Tensor]:
    """Choose the features that are not blocked with the largest `Σ sums / sqrt(count)`, at most so many; and that."""
    values, order = sums.masked_fill(blocked, -math.inf).topk(min(most, sums.shape[-1]), dim=-1)
    counts = torch.arange(1, values.shape[-1] + 1, device=sums.device)
    score, last = (values.cumsum(-1) / counts.sqrt()).max(-1)
    return torch.zeros_like(blocked).scatter(-1, order, counts <= last[..., None] + 1), score


def _one_hot(index: Int[Tensor, "*n"], m: int) -> Bool[Tensor, "*n m"]:
    return torch.nn.functional.one_hot(index, m).bool()


def _take(rows: Tensor, at: Int[Tensor, " out"]) -> Tensor:
    """Pick one row for each output, `[out, k, m] -> [out, m]`."""
    return rows.gather(1, repeat(at, "out -> out 1 m", m=rows.shape[-1]))[:, 0]
