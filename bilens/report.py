"""Records in, one self-contained HTML file out."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import plotly.graph_objects as go
import torch
from plotly.offline import get_plotlyjs
from torch import Tensor

from . import plots
from .circuits import FeatureLayer, NegationCircuit, Outliers, Prediction, pairs, predict, top_eigen
from .interactions import Interactions
from .saes import Contexts

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; background: #f5f7fa; margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 24px; }
section, details {
  background: #fff; border: 1px solid #e4e7eb; border-radius: 8px; padding: 16px 24px; margin: 16px 0;
}
summary { cursor: pointer; font-weight: 600; }
summary small, .muted { color: #616e7c; font-weight: 400; }
table { border-collapse: collapse; margin: 8px 0; }
th, td { padding: 3px 14px 3px 0; text-align: left; vertical-align: top; }
th { border-bottom: 1px solid #cbd2d9; font-weight: 600; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
.row { display: flex; flex-wrap: wrap; gap: 12px; align-items: flex-start; }
.contexts { font-size: 13px; max-width: 520px; }
.contexts p { margin: 2px 0; }
.contexts span { border-radius: 3px; padding: 0 1px; }
h1 { font-size: 26px; } h2 { font-size: 19px; } h3 { font-size: 15px; margin: 12px 0 4px; }
"""


@dataclass(frozen=True)
class FeatureReport:
    """All that the report shows of one output feature."""

    feature: int
    label: str
    values: Tensor  # spectrum
    vectors: Tensor  # the two strongest eigenvectors
    pairs: Interactions
    prediction: Prediction


def describe(lens: FeatureLayer, feature: int, dataset: Sequence[str] | Tensor, n_pairs: int = 12) -> FeatureReport:
    """Collect the spectrum, the strongest pairs and the prediction of one output feature.

    Args:
        lens: The layer.
        feature: Output feature.
        dataset: Texts, or token windows, to test the prediction on.
        n_pairs: How many pairs.
    """
    top = top_eigen(lens, feature)
    found = pairs(lens, feature, n_pairs)
    return FeatureReport(
        feature, lens.label("out", feature), top.values, top.vectors[:2], found, predict(lens, feature, dataset)
    )


def write_report(
    path: str | Path,
    lens: FeatureLayer,
    ranking: Outliers,
    strongest: Interactions,
    features: Sequence[FeatureReport],
    negation: NegationCircuit | None = None,
    *,
    title: str = "bilens report",
    note: str = "",
) -> Path:
    """Write one HTML file that needs nothing else: the layer's ranking, features one by one, the negation circuit.

    Args:
        path: The file; it is replaced.
        lens: The layer.
        ranking: Output features by spectral outliers.
        strongest: The strongest pairs of the whole layer.
        features: What to show in detail, from `describe`.
        negation: The sentiment-negation circuit, if it has been located.
        title: Heading.
        note: A sentence on where the numbers come from.

    Returns:
        The path, absolute.
    """
    parts = [f"<h1>{escape(title)}</h1>", f"<p class=muted>{escape(note)}</p>" if note else ""]
    if negation is not None:
        parts.append(_negation(negation))
    parts += [_layer(lens, ranking, strongest), "<h2>Output features</h2>"]
    parts += [_feature(lens, one, is_open=i == 0) for i, one in enumerate(features)]
    html = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"
        f"<script>{get_plotlyjs()}</script><main>{''.join(parts)}</main></html>"
    )
    path = Path(path)
    path.write_text(html, encoding="utf-8")
    return path.resolve()


def _plot(figure: go.Figure) -> str:
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False})


def _table(header: Sequence[str], rows: Sequence[Sequence[str | float | int]]) -> str:
    def cell(value: str | float | int) -> str:
        if isinstance(value, str):
            return f"<td>{escape(value)}</td>"
        return f"<td class=n>{value:.3f}</td>" if isinstance(value, float) else f"<td class=n>{value}</td>"

    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _layer(lens: FeatureLayer, ranking: Outliers, strongest: Interactions) -> str:
    top = zip(
        ranking.feature.tolist(),
        ranking.values.tolist(),
        ranking.strength.tolist(),
        ranking.ratio.tolist(),
        strict=True,
    )
    rows = [
        (feature, lens.label("out", feature), one, two, strength, ratio)
        for (feature, (one, two), strength, ratio), _ in zip(top, range(12), strict=False)
    ]
    rows_pairs = [
        (lens.label("inp", i), "×", lens.label("inp", j), "→", lens.label("out", o), value)
        for (o, i, j, value), _ in zip(
            zip(*(part.tolist() for part in strongest), strict=True), range(12), strict=False
        )
    ]
    return (
        f"<section><h2>Layer {lens.layer}: strongest pairs of input features, over all output features</h2>"
        "<p class=muted>Coefficient of z<sub>i</sub> z<sub>j</sub> in the output feature's pre-activation, from the "
        "weights alone; every pair of every output feature was looked at.</p>"
        + _table(("input feature", "", "input feature", "", "output feature", "coefficient"), rows_pairs)
        + "<h2>Output features by spectral outliers</h2><p class=muted>|λ₁| + |λ₂| of the interaction matrix; "
        "“outlier ratio” is |λ₂| over the edge of a random matrix with the remaining eigenvalues' energy.</p>"
        + _table(("feature", "most active at", "λ₁", "λ₂", "|λ₁| + |λ₂|", "outlier ratio"), rows)
        + "</section>"
    )


