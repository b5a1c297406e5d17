"""How well each feature tells each role, counted while text is streamed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bilens.models.windows import Windows
from bilens.tensor.records import Record, tabular

from .roles import ROLES

KEPT = 8  # tokens per feature whose shares are stored
WHOLE = (0.8, 0.5)  # AUROC and share from which a feature is the detector of a role
PART = 0.6  # share beyond chance from which a feature is for a part of a role


@tabular()
class Role(NamedTuple):
    """A role that a feature has been found to have."""

    name: str
    auroc: float  # of the activation, at positions of the role against all others
    share: float  # of the positive activation that lies at positions of the role
    base: float  # of the positions that have the role


@tabular(rows="feature")
class TokenShares(NamedTuple):
    """The tokens that most of a feature's activation lies at, or after, beyond how frequent they are."""

    tokens: Int[Tensor, "feature n"]
    share: Float[Tensor, "feature n"]  # of the positive activation
    base: Float[Tensor, "feature n"]  # of the positions


@dataclass(frozen=True, eq=False, repr=False)
class RoleScores(Record, rows="feature", along=("at", "after")):
    """What text tells of the features' roles."""

    places: dict[str, int]  # positions of each role
    positions: int
    auroc: Float[Tensor, "feature role"]  # NaN where no position has the role, or all
    share: Float[Tensor, "feature role"]
    at: TokenShares
    after: TokenShares

    def columns(self) -> dict[str, Any]:
        """Return the AUROC of each feature for each role."""
        return dict(zip(self.places, self.auroc.T, strict=True))

    def facts(self) -> dict[str, Any]:
        """Return how many positions have each role, and how many there are."""
        return {"positions": self.positions, "places": self.places}

    def best(self, feature: int, lift: float = PART) -> Role | None:
        """Return the role that a feature has, if any.

        Either its activation tells the role (AUROC at least 0.8) and most of it lies there: then the one with the
        largest harmonic mean of `2 AUROC - 1` and the share. Or it lies there so much more often than chance
        (`share - base >= lift`) that the feature is for a part of the role, one negator of many: then the one with the
        largest such difference.
        """
        base = torch.tensor([n / self.positions for n in self.places.values()]).to(self.share)
        told, inside = self.auroc[feature].nan_to_num(0.5), self.share[feature].nan_to_num(0)
        gini = (2 * told - 1).clamp(min=0)
        whole = torch.where((told >= WHOLE[0]) & (inside >= WHOLE[1]), 2 * gini * inside / (gini + inside), 0)
        part = torch.where(inside - base >= lift, inside - base, 0)
        score = whole if whole.max() > 0 else part
        if not score.max() > 0:
            return None
        i = int(score.argmax())
        return Role(list(self.places)[i], told[i].item(), inside[i].item(), base[i].item())

    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored, in half precision."""
        found = {"roles": self.auroc, "share": self.share}
        for name, some in (("at", self.at), ("after", self.after)):
            found |= {f"{name}.tokens": some.tokens.to(torch.int32), f"{name}.share": some.share}
            found |= {f"{name}.base": some.base}
        return {key: t.half() if t.is_floating_point() else t for key, t in found.items()}

    @classmethod
    def read(cls, places: dict[str, int], positions: int, tensors: Mapping[str, Tensor]) -> "RoleScores":
        """Return what `tensors` gave."""
        at, after = (
            TokenShares(
                tensors[f"{name}.tokens"].long(), tensors[f"{name}.share"].float(), tensors[f"{name}.base"].float()
            )
            for name in ("at", "after")
        )
        return cls(places, positions, tensors["roles"].float(), tensors["share"].float(), at, after)


class Active(NamedTuple):
    """The activations of some windows that are not zero."""

    row: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    feature: Int[Tensor, " n"]
    value: Float[Tensor, " n"]
    bin: Int[Tensor, " n"]


@dataclass(eq=False)
class RoleTally:
    """Counts for one SAE; memory: `2 · features · vocabulary` numbers, and `features · bins · roles`."""

    counts: Int[Tensor, "feature bin role"]  # activations that are not zero
    mass: Float[Tensor, "feature role"]  # positive activation
    at: Float[Tensor, "feature token"]  # positive activation
    after: Float[Tensor, "feature token"]
    places: Int[Tensor, " role"]
    seen: Int[Tensor, "where token"]  # how often a token is at a position, and before one

    @classmethod
    def empty(cls, d_sae: int, bins: int, d_vocab: int) -> "RoleTally":
        """Return the tally of no text."""
        n = len(ROLES)
        tables = (torch.zeros(d_sae, d_vocab, dtype=torch.float32) for _ in range(2))
        return cls(
            torch.zeros(d_sae, bins, n, dtype=torch.int32), torch.zeros(d_sae, n, dtype=torch.float64), *tables,
            torch.zeros(n, dtype=torch.int64), torch.zeros(2, d_vocab, dtype=torch.int64),
        )  # fmt: skip

    def add(self, windows: Windows, marks: Bool[Tensor, "row seq role"], active: Active) -> None:
        """Take in windows, the marks of their roles (`Roles.of`), and the activations there."""
        row, position, feature, value, bins = active
        tokens, counts = windows.tokens, windows.counts
        positive = value.clamp(min=0).double()
        self.places += marks.sum((0, 1))
        held = marks[row, position].nonzero(as_tuple=True)  # activation, role
        n_bins, n_roles = self.counts.shape[1:]
        key = (feature * n_bins + bins)[held[0]] * n_roles + held[1]
        self.counts += torch.bincount(key, minlength=self.counts.numel()).view_as(self.counts)
        key = feature[held[0]] * n_roles + held[1]
        self.mass += torch.bincount(key, positive[held[0]], minlength=self.mass.numel()).view_as(self.mass)
        later = position > 0
        d_vocab = self.at.shape[1]
        for table, kept, before in ((self.at, slice(None), 0), (self.after, later, 1)):
            token = tokens[row[kept], position[kept] - before]
            table.view(-1).index_add_(0, feature[kept] * d_vocab + token, positive[kept].float())
        self.seen[0] += torch.bincount(tokens[counts], minlength=d_vocab)
        self.seen[1] += torch.bincount(tokens[:, :-1][counts[:, 1:]], minlength=d_vocab)

    def scores(self, histogram: Int[Tensor, "feature bin"], positions: int) -> RoleScores:
        """Return what the counts say, given the histogram of all activations that are not zero."""
        total = self.at.double().sum(1)
        at, after = (
            _shares(table, seen / positions, total)
            for table, seen in zip((self.at, self.after), self.seen, strict=True)
        )
        told = auroc_of_counts(self.counts, histogram, self.places, positions)
        places = dict(zip(ROLES, self.places.tolist(), strict=True))
        return RoleScores(places, positions, told, (self.mass / total[:, None]).nan_to_num(0).float(), at, after)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is counted; of the tables only what is not zero."""
        found = {"roles.counts": self.counts, "roles.mass": self.mass}
        found |= {"roles.places": self.places, "roles.seen": self.seen}
        for name in ("at", "after"):
            flat = getattr(self, name).view(-1)
            index = flat.nonzero()[:, 0]
            found |= {f"roles.{name}.index": index if len(flat) > 2**31 else index.int()}
            found |= {f"roles.{name}.value": flat[index]}
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        for name in ("counts", "mass", "places", "seen"):
            setattr(self, name, tensors[f"roles.{name}"])
        for name in ("at", "after"):
            table = getattr(self, name)
            table.zero_().view(-1)[tensors[f"roles.{name}.index"].long()] = tensors[f"roles.{name}.value"]


