"""Records in, one self-contained HTML file out: it loads nothing, and reads with a keyboard or a screen reader."""

import base64
import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from plotly.offline import get_plotlyjs
from torch import Tensor

from bilens.circuits.couplings import CouplingTest, NegationCouplings
from bilens.circuits.discovery import Discoveries, Discovery
from bilens.circuits.groups import Group
from bilens.circuits.layer import FeatureLayer
from bilens.circuits.spectral import Outliers, Prediction, pairs, predict_all
from bilens.circuits.trial import CircuitTest
from bilens.saes.cards import FeatureCards
from bilens.tensor.interactions import Interactions

from . import plots

_SHOWN = 14  # input features of a heat map and of the graph's pairs
_MEMBERS = 12  # features of a coupling's groups that are named


@dataclass(frozen=True, repr=False)
class Finding:
    """All that the report shows of one output feature."""

    feature: int
    label: str
    discoveries: tuple[Discovery, ...]  # what the search found in it, the most significant first
    values: Float[Tensor, " inp"]  # spectrum
    vectors: Float[Tensor, "2 inp"]  # the two strongest eigenvectors
    pairs: Interactions
    prediction: Prediction
    tested: CircuitTest | None = None

    def __repr__(self) -> str:
        first = self.discoveries[0] if self.discoveries else None
        motif = "no motif" if first is None else f"{first.motif}, q={first.q:.2g}"
        return f"Finding(#{self.feature} {self.label!r}: {motif}, {self.prediction!r})"


def describe(
    lens: FeatureLayer,
    features: Sequence[int],
    dataset: Sequence[str] | Int[Tensor, "row seq"],
    discoveries: Discoveries | None = None,
    tested: Sequence[CircuitTest] = (),
    n_pairs: int = 12,
) -> list[Finding]:
    """Collect spectrum, strongest pairs, prediction on text, motifs and tests of some output features.

    Args:
        lens: The layer.
        features: Output features.
        dataset: Texts, or token windows, to test the predictions on.
        discoveries: What `circuits.search` found in the layer.
        tested: What `circuits.test` gave, of any of the features.
        n_pairs: How many pairs.
    """
    tests = {test.circuit.feature: test for test in tested}
    found = discoveries.found if discoveries is not None else ()
    findings = []
    for feature, prediction in zip(features, predict_all(lens, features, dataset), strict=True):
        top = lens.eigen(feature)
        motifs = tuple(one for one in found if one.out == feature)
        some, label = pairs(lens, feature, n_pairs), lens.name("out", feature)
        one = Finding(feature, label, motifs, top.values, top.vectors[:2], some, prediction, tests.get(feature))
        findings.append(one)
    return findings


def write_report(
    path: str | Path,
    lens: FeatureLayer,
    findings: Sequence[Finding],
    *,
    discoveries: Discoveries | None = None,
    ranking: Outliers | None = None,
    strongest: Interactions | None = None,
    couplings: NegationCouplings | None = None,
    coupling_test: CouplingTest | None = None,
    generator: torch.Generator | None = None,
    title: str = "bilens report",
    note: str = "",
) -> Path:
    """Write one HTML file of under 5 MB that needs nothing else.

    It holds the findings in the order given, each with the graph of its strongest pairs, heat map, spectrum against
    random output directions, plane of the two strongest eigenvectors, predictions and tests; the cards of all features
    in them; and tables of the whole layer.

    Args:
        path: The file; it is replaced.
        lens: The layer.
        findings: What to show in detail, from `describe`.
        discoveries: What the search found in all output features.
        ranking: Output features by spectral outliers.
        strongest: The strongest pairs of the whole layer.
        couplings: Negators and sentiment as groups, layer by layer.
        coupling_test: Their products taken out of the running model.
        generator: Of the random output directions whose spectra are drawn; no such band if `None`.
        title: Heading.
        note: A sentence on where the numbers come from.

    Returns:
        The path, absolute.
    """
    null = None if generator is None else _null_spectrum(lens, generator)
    parts = [f"<h1>{escape(title)}</h1>", f"<p class=muted>{escape(note)}</p>" if note else ""]
    parts.append(_summary(lens, findings, discoveries))
    if couplings is not None:
        parts.append(_couplings(lens, couplings, coupling_test))
    parts += [_finding(lens, one, number, null) for number, one in enumerate(findings, 1)]
    parts.append(_cards(lens, findings, [] if couplings is None else _members(lens, couplings)))
    parts.append(_layer(lens, ranking, strongest))
    path = Path(path)
    path.write_text(_page(title, "".join(parts)), encoding="utf-8")
    return path.resolve()


