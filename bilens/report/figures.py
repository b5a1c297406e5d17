"""The house's look: colours, and the parts that figures share."""

import textwrap
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from torch import Tensor

INK, PAPER, GRID = "#1f2933", "#ffffff", "#e4e7eb"
POSITIVE, NEGATIVE, NEUTRAL = "#c2410c", "#1d4ed8", "#9aa5b1"
_EDGE, _LETTER = 20, 8.5  # beside a title; width of its letters, pixels
DIVERGING = [[0, NEGATIVE], [0.5, "#ffffff"], [1, POSITIVE]]


def draw(
    *traces: go.Scatter | go.Heatmap | go.Bar | go.Histogram, width: int = 520, height: int = 380, **layout: object
) -> go.Figure:
    """Return a figure in the house's look."""
    return styled(go.Figure(data=list(traces)), width, height, **layout)


def styled(figure: go.Figure, width: int = 520, height: int = 380, title: str = "", **layout: object) -> go.Figure:
    """Give a figure the house's look; its title is broken into as many lines as its width needs."""
    lines = textwrap.wrap(title, int((width - 2 * _EDGE) / _LETTER))
    figure.update_layout(
        width=width,
        height=height,
        title={"text": "<br>".join(lines), "font_size": 15, "x": _EDGE / width, "y": 1 - 12 / height, "yanchor": "top"},
        margin={"l": 60, "r": 20, "t": 20 + 20 * len(lines), "b": 50},
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        paper_bgcolor=PAPER,
        plot_bgcolor=PAPER,
        showlegend=False,
        **layout,
    )
    figure.update_xaxes(gridcolor=GRID, zerolinecolor=NEUTRAL)
    figure.update_yaxes(gridcolor=GRID, zerolinecolor=NEUTRAL)
    return figure


def shaded(x: Sequence[int], low: Sequence[float], high: Sequence[float], color: str = NEUTRAL) -> list[go.Scatter]:
    """Return two lines with what is between them filled."""
    shared = {"x": list(x), "mode": "lines", "line": {"width": 0, "color": color}, "hoverinfo": "skip"}
    return [go.Scatter(y=list(low), **shared), go.Scatter(y=list(high), fill="tonexty", opacity=0.3, **shared)]


def rounded(values: Tensor) -> list[float]:
    """Return numbers at the precision a screen can show, which makes a page a third as large."""
    return [float(f"{value:.4g}") for value in values.tolist()]


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
    figure = draw(trace, title=title, yaxis_title=unit)
    figure.update_xaxes(automargin=True)
    return figure
