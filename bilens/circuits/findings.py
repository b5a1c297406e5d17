"""All that is known of a few output features, in one record each: spectrum, pairs, motifs, prediction, test."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from bilens.models.texts import Texts
from bilens.tensor.interactions import Interactions
from bilens.tensor.records import Record, Rows

from .discovery import Discoveries, Discovery
from .layer import FeatureLayer
from .records import plain
from .spectral import Prediction, pairs_of, predict_all
from .trial import CircuitTest


@dataclass(frozen=True, repr=False, eq=False)
class Finding(Record):
    """All that the report shows of one output feature."""

    feature: int
    label: str
    discoveries: tuple[Discovery, ...]  # what the search found in it, the most significant first
    names: tuple[tuple[str, ...], ...]  # of the groups of each
    values: Float[Tensor, " inp"]  # spectrum
    vectors: Float[Tensor, "2 inp"]  # the two strongest eigenvectors
    pairs: Interactions
    prediction: Prediction
    tested: CircuitTest | None = None

    def __repr__(self) -> str:
        first = self.discoveries[0] if self.discoveries else None
        motif = "no motif" if first is None else f"{first.motif}, q={first.q:.2g}"
        return f"Finding(#{self.feature} {self.label!r}: {motif}, {self.prediction!r})"

    @property
    def motifs(self) -> list[dict[str, Any]]:
        """What the search found, each group with its name, as `Discovery.to_dict` has it."""
        motifs = [one.to_dict() for one in self.discoveries]
        for motif, names in zip(motifs, self.names, strict=True):
            motif["groups"] = [group | {"name": name} for group, name in zip(motif["groups"], names, strict=True)]
        return motifs

    def to_dict(self) -> dict[str, Any]:
        """Return everything but eigenvectors and positions; of the spectrum the eight strongest eigenvalues."""
        legs = zip(*(part.tolist() for part in (self.pairs.left, self.pairs.right, self.pairs.value)), strict=True)
        about = {"feature": self.feature, "label": self.label, "eigenvalues": self.values[:8], "motifs": self.motifs}
        about |= {"pairs": [dict(zip(("left", "right", "coefficient"), row, strict=True)) for row in legs]}
        return plain(about | self.prediction.to_dict() | {"test": self.tested and self.tested.to_dict()})


def describe(
    lens: FeatureLayer,
    features: Sequence[int],
    texts: Texts,
    discoveries: Discoveries | None = None,
    tested: Sequence[CircuitTest] = (),
    n_pairs: int = 12,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Rows[Finding]:
    """Collect spectrum, strongest pairs, prediction on text, motifs and tests of some output features.

    Args:
        lens: The layer.
        features: Output features.
        texts: Texts, or token windows, to test the predictions on.
        discoveries: What `circuits.search` found in the layer.
        tested: What `circuits.test` gave, of any of the features.
        n_pairs: How many pairs.
        progress: Show how far the predictions are.
        checkpoint: Folder to keep their state in, from which the same call goes on after a kill.

    Raises:
        ValueError: No such output feature, or a checkpoint that is damaged or of another call.
    """
    tests = {test.circuit.feature: test for test in tested}
    found = discoveries.found if discoveries is not None else ()
    findings = Rows()
    strongest = pairs_of(lens, features, n_pairs)
    predicted = predict_all(lens, features, texts, progress=progress, checkpoint=checkpoint)
    for feature, among, prediction in zip(features, strongest, predicted, strict=True):
        top, motifs = lens.eigen(feature), tuple(one for one in found if one.out == feature)
        names = tuple(
            tuple(lens.name("inp", group.features.tolist(), group.weights.tolist()) for group in one.groups)
            for one in motifs
        )
        one = Finding(
            feature, lens.name("out", feature), motifs, names, top.values, top.vectors[:2],
            among, prediction, tests.get(feature),
        )  # fmt: skip
        findings.append(one)
    return findings