def _page(title: str, body: str) -> str:
    style, script = (resources.files("bilens").joinpath("assets", "report", name).read_text()
                     for name in ("style.css", "page.js"))  # fmt: skip
    library = base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{style}</style></head>'
        f'<body><a class="skip" href="#findings">Skip to the findings</a><main>{body}</main>'
        f'<script type="application/octet-stream" id="plotly">{library}</script><script>{script}</script></body></html>'
    )


# -- pieces of a page -------------------------------------------------------------------------------------------------


class _Html(str):
    """Text that is markup already."""


def _plot(figure: go.Figure, says: str) -> str:
    """Return a figure that is drawn when it comes near the screen, with a caption that says what is to be seen."""
    drawn = json.loads(figure.to_json())
    drawn["layout"].pop("template", None)
    data = json.dumps(drawn, separators=(",", ":")).replace("</", "<\\/")
    style = f"height:{drawn['layout']['height']}px"  # reserved, so that what is below does not move when it is drawn
    return (
        f'<figure><div class="plot" role="img" aria-label="{escape(says)}" style="{style}"></div>'
        f'<script type="application/json">{data}</script><figcaption>{escape(says)}</figcaption></figure>'
    )


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str | float | int]]) -> str:
    """Return a table, numbers to the right, that scrolls on a narrow screen."""

    def cell(value: str | float | int) -> str:
        if isinstance(value, str):
            return f"<td>{value if isinstance(value, _Html) else escape(value)}</td>"
        shown = "–" if value != value else f"{value:.3g}" if isinstance(value, float) else value
        return f'<td class="n">{shown}</td>'

    numeric = [not isinstance(value, str) for value in rows[0]] if rows else [False] * len(header)
    head = "".join(
        f'<th scope="col"{" class=n" if right else ""}>{escape(name)}</th>'
        for name, right in zip(header, numeric, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table><caption>{escape(caption)}</caption><tr>{head}</tr>{body}</table></div>"
    )


def _link(lens: FeatureLayer, side: str, feature: int) -> _Html:
    """Return a feature's name, as a link to its card."""
    name = f"{feature} {lens.name(side, feature)}" if feature < _n_features(lens, side) else "(constant)"
    return _Html(f'<a href="#{side}-{feature}">{escape(name)}</a>' if feature < _n_features(lens, side) else name)


def _n_features(lens: FeatureLayer, side: str) -> int:
    return len(lens.writers if side == "inp" else lens.readers)


def _rows_of(found: Interactions, n: int | None = None) -> Iterator[tuple[int, int, int, float]]:
    yield from list(zip(*(part.tolist() for part in found), strict=True))[:n]


# -- the parts of the report ------------------------------------------------------------------------------------------


def _summary(lens: FeatureLayer, findings: Sequence[Finding], discoveries: Discoveries | None) -> str:
    rows = []
    for number, one in enumerate(findings, 1):
        first = one.discoveries[0] if one.discoveries else None
        link = _Html(f'<a href="#finding-{number}">{escape(f"{one.feature} {one.label}")}</a>')
        motif = (first.motif, first.p, first.q) if first is not None else ("none", float("nan"), float("nan"))
        test = one.tested.percentile["kl"] if one.tested is not None else float("nan")
        rows.append((link, *motif, *one.values[:2].tolist(), one.prediction.pearson_active, test))
    said = "" if discoveries is None else (
        f"<p>The search scored {len(discoveries.score)} output features for {', '.join(discoveries.motifs)} against "
        f"null models ({', '.join(null.name for null in discoveries.nulls)}); it found {len(discoveries.found)} motifs "
        f"in {len({one.out for one in discoveries.found})} of them at a false discovery rate of {discoveries.fdr:g}."
        "</p>"
    )  # fmt: skip
    header = ("output feature", "motif", "p", "q", "λ₁", "λ₂", "r active, k = 2", "KL percentile")
    caption = "Motifs from the weights, with p and q; prediction by two eigenvectors; pair removed, among matched pairs"
    return (
        f'<section id="findings" aria-labelledby="h-findings"><h2 id="h-findings">Circuits of layer {lens.layer}</h2>'
        f"{said}{_table(caption, header, rows)}</section>"
    )


def _finding(lens: FeatureLayer, one: Finding, number: int, null: Tensor | None) -> str:
    involved = _involved(lens, one)
    labels = [lens.name("inp", i) for i in involved]
    matrix = lens.coefficients(one.feature)[involved][:, involved]
    directions = torch.nn.functional.normalize(lens.writers[involved], dim=1)
    cosines = directions @ one.vectors[:, : directions.shape[1]].T
    names = tuple(f"v{i + 1} (λ = {value:+.2f})" for i, value in enumerate(one.values[:2].tolist()))
    band = None if null is None else null * one.values.norm()
    strongest = next(_rows_of(one.pairs))
    figures = [
        _plot(
            plots.interaction_matrix(matrix, labels),
            f"Interactions of {len(involved)} input features; the strongest pair has coefficient {strongest[3]:+.3f}",
        ),
        _plot(plots.spectrum(one.values, null=band), _says_spectrum(one, band)),
        _plot(
            plots.cosine_plane(cosines, labels, names),
            "Input features by their cosine with the two eigenvectors of largest magnitude",
        ),
        _plot(
            plots.prediction(one.prediction.actual, one.prediction.predicted, "Prediction by two eigenvectors"),
            f"Activation against its prediction by two eigenvectors: r = {one.prediction.pearson_active:.2f} at "
            f"{one.prediction.n_active} active positions",
        ),
    ]
    table = _table(
        "Strongest pairs of input features, from the weights",
        ("input feature", "× input feature", "coefficient"),
        [(_link(lens, "inp", i), _link(lens, "inp", j), value) for _, i, j, value in _rows_of(one.pairs)],
    )
    return (
        f'<section id="finding-{number}" aria-labelledby="h-{number}"><h2 id="h-{number}">{number}. Output feature '
        f"{one.feature}: {escape(one.label)}</h2>{_motifs(lens, one)}"
        f'{_graph(lens, one)}<div class="row">{table}</div><div class="row">{"".join(figures)}</div>'
        f"{_tested(one.tested)}<p>{_link(lens, 'out', one.feature)}</p></section>"
    )


def _says_spectrum(one: Finding, band: Tensor | None) -> str:
    text = f"Eigenvalues; the two strongest are {one.values[0]:+.3f} and {one.values[1]:+.3f}"
    return text if band is None else f"{text}, where random output directions of the same norm reach {band.max():.3f}"


def _motifs(lens: FeatureLayer, one: Finding) -> str:
    """Return what the search found, group by group."""
    lines = []
    for found in one.discoveries:
        groups = "; ".join(
            f"<b>{escape(group.role)}</b> {escape(_group_name(lens, group.features, group.weights))} "
            f"({', '.join(_link_number(i) for i in group.features.tolist())})"
            for group in found.groups
        )
        lines.append(f"<li>{found.motif}, score {found.score:.3g}, p = {found.p:.2g}, q = {found.q:.2g}: {groups}</li>")
    return f"<ul>{''.join(lines)}</ul>" if lines else "<p class=muted>No motif beyond the null models.</p>"


def _group_name(lens: FeatureLayer, features: Tensor, weights: Tensor) -> str:
    return lens.name("inp", features.tolist(), weights.tolist())


def _link_number(feature: int) -> str:
    return f'<a href="#inp-{feature}">{feature}</a>'


def _involved(lens: FeatureLayer, one: Finding) -> list[int]:
    """Return the input features of a finding's strongest pairs; a constant leg is no feature."""
    legs = torch.stack((one.pairs.left, one.pairs.right), 1).flatten().tolist()
    return [i for i in dict.fromkeys(legs) if i < len(lens.writers)][:_SHOWN]


def _null_spectrum(lens: FeatureLayer, generator: torch.Generator, n: int = 64) -> Float[Tensor, "2 inp"]:
    """Return the range of each eigenvalue, by value, for random output directions, in units of the matrix's norm."""
    directions = torch.randn(n, lens.tensor.out, generator=generator).to(lens.readers)
    values = torch.linalg.eigvalsh(lens.tensor.matrix(directions)).flip(1)
    values = values / values.norm(dim=1, keepdim=True)
    return torch.stack((values.amin(0), values.amax(0)))


# -- the graph --------------------------------------------------------------------------------------------------------

_WIDE, _BOX, _STEP, _TOP = 1060, 216, 34, 16  # of the drawing, of a node, between rows, above the first


def _graph(lens: FeatureLayer, one: Finding, n: int = 8) -> str:
    """Draw the strongest pairs: input features, pairs, the output feature, the tokens it promotes. Nodes are links."""
    rows = [row for row in _rows_of(one.pairs) if max(row[1], row[2]) < len(lens.writers)][:n]
    inputs = list(dict.fromkeys(i for row in rows for i in row[1:3]))
    tokens = list(lens.out_cards[one.feature].promoted.items())[:5] if lens.out_cards is not None else []
    height = _TOP + _STEP * max(len(inputs), len(rows), len(tokens), 1)
    strongest = max((abs(row[3]) for row in rows), default=1.0)
    lines, nodes = [], []
    columns = [i * (_WIDE - _BOX) / 3 for i in range(4)]

    def y(index: int, count: int) -> float:
        return (index + 0.5) * height / max(count, 1)

    for index, feature in enumerate(inputs):
        name = f"{feature} {lens.name('inp', feature)}"
        nodes.append(_node(columns[0], y(index, len(inputs)), f"#inp-{feature}", name, f"Input feature {name}"))
    for index, (_, i, j, value) in enumerate(rows):
        at = y(index, len(rows))
        for leg in dict.fromkeys((i, j)):
            lines.append(_edge(columns[0], y(inputs.index(leg), len(inputs)), columns[1], at, value, strongest))
        lines.append(_edge(columns[1], at, columns[2], height / 2, value, strongest))
        name = f"{i} × {j}: {value:+.3f}"
        nodes.append(_node(columns[1], at, f"#inp-{i}", name, f"Pair {name}, to the first feature's card"))
    for index, (token, effect) in enumerate(tokens):
        at = y(index, len(tokens))
        lines.append(_edge(columns[2], height / 2, columns[3], at, effect, tokens[0][1]))
        says = f"Promotes {token}, logit {effect:+.2f}"
        nodes.append(_node(columns[3], at, f"#out-{one.feature}", f"{token} {effect:+.2f}", says))
    name = f"{one.feature} {one.label}"
    nodes.append(_node(columns[2], height / 2, f"#out-{one.feature}", name, f"Output feature {name}"))
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Graph of the strongest pairs">'
        f'<svg class="graph" role="group" aria-label="Input features, pairs, output feature, tokens" width="{_WIDE}" '
        f'height="{height:.0f}" viewBox="0 0 {_WIDE} {height:.0f}">{"".join(lines)}{"".join(nodes)}</svg></div>'
    )


