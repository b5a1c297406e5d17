"""The features that play a role in a motif, by name; notation as in `motifs`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens.tensor.records import Record

from .motifs import GROUPED
from .records import plain
from .scoring import Scoring, Strongest

_SHARE = 0.5  # of the strongest weight, to be named in a group: planted groups are named best then


@dataclass(frozen=True, repr=False, eq=False)
class Group(Record, rows="k", names={"features": "inp"}, unit="features"):
    """Input features that play one role in a motif, the strongest first, with their mean signed coefficients.

    Features with less than half the weight of the strongest are not named; most are there because they overlap with it.
    """

    role: str
    features: Int[Tensor, " k"]
    weights: Float[Tensor, " k"]
    name: Callable[[str, int], str] | None = None  # of a feature, by its side and number

    def __repr__(self) -> str:
        top = ", ".join(f"#{f} {w:+.2g}" for f, w in zip(self.features.tolist(), self.weights.tolist(), strict=True))
        return f"{self.role}({top})"

    def to_dict(self) -> dict[str, Any]:
        """Return role, features and weights."""
        return plain({name: getattr(self, name) for name in ("role", "features", "weights")})


def name_groups(task: Scoring, seen: Strongest, found: Sequence[Sequence[int]]) -> list[tuple[Group, ...]]:
    """Name the features of each `(output, motif)`, the motif by its number, given the strongest of every output."""
    done: dict[tuple[int, int], tuple[Group, ...]] = {}
    for column, motif in enumerate(task.motifs):
        outs = [o for o, m in found if m == column]
        for i in range(0, len(outs), task.chunk):
            some = outs[i : i + task.chunk]
            members = _members(motif, task.writers, Strongest(*(part[some] for part in seen)), task.group)
            done |= {(o, column): each for o, each in zip(some, members, strict=True)}
    return [done[o, m] for o, m in found]


def _members(motif: str, D: Tensor, strongest: Strongest, group: int) -> list[tuple[Group, ...]]:
    """Return the groups of a motif in each output; weights are coefficients of Q, not in units of σ."""
    if motif == "copy":
        least = torch.finfo(D.dtype).tiny
        best = (strongest.own.abs() / D.pow(2).sum(1).clamp(min=least)).argmax(1, keepdim=True)
        return [(Group("source", *parts),) for parts in zip(best, strongest.own.gather(1, best), strict=True)]
    if motif == "outlier":
        return [_halves(*parts, group) for parts in zip(*strongest[:3], strict=True)]
    found = GROUPED[motif](strongest.T, group)
    T = strongest.T * strongest.unit[:, None, None]
    named = {"and": _named_and, "xor": _named_xor, "negation": _named_negation}[motif]
    return [
        named(T[o], [mask[o].nonzero()[:, 0] for mask in found.masks], features)
        for o, features in enumerate(strongest.features)
    ]


def _halves(features: Tensor, T: Tensor, unit: Tensor, group: int) -> tuple[Group, ...]:
    """Divide the features of an outlier with `split`, the strongest few of either factor."""
    Q = T * unit / 2
    Q.diagonal().mul_(2)
    side, weights = split(Q)
    halves = []
    for i, role in enumerate(("left", "right")):
        at = (side == i).nonzero()[:, 0]
        at = at[weights[at].abs().argsort(descending=True, stable=True)][:group]
        halves.append(Group(role, features[at], weights[at]))
    return tuple(halves)


def _group(role: str, features: Tensor, at: Tensor, weights: Tensor) -> Group:
    """Sort a group by weight, and leave out the weak."""
    order = weights.abs().argsort(descending=True, stable=True)
    order = order[weights[order].abs() >= _SHARE * weights.abs().max()]
    return Group(role, features[at[order]], weights[order])


def _named_and(T: Tensor, groups: Sequence[Tensor], features: Tensor) -> tuple[Group, ...]:
    a, b = groups
    block = T[a][:, b]
    return _group("left", features, a, block.mean(1)), _group("right", features, b, block.mean(0))


def _named_xor(T: Tensor, groups: Sequence[Tensor], features: Tensor) -> tuple[Group, ...]:
    c, a, b = groups
    with_a, with_b = T[c][:, a], T[c][:, b]
    return (
        _group("shared", features, c, (with_a.mean(1) - with_b.mean(1)) / 2),
        _group("for", features, a, with_a.mean(0)),
        _group("against", features, b, with_b.mean(0)),
    )


def _named_negation(T: Tensor, groups: Sequence[Tensor], features: Tensor) -> tuple[Group, ...]:
    c, a, b, r = groups
    effect = T[r[0]] if len(r) else T.diagonal()
    named = (
        _group("negators", features, c, (T[c][:, a].mean(1) - T[c][:, b].mean(1)) / 2),
        _group("positive", features, a, effect[a]),
        _group("negative", features, b, effect[b]),
    )
    if not len(r):
        return named
    return (*named, _group("reference", features, r, (effect[a].mean() - effect[b].mean())[None] / 2))


def split(Q: Float[Tensor, "n n"]) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Divide features into the two factors of their matrix's two strongest eigenvalues.

    If these have different signs, `λ₊ (v₊·z)² + λ₋ (v₋·z)² = (l·z)(r·z)` with `l, r = sqrt(λ₊) v₊ ± sqrt|λ₋| v₋`; for
    equal signs `l, r` are the two squares' own directions. A feature belongs to the factor on which it weighs more.

    Returns:
        For each feature 0 or 1, and its signed weight on that factor.
    """
    values, vectors = torch.linalg.eigh(Q)
    order = (
        values.abs().argsort(descending=True, stable=True)[:2].sort(descending=True).values
    )  # the larger value first
    one, two = (values[order].abs().sqrt() * vectors[:, order]).unbind(1)
    factors = torch.stack((one + two, one - two) if values[order].prod() < 0 else (one, two))
    side = factors.abs().argmax(0)
    return side, factors.gather(0, side[None])[0]
