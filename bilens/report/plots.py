"""Figures of circuits: one output feature, its test, the paths of a layer; and `of` any record."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from bilens.circuits.attending import Attending
from bilens.circuits.bigrams import Bigram
from bilens.circuits.controls import Edit
from bilens.circuits.couplings import CouplingTest
from bilens.circuits.findings import Finding
from bilens.circuits.lowrank import LowRank
from bilens.circuits.modifying import Modification
from bilens.circuits.negating import Negation
from bilens.circuits.paths import Paths
from bilens.circuits.spectral import Prediction
from bilens.circuits.steering import Steering
from bilens.circuits.terms import Terms
from bilens.circuits.trial import CircuitTest
from bilens.circuits.turning import FlipTest
from bilens.images.adversarial import Attack, Masks
from bilens.images.reading import ClassEigen, Explanation, Similarity, Truncation
from bilens.images.sets import ImageSet
from bilens.tensor.decompositions import Eigen
from bilens.tensor.defaults import Modified
from bilens.tensor.factorizations import CP, HOSVD
from bilens.tensor.polynomials import Degree
from bilens.tensor.spectra import Eigenspace
from bilens.tensor.tables import Tabular

from . import imageplots, tensorplots
from .columns import short
from .figures import DIVERGING, INK, NEGATIVE, NEUTRAL, POSITIVE, bars, draw, rounded, shaded
from .generic import table
from .labels import Box, place, size


def spectrum(values: Float[Tensor, " k"], n_marked: int = 2, null: Float[Tensor, "2 k"] | None = None) -> go.Figure:
    """Plot eigenvalues by rank, the outliers coloured by sign (2410.08417, figures 3 and 27).

    Args:
        values: Eigenvalues, strongest |value| first, as `eigen` returns them.
        n_marked: How many of the strongest to mark.
        null: Lowest and highest eigenvalue of each rank by value that a null model gives, drawn as a band.
    """
    order = values.argsort(descending=True)
    sizes = [11 if i < n_marked else 5 for i in order.tolist()]
    colors = [(POSITIVE if values[i] > 0 else NEGATIVE) if i < n_marked else NEUTRAL for i in order.tolist()]
    ranks = list(range(1, len(values) + 1))
    trace = go.Scatter(
        x=ranks,
        y=rounded(values[order]),
        mode="markers",
        marker={"size": sizes, "color": colors},
        hovertemplate="λ = %{y:.4f}<extra></extra>",
    )
    band = [] if null is None else shaded(ranks, *map(rounded, null))
    return draw(*band, trace, title="Spectrum", xaxis_title="rank by value", yaxis_title="eigenvalue λ")


def interaction_matrix(matrix: Float[Tensor, "n n"], labels: Sequence[str]) -> go.Figure:
    """Plot a symmetric matrix of interactions between named features, its diagonal the self-interactions.

    Args:
        matrix: `Q_ij` among the chosen features.
        labels: Their names.
    """
    if len(labels) != len(matrix):
        raise ValueError(f"labels must name each of the {len(matrix)} features, got {len(labels)}")
    limit = matrix.abs().max().item() or 1.0
    trace = go.Heatmap(
        z=[rounded(row) for row in matrix],
        x=list(range(len(labels))),
        y=list(range(len(labels))),
        customdata=[[f"{a} × {b}" for b in labels] for a in labels],
        hovertemplate="%{customdata}<br>Q = %{z:.4f}<extra></extra>",
        colorscale=DIVERGING,
        zmin=-limit,
        zmax=limit,
    )
    figure = draw(trace, width=520, height=480, title="Interactions of its strongest input features")
    ticks = {"tickmode": "array", "tickvals": list(range(len(labels))), "ticktext": [short(label) for label in labels]}
    figure.update_xaxes(tickangle=45, automargin=True, **ticks)
    figure.update_yaxes(autorange="reversed", automargin=True, **ticks)
    return figure


def prediction(
    actual: Float[Tensor, " position"], predicted: Float[Tensor, " position"], title: str, n_most: int = 2000
) -> go.Figure:
    """Scatter predicted against actual activations, where the feature is active (2410.08417, figure 9).

    Args:
        actual: Activation at each position, zero where inactive.
        predicted: What the eigenvectors predict there.
        title: Goes above.
        n_most: Points to draw at most, evenly thinned.
    """
    active = (actual != 0).nonzero()[:, 0]
    active = active[:: max(1, len(active) // n_most)]
    trace = go.Scatter(
        x=rounded(predicted[active]),
        y=rounded(actual[active]),
        mode="markers",
        marker={"size": 5, "color": POSITIVE, "opacity": 0.5},
        hovertemplate="predicted %{x:.3f}, actual %{y:.3f}<extra></extra>",
    )
    return draw(trace, title=title, xaxis_title="Σ λᵢ (vᵢ·x)² over two eigenvectors", yaxis_title="SAE activation")


def cosine_plane(
    points: Float[Tensor, "n 2"], labels: Sequence[str], axes: tuple[str, str], n_labels: int = 10
) -> go.Figure:
    """Place input features in the plane of two eigenvectors by cosine similarity (2410.08417, figure 8B).

    Args:
        points: Cosine of each feature's decoder row with either eigenvector, the most important feature first.
        labels: Names of the features.
        axes: Names of the eigenvectors.
        n_labels: How many of the first features are named in the figure, where there is room; hovering names all.
    """
    trace = go.Scatter(
        x=points[:, 0].tolist(),
        y=points[:, 1].tolist(),
        mode="markers",
        marker={"size": 8, "color": INK},
        customdata=list(labels),
        hovertemplate="%{customdata}: (%{x:.2f}, %{y:.2f})<extra></extra>",
    )
    figure = draw(trace, width=520, height=480, title="Its input features in the plane of the two eigenvectors")
    limit = 1.25 * max(points.abs().max().item(), torch.finfo(points.dtype).eps)
    figure.update_xaxes(title=f"cosine with {axes[0]}", range=[-limit, limit])
    figure.update_yaxes(title=f"cosine with {axes[1]}", range=[-limit, limit])
    return _named(figure, points, [short(label) for label in labels[:n_labels]], limit)


def _named(figure: go.Figure, points: Tensor, labels: Sequence[str], limit: float, font: float = 11.0) -> go.Figure:
    """Write the names of the first points beside them, each with a line to its point."""
    layout = figure.layout
    width = layout.width - layout.margin.l - layout.margin.r
    height = layout.height - layout.margin.t - layout.margin.b
    at = [((x / limit + 1) * width / 2, (1 - y / limit) * height / 2) for x, y in points.tolist()]
    places = place(at, [size(label, font) for label in labels], Box(0.0, 0.0, float(width), float(height)))
    for (x, y), (px, py), label, found in zip(points.tolist(), at, labels, places, strict=False):
        if found is not None:
            line = {"arrowhead": 0, "arrowwidth": 1, "arrowcolor": NEUTRAL, "standoff": 4}
            away = {"ax": found[0] - px, "ay": found[1] - py}
            figure.add_annotation(
                x=x, y=y, text=escape(label, quote=False), font_size=font, showarrow=True, **line, **away
            )
    return figure


def low_rank(
    k: Sequence[int],
    active: tuple[Tensor, Tensor, Tensor],
    overall: tuple[Tensor, Tensor, Tensor],
) -> go.Figure:
    """Plot how well the k strongest eigenvectors predict an output feature (2410.08417, figure 9), with intervals.

    Args:
        k: Numbers of eigenvectors.
        active: Correlation over active positions, and the ends of its interval, as `lowrank.LowRank` holds them.
        overall: The same over all positions.
    """
    traces = []
    for (value, low, high), name, color in ((active, "active", POSITIVE), (overall, "overall", NEGATIVE)):
        kept = value.isfinite() & low.isfinite() & high.isfinite()
        x = [one for one, keep in zip(k, kept.tolist(), strict=True) if keep]
        traces += shaded(x, rounded(low[kept]), rounded(high[kept]), color)
        hover = f"{name}, k = %{{x}}: r = %{{y:.3f}}<extra></extra>"
        line = {"color": color}
        traces.append(go.Scatter(x=x, y=rounded(value[kept]), mode="lines+markers", line=line, hovertemplate=hover))
    figure = draw(*traces, title="Predicted by k eigenvectors: active (orange), overall (blue)")
    figure.update_xaxes(type="log", title="k", tickvals=list(k))
    figure.update_yaxes(title="Pearson correlation")
    return figure


def predicted_measured(
    predicted: Float[Tensor, " position"],
    measured: Float[Tensor, " position"],
    title: str = "Change of the output feature without the pair",
) -> go.Figure:
    """Scatter the change of an output feature that the weights predict for an edit against the one measured.

    Args:
        predicted: From the weights.
        measured: In the running model.
        title: What changes, and by which edit.
    """
    ends = [float(f(torch.cat((predicted, measured)))) for f in (torch.min, torch.max)]
    same = go.Scatter(x=ends, y=ends, mode="lines", line={"color": NEUTRAL, "dash": "dot"}, hoverinfo="skip")
    hover = "predicted %{x:.4f}, measured %{y:.4f}<extra></extra>"
    marker = {"size": 6, "color": POSITIVE, "opacity": 0.6}
    x, y = rounded(predicted), rounded(measured)
    points = go.Scatter(x=x, y=y, mode="markers", marker=marker, hovertemplate=hover)
    axes = {"xaxis_title": "predicted from the weights", "yaxis_title": "measured"}
    return draw(same, points, title=title, **axes)


def among(value: float, others: Float[Tensor, " n"], title: str, unit: str) -> go.Figure:
    """Draw the histogram of what controls give, and where a value lies among them.

    Args:
        value: The one.
        others: The controls'.
        title: Goes above.
        unit: What is measured.
    """
    figure = draw(
        go.Histogram(x=rounded(others), marker_color=NEUTRAL, nbinsx=30, hovertemplate="%{x}: %{y}<extra></extra>"),
        title=title,
        xaxis_title=unit,
        yaxis_title="controls",
    )
    figure.add_vline(x=value, line={"color": POSITIVE, "width": 3})
    return figure


def path_shares(shares: Mapping[str, float]) -> go.Figure:
    """Draw each path group's share of the variance of the logits (2305.03452, path expansion).

    Args:
        shares: As `Paths.shares` returns them.
    """
    return bars(shares, "Variance of the logits by path", "share", marked=[name for name in shares if "×" in name])


def path_table(table: Float[Tensor, "part part"], names: Sequence[str], token: str) -> go.Figure:
    """Draw a logit's paths through the MLP at one position, or their mean: left part down, right part across.

    Args:
        table: `Paths.table(...)[n]`.
        names: `Paths.names`.
        token: Whose logit it is.
    """
    if len(table) != len(names) + 1:
        raise ValueError(f"table must have a row for the bias and each of {len(names)} names, got {len(table)}")
    labels, limit = ["bias", *names], table.abs().max().item() or 1.0
    trace = go.Heatmap(
        z=[rounded(row) for row in table],
        x=labels,
        y=labels,
        colorscale=DIVERGING,
        zmin=-limit,
        zmax=limit,
        hovertemplate="left %{y}, right %{x}: %{z:.4f}<extra></extra>",
    )
    figure = draw(
        trace, title=f"Paths to the logit of {token!r}", xaxis_title="right factor", yaxis_title="left factor"
    )
    return figure.update_yaxes(autorange="reversed", automargin=True)


def bigrams(token: str, found: Sequence[Bigram]) -> go.Figure:
    """Draw which tokens follow one, read off embedding, layer and unembedding (2406.03947, language part).

    Args:
        token: The one that is read.
        found: As `paths.bigrams` returns them.
    """
    return bars({one.token: one.score for one in found}, f"What {token!r} predicts by itself", "logit")


def steering(found: Steering) -> go.Figure:
    """Draw log-odds by the amount of the feature that is added, and the range of random directions (grey).

    Args:
        found: What adding the feature does.
    """
    amounts = list(found.amounts)
    band = shaded(amounts, rounded(found.controls.amin(0)), rounded(found.controls.amax(0)))
    hover = "amount %{x:.3g}: %{y:.3f}<extra></extra>"
    line = go.Scatter(
        x=amounts, y=rounded(found.log_odds), mode="lines+markers", line={"color": POSITIVE}, hovertemplate=hover
    )
    title = f"Steering with {found.side} feature {found.feature}"
    return draw(*band, line, title=title, xaxis_title="amount added", yaxis_title="log-odds")


def flips(found: FlipTest) -> go.Figure:
    """Draw the share of minimal pairs that flip: as the model is, without the circuit, and with each control.

    Args:
        found: What taking the circuit out does.
    """
    shares = {"as it is": found.before, "without the circuit": found.after, **found.by_place}
    for name in ("controls", "matched"):
        shares |= {f"{name} {index}": one for index, one in enumerate(getattr(found, name), 1)}
    values = {name: one.all for name, one in shares.items()}
    return bars(values, "Minimal pairs that flip", "share", marked=["without the circuit"])


def of(record: Any) -> go.Figure:
    """Draw a record: the figure that its kind has here, else its numbers by the names of its rows.

    Args:
        record: What a function of bilens returned, or a list of terms, checks, ... that one returned.

    Raises:
        ValueError: The record holds no numbers.
        TypeError: It is no record.
    """
    if not isinstance(record, Tabular):
        raise TypeError(f"record must be a result of bilens, got {type(record).__name__}")
    kinds = [kind for kind in type(record).__mro__ if kind in _FIGURES]
    return _FIGURES[kinds[0]](record) if kinds else table(record)


def _spectrum(found: Eigen) -> go.Figure:
    """Plot the eigenvalues of one matrix; of several the numbers alone."""
    return spectrum(found.values) if found.values.ndim == 1 else table(found)


def _low_rank(found: LowRank) -> go.Figure:
    return low_rank(found.k, tuple(found.pearson_active), tuple(found.pearson))


def _changes(found: Edit | CouplingTest | FlipTest) -> go.Figure:
    return predicted_measured(found.predicted, found.measured, f"{type(found).__name__}: change by the edit")


def _prediction(found: Prediction) -> go.Figure:
    return prediction(found.actual, found.predicted, f"Predicted: r = {found.pearson_active:.3f} where active")


def _similarity(found: Similarity) -> go.Figure:
    """Plot similarity by rank; with intervals if there are the three models that these need."""
    models = {number for pair in found.pairs for number in pair}
    return imageplots.similarity({"models": found}) if len(models) > 2 else table(found)


def _images(found: ImageSet, columns: int = 5, rows: int = 4) -> go.Figure:
    """Draw the first images, in rows of five."""
    columns, rows = (min(columns, len(found)), 1) if len(found) < 2 * columns else (columns, rows)
    rows = min(rows, len(found) // columns)
    some = found[: rows * columns]
    shown, names = some.x.unflatten(0, (rows, columns)), [found.names[label] for label in some.y.tolist()]
    captions = [names[row * columns : (row + 1) * columns] for row in range(rows)]
    return imageplots.image_grid(shown, [""] * rows, [""] * columns, f"{rows * columns} of {len(found)}", captions)


def _masks(found: Masks) -> go.Figure:
    classes, n, _ = found.mask.shape
    shown = found.mask.unflatten(-1, found.size)
    return imageplots.image_grid(shown, list(map(str, range(classes))), list(map(str, range(n))), "Masks by class")


def _class_eigenvectors(found: ClassEigen) -> go.Figure:
    """Draw eigenvectors of either sign, as many as every class has; of one sign alone the eigenvalues."""
    n = min(3, *((found.values * sign > 0).sum(1).min().item() for sign in (1, -1)))
    names = _numbered(found)
    return imageplots.class_eigenvectors(found, names, n) if n else imageplots.class_spectra(found, names)


def _numbered(found: ClassEigen | Explanation) -> list[str]:
    """Name classes by number: images' records do not know their names."""
    return [str(index) for index in range(len(found))]