def _node(x: float, y: float, href: str, text: str, says: str) -> str:
    shown = text if len(text) <= 31 else text[:30] + "…"
    return (
        f'<a href="{href}" aria-label="{escape(says)}"><title>{escape(says)}</title>'
        f'<rect x="{x:.0f}" y="{y - 12:.0f}" width="{_BOX}" height="24" rx="5"/>'
        f'<text x="{x + 7:.0f}" y="{y + 4:.0f}">{escape(shown)}</text></a>'
    )


def _edge(x: float, y: float, to_x: float, to_y: float, value: float, most: float) -> str:
    x, middle = x + _BOX, (x + _BOX + to_x) / 2
    sign, width = "plus" if value > 0 else "minus", 0.75 + 4 * abs(value) / most
    path = f"M{x:.0f},{y:.0f} C{middle:.0f},{y:.0f} {middle:.0f},{to_y:.0f} {to_x:.0f},{to_y:.0f}"
    return f'<path class="{sign}" d="{path}" stroke-width="{width:.1f}" stroke-opacity="0.55"/>'


# -- tests ------------------------------------------------------------------------------------------------------------


def _tested(test: CircuitTest | None) -> str:
    """Return what the test of a finding's strongest pair gave."""
    if test is None:
        return ""
    c, pair = test.circuit, test.edits["pair"]
    rows = []
    for edit in test.edits.values():
        effect = {name: value[0].item() for name, value in edit.effect._asdict().items()}
        ranks = edit.percentile
        rows.append((edit.name, edit.correlation, edit.error, effect["kl"], ranks["kl"], effect["loss"], ranks["loss"]))
    header = ("edit", "r predicted, measured", "largest error", "KL", "among random", "Δ loss", "among random")
    low = test.low_rank
    ranks, again = test.percentile, test.percentile_rescaled
    figures = [
        _plot(
            plots.predicted_measured(pair.predicted, pair.measured),
            f"Without {c.left} × {c.right}: predicted and measured change correlate {pair.correlation:.4f} at "
            f"{len(pair.measured)} positions",
        ),
        _plot(
            plots.low_rank(low.k, low.pearson_active, low.pearson),
            f"Prediction by k eigenvectors: r = {low.pearson_active.value[0]:.2f} for k = {low.k[0]}, "
            f"{low.pearson_active.value[-1]:.2f} for k = {low.k[-1]}, at {low.n_active} active positions",
        ),
    ]
    if len(test.matched.left):
        kl = pair.effect.kl[0].item()
        n = len(test.matched.left)
        says = f"KL of removing the pair, {kl:.3g}, among {n} matched pairs: percentile {ranks['kl']:.0f}"
        figures.append(_plot(plots.among(kl, test.matched.effects.kl, "Effect on the predictions", "KL, nats"), says))
    return (
        f"<h3>Its pair {c.left} × {c.right}, tested by editing the running model</h3>"
        f"<p>Active together at {test.n_pair_all} positions; edited at {test.n_pair} of them. Among "
        f"{len(test.matched.left)} pairs active there, removing this one has KL percentile {ranks['kl']:.0f} and loss "
        f"percentile {ranks['loss']:.0f}; at equal strength {again['kl']:.0f} and {again['loss']:.0f}. (Predicted and "
        "measured change of the output feature agree by identity; the effects further on are evidence.)</p>"
        f"{_table('Edits at those positions', header, rows)}<div class=row>{''.join(figures)}</div>"
    )