def _shares(
    table: Float[Tensor, "feature token"], base: Float[Tensor, " token"], total: Float[Tensor, " feature"]
) -> TokenShares:
    share = (table / total[:, None]).nan_to_num(0).float()
    best = (share - base.to(share)).topk(min(KEPT, share.shape[1]), dim=1).indices
    return TokenShares(best, share.gather(1, best), base.to(share).expand_as(share).gather(1, best))


def auroc_of_counts(
    inside: Int[Tensor, "feature bin role"],
    overall: Int[Tensor, "feature bin"],
    places: Int[Tensor, " role"],
    positions: int,
) -> Float[Tensor, "feature role"]:
    """Return the AUROC of activations at a role's positions against all others, those of one bin counting as ties.

    Args:
        inside: Histogram of the activations that are not zero, at positions of each role; the first bin is of those
            below zero.
        overall: The same at all positions.
        places: Positions of each role.
        positions: All positions.
    """
    everything = overall.sum(1)
    zero = (places - inside.sum(1))[:, None]
    others = positions - everything[:, None] - zero[:, 0]
    ours = torch.cat((inside[:, :1], zero, inside[:, 1:]), 1).double()
    rest = overall[:, :, None] - inside
    rest = torch.cat((rest[:, :1], others[:, None], rest[:, 1:]), 1).double()
    wins = (ours * (rest.cumsum(1) - rest / 2)).sum(1)
    return (wins / (places * (positions - places))).float()