def _feature(lens: FeatureLayer, one: FeatureReport, is_open: bool) -> str:
    involved = torch.stack((one.pairs.left, one.pairs.right), 1).flatten().tolist()
    involved = [i for i in dict.fromkeys(involved) if i < len(lens.writers)][:14]  # a constant leg is no feature
    directions = lens.writers[involved]
    matrix = lens.coefficients(one.feature)[involved][:, involved]
    labels = [lens.label("inp", i) for i in involved]
    cosines = torch.nn.functional.normalize(directions, dim=1) @ one.vectors[:, : directions.shape[1]].T
    names = tuple(f"v{i + 1} (λ = {value:+.2f})" for i, value in enumerate(one.values[:2].tolist()))
    rows = [
        (lens.label("inp", i), "×", lens.label("inp", j), value)
        for _, i, j, value in zip(*(part.tolist() for part in one.pairs), strict=True)
    ]
    p = one.prediction
    fit = f"two eigenvectors against text: r = {p.pearson_active:.2f} active, {p.pearson:.2f} overall"
    blocks = [_table(("input feature", "", "input feature", "coefficient"), rows)]
    if lens.out_contexts is not None:
        blocks.append(_contexts(lens, lens.out_contexts, one.feature, "Where it is most active"))
    figures = [
        plots.spectrum(one.values),
        plots.prediction(p.actual, p.predicted, f"Prediction at {p.n_active} active positions"),
        plots.interaction_matrix(matrix, labels),
        plots.cosine_plane(cosines, labels, names),
    ]
    inputs = ""
    if lens.inp_contexts is not None:
        inputs = "".join(_contexts(lens, lens.inp_contexts, i, f"Input feature {i}", n=3) for i in involved[:6])
    return (
        f"<details{' open' if is_open else ''}><summary>{one.feature} · {escape(one.label)} <small>λ "
        f"{one.values[0]:+.2f}, {one.values[1]:+.2f}; {fit}</small></summary><div class=row>{''.join(blocks)}</div>"
        f"<div class=row>{''.join(map(_plot, figures))}</div><div class=row>{inputs}</div></details>"
    )


def _contexts(lens: FeatureLayer, contexts: Contexts, feature: int, heading: str, n: int = 8) -> str:
    lines = []
    strongest = contexts.values[feature].max().item() or 1.0
    for tokens, values in zip(
        contexts.tokens[feature, :n].tolist(), contexts.values[feature, :n].tolist(), strict=True
    ):
        spans = []
        for token, value in zip(tokens, values, strict=True):
            if token < 0:
                continue
            word = lens.model.tokenizer.id_to_token(token)
            space = "" if word.startswith("##") else " "
            shade = f"background:rgba(194,65,12,{0.75 * max(value, 0) / strongest:.2f})"
            spans.append(f'{space}<span style="{shade}" title="{value:.2f}">{escape(word.removeprefix("##"))}</span>')
        if spans:
            lines.append(f"<p>{''.join(spans)}</p>")
    active = f"active at {100 * contexts.density[feature].item():.2f} % of positions"
    return (
        f"<div class=contexts><h3>{escape(heading)} <span class=muted>({active})</span></h3>"
        f"{''.join(lines) or '<p class=muted>never active in the text it was looked for</p>'}</div>"
    )


def _negation(found: NegationCircuit) -> str:
    sentences = {("plain", "positive"): "good", ("plain", "negative"): "bad"}
    sentences |= {("negated", "positive"): "not good", ("negated", "negative"): "not bad"}
    means = {sentences[cell]: value for cell, value in found.means.items()}
    rows = [
        (role, index, found.labels[role], found.auroc[role])
        for role, index in (
            ("negation", found.negation),
            ("sentiment", found.sentiment),
            ("feature", found.feature),
        )
    ]
    pair = "negation × sentiment"
    cosine = (
        ""
        if found.decoder_cosine is None
        else f" Its decoder row and that of the opposite feature have cosine {found.decoder_cosine:+.2f}."
    )
    return (
        f"<section><h2>Sentiment negation: “{sentences[found.target]}”, in layer {found.layer}</h2>"
        + _table(("role", "feature", "most active at", "AUROC"), rows)
        + f"<p>The weights give {pair} the coefficient <b>{found.coefficient:+.3f}</b> in the output feature, number "
        f"{found.rank} of all its pairs by strength. In the {100 * found.coverage:.0f} % of the template sentences "
        f"where both are active, it contributes {found.contribution:+.2f} to the pre-activation on average; the "
        f"removals below are over those.{cosine}</p><div class=row>"
        + _plot(
            plots.bars(means, "Output feature by kind of sentence", "mean pre-activation", [sentences[found.target]])
        )
        + _plot(plots.bars(found.removals, "With an input feature removed", "mean pre-activation", ["as it is"]))
        + "</div><p class=muted>Each removal was predicted from the weights and then measured by running the model; "
        f"the two differ by at most {found.prediction_error:.0e} of the pre-activation.</p></section>"
    )
