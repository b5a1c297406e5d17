"""Minimal pairs without the products of negators and sentiment in all layers, beside random products."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bilens.tensor.records import Record
from bilens.tensor.statistics import pearson

from .candidates import PLACES, Candidates, Seen
from .edits import product, without_products
from .layer import FeatureLayer
from .records import plain
from .statements import MinimalPair
from .verdict import (
    STANDARD,
    Asked,
    Edit,
    Flips,
    Readout,
    ask_pairs,
    flips,
    log_odds,
    verdict_direction,
    verdict_logits,
)

NEAR = 16  # features of the next higher and lower activity that a control may take


@dataclass(frozen=True, eq=False, repr=False)
class Products(Record):
    """Two groups of one layer whose products are taken out in one place: in the statement, or in the prompt."""

    layer: int
    place: str
    left: tuple[int, ...]
    right: tuple[int, ...]
    scale: float = 1.0

    @classmethod
    def of(cls, one: Candidates) -> "Products":
        """Return those of a layer's candidates."""
        return cls(one.layer, one.place, tuple(one.negators.features.tolist()), tuple(one.sentiment.features.tolist()))


@dataclass(frozen=True, eq=False)
class FlipTest(Record, rows="pair", tells=("correlation",)):
    """Flips of minimal pairs as the model is, without the circuit's products, and without as many random products."""

    products: tuple[Products, ...]
    before: Flips
    after: Flips
    by_place: dict[str, Flips]  # without the products in one place only
    controls: tuple[Flips, ...]
    matched: tuple[Flips, ...]  # the controls at the circuit's strength, layer by layer
    predicted: Float[Tensor, " pair"]  # change of a negated statement's log-odds by the direct path, from the weights
    measured: Float[Tensor, " pair"]

    @property
    def correlation(self) -> float:
        """Pearson correlation of predicted and measured change over the negated statements."""
        return pearson(self.predicted, self.measured)

    def __repr__(self) -> str:
        least = min((one.all for one in (*self.controls, *self.matched)), default=float("nan"))
        return (
            f"FlipTest({len(self.measured)} pairs: flips {self.before.all:.0%} -> {self.after.all:.0%}, plain "
            f"{self.before.plain:.0%} -> {self.after.plain:.0%}; {len(self.controls)} controls keep at least "
            f"{least:.0%})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return counts and shares, and the sizes of the groups."""
        sizes = [
            {"layer": one.layer, "place": one.place, "negators": len(one.left), "sentiment": len(one.right)}
            for one in self.products
        ]
        about = {"products": sizes, "before": self.before.to_dict(), "after": self.after.to_dict()}
        about |= {"by_place": {place: one.to_dict() for place, one in self.by_place.items()}}
        about |= {name: [one.to_dict() for one in getattr(self, name)] for name in ("controls", "matched")}
        return plain(about | {"correlation": self.correlation, "pairs": len(self.measured)})


def edit_of(lenses: Mapping[int, FeatureLayer], products: Sequence[Products]) -> Edit:
    """Return the edit that takes products out, for `verdict_logits`."""

    @contextmanager
    def edit(asked: Asked) -> Iterator[None]:
        with ExitStack() as edits:
            for place, where in zip(PLACES, (asked.statement, asked.prompt), strict=True):
                some = [one for one in products if one.place == place]
                if some:
                    groups = {one.layer: (one.left, one.right) for one in some}
                    scale = {one.layer: one.scale for one in some}
                    edits.enter_context(without_products(lenses, groups, where, scale))
            yield

    return edit


# seven parameters: what is taken out of what, on which pairs, and against what
@torch.no_grad()
def flip_test(
    lenses: Mapping[int, FeatureLayer],
    chosen: Sequence[Candidates],
    pairs: Sequence[MinimalPair],
    *,
    generator: torch.Generator,
    readout: Readout = STANDARD,
    n_controls: int = 40,
) -> FlipTest:
    """Take the products of negators and sentiment out of all layers at once, and see which pairs still flip.

    A control takes out, in the same layers and places, the products of two groups as large, each feature replaced by a
    random one that is about as active in that place; once as it is, and once at the circuit's strength: scaled, layer
    by layer, to the root mean square of what the circuit's products write there.

    Args:
        lenses: Layers of one model.
        chosen: The features, from other pairs (`candidates`).
        pairs: The pairs that are tested.
        generator: Source of the controls.
        readout: How the model is asked.
        n_controls: How many.

    Raises:
        ValueError: No layer has negators and sentiment features.
    """
    products = [Products.of(one) for one in chosen if one]
    if not products:
        raise ValueError("chosen must hold a layer with negators and sentiment features, got none")
    model = lenses[products[0].layer].model
    asked = ask_pairs(model, pairs, readout)

    def judge(some: Sequence[Products]) -> Float[Tensor, " statement"]:
        return log_odds(model, verdict_logits(model, asked, edit_of(lenses, some) if some else None), readout)

    def count(odds: Float[Tensor, " statement"]) -> Flips:
        return flips(pairs, *odds.split(len(pairs)))

    before, after = judge([]), judge(products)
    seen = Seen.of(lenses, asked)
    controls = [matched_products(lenses, products, seen, generator) for _ in range(n_controls)]
    return FlipTest(
        tuple(products),
        count(before),
        count(after),
        {place: count(judge([one for one in products if one.place == place])) for place in PLACES},
        tuple(count(judge(some)) for some in controls),
        tuple(count(judge(at_strength(lenses, some, products, seen))) for some in controls),
        predicted_change(lenses, products, seen, readout)[len(pairs) :],
        (after - before)[len(pairs) :],
    )


def matched_products(
    lenses: Mapping[int, FeatureLayer], products: Sequence[Products], seen: Seen, generator: torch.Generator
) -> list[Products]:
    """Replace each feature by a random one that is about as active in that place, and is in neither group."""
    found = []
    for one in products:
        z = lenses[one.layer].codes(seen.x[one.layer][seen.around[one.place]])
        activity = z.abs().mean(0).cpu()
        taken, groups = {*one.left, *one.right}, []
        order = activity.argsort(descending=True, stable=True).tolist()
        rank = {feature: i for i, feature in enumerate(order)}
        for group in (one.left, one.right):
            groups.append(tuple(_other(order, rank[feature], taken, activity, generator) for feature in group))
        found.append(Products(one.layer, one.place, *groups))
    return found


def _other(
    order: Sequence[int], rank: int, taken: set[int], activity: Float[Tensor, " feature"], generator: torch.Generator
) -> int:
    """Draw a feature of a similar rank that is not taken, and take it; wider where all near ones are taken."""
    width = NEAR
    while not (free := [f for f in order[max(0, rank - width) : rank + width + 1] if f not in taken and activity[f]]):
        if width > len(order):
            raise ValueError("statements must activate more features than the circuit's for controls, all are taken")
        width *= 2
    feature = free[int(torch.randint(len(free), (1,), generator=generator))]
    taken.add(feature)
    return feature


def at_strength(
    lenses: Mapping[int, FeatureLayer], some: Sequence[Products], like: Sequence[Products], seen: Seen
) -> list[Products]:
    """Scale products to the root mean square of what others write in the same layers and places."""
    scaled = []
    for one, other in zip(some, like, strict=True):
        strength = [_written(lenses, each, seen).norm() for each in (one, other)]
        times = (strength[1] / strength[0]).item() if strength[0] > 0 else 1.0
        scaled.append(Products(one.layer, one.place, one.left, one.right, times))
    return scaled


def _written(lenses: Mapping[int, FeatureLayer], one: Products, seen: Seen) -> Float[Tensor, "position d_model"]:
    """Return what products write at the positions of their place, in the model as it is."""
    lens = lenses[one.layer]
    return product(lens, lens.codes(seen.x[one.layer][seen.around[one.place]]), one.left, one.right)


def predicted_change(
    lenses: Mapping[int, FeatureLayer], products: Sequence[Products], seen: Seen, readout: Readout = STANDARD
) -> Float[Tensor, " statement"]:
    """Return `-Σ_layers verdict direction · 2 B(x_A, x_B)` at the readout: the direct path, the final norm left out."""
    at = seen.at["readout"]
    change = None
    for one in products:
        if one.place != "readout":
            continue
        lens = lenses[one.layer]
        written = product(lens, lens.codes(seen.x[one.layer][at]), one.left, one.right)
        part = -(written @ verdict_direction(lens.model, readout).to(written))
        change = part if change is None else change + part
    n = int(seen.statement.max()) + 1
    found = seen.x[products[0].layer].new_zeros(n)
    if change is not None:
        found[seen.statement[at]] = change.to(found)
    return found
