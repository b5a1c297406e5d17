"""Records in, plotly figures out."""

import itertools
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from bilens.circuits.bigrams import Bigram
from bilens.tensor.defaults import Modified
from bilens.tensor.factorizations import CP, HOSVD
from bilens.tensor.polynomials import Degree
from bilens.tensor.spectra import entropy_rank, l1l2_rank, participation_ratio

INK, PAPER, GRID = "#1f2933", "#ffffff", "#e4e7eb"
POSITIVE, NEGATIVE, NEUTRAL = "#c2410c", "#1d4ed8", "#9aa5b1"
DIVERGING = [[0, NEGATIVE], [0.5, "#ffffff"], [1, POSITIVE]]


def _figure(
    *traces: go.Scatter | go.Heatmap | go.Bar | go.Histogram, width: int = 520, height: int = 380, **layout: object
) -> go.Figure:
    """Return a figure in the house's look."""
    return _styled(go.Figure(data=list(traces)), width, height, **layout)


def _styled(figure: go.Figure, width: int = 520, height: int = 380, **layout: object) -> go.Figure:
    figure.update_layout(
        width=width,
        height=height,
        margin={"l": 60, "r": 20, "t": 40, "b": 50},
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        paper_bgcolor=PAPER,
        plot_bgcolor=PAPER,
        showlegend=False,
        **layout,
    )
    figure.update_xaxes(gridcolor=GRID, zerolinecolor=NEUTRAL)
    figure.update_yaxes(gridcolor=GRID, zerolinecolor=NEUTRAL)
    return figure


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
        y=_rounded(values[order]),
        mode="markers",
        marker={"size": sizes, "color": colors},
        hovertemplate="λ = %{y:.4f}<extra></extra>",
    )
    band = [] if null is None else _band(ranks, *map(_rounded, null))
    return _figure(*band, trace, title="Spectrum", xaxis_title="rank by value", yaxis_title="eigenvalue λ")


def _band(x: Sequence[int], low: Sequence[float], high: Sequence[float], color: str = NEUTRAL) -> list[go.Scatter]:
    """Return two lines with what is between them filled."""
    shared = {"x": list(x), "mode": "lines", "line": {"width": 0, "color": color}, "hoverinfo": "skip"}
    return [go.Scatter(y=list(low), **shared), go.Scatter(y=list(high), fill="tonexty", opacity=0.3, **shared)]


def _rounded(values: Tensor) -> list[float]:
    """Return numbers at the precision a screen can show, which makes a page a third as large."""
    return [float(f"{value:.4g}") for value in values.tolist()]


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
        z=[_rounded(row) for row in matrix],
        x=list(range(len(labels))),
        y=list(range(len(labels))),
        customdata=[[f"{a} × {b}" for b in labels] for a in labels],
        hovertemplate="%{customdata}<br>Q = %{z:.4f}<extra></extra>",
        colorscale=DIVERGING,
        zmin=-limit,
        zmax=limit,
    )
    figure = _figure(trace, width=520, height=480, title="Interactions of its strongest input features")
    ticks = {"tickmode": "array", "tickvals": list(range(len(labels))), "ticktext": [_short(label) for label in labels]}
    figure.update_xaxes(tickangle=45, automargin=True, **ticks)
    figure.update_yaxes(autorange="reversed", automargin=True, **ticks)
    return figure


def hosvd(found: HOSVD, n_matrices: int = 3) -> go.Figure:
    """Plot all singular values of a layer, and the interaction matrices of its strongest output directions.

    Args:
        found: The decomposition.
        n_matrices: How many matrices to draw, each on a scale of its own; its singular value stands above it.
    """
    if not 1 <= n_matrices <= found.rank:
        raise ValueError(f"n_matrices must lie between 1 and the rank, {found.rank}, got {n_matrices}")
    matrices = found.matrices()[:n_matrices]
    titles = ["singular values", *(f"σ = {value:.3g}" for value in found.singular[:n_matrices].tolist())]
    figure = make_subplots(1, 1 + n_matrices, subplot_titles=titles, horizontal_spacing=0.08)
    ranks = list(range(1, len(found.spectrum) + 1))
    colors = [POSITIVE if rank <= found.rank else NEUTRAL for rank in ranks]
    hover = "σ = %{y:.4f}<extra></extra>"
    bars = go.Bar(x=ranks, y=_rounded(found.spectrum), marker={"color": colors, "line_width": 0}, hovertemplate=hover)
    figure.add_trace(bars, 1, 1)
    for column, matrix in enumerate(matrices, 2):
        limit = matrix.abs().max().item() or 1.0
        colors = {"colorscale": DIVERGING, "zmin": -limit, "zmax": limit, "showscale": False}
        hover = "%{y} × %{x}: %{z:.4f}<extra></extra>"
        figure.add_trace(go.Heatmap(z=[_rounded(row) for row in matrix], hovertemplate=hover, **colors), 1, column)
        figure.update_yaxes(autorange="reversed", row=1, col=column)
    title = f"{found.rank} output directions leave a relative error of {found.error:.3g}"
    return _styled(figure, width=300 * (1 + n_matrices), title=title)


