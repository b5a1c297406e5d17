"""Records in notebooks: a table of bounded length, with a small figure wherever there are many numbers.

Colours are the notebook's own (`currentColor`), so that it reads on light and dark alike.
"""

import base64
from collections.abc import Iterator
from html import escape
from io import BytesIO
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .tables import SPREAD, Tabular, brief, cell, is_one, length_of, unit_of

ROWS, COLUMNS, FACTS = 10, 14, 16  # shown at most
_DEEP = 2  # records within records
_WIDE, _HIGH, _POINTS = 96, 22, 64  # a sparkline: pixels, and numbers drawn
_POSITIVE, _NEGATIVE = (194, 65, 12), (29, 78, 216)  # of an image; zero is white
_LEFT, _RIGHT = ' style="text-align:left"', ' style="text-align:right"'


def html_of(record: Any, depth: int = 0) -> str:
    """Return a record as HTML: its table, what is said of it as a whole, and the records in it to be unfolded."""
    facts = dict(islice(record.facts().items(), FACTS))
    inner = {name: value for name, value in facts.items() if isinstance(value, Tabular)}
    flat = {name: value for name, value in facts.items() if name not in inner}
    parts = [_lines(record, flat)] if is_one(record) else [_table(record, flat)]
    if depth < _DEEP:
        parts += [_folded(name, value, depth) for name, value in inner.items()]
    return f"<div>{''.join(parts)}</div>"


def _folded(name: str, value: Any, depth: int) -> str:
    """Return a record within another, to be unfolded; several are open."""
    said = f"{escape(name)}: {escape(_headline(value))}"
    state = " open" if isinstance(value, list) else ""
    return f"<details{state}><summary>{said}</summary>{html_of(value, depth + 1)}</details>"


def _headline(value: Any) -> str:
    return f"{length_of(value)} {unit_of(value)}" if isinstance(value, list) else brief(repr(value), 160)


def _lines(record: Any, facts: dict[str, Any]) -> str:
    """Return a record that is one row as a line for each of its facts."""
    lines = (f"<tr><th{_LEFT}>{escape(name)}</th><td{_LEFT}>{_long(value)}</td></tr>" for name, value in facts.items())
    return f"<table><caption{_LEFT}>{escape(type(record).__name__)}</caption><tbody>{''.join(lines)}</tbody></table>"


def _long(value: Any) -> str:
    """Return a cell that has a line to itself, with a line for each text if it holds several."""
    if isinstance(value, tuple | list) and len(value) and all(isinstance(one, str) for one in value):
        return "<br/>".join(escape(brief(one, 120)) for one in value[:ROWS])
    return _shown(value)


def _table(record: Any, facts: dict[str, Any]) -> str:
    """Return the first rows, under the course of each column through all of them."""
    columns = dict(islice(record.columns().items(), COLUMNS))
    n = max((len(column) for column in columns.values()), default=0)
    head = "".join(f"<th{_side(column)}>{escape(name)}</th>" for name, column in columns.items())
    lines = "".join(f"<tr>{''.join(_cells(columns, index))}</tr>" for index in range(min(n, ROWS)))
    said = [
        f"{min(n, ROWS)} of {n} {unit_of(record)}",
        *(f"{name} {brief(one)}" for name, one in facts.items() if one is not None),
    ]
    caption = f"<caption{_LEFT}>{escape(_kind(record) + ' · '.join(said))}</caption>"
    return f"<table>{caption}<thead><tr>{head}</tr>{_courses(columns)}</thead><tbody>{lines}</tbody></table>"


def _kind(record: Any) -> str:
    return "" if isinstance(record, list) else f"{type(record).__name__}: "


def _cells(columns: dict[str, Any], index: int) -> Iterator[str]:
    for column in columns.values():
        yield f"<td{_side(column)}>{_shown(column[index]) if index < len(column) else ''}</td>"


def _side(column: Any) -> str:
    return _RIGHT if _numbers(column) else _LEFT


