"""What an input feature modifies: the default features of a layer that it changes most, and what activates those."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bilens.models.texts import Texts
from bilens.models.windows import Windows
from bilens.saes.naming import word
from bilens.saes.wording import logit_effects
from bilens.tensor.defaults import FactorFeatures, Method, Modified, Side, default_features, most_modified
from bilens.tensor.records import Record, tabular

from .layer import FeatureLayer
from .records import plain

_TOKENS = 3  # by which a default feature is named


@tabular()
class Partner(NamedTuple):
    """An input feature that activates a default feature, at positions where another one modifies it."""

    default: int
    feature: int
    name: str
    activation: float  # of the default feature, per unit of this one's code
    together: float  # share of the positions with the modifying feature at which this one is active too
    by_chance: float  # share of all positions at which it is


@dataclass(frozen=True, repr=False, eq=False)
class Modification(Record, rows="default", along=("modified", "names"), unit="default features"):
    """The default features that an input feature or a direction modifies most, most first, and by what they are active.

    `partners` is empty without text.
    """

    name: str
    defaults: FactorFeatures
    modified: Modified
    names: tuple[str, ...]  # of each default feature: the input feature that activates it most, the tokens it promotes
    partners: tuple[Partner, ...]

    def __repr__(self) -> str:
        first = f"; first: {self.names[0]}" if self.names else ""
        return f"Modification({self.name!r}: {len(self.names)} default features, {len(self.partners)} partners{first})"

    def to_dict(self) -> dict[str, Any]:
        """Return names and numbers, without the default features themselves."""
        found = self.modified
        rows = zip(self.names, found.feature, found.change, found.excess, found.gain, strict=True)
        keys = ("name", "default", "change", "excess", "gain")
        listed = [dict(zip(keys, row, strict=True)) for row in rows]
        return plain({"feature": self.name, "modified": listed, "partners": self.partners})


# seven parameters: what is modified, in which reading of the layer, and on which text
@torch.no_grad()
def modified(
    lens: FeatureLayer,
    feature: int | Float[Tensor, " d_model"],
    k: int = 10,
    texts: Texts | None = None,
    *,
    side: Side = "right",
    method: Method = "svd",
    generator: torch.Generator | None = None,
) -> Modification:
    """Return the default features that an input feature modifies most (2305.03452, equation 16 and what follows it).

    One factor of the layer, `W x`, gives default features, the other multiplies them: `change_i` is what a unit of the
    input feature adds to, or takes from, what default feature i writes at its usual strength (`most_modified`). With
    text, default features are those of what enters the MLP there, and `partners` are the pairs that the note asks for:
    input features d_l, often active together with this one, by which a default feature is both among the most modified
    by this one and among the most activated.

    Args:
        lens: The layer.
        feature: Input feature, or a direction at the MLP's input.
        k: How many default features.
        texts: Texts, or windows of token ids; needed for `method="ica"`, and for partners.
        side: Which factor is the default.
        method: How default features are found, as for `default_features`.
        generator: Where ICA starts from.

    Raises:
        ValueError: No such feature, a direction of another width, `k` below 1, or ICA without text.
        TypeError: The layer is not bilinear.
    """
    if isinstance(feature, int):
        lens.check_feature("inp", feature)
        direction, name = lens.writers[feature], lens.name("inp", feature)
    else:
        direction, name = feature.to(lens.writers), "a direction"
    windows = None if texts is None else Windows.of(lens.model, texts)
    inputs = None if windows is None else lens.at_positions(windows, lambda x, y: lens.entering(x))
    defaults = default_features(lens.tensor, method, inputs=inputs, side=side, generator=generator)
    found = most_modified(lens.tensor, defaults, direction, k)
    activated = defaults.readers[found.feature, : lens.writers.shape[1]] @ lens.writers.T
    names = _names(lens, defaults, found, activated)
    with_text = windows is not None and isinstance(feature, int)
    partners = _partners(lens, feature, windows, found, activated) if with_text else ()
    return Modification(name, defaults, found, names, partners)


def _names(
    lens: FeatureLayer, defaults: FactorFeatures, found: Modified, activated: Float[Tensor, "k feature"]
) -> tuple[str, ...]:
    """Name default features by the input feature that activates each most, and by the tokens that it promotes."""
    written = defaults.patterns[found.feature] @ lens.tensor.down.T
    signs = activated.gather(1, activated.abs().argmax(1, keepdim=True)).sign()  # as that feature activates it
    promoted = logit_effects(lens.model, written * signs).topk(_TOKENS, dim=1).indices.tolist()
    first = [lens.name("inp", index) for index in activated.abs().argmax(1).tolist()]
    if lens.model.tokenizer is None:
        return tuple(first)
    words = (" / ".join(word(lens.model, token) for token in tokens) for tokens in promoted)
    return tuple(f"{one} → {told}" for one, told in zip(first, words, strict=True))


def _partners(
    lens: FeatureLayer,
    feature: int,
    windows: Windows,
    found: Modified,
    activated: Float[Tensor, "k feature"],
    most: int = 3,
) -> tuple[Partner, ...]:
    """Return, of each default feature, the input features by which it is most active at the feature's own positions.

    They are ranked by the mean absolute activation of the default feature that they give there.
    """
    active, everywhere, sizes, n, m = _together(lens, feature, windows)
    if not n:
        return ()
    strength = activated.abs() * (sizes / n)
    strength[:, feature] = 0
    partners = []
    for row, default in enumerate(found.feature.tolist()):
        for index in strength[row].topk(min(most, strength.shape[1])).indices.tolist():
            if strength[row, index] > 0:
                numbers = (activated[row, index].item(), (active[index] / n).item(), (everywhere[index] / m).item())
                partners.append(Partner(default, index, lens.name("inp", index), *numbers))
    return tuple(partners)


def _together(lens: FeatureLayer, feature: int, windows: Windows) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Count where each input feature is active: with a feature, anywhere; sum its codes there; and count positions."""
    sums: Sequence[Tensor] = [lens.writers.new_zeros(len(lens.writers), dtype=torch.float64) for _ in range(3)]
    counts = [0, 0]

    def add(x: Tensor, y: Tensor) -> Tensor:
        z = lens.codes(x).double()
        here = z[:, feature] != 0
        sums[0].add_((z[here] != 0).sum(0))
        sums[1].add_((z != 0).sum(0))
        sums[2].add_(z[here].abs().sum(0))
        counts[0] += int(here.sum())
        counts[1] += len(z)
        return here

    lens.at_positions(windows, add)
    return sums[0], sums[1], sums[2].to(lens.writers), *counts
