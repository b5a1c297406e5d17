"""Figures of tensors: decompositions, similarity, effective ranks, degrees, modifiers."""

import itertools
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from bilens.tensor.defaults import Modified
from bilens.tensor.factorizations import CP, HOSVD
from bilens.tensor.polynomials import Degree
from bilens.tensor.spectra import entropy_rank, l1l2_rank, participation_ratio

from .figures import DIVERGING, INK, NEGATIVE, NEUTRAL, PAPER, POSITIVE, bars, draw, rounded, styled


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
    bars = go.Bar(x=ranks, y=rounded(found.spectrum), marker={"color": colors, "line_width": 0}, hovertemplate=hover)
    figure.add_trace(bars, 1, 1)
    for column, matrix in enumerate(matrices, 2):
        limit = matrix.abs().max().item() or 1.0
        colors = {"colorscale": DIVERGING, "zmin": -limit, "zmax": limit, "showscale": False}
        hover = "%{y} × %{x}: %{z:.4f}<extra></extra>"
        figure.add_trace(go.Heatmap(z=[rounded(row) for row in matrix], hovertemplate=hover, **colors), 1, column)
        figure.update_yaxes(autorange="reversed", row=1, col=column)
    title = f"{found.rank} output directions leave a relative error of {found.error:.3g}"
    return styled(figure, width=300 * (1 + n_matrices), title=title)


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
    figure = draw(trace, title="CP: terms against what they hold of the layer")
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
        z=[rounded(row) for row in matrix],
        x=list(labels),
        y=list(labels),
        texttemplate="%{z:.2f}" if len(labels) <= 12 else None,
        hovertemplate="%{y} × %{x}: %{z:.4f}<extra></extra>",
        colorscale=DIVERGING,
        zmin=-1,
        zmax=1,
    )
    figure = draw(trace, width=520, height=480, title="Similarity as functions of Gaussian inputs")
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
        y=rounded(magnitudes),
        mode="markers",
        marker={"size": 5, "color": colors},
        hovertemplate="|λ| = %{y:.4f}<extra></extra>",
    )
    figure = draw(trace, title="Effective ranks", xaxis_title="rank by magnitude", yaxis_title="|λ|")
    measures = {"participation ratio": participation_ratio, "entropy": entropy_rank, "L1/L2": l1l2_rank}
    for height, (name, measure) in zip((0.95, 0.8, 0.65), measures.items(), strict=True):
        rank = float(measure(values))
        figure.add_vline(x=rank, line={"color": NEUTRAL, "dash": "dot"})
        label = f"{name} {rank:.1f}"
        figure.add_annotation(x=rank, y=height, yref="paper", text=label, showarrow=False, xanchor="left")
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
    figure = draw(*traces, title="What a polynomial leaves", xaxis_title="degree", yaxis_title="relative residual")
    figure.update_yaxes(type="log", exponentformat="power")
    return figure.update_layout(showlegend=True)


def modified(found: Modified, names: Sequence[str] = ()) -> go.Figure:
    """Draw the default features that an input feature modifies most, orange where amplified, blue where suppressed.

    Args:
        found: As `most_modified` returns it.
        names: Of the default features, as `circuits.modified` gives them; by number without.
    """
    names = (
        [f"#{feature}" for feature in found.feature.tolist()]
        if not names
        else [f"#{feature} {name}" for feature, name in zip(found.feature.tolist(), names, strict=True)]
    )
    figure = bars(dict(zip(names, found.change.tolist(), strict=True)), "Default features modified most", "change")
    figure.data[0].update(
        marker_color=[POSITIVE if gain > 0 else NEGATIVE for gain in found.gain.tolist()],
        customdata=list(zip(rounded(found.gain), rounded(found.excess), strict=True)),
        hovertemplate="%{x}: %{y:.3f}, gain %{customdata[0]}, %{customdata[1]} × chance<extra></extra>",
    )
    return figure


def modification(matrix: Float[Tensor, "default modifier"]) -> go.Figure:
    """Draw how strongly each modifier feature modifies each default feature (2305.03452).

    Args:
        matrix: As `bilens.tensor.defaults.modification` returns it.
    """
    trace = go.Heatmap(
        z=[rounded(row) for row in matrix],
        colorscale=[[0, PAPER], [1, POSITIVE]],
        hovertemplate="default %{y}, modifier %{x}: %{z:.4f}<extra></extra>",
    )
    figure = draw(trace, title="What modifies what", xaxis_title="modifier feature", yaxis_title="default feature")
    return figure.update_yaxes(autorange="reversed")