# -- cards ------------------------------------------------------------------------------------------------------------


def _cards(lens: FeatureLayer, findings: Sequence[Finding], others: Sequence[int]) -> str:
    """Return the cards of every feature that the findings link to, and of some other input features."""
    inputs = dict.fromkeys(others)
    for one in findings:
        inputs |= dict.fromkeys(_legs(lens, one))
    parts = [_card(lens, "out", one.feature) for one in findings]
    parts += [_card(lens, "inp", i) for i in sorted(inputs)]
    about = next((cards.provenance for cards in (lens.inp_cards, lens.out_cards) if cards is not None), None)
    said = "" if about is None else (
        f"<p class=muted>From {about['texts']} texts (sha256 {about['data'][:12]}…), model {about['model'][:12]}….</p>"
    )  # fmt: skip
    return (
        '<section aria-labelledby="h-cards"><h2 id="h-cards">Feature cards</h2>'
        f'{said}<div class="cards">{"".join(parts)}</div></section>'
    )


def _legs(lens: FeatureLayer, one: Finding) -> list[int]:
    """Return every input feature that a finding links to."""
    legs = [*one.pairs.left.tolist(), *one.pairs.right.tolist()]
    legs += [i for found in one.discoveries for group in found.groups for i in group.features.tolist()]
    return [i for i in dict.fromkeys(legs) if i < len(lens.writers)]


