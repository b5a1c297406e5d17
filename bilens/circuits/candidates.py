"""Input features that tell negated statements and polarity, output features that tell the verdict: from text alone.

Features are looked at in two places: at the word that is said of something, and where the verdict is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bilens.models.windows import observe
from bilens.saes.collecting import auroc
from bilens.tensor.records import Record

from .groups import Group
from .layer import FeatureLayer
from .statements import MinimalPair
from .verdict import STANDARD, Asked, Readout, ask_pairs

PLACES = ("word", "readout")


@dataclass(frozen=True, eq=False)
class Seen:
    """What enters and leaves the MLPs at all positions of some statements and the prompt behind them."""

    x: dict[int, Float[Tensor, "position d_model"]]  # by layer
    y: dict[int, Float[Tensor, "position d_model"]]
    statement: Int[Tensor, " position"]  # number of the statement
    at: dict[str, Bool[Tensor, " position"]]  # by place: the word itself, the last token of the prompt
    around: dict[str, Bool[Tensor, " position"]]  # by place: the whole statement, the whole prompt

    @classmethod
    @torch.no_grad()
    def of(cls, lenses: Mapping[int, FeatureLayer], asked: Asked) -> "Seen":
        """Run the statements as far as the last of the layers."""
        model = next(iter(lenses.values())).model
        hooks = {layer: (lens.hook_in, lens.hook_out) for layer, lens in lenses.items()}
        parts: list[list[Tensor]] = []
        for rows, some in asked.batches():
            found = observe(model, some.windows, [hook for both in hooks.values() for hook in both])
            row, seq = some.windows.counts.nonzero(as_tuple=True)
            where = [rows[row], seq == some.word[row], seq == some.last[row], some.statement[row, seq]]
            parts.append([found[hook][row, seq] for both in hooks.values() for hook in both] + where)
        *values, statement, word, last, inside = (torch.cat(part) for part in zip(*parts, strict=True))
        x, y = (dict(zip(hooks, values[i::2], strict=True)) for i in (0, 1))
        return cls(x, y, statement, {"word": word, "readout": last}, {"word": inside, "readout": ~inside})


@dataclass(frozen=True, eq=False, repr=False)
class Candidates(Record):
    """Features of one layer in one place, weighted by how well they tell (AUROC less one half)."""

    layer: int
    place: str
    negators: Group  # higher in negated statements, of good words and of bad ones
    sentiment: Group  # of the input: the polarity of the word in plain statements, positive for good
    carriers: Group  # of the output: the verdict in all statements, positive for good

    def __bool__(self) -> bool:
        return bool(len(self.negators.features) and len(self.sentiment.features))


@torch.no_grad()
def candidates(
    lenses: Mapping[int, FeatureLayer],
    pairs: Sequence[MinimalPair],
    readout: Readout = STANDARD,
    *,
    tells: float | None = None,
    most: int = 64,
    carriers: int = 4,
) -> list[Candidates]:
    """Choose features by what they tell of minimal pairs, in every layer and place; the weights are not looked at.

    Negators are the features whose AUROC for negated statements exceeds one half by `tells` among good words and among
    bad ones, so that neither the polarity nor the verdict can pass for negation. Sentiment features are those whose
    AUROC for good words differs as much from one half among plain statements, and that are no negators; carriers the
    output features whose AUROC for a good verdict differs most from one half among all statements.

    Args:
        lenses: Layers of one model.
        pairs: The minimal pairs.
        readout: What follows the statements.
        tells: Least `|AUROC - ½|`; if `None`, 2.5 standard errors of a feature that tells nothing, at least 0.1.
        most: At most so many of each kind, the strongest.
        carriers: How many output features.
    """
    seen = Seen.of(lenses, ask_pairs(next(iter(lenses.values())).model, pairs, readout))
    good = torch.tensor([pair.polarity > 0 for pair in pairs] * 2, device=seen.statement.device)
    negated = torch.arange(2 * len(pairs), device=good.device) >= len(pairs)
    least = min(sum(pair.polarity == one for pair in pairs) for one in (1, -1))
    tells = max(0.1, 2.5 * ((2 * least + 1) / (12 * least**2)) ** 0.5) if tells is None else tells
    found = []
    for layer, lens in lenses.items():
        for place in PLACES:
            at = seen.at[place]
            chosen = seen.statement[at]
            g, n = good[chosen], negated[chosen]
            z = lens.codes(seen.x[layer][at])
            turned = torch.stack([auroc(z[n & one], z[~n & one]) - 0.5 for one in (g, ~g)]).amin(0)
            told = auroc(z[~n & g], z[~n & ~g]) - 0.5
            told = told.masked_fill(turned > tells, 0)
            carried = lens.outputs(seen.x[layer][at], seen.y[layer][at])
            verdict = auroc(carried[g != n], carried[g == n]) - 0.5
            groups = (
                _strongest("negators", turned.clamp(min=0), tells, most).named(lens.name),
                _strongest("sentiment", told, tells, most).named(lens.name),
                _strongest("carriers", verdict, tells, carriers),
            )
            found.append(Candidates(layer, place, *groups))
    return found


def _strongest(role: str, told: Float[Tensor, " feature"], least: float, most: int) -> Group:
    features = told.abs().argsort(descending=True, stable=True)[:most]
    features = features[told[features].abs() > least].cpu()
    return Group(role, features, told.cpu()[features].float())
