"""A figure of any record: its columns of numbers, against the names of its rows or their order."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import plotly.graph_objects as go
from torch import Tensor

from bilens.tensor.tables import Tabular, is_one, length_of, unit_of

from .columns import short
from .figures import DIVERGING, INK, NEGATIVE, NEUTRAL, POSITIVE, draw, rounded

_BARS, _LINES = 20, 4  # rows that each have a bar; columns that each have a line
_MOST = 2000  # points of a line
_COLORS = (POSITIVE, NEGATIVE, INK, NEUTRAL)


def table(record: Tabular) -> go.Figure:
    """Draw a record's columns: the last as bars where the rows have names, else each as a line.

    Raises:
        ValueError: The record holds no numbers.
    """
    if is_one(record):
        return _facts(record)
    columns = record.columns()
    numbers = _those(columns, float) or _those(columns, int)
    if not numbers and (wide := [column for column in columns.values() if _is_matrix(column)]):
        return _matrix(record, wide[0])
    if not any(map(len, numbers.values())):
        raise ValueError(f"record must hold numbers to be drawn, but {type(record).__name__} has {_said(columns)}")
    names = _names(columns)
    return _bars(record, names, numbers) if names else _lines(record, numbers)


def _facts(record: Tabular) -> go.Figure:
    """Draw the numbers of a record that is one row, or the record in it that has most rows."""
    facts = record.facts()
    numbers = {name: value for name, value in facts.items() if isinstance(value, float)}
    numbers = numbers or {name: value for name, value in facts.items() if isinstance(value, int)}
    vectors = [value for value in facts.values() if isinstance(value, Tensor) and value.ndim == 1 and len(value) > 1]
    inner = [value for value in facts.values() if isinstance(value, Tabular)]
    if not numbers and inner:
        return table(max(inner, key=length_of))
    if not numbers and vectors:
        return _lines(record, {"value": _numbers(vectors[0])})
    if not numbers:
        raise ValueError(f"record must hold numbers to be drawn, but {type(record).__name__} has {_said(facts)}")
    return _signed(list(numbers), list(map(float, numbers.values())), type(record).__name__, "")


def _said(names: Any) -> str:
    return f"none among {', '.join(names)}" if names else "no column"


def _those(columns: dict[str, Any], kind: type) -> dict[str, list[float]]:
    """Return the columns of fractions, which measure something, or of whole numbers, which mostly number something."""
    return {name: _numbers(column) for name, column in columns.items() if _is(column, kind)}


def _is(column: Any, kind: type) -> bool:
    if isinstance(column, Tensor):
        return column.ndim == 1 and column.is_floating_point() == (kind is float)
    return len(column) > 0 and all(isinstance(one, kind) for one in islice(column, _MOST))


def _numbers(column: Any) -> list[float]:
    return [float(one) for one in (column.tolist() if isinstance(column, Tensor) else column)[:_MOST]]


def _names(columns: dict[str, Any]) -> list[str]:
    """Return what the rows are called, by all columns of words; none if there are no words, or too many rows."""
    words = [column for column in columns.values() if _is_words(column)]
    return [" × ".join(short(str(one)) for one in row) for row in islice(zip(*words, strict=True), _BARS)]


def _is_words(column: Any) -> bool:
    return not isinstance(column, Tensor) and len(column) > 0 and isinstance(column[0], str)


def _is_matrix(column: Any) -> bool:
    return isinstance(column, Tensor) and column.ndim > 1 and column.is_floating_point()


def _matrix(record: Tabular, values: Tensor) -> go.Figure:
    """Draw numbers that have a second axis, the mean over further ones."""
    values = values[:_MOST].flatten(2).mean(-1) if values.ndim > 2 else values[:_MOST]
    limit = values.nan_to_num().abs().max().item() or 1.0
    colors = {"colorscale": DIVERGING, "zmin": -limit, "zmax": limit}
    trace = go.Heatmap(
        z=[rounded(row) for row in values], hovertemplate="%{y}, %{x}: %{z:.4g}<extra></extra>", **colors
    )
    figure = draw(trace, title=type(record).__name__, yaxis_title=unit_of(record))
    return figure.update_yaxes(autorange="reversed")


def _bars(record: Tabular, names: Sequence[str], numbers: dict[str, list[float]]) -> go.Figure:
    unit = "value" if "value" in numbers else list(numbers)[-1]
    n = len(numbers[unit])
    title = f"{type(record).__name__}: {min(n, len(names))} of {n} {unit_of(record)}"
    return _signed(names, numbers[unit][: len(names)], title, unit)


def _signed(names: Sequence[str], values: Sequence[int | float], title: str, unit: str) -> go.Figure:
    """Draw bars with names at their side, the first on top, coloured by sign."""
    rows = list(range(len(names)))
    trace = go.Bar(
        x=[float(f"{value:.4g}") for value in values],
        y=rows,
        orientation="h",
        marker_color=[POSITIVE if value > 0 else NEGATIVE for value in values],
        customdata=list(names),
        hovertemplate="%{customdata}: %{x:.4g}<extra></extra>",
    )
    figure = draw(trace, width=680, height=110 + 24 * len(names), title=title, xaxis_title=unit)
    ticks = {"tickmode": "array", "tickvals": rows, "ticktext": [short(name, 60) for name in names]}
    return figure.update_yaxes(autorange="reversed", automargin=True, **ticks)


def _lines(record: Tabular, numbers: dict[str, list[float]]) -> go.Figure:
    shown = dict(islice(numbers.items(), _LINES))
    traces = [
        go.Scatter(
            x=list(range(len(values))),
            y=[float(f"{value:.4g}") for value in values],
            name=name,
            mode="lines+markers" if len(values) <= 50 else "lines",
            line={"color": color},
            hovertemplate=f"{name}, %{{x}}: %{{y:.4g}}<extra></extra>",
        )
        for (name, values), color in zip(shown.items(), _COLORS, strict=False)
    ]
    figure = draw(*traces, title=type(record).__name__, xaxis_title=unit_of(record))
    return figure.update_layout(showlegend=True, yaxis_title=next(iter(shown)) if len(shown) == 1 else "")