def cp_cosines(fits: Sequence[CP]) -> go.Figure:
    """Plot how well few terms fit a layer: the cosine of the symmetrised cubes against the rank.

    Args:
        fits: CP decompositions of one layer.
    """
    if not fits:
        raise ValueError("fits must hold at least one CP, got none")
    fits = sorted(fits, key=lambda fit: fit.rank)
    trace = go.Scatter(
        x=[fit.rank for fit in fits],
        y=[float(f"{fit.cosine:.4g}") for fit in fits],
        mode="lines+markers",
        line={"color": POSITIVE},
        hovertemplate="rank %{x}: cosine %{y:.4f}<extra></extra>",
    )
    figure = _figure(trace, title="CP: terms against what they hold of the layer")
    figure.update_xaxes(type="log", title="rank", tickvals=[fit.rank for fit in fits])
    figure.update_yaxes(title="cosine with the layer", range=[0, 1.02])
    return figure


def similarity(matrix: Float[Tensor, "n n"], labels: Sequence[str]) -> go.Figure:
    """Plot the similarity of every two of several layers, from -1 to 1.

    Args:
        matrix: As `bilens.similarity_matrix` returns it.
        labels: Names of the layers.
    """
    if len(labels) != len(matrix):
        raise ValueError(f"labels must name each of the {len(matrix)} layers, got {len(labels)}")
    trace = go.Heatmap(
        z=[_rounded(row) for row in matrix],
        x=list(labels),
        y=list(labels),
        texttemplate="%{z:.2f}" if len(labels) <= 12 else None,
        hovertemplate="%{y} × %{x}: %{z:.4f}<extra></extra>",
        colorscale=DIVERGING,
        zmin=-1,
        zmax=1,
    )
    figure = _figure(trace, width=520, height=480, title="Similarity as functions of Gaussian inputs")
    figure.update_xaxes(type="category", automargin=True)
    figure.update_yaxes(type="category", autorange="reversed", automargin=True)
    return figure


def effective_ranks(values: Float[Tensor, " k"]) -> go.Figure:
    """Plot the magnitudes of eigenvalues by rank, and where each effective rank cuts them.

    Args:
        values: Eigenvalues or singular values.
    """
    magnitudes = values.abs().sort(descending=True).values
    colors = [POSITIVE if value > 0 else NEGATIVE for value in values[values.abs().argsort(descending=True)].tolist()]
    trace = go.Scatter(
        x=list(range(1, len(values) + 1)),
        y=_rounded(magnitudes),
        mode="markers",
        marker={"size": 5, "color": colors},
        hovertemplate="|λ| = %{y:.4f}<extra></extra>",
    )
    figure = _figure(trace, title="Effective ranks", xaxis_title="rank by magnitude", yaxis_title="|λ|")
    measures = {"participation ratio": participation_ratio, "entropy": entropy_rank, "L1/L2": l1l2_rank}
    for height, (name, measure) in zip((0.95, 0.8, 0.65), measures.items(), strict=True):
        rank = float(measure(values))
        figure.add_vline(x=rank, line={"color": NEUTRAL, "dash": "dot"})
        label = f"{name} {rank:.1f}"
        figure.add_annotation(x=rank, y=height, yref="paper", text=label, showarrow=False, xanchor="left")
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
        x=_rounded(predicted[active]),
        y=_rounded(actual[active]),
        mode="markers",
        marker={"size": 5, "color": POSITIVE, "opacity": 0.5},
        hovertemplate="predicted %{x:.3f}, actual %{y:.3f}<extra></extra>",
    )
    return _figure(trace, title=title, xaxis_title="Σ λᵢ (vᵢ·x)² over two eigenvectors", yaxis_title="SAE activation")


def bars(values: Mapping[str, float], title: str, unit: str, marked: Sequence[str] = ()) -> go.Figure:
    """Draw one bar per name.

    Args:
        values: Heights by name.
        title: Goes above.
        unit: What the height is.
        marked: Names to colour.
    """
    colors = [POSITIVE if name in marked else NEUTRAL for name in values]
    trace = go.Bar(
        x=list(values),
        y=list(values.values()),
        marker_color=colors,
        text=[f"{value:.2f}" for value in values.values()],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{x}: %{y:.3f}<extra></extra>",
    )
    figure = _figure(trace, title=title, yaxis_title=unit)
    figure.update_xaxes(automargin=True)
    return figure