def _numbers(column: Any) -> bool:
    """Tell a column of numbers from one of words or figures."""
    if isinstance(column, Tensor):
        return column.ndim == 1
    first = next((one for one in islice(column, ROWS) if one is not None), None)
    return isinstance(first, int | float) and not isinstance(first, bool)


def _courses(columns: dict[str, Any]) -> str:
    """Return a line of sparklines above columns of fractions that are long enough to have a course."""
    drawn = {name: _course(column) for name, column in columns.items()}
    if not any(drawn.values()):
        return ""
    return f"<tr>{''.join(f'<td{_side(columns[name])}>{one}</td>' for name, one in drawn.items())}</tr>"


def _course(column: Any) -> str:
    if not isinstance(column, Tensor) and _numbers(column) and all(isinstance(one, int | float) for one in column):
        column = torch.tensor([float(one) for one in column])
    whole = not isinstance(column, Tensor) or column.ndim != 1 or not column.is_floating_point()
    return "" if whole or len(column) < 3 else sparkline(column)


def _shown(value: Any) -> str:
    """Return one cell."""
    value = cell(value)
    if isinstance(value, Tensor) and value.ndim == 2 and min(value.shape) > 3:
        return image(value)
    if isinstance(value, tuple | list) and len(value) > SPREAD and all(isinstance(one, int | float) for one in value):
        value = torch.tensor(value, dtype=torch.float64)
    if isinstance(value, Tensor) and value.ndim == 1 and len(value) > 2 and value.is_floating_point():
        return sparkline(value)
    inner = isinstance(value, Tabular) and not isinstance(value, list)
    return escape(brief(repr(value), 120) if inner else brief(value))


def sparkline(values: Tensor) -> str:
    """Return the course of some numbers as a small drawing, around zero where they have both signs.

    Args:
        values: The numbers; those that are not finite are left out.
    """
    values = values.detach().cpu().double()
    kept = values[torch.linspace(0, len(values) - 1, min(len(values), _POINTS)).round().long()]
    kept = kept[kept.isfinite()]
    if not len(kept):
        return ""
    low, high = min(0.0, kept.min().item()), max(0.0, kept.max().item())
    scale = (_HIGH - 4) / ((high - low) or 1.0)
    across = torch.linspace(1, _WIDE - 1, len(kept)).tolist()
    points = " ".join(f"{x:.1f},{2 + (high - y) * scale:.1f}" for x, y in zip(across, kept.tolist(), strict=True))
    zero = 2 + high * scale
    lines = f'<line x1="0" x2="{_WIDE}" y1="{zero:.1f}" y2="{zero:.1f}" stroke="currentColor" opacity="0.35"/>'
    lines += f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.3"/>'
    said = f"{len(values)} numbers from {kept.min():.4g} to {kept.max():.4g}"
    size = f'width="{_WIDE}" height="{_HIGH}" viewBox="0 0 {_WIDE} {_HIGH}"'
    return f'<svg {size} role="img" aria-label="{said}"><title>{said}</title>{lines}</svg>'


def image(pixels: Tensor, pixel: int = 64) -> str:
    """Return a signed matrix as a small picture: orange above zero, blue below, white at zero.

    Args:
        pixels: `[height, width]`.
        pixel: Its longer side on the screen.
    """
    from PIL import Image

    pixels = pixels.detach().cpu().float().nan_to_num()
    share = (pixels / pixels.abs().max().clamp(min=torch.finfo(torch.float32).tiny))[..., None]
    tone = torch.where(share > 0, torch.tensor(_POSITIVE), torch.tensor(_NEGATIVE)).float()
    drawn, held = (255 + (tone - 255) * share.abs()).round().byte().numpy(), BytesIO()
    height, width = pixels.shape
    Image.fromarray(drawn).save(held, "PNG")
    size = f'width="{pixel * width // max(pixels.shape)}" height="{pixel * height // max(pixels.shape)}"'
    said = f"{height}×{width}, from {pixels.min():.4g} to {pixels.max():.4g}"
    data = base64.b64encode(held.getvalue()).decode()
    style = 'style="image-rendering:pixelated"'
    return f'<img {size} alt="{said}" title="{said}" {style} src="data:image/png;base64,{data}"/>'