def _card(lens: FeatureLayer, side: str, feature: int) -> str:
    what = {"inp": "Input", "out": "Output"}[side]
    cards = lens.inp_cards if side == "inp" else lens.out_cards
    head = f'<article id="{side}-{feature}" tabindex="-1"><h3>{what} feature {feature}'
    if cards is None:
        return f"{head}</h3></article>"
    card = cards[feature]
    facts = [f"active at {100 * card.density:.2f} % of positions, {card.mean:.2f} on average there"]
    facts += [f"AUROC for {escape(name)} {value:.2f}" for name, value in card.auroc.items()]
    tokens = [f"{verb} {_tokens(some)}" for verb, some in (("promotes", card.promoted), ("demotes", card.demoted))]
    return (
        f'{head}: {escape(card.name)}</h3><p class="muted">{"; ".join(facts)}</p>{_bars(card.histogram)}'
        f"<p>{'; '.join(tokens)}</p><ul class=contexts>{''.join(_contexts(cards, feature))}</ul></article>"
    )


def _tokens(effects: dict[str, float], n: int = 5) -> str:
    return ", ".join(f"{escape(token)} {effect:+.2f}" for token, effect in list(effects.items())[:n]) or "nothing"


def _bars(counts: Sequence[int]) -> str:
    """Draw a histogram of activations, the first bar those below zero; heights by square root, so rare ones show."""
    most = max(max(counts), 1) ** 0.5
    bars = "".join(
        f'<rect x="{10 * i}" y="{40 - 38 * count**0.5 / most:.1f}" width="9" height="{38 * count**0.5 / most:.1f}"/>'
        for i, count in enumerate(counts)
    )
    says = f"Histogram of {sum(counts)} activations, by half octaves from 1/64 to 64"
    return (
        f'<svg class="bars" role="img" aria-label="{says}" viewBox="0 0 {10 * len(counts)} 40" '
        f'preserveAspectRatio="none">{bars}</svg>'
    )


