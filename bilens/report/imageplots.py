"""Figures of image classifiers: eigenvectors as images, truncation, similarity, explanations, masks, grids."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from bilens.images.adversarial import Attack
from bilens.images.reading import ClassEigen, Explanation, Similarity, Truncation

from .figures import DIVERGING, INK, NEGATIVE, POSITIVE, draw, rounded

PALETTE = (POSITIVE, NEGATIVE, "#047857", "#7c3aed", "#b45309", "#0e7490")


def image_grid(
    images: Float[Tensor, "rows columns height width"],
    row_names: Sequence[str],
    column_names: Sequence[str],
    title: str,
    captions: Sequence[Sequence[str]] | None = None,
) -> go.Figure:
    """Draw a grid of signed images, each on its own scale, zero white (2410.08417, figures 2, 4 and 7).

    Args:
        images: One for each row and column; NaN is left blank.
        row_names: Names at the left.
        column_names: Names above.
        title: Goes above.
        captions: What to show when pointing at an image.
    """
    rows, columns, height, width = images.shape
    if (len(row_names), len(column_names)) != (rows, columns):
        raise ValueError(f"names must be {rows} and {columns}, got {len(row_names)} and {len(column_names)}")
    scale = images.nan_to_num().abs().amax((2, 3), keepdim=True).clamp(min=1e-30)
    tiles = torch.full((rows, columns, height + 1, width + 1), torch.nan)
    tiles[:, :, :height, :width] = images / scale
    sheet = tiles.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    captions = [["" for _ in range(columns)] for _ in range(rows)] if captions is None else captions
    hover = [[captions[r][c] for c in range(columns) for _ in range(width + 1)] for r in range(rows)]
    trace = go.Heatmap(
        z=[[None if value != value else round(value, 2) for value in row] for row in sheet.tolist()],
        text=[line for line in hover for _ in range(height + 1)],
        hovertemplate="%{text}<extra></extra>",
        colorscale=DIVERGING,
        zmin=-1,
        zmax=1,
        showscale=False,
    )
    size = {"width": 100 + 60 * columns, "height": 110 + 60 * rows * height // width}
    figure = draw(trace, title=title, **size)
    middles = [[place * (step + 1) + step / 2 for place in range(n)] for step, n in ((width, columns), (height, rows))]
    figure.update_xaxes(tickvals=middles[0], ticktext=list(column_names), side="top", showgrid=False, zeroline=False)
    figure.update_yaxes(tickvals=middles[1], ticktext=list(row_names), autorange="reversed", showgrid=False)
    figure.update_yaxes(zeroline=False, automargin=True, scaleanchor="x", constrain="domain")
    figure.update_layout(title={"y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 12}})
    figure.update_layout(margin={"l": 70, "r": 20, "t": 80, "b": 20})
    return figure


def class_eigenvectors(full: ClassEigen, names: Sequence[str], n: int = 3, title: str = "Eigenvectors") -> go.Figure:
    """Draw the n most positive and the n most negative eigenvectors of each class (2410.08417, figures 2 and 3)."""
    ends = [full.best(n, "positive"), full.best(n, "negative")]
    shown = torch.cat([end.pixels for end in ends], 1).unflatten(2, full.size)
    values = torch.cat([end.values for end in ends], 1).tolist()
    captions = [[f"{name}: λ = {value:+.3f}" for value in row] for name, row in zip(names, values, strict=True)]
    columns = [f"{sign}{rank}" for sign in "+−" for rank in range(1, n + 1)]
    return image_grid(shown, names, columns, title, captions)


def _line(x: Sequence[int | float], y: Tensor, name: str, color: str | None = None, dash: str = "solid") -> go.Scatter:
    hover = f"{name}, %{{x}}: %{{y:.4g}}<extra></extra>"
    line = {"dash": dash} if color is None else {"dash": dash, "color": color}
    return go.Scatter(x=list(x), y=rounded(y), name=name, mode="lines", line=line, hovertemplate=hover)


def class_spectra(full: ClassEigen, names: Sequence[str]) -> go.Figure:
    """Plot the eigenvalues of every class by rank, most positive first (2410.08417, figure 3)."""
    ranks = range(1, full.values.shape[1] + 1)
    rows = full.values.sort(1, descending=True).values
    figure = draw(*(_line(ranks, row, name) for row, name in zip(rows, names, strict=True)), title="Spectra")
    figure.update_layout(showlegend=True, xaxis_title="rank by value", yaxis_title="eigenvalue λ")
    return figure


def truncation(curves: Mapping[str, Truncation]) -> go.Figure:
    """Plot the error with k eigenvectors for each class, and with all as a dotted line (2410.08417, figure 5B)."""
    traces = []
    for place, (name, curve) in enumerate(curves.items()):
        color = PALETTE[place % len(PALETTE)]
        k = curve.k.tolist()
        traces.append(_line(k, 1 - curve.accuracy, name, color))
        traces.append(_line([k[0], k[-1]], torch.full((2,), 1 - curve.full), f"{name}, all", color, "dot"))
    figure = draw(*traces, title="Error with k eigenvectors of each class", xaxis_title="k")
    figure.update_yaxes(type="log", dtick=1, title="error on test images")
    figure.update_layout(showlegend=True)
    return figure


def similarity(found: Mapping[str, Similarity], title: str = "Similarity across seeds") -> go.Figure:
    """Plot mean |cosine| of matched eigenvectors by rank with 90 % intervals (2410.08417, figure 5A)."""
    traces = []
    for place, (name, one) in enumerate(found.items()):
        low, high = one.interval()
        line = _line(range(1, len(one.mean) + 1), one.mean, name, PALETTE[place % len(PALETTE)])
        bars = {"type": "data", "array": rounded(high - one.mean), "arrayminus": rounded(one.mean - low), "width": 3}
        traces.append(line.update(mode="lines+markers", error_y=bars))
    figure = draw(*traces, title=title, xaxis_title="rank", yaxis_title="|cosine|")
    figure.update_layout(showlegend=True)
    figure.update_yaxes(range=[0, 1])
    return figure


def explanation(found: Explanation, names: Sequence[str], classes: int = 3, n: int = 20) -> go.Figure:
    """Plot what the eigenvectors add to the largest logits of one image, strongest first (2410.08417, appendix C)."""
    traces = []
    for place, label in enumerate(found.top(classes)):
        parts = found.contributions[label]
        parts = parts[parts.abs().argsort(descending=True)[:n]].sort(descending=True).values
        name = f"{names[label]}: {float(found.logits[label]):+.2f}"
        hover = f"{names[label]}: %{{y:+.3f}}<extra></extra>"
        color = PALETTE[place % len(PALETTE)]
        ranks = list(range(1, len(parts) + 1))
        traces.append(go.Bar(x=ranks, y=rounded(parts), name=name, marker_color=color, hovertemplate=hover))
    figure = draw(*traces, title=f"What adds to each logit: the {n} strongest eigenvectors", width=720)
    figure.update_layout(showlegend=True, xaxis_title="rank by value", yaxis_title="λ (v·x)²")
    return figure


def explanation_images(found: Explanation, names: Sequence[str], classes: int = 3, n: int = 2) -> go.Figure:
    """Draw an image beside the eigenvectors that add most to its largest logits, and those that take most."""
    rows, captions = [], []
    for label in found.top(classes):
        order = found.contributions[label].argsort(descending=True)
        chosen = torch.cat((order[:n], order[-n:].flip(0)))
        rows.append(torch.cat((found.x[None], found.eigen.pixels[label, chosen])))
        parts = found.contributions[label, chosen].tolist()
        captions.append(["the image", *(f"{names[label]}: adds {part:+.2f}" for part in parts)])
    columns = ["image", *(f"{sign}{rank}" for sign in "+−" for rank in range(1, n + 1))]
    labels = [names[label] for label in found.top(classes)]
    return image_grid(torch.stack(rows).unflatten(2, found.eigen.size), labels, columns, "What adds most", captions)


def attack(
    found: Attack,
    limit: Float[Tensor, " strengths"] | None = None,
    published: Mapping[float, tuple[float, float]] | None = None,
) -> go.Figure:
    """Plot accuracy and targeted rate by strength, means over masks, beside permuted masks (2410.08417, figure 7).

    Args:
        found: What the masks did.
        limit: The share of images that any perturbation of that norm could take to its target.
        published: Accuracy and targeted rate printed by the authors, by strength.
    """
    parts = {
        "accuracy": (found.accuracy, NEGATIVE, "solid"),
        "accuracy, permuted": (found.control_accuracy, NEGATIVE, "dot"),
        "targeted": (found.targeted, POSITIVE, "solid"),
        "targeted, permuted": (found.control_targeted, POSITIVE, "dot"),
    }
    traces = [_line(found.strengths, part.mean((0, 1)), name, *look) for name, (part, *look) in parts.items()]
    if limit is not None:
        traces.append(_line(found.strengths, limit, "reachable at that norm", INK, "dash"))
    for place, (name, color) in enumerate((("accuracy", NEGATIVE), ("targeted", POSITIVE)) if published else ()):
        y = [pair[place] for pair in published.values()]
        marker = {"color": color, "symbol": "circle-open", "size": 8}
        traces.append(go.Scatter(x=list(published), y=y, name=f"{name}, published", mode="markers", marker=marker))
    figure = draw(*traces, title="Masks on held-out images", width=680, xaxis_title="strength", yaxis_title="share")
    figure.update_layout(showlegend=True)
    return figure


def grid(values: Float[Tensor, "rows columns"], rows: Sequence[str], columns: Sequence[str], title: str) -> go.Figure:
    """Draw numbers as a table of shades, such as effective ranks by noise and decay (2410.08417, appendix E)."""
    if values.shape != (len(rows), len(columns)):
        raise ValueError(f"values must be {len(rows)}x{len(columns)}, got {list(values.shape)}")
    text = [[f"{value:.3g}" for value in row] for row in values.tolist()]
    shades = [[0, "#ffffff"], [1, POSITIVE]]
    trace = go.Heatmap(z=list(map(rounded, values)), x=list(columns), y=list(rows), text=text, texttemplate="%{text}")
    trace.update(colorscale=shades, showscale=False, hovertemplate="%{y}, %{x}: %{text}<extra></extra>")
    figure = draw(trace, title=title)
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category")
    return figure