_FIGURES: dict[type, Callable[[Any], go.Figure]] = {
    Eigen: _spectrum,
    Eigenspace: lambda found: spectrum(found.values, found.dim),
    HOSVD: lambda found: tensorplots.hosvd(found, min(3, found.rank)),
    CP: lambda found: tensorplots.cp_cosines([found]),
    Degree: lambda found: tensorplots.residuals({"function": found}),
    Modified: tensorplots.modified,
    Modification: lambda found: tensorplots.modified(found.modified, found.names),
    Terms: lambda found: table(found.top(20)),
    Attending: lambda found: table(found.top(20)),
    Prediction: _prediction,
    LowRank: _low_rank,
    Edit: _changes,
    CouplingTest: _changes,
    FlipTest: _changes,
    CircuitTest: lambda found: _changes(found.edits["pair"]),
    Negation: lambda found: table(found.behaviour) if found.test is None else flips(found.test),
    Finding: lambda found: spectrum(found.values),
    Paths: lambda found: path_shares(found.shares()),
    Steering: steering,
    ImageSet: _images,
    Masks: _masks,
    ClassEigen: _class_eigenvectors,
    Explanation: lambda found: imageplots.explanation_images(found, _numbered(found)),
    Truncation: lambda found: imageplots.truncation({"model": found}),
    Similarity: _similarity,
    Attack: imageplots.attack,
}