def _contexts(cards: FeatureCards, feature: int, n: int = 6) -> Iterator[str]:
    contexts, tokenizer = cards.contexts, cards.model.tokenizer
    strongest = contexts.values[feature].max().item() or 1.0
    windows = zip(contexts.tokens[feature, :n].tolist(), contexts.values[feature, :n].tolist(), strict=True)
    for tokens, values in windows:
        spans = []
        for at, (token, value) in enumerate(zip(tokens, values, strict=True)):
            if token < 0:
                continue
            word = tokenizer.id_to_token(token)
            text = ("" if word.startswith("##") else " ") + escape(word.removeprefix("##"))
            peak = " class=peak" if at == contexts.peak else ""
            shade = max(value, 0) / strongest
            spans.append(f'<mark{peak} style="--a:{shade:.2f}">{text}</mark>' if peak or shade > 0.02 else text)
        if spans:
            yield f"<li>{''.join(spans)}</li>"


# -- tables of the layer ----------------------------------------------------------------------------------------------


def _layer(lens: FeatureLayer, ranking: Outliers | None, strongest: Interactions | None, n: int = 12) -> str:
    parts = []
    if strongest is not None:
        rows = [
            (f"{i} {lens.name('inp', i)}", f"{j} {lens.name('inp', j)}", f"{o} {lens.name('out', o)}", value)
            for o, i, j, value in _rows_of(strongest, n)
        ]
        header = ("input feature", "× input feature", "→ output feature", "coefficient")
        parts.append(_table("Strongest pairs over all output features, every one looked at", header, rows))
    if ranking is not None:
        columns = (ranking.feature.tolist(), *ranking.values.T.tolist(), ranking.strength.tolist())
        rows = [
            (f"{feature} {lens.name('out', feature)}", *numbers)
            for feature, *numbers in list(zip(*columns, ranking.ratio.tolist(), strict=True))[:n]
        ]
        header = ("output feature", "λ₁", "λ₂", "|λ₁| + |λ₂|", "outlier ratio")
        caption = "Output features by spectral outliers; the ratio is |λ₂| over the edge of the other eigenvalues' bulk"
        parts.append(_table(caption, header, rows))
    if not parts:
        return ""
    return f'<section aria-labelledby="h-layer"><h2 id="h-layer">The whole layer</h2>{"".join(parts)}</section>'