def cosine_plane(points: Float[Tensor, "n 2"], labels: Sequence[str], axes: tuple[str, str]) -> go.Figure:
    """Place input features in the plane of two eigenvectors by cosine similarity (2410.08417, figure 8B).

    Args:
        points: Cosine of each feature's decoder row with either eigenvector.
        labels: Names of the features.
        axes: Names of the eigenvectors.
    """
    trace = go.Scatter(
        x=points[:, 0].tolist(),
        y=points[:, 1].tolist(),
        text=[_short(label) for label in labels],
        mode="markers+text",
        textposition="top center",
        textfont={"size": 11},
        marker={"size": 8, "color": INK},
        customdata=list(labels),
        hovertemplate="%{customdata}: (%{x:.2f}, %{y:.2f})<extra></extra>",
    )
    figure = _figure(trace, width=520, height=480, title="Its input features in the plane of the two eigenvectors")
    limit = 1.25 * max(points.abs().max().item(), torch.finfo(points.dtype).eps)
    figure.update_xaxes(title=f"cosine with {axes[0]}", range=[-limit, limit])
    figure.update_yaxes(title=f"cosine with {axes[1]}", range=[-limit, limit])
    return figure


def _short(label: str, length: int = 26) -> str:
    return label if len(label) <= length else label[: length - 1] + "…"


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
        traces += _band(x, _rounded(low[kept]), _rounded(high[kept]), color)
        hover = f"{name}, k = %{{x}}: r = %{{y:.3f}}<extra></extra>"
        line = {"color": color}
        traces.append(go.Scatter(x=x, y=_rounded(value[kept]), mode="lines+markers", line=line, hovertemplate=hover))
    figure = _figure(*traces, title="Predicted by k eigenvectors: active (orange), overall (blue)")
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
    x, y = _rounded(predicted), _rounded(measured)
    points = go.Scatter(x=x, y=y, mode="markers", marker=marker, hovertemplate=hover)
    axes = {"xaxis_title": "predicted from the weights", "yaxis_title": "measured"}
    return _figure(same, points, title=title, **axes)


def among(value: float, others: Float[Tensor, " n"], title: str, unit: str) -> go.Figure:
    """Draw the histogram of what controls give, and where a value lies among them.

    Args:
        value: The one.
        others: The controls'.
        title: Goes above.
        unit: What is measured.
    """
    figure = _figure(
        go.Histogram(x=_rounded(others), marker_color=NEUTRAL, nbinsx=30, hovertemplate="%{x}: %{y}<extra></extra>"),
        title=title,
        xaxis_title=unit,
        yaxis_title="controls",
    )
    figure.add_vline(x=value, line={"color": POSITIVE, "width": 3})
    return figure


def residuals(found: Mapping[str, Degree]) -> go.Figure:
    """Plot what the best polynomial of each degree leaves of a function; a polynomial falls to rounding at its own.

    Args:
        found: What `degree` returned, by name of the function.
    """
    colors = dict(zip(found, itertools.cycle((POSITIVE, NEGATIVE, INK, NEUTRAL)), strict=False))
    floor = torch.finfo(torch.float64).eps / 10  # a residual of zero has no place on a logarithmic axis
    traces = [
        go.Scatter(
            x=list(range(len(one.residuals))),
            y=[max(residual, floor) for residual in one.residuals],
            name=name,
            mode="lines+markers",
            line={"color": colors[name]},
            hovertemplate=f"{name}, degree %{{x}}: %{{y:.1e}}<extra></extra>",
        )
        for name, one in found.items()
    ]
    figure = _figure(*traces, title="What a polynomial leaves", xaxis_title="degree", yaxis_title="relative residual")
    figure.update_yaxes(type="log", exponentformat="power")
    return figure.update_layout(showlegend=True)


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
        z=[_rounded(row) for row in table],
        x=labels,
        y=labels,
        colorscale=DIVERGING,
        zmin=-limit,
        zmax=limit,
        hovertemplate="left %{y}, right %{x}: %{z:.4f}<extra></extra>",
    )
    figure = _figure(
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


def modified(found: Modified) -> go.Figure:
    """Draw the default features that an input feature modifies most, orange where amplified, blue where suppressed.

    Args:
        found: As `most_modified` returns it.
    """
    names = [f"#{feature}" for feature in found.feature.tolist()]
    figure = bars(dict(zip(names, found.change.tolist(), strict=True)), "Default features modified most", "change")
    figure.data[0].update(
        marker_color=[POSITIVE if gain > 0 else NEGATIVE for gain in found.gain.tolist()],
        customdata=list(zip(_rounded(found.gain), _rounded(found.excess), strict=True)),
        hovertemplate="%{x}: %{y:.3f}, gain %{customdata[0]}, %{customdata[1]} × chance<extra></extra>",
    )
    return figure


def modification(matrix: Float[Tensor, "default modifier"]) -> go.Figure:
    """Draw how strongly each modifier feature modifies each default feature (2305.03452).

    Args:
        matrix: As `modifiers.modification` returns it.
    """
    trace = go.Heatmap(
        z=[_rounded(row) for row in matrix],
        colorscale=[[0, PAPER], [1, POSITIVE]],
        hovertemplate="default %{y}, modifier %{x}: %{z:.4f}<extra></extra>",
    )
    figure = _figure(trace, title="What modifies what", xaxis_title="modifier feature", yaxis_title="default feature")
    return figure.update_yaxes(autorange="reversed")
