"""Null models of a layer's outputs: what they score for a motif, and how unlikely a score is under them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bilens.tensor.bilinear import BilinearTensor
from bilens.tensor.records import Record
from bilens.tensor.resuming import UNKEPT, Stages

from .motifs import GROUPED
from .scoring import MOTIFS, Scoring, strongest_features

NULLS = {  # and the motifs whose score each of them changes
    "readers": MOTIFS,
    "rotation": (*GROUPED, "copy"),
    "signs": tuple(GROUPED),
    "untrained": MOTIFS,
}
LEAST_FOR_TAIL = 200  # null scores
_TAIL = 0.1  # share of the null scores that the tail is fitted to
_EXCEEDANCES = 10  # with fewer null scores above it, a p-value comes from the tail
_PART = {"xor": "and", "negation": "xor"}  # what null models must not reach: a part of the motif may really be there
_OWN = ("rotation", "signs")  # null models that keep something of each output, which is compared with its own draws
_DRAWS = 8  # at least, of each output from those


@dataclass(frozen=True, repr=False, eq=False)
class Null(Record):
    """Scores of outputs of a null model, and the generalised-Pareto tail fitted to the highest tenth of them.

    `P(score > x) = 0.1 (1 + shape (x - threshold) / scale)^(-1/shape)` above the threshold. `scale` is NaN where no
    tail was fitted. The column of xor holds scores of "and", that of negation those of xor: see `search`. Scores are
    in units of `spread` from `center`: 1 and 0 but for models that keep something of each output, and then the standard
    deviation and mean of the output's own draws, of all others for a draw itself.
    """

    name: str
    motifs: tuple[str, ...]
    scores: Float[Tensor, "null motif"]
    threshold: Float[Tensor, " motif"]
    scale: Float[Tensor, " motif"]
    shape: Float[Tensor, " motif"]
    center: Float[Tensor, "#out motif"]
    spread: Float[Tensor, "#out motif"]

    def __repr__(self) -> str:
        return f"Null({self.name!r}, {len(self.scores)} outputs × {len(self.motifs)} motifs)"

    def p(self, scores: Float[Tensor, "out motif"]) -> Float[Tensor, "out motif"]:
        """Return p-values of scores, `(1 + #{null ≥ score}) / (1 + n)`, or from the tail if fewer than 10 are above."""
        scores = (scores.double() - self.center) / self.spread
        ordered = self.scores.T.sort(1).values.contiguous()
        above = len(self.scores) - torch.searchsorted(ordered, scores.T.contiguous()).T
        p = (1 + above).double() / (1 + len(self.scores))
        excess = (scores - self.threshold).clamp(min=0) / self.scale
        heavy = _TAIL * (1 + self.shape * excess).pow(-1 / self.shape.clamp(min=1e-6))
        tail = torch.where(self.shape > 1e-6, heavy, _TAIL * torch.exp(-excess))
        return torch.where((above < _EXCEEDANCES) & self.scale.isfinite(), tail, p)


# -- draws ------------------------------------------------------------------------------------------------------------


def null_scores(
    task: Scoring,
    name: str,
    n: int,
    generator: torch.Generator,
    T: Float[Tensor, "out m m"] | None,
    stages: Stages = UNKEPT,
) -> Float[Tensor, "null motif"]:
    """Score n outputs of a null model, or somewhat more to divide them evenly over the outputs.

    Args:
        task: What is scored.
        name: Of the null model.
        n: How many.
        generator: Source of the draws.
        T: The strongest coefficients of every output; only the signs need them.
        stages: Where the scores are kept, to go on from there.
    """
    n = n_draws(name, n, len(task.readers))
    parts = tuple(_PART.get(motif, motif) for motif in task.motifs)

    def scored(start: int) -> Iterator[dict[str, Tensor]]:
        if name == "readers":  # all are drawn before the first is scored
            scores = (one for one, *_ in task.observe(directions(task, n, generator), parts, start=start))
        else:
            scores = _drawn_scores(task, name, draws(task, name, n, generator, T, start), parts)
        return ({"score": one} for one in scores)

    return stages.run(f"null-{name}", n, scored, generator, unit="null output")["score"]


def n_draws(name: str, n: int, n_out: int) -> int:
    """Return how many outputs of a null model are drawn where n are asked for."""
    return n_out * max(_DRAWS, math.ceil(n / n_out)) if name in _OWN else n


def _drawn_scores(
    task: Scoring, name: str, drawn: Iterator[tuple[Tensor, ...]], parts: tuple[str, ...]
) -> Iterator[Float[Tensor, "some motif"]]:
    """Yield the scores of null outputs that `draws` yields."""
    m = min(task.features, len(task.writers))
    for one in drawn:
        if name == "signs":
            yield torch.stack([GROUPED[part](*one, task.group).score for part in parts], 1)
        else:
            yield task.score(*one, strongest_features(*one, m), parts)


def directions(task: Scoring, n: int, generator: torch.Generator) -> Float[Tensor, "n out"]:
    """Return random directions with the norms of the readers."""
    drawn = []
    for i in _passes(task, n):
        noise = _normal(task.readers[i], generator)
        drawn.append(noise * (task.readers[i].norm(dim=1) / noise.norm(dim=1))[:, None])
    return torch.cat(drawn)


def _passes(task: Scoring, n: int) -> Iterator[Tensor]:
    """Yield the outputs again and again, n in all and some at a time, none of them twice."""
    outs = len(task.readers)
    passes = torch.arange(outs, device=task.readers.device).repeat(math.ceil(n / outs))[:n]
    return (i for once in passes.split(outs) for i in once.split(task.chunk))


def draws(
    task: Scoring, name: str, n: int, generator: torch.Generator, T: Float[Tensor, "out m m"] | None, start: int = 0
) -> Iterator[tuple[Tensor, ...]]:
    """Yield matrices and writers of null outputs that do not share the layer's, `(M, D)`; for the signs only `(T,)`.

    The first `start` of them are left out, and not drawn.
    """
    D, B, done = task.writers, task.B, 0
    for i in _passes(task, n):
        done += len(i)
        if done <= start:
            continue
        if name == "rotation":
            rotation = torch.nn.init.orthogonal_(D.new_empty(D.shape[1], D.shape[1]), generator=generator)
            yield B.matrix(task.readers[i]), D @ rotation
        elif name == "untrained":
            yield untrained(B, generator).matrix(task.readers[i]), D
        else:
            signs = _normal(T[i], generator).sign().triu()
            yield (T[i] * (signs + signs.triu(1).mT),)


def untrained(B: BilinearTensor, generator: torch.Generator) -> BilinearTensor:
    """Return Gaussian factors of the same norms."""
    noise = [(old, _normal(old, generator)) for old in (B.down, B.left, B.right)]
    return BilinearTensor(*(new * (old.norm() / new.norm()) for old, new in noise))


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


# -- tails ------------------------------------------------------------------------------------------------------------


def fit(name: str, motifs: tuple[str, ...], scores: Float[Tensor, "null motif"], n_out: int, tail: bool) -> Null:
    """Fit the tails by moments: with mean m and variance s² of the excess, `shape = ½ (1 - m²/s²)`, kept in [0, ½).

    `scale = m (1 - shape)`, raised by one standard error of m.
    """
    scores = scores.double()
    center, spread = torch.zeros_like(scores[:1]), torch.ones_like(scores[:1])
    if name in _OWN:
        scores, center, spread = standardized(scores.unflatten(0, (-1, n_out)))
    threshold = scores.quantile(1 - _TAIL, dim=0)
    shape = scale = torch.full_like(threshold, math.nan)
    if tail:
        above = scores > threshold
        excess = (scores - threshold).clamp(min=0)
        count = above.sum(0)
        mean = excess.sum(0) / count
        variance = ((excess - mean).pow(2) * above).sum(0) / (count - 1)
        shape = ((1 - mean.pow(2) / variance) / 2).clamp(0, 0.49)
        scale = mean * (1 - shape) * (1 + count.rsqrt())
    return Null(name, motifs, scores, threshold, scale, shape, center, spread)


def standardized(draws: Float[Tensor, "draw out motif"]) -> tuple[Tensor, Tensor, Tensor]:
    """Measure each draw against the other draws of its output; and return the mean and deviation of all of them."""
    n, center = len(draws), draws.mean(0)
    squares = (draws - center).pow(2)
    others = (squares.sum(0) - squares * n / (n - 1)) / (n - 2)  # variance without the draw itself
    least = 1e-6 * center.abs() + torch.finfo(draws.dtype).tiny
    away = (draws - center) * n / (n - 1)
    scores = away / torch.maximum(others.clamp(min=0).sqrt(), least)
    return scores.flatten(0, 1), center, torch.maximum(draws.std(0), least)