def _members(lens: FeatureLayer, couplings: NegationCouplings) -> list[int]:
    """Return the input features of this layer's groups that are named."""
    return [i for group in _groups(lens, couplings) for i in _strongest(group)]


def _groups(lens: FeatureLayer, couplings: NegationCouplings) -> list[Group]:
    return [group for one in couplings.layers if one.layer == lens.layer for group in (one.left, one.right)]


def _strongest(group: Group) -> list[int]:
    return group.features[group.weights.abs().argsort(descending=True, stable=True)][:_MEMBERS].tolist()


def _couplings(lens: FeatureLayer, found: NegationCouplings, test: CouplingTest | None) -> str:
    """Return negators and sentiment as groups: the weights' answer layer by layer, and the running model's."""
    rows = []
    for one, q in zip(found.layers, found.q.tolist(), strict=True):
        numbers = (one.value[0].item(), one.z[0].item(), one.p[0].item(), q)
        rows.append((f"layer {one.layer}", len(one.left.features), len(one.right.features), *numbers))
    header = ("layer", "negators", "sentiment features", "mean interaction", "z", "p", "q")
    caption = "Negators × sentiment → logits of good less bad words; a negative value flips the sentiment"
    groups = "".join(
        f"<li><b>{group.role}</b>: {', '.join(_link(lens, 'inp', i) for i in _strongest(group))}"
        f"{f', and {len(group.features) - _MEMBERS} more' if len(group.features) > _MEMBERS else ''}</li>"
        for group in _groups(lens, found)
    )
    return (
        '<section aria-labelledby="h-groups"><h2 id="h-groups">Negators × sentiment, as groups</h2>'
        f"{_table(caption, header, rows)}<p>Groups of layer {lens.layer}, found by their feature cards alone:</p>"
        f"<ul>{groups}</ul>{_coupling_tested(test)}</section>"
    )


