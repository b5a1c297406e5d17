"""What the sections of the report show, as values for their templates."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bilens.circuits.discovery import Discoveries
from bilens.circuits.findings import Finding
from bilens.circuits.layer import FeatureLayer
from bilens.circuits.spectral import Outliers
from bilens.circuits.trial import CircuitTest
from bilens.tensor.interactions import Interactions

from . import plots
from .drawing import graph
from .parts import Figure, Link, Table, rows_of, to_card

_SHOWN = 14  # input features of a heat map and of the graph's pairs
_NONE = float("nan")


def summary(findings: Sequence[Finding]) -> Table:
    """Return the findings, a row each."""
    rows = []
    for number, one in enumerate(findings, 1):
        first = one.discoveries[0] if one.discoveries else None
        motif = ("none", _NONE, _NONE) if first is None else (first.motif, first.p, first.q)
        test = _NONE if one.tested is None else one.tested.percentile["kl"]
        link = Link(f"{one.feature} {one.label}", f"#finding-{number}")
        rows.append((link, *motif, *one.values[:2].tolist(), one.prediction.pearson_active, test))
    header = ("output feature", "motif", "p", "q", "λ₁", "λ₂", "r active, k = 2", "KL percentile")
    caption = "Motifs from the weights, with p and q; prediction by two eigenvectors; pair removed, among matched pairs"
    return Table(caption, header, rows)


# -- one finding ------------------------------------------------------------------------------------------------------


def finding(lens: FeatureLayer, one: Finding, number: int, null: Float[Tensor, "2 inp"] | None) -> dict[str, Any]:
    """Return the section of one output feature; `null` is what `null_spectrum` returned."""
    rows = [(to_card(lens, "inp", i), to_card(lens, "inp", j), value) for _, i, j, value in rows_of(one.pairs)]
    header = ("input feature", "× input feature", "coefficient")
    shown = {"number": number, "found": one, "motifs": one.motifs, "graph": graph(lens, one)}
    shown |= {"pairs": Table("Strongest pairs of input features, from the weights", header, rows)}
    shown |= {"figures": _figures(lens, one, null), "card": to_card(lens, "out", one.feature)}
    if one.tested is not None:
        shown |= {"edits": _edits(one.tested), "tests": _tests(one.tested)}
    return shown


def _figures(lens: FeatureLayer, one: Finding, null: Tensor | None) -> list[Figure]:
    """Draw heat map, spectrum, plane of the two strongest eigenvectors, and prediction."""
    involved = _involved(lens, one)
    labels = [lens.name("inp", i) for i in involved]
    matrix = lens.coefficients(one.feature)[involved][:, involved]
    directions = torch.nn.functional.normalize(lens.writers[involved], dim=1)
    cosines = directions @ one.vectors[:, : directions.shape[1]].T
    names = tuple(f"v{i + 1} (λ = {value:+.2f})" for i, value in enumerate(one.values[:2].tolist()))
    band = None if null is None else null * one.values.norm()
    (_, _, _, strongest), *_ = rows_of(one.pairs, 1)
    predicted = one.prediction
    return [
        Figure.of(
            plots.interaction_matrix(matrix, labels),
            f"Interactions of {len(involved)} input features; the strongest pair has coefficient {strongest:+.3f}",
        ),
        Figure.of(plots.spectrum(one.values, null=band), _says_spectrum(one, band)),
        Figure.of(
            plots.cosine_plane(cosines, labels, names),
            "Input features by their cosine with the two eigenvectors of largest magnitude",
        ),
        Figure.of(
            plots.prediction(predicted.actual, predicted.predicted, "Prediction by two eigenvectors"),
            f"Activation against its prediction by two eigenvectors: r = {predicted.pearson_active:.2f} at "
            f"{predicted.n_active} active positions",
        ),
    ]


def _says_spectrum(one: Finding, band: Tensor | None) -> str:
    text = f"Eigenvalues; the two strongest are {one.values[0]:+.3f} and {one.values[1]:+.3f}"
    return text if band is None else f"{text}, where random output directions of the same norm reach {band.max():.3f}"


def _involved(lens: FeatureLayer, one: Finding) -> list[int]:
    """Return the input features of a finding's strongest pairs; a constant leg is no feature."""
    legs = torch.stack((one.pairs.left, one.pairs.right), 1).flatten().tolist()
    return [i for i in dict.fromkeys(legs) if i < len(lens.writers)][:_SHOWN]