def _coupling_tested(test: CouplingTest | None) -> str:
    if test is None:
        return ""
    ranks, again, n = test.percentile, test.percentile_rescaled, len(test.scale)
    kl = test.effect.kl[0].item()
    figures = [
        _plot(
            plots.predicted_measured(test.predicted, test.measured, "Change of good less bad without the products"),
            f"Predicted and measured change of good less bad correlate {test.correlation:.4f} at "
            f"{len(test.measured)} positions",
        ),
        _plot(
            plots.among(kl, test.controls.kl, "Effect on the predictions", "KL, nats"),
            f"KL of removing all their products, {kl:.3g}, among {n} random groups: percentile {ranks['kl']:.0f}",
        ),
    ]
    return (
        f"<h3>Tested by editing the running model</h3><p>All products of the two groups were taken out of layer "
        f"{test.coupling.layer} at {len(test.measured)} positions. Among {n} random groups in place of the negators "
        f"the KL is at percentile {ranks['kl']:.0f}, the loss at {ranks['loss']:.0f}; at equal strength at "
        f"{again['kl']:.0f} and {again['loss']:.0f}.</p><div class=row>{''.join(figures)}</div>"
    )


# -- the same for machines --------------------------------------------------------------------------------------------


def to_json(lens: FeatureLayer, findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Return findings as plain numbers and strings, for `json.dumps`; missing numbers are None.

    Args:
        lens: The layer.
        findings: From `describe`.
    """
    return [_finite(_as_dict(lens, one)) for one in findings]


def couplings_to_json(found: NegationCouplings, test: CouplingTest | None = None) -> dict[str, Any]:
    """Return negation couplings, and the test of one of them, as plain numbers.

    Args:
        found: From `couplings.negation_couplings`.
        test: From `couplings.test_coupling`.
    """
    layers = [
        {"layer": one.layer, "value": one.value[0].item(), "z": one.z[0].item(), "p": one.p[0].item(), "q": q}
        | {group.role: group.features.tolist() for group in (one.left, one.right)}
        for one, q in zip(found.layers, found.q.tolist(), strict=True)
    ]
    if test is None:
        return {"layers": layers, "test": None}
    effect = {name: value[0].item() for name, value in test.effect._asdict().items()}
    tested = {"layer": test.coupling.layer, "positions": len(test.measured), "correlation": test.correlation}
    tested |= {"effect": effect, "percentile": test.percentile, "percentile_rescaled": test.percentile_rescaled}
    return _finite({"layers": layers, "test": tested | {"controls": len(test.scale)}})


def _as_dict(lens: FeatureLayer, one: Finding) -> dict[str, Any]:
    motifs = [
        {"motif": d.motif, "score": d.score, "p": d.p, "q": d.q, "groups": [_group(lens, g) for g in d.groups]}
        for d in one.discoveries
    ]
    strongest = [{"left": i, "right": j, "coefficient": value} for _, i, j, value in _rows_of(one.pairs)]
    p = one.prediction
    found = {"feature": one.feature, "label": one.label, "eigenvalues": one.values[:8].tolist(), "motifs": motifs}
    found |= {"pairs": strongest, "pearson_active": p.pearson_active, "pearson": p.pearson, "n_active": p.n_active}
    return found | {"test": None if one.tested is None else _test_as_dict(one.tested)}


def _group(lens: FeatureLayer, group: Any) -> dict[str, Any]:
    name = _group_name(lens, group.features, group.weights)
    return {
        "role": group.role,
        "name": name,
        "features": group.features.tolist(),
        "weights": group.weights.tolist(),
    }


def _test_as_dict(test: CircuitTest) -> dict[str, Any]:
    pair, low = test.edits["pair"], test.low_rank
    curve = {
        str(k): {"pearson_active": value, "low": a, "high": b}
        for k, value, a, b in zip(low.k, *(part.tolist() for part in low.pearson_active), strict=True)
    }
    effect = {name: value[0].item() for name, value in pair.effect._asdict().items()}
    return {
        "left": test.circuit.left,
        "right": test.circuit.right,
        "positions": test.n_pair,
        "correlation": pair.correlation,
        "effect": effect,
        "percentile": test.percentile,
        "percentile_rescaled": test.percentile_rescaled,
        "matched_pairs": len(test.matched.left),
        "low_rank": curve,
    }


def _finite(value: Any) -> Any:
    """Replace numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and value != value else value