def null_spectrum(lens: FeatureLayer, generator: torch.Generator, n: int = 64) -> Float[Tensor, "2 inp"]:
    """Return the range of each eigenvalue, by value, for random output directions, in units of the matrix's norm."""
    directions = torch.randn(n, lens.tensor.out, generator=generator).to(lens.readers)
    values = torch.linalg.eigvalsh(lens.tensor.matrix(directions)).flip(1)
    values = values / values.norm(dim=1, keepdim=True)
    return torch.stack((values.amin(0), values.amax(0)))


def _edits(test: CircuitTest) -> Table:
    """Return what each edit of the running model did."""
    rows = []
    for edit in test.edits.values():
        effect, ranks = {name: value[0].item() for name, value in edit.effect._asdict().items()}, edit.percentile
        rows.append((edit.name, edit.correlation, edit.error, effect["kl"], ranks["kl"], effect["loss"], ranks["loss"]))
    header = ("edit", "r predicted, measured", "largest error", "KL", "among random", "Δ loss", "among random")
    return Table("Edits at those positions", header, rows)


def _tests(test: CircuitTest) -> list[Figure]:
    """Draw predicted against measured change, the prediction by k eigenvectors, and the effect among the controls."""
    c, pair, low = test.circuit, test.edits["pair"], test.low_rank
    figures = [
        Figure.of(
            plots.predicted_measured(pair.predicted, pair.measured),
            f"Without {c.left} × {c.right}: predicted and measured change correlate {pair.correlation:.4f} at "
            f"{len(pair.measured)} positions",
        ),
        Figure.of(
            plots.low_rank(low.k, low.pearson_active, low.pearson),
            f"Prediction by k eigenvectors: r = {low.pearson_active.value[0]:.2f} for k = {low.k[0]}, "
            f"{low.pearson_active.value[-1]:.2f} for k = {low.k[-1]}, at {low.n_active} active positions",
        ),
    ]
    if n := len(test.matched.left):
        kl, percentile = pair.effect.kl[0].item(), test.percentile["kl"]
        drawn = plots.among(kl, test.matched.effects.kl, "Effect on the predictions", "KL, nats")
        says = f"KL of removing the pair, {kl:.3g}, among {n} matched pairs: percentile {percentile:.0f}"
        figures.append(Figure.of(drawn, says))
    return figures


# -- the whole layer --------------------------------------------------------------------------------------------------


def tables(
    lens: FeatureLayer,
    ranking: Outliers | None,
    strongest: Interactions | None,
    discoveries: Discoveries | None = None,
    n: int = 12,
) -> list[Table]:
    """Return the strongest pairs of the layer, and its output features by spectral outliers.

    Where the search looked at some output features only, so did the others, and the captions say so.
    """
    found, some, every = [], "", "all output features, every one looked at"
    if discoveries is not None and discoveries.outputs is not None:
        every = f"{discoveries.looked_at} output features; the others are left out"
        some = f", among {every}"
    if strongest is not None:
        rows = [
            (f"{i} {lens.name('inp', i)}", f"{j} {lens.name('inp', j)}", f"{o} {lens.name('out', o)}", value)
            for o, i, j, value in rows_of(strongest, n)
        ]
        header = ("input feature", "× input feature", "→ output feature", "coefficient")
        found.append(Table(f"Strongest pairs over {every}", header, rows))
    if ranking is not None:
        columns = (ranking.feature.tolist(), *ranking.values.T.tolist(), ranking.strength.tolist())
        rows = [
            (f"{feature} {lens.name('out', feature)}", *numbers)
            for feature, *numbers in list(zip(*columns, ranking.ratio.tolist(), strict=True))[:n]
        ]
        header = ("output feature", "λ₁", "λ₂", "|λ₁| + |λ₂|", "outlier ratio")
        ratio = "the ratio is |λ₂| over the edge of the other eigenvalues' bulk"
        caption = f"Output features by spectral outliers{some}; {ratio}"
        found.append(Table(caption, header, rows))
    return found
