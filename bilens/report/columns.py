"""Tables whose numbers are whole at any width of the terminal, and whose names give way."""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

_LEAST = 4  # characters that are left of a name
_FRAME = 3  # characters beside each column: two blanks and a line


def print_table(
    console: Console, title: str, names: Sequence[str], numbers: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Print a table: columns of names to the left, then columns of numbers, none of which is ever cut.

    Names share the room that numbers leave. Where even the numbers have no room the table is wider than the console.

    Args:
        console: Where to; what is in the cells is plain text.
        title: What stands above.
        names: Headers of the columns of names.
        numbers: Headers of the columns of numbers, which give way too.
        rows: The cells, names first.
    """
    longest = [max((cell_len(row[i]) for row in rows), default=1) for i in range(len(names) + len(numbers))]
    cells, exact = longest[: len(names)], longest[len(names) :]
    frame = _FRAME * len(longest) + 1
    wanted = [max(cell_len(head), width) for head, width in zip(names, cells, strict=True)]
    widths = _number_widths(console.width - frame, numbers, exact, min(sum(wanted), 12 * len(names)))
    shares = share(console.width - frame - sum(widths), wanted)
    table = Table(title=Text(title), title_justify="left")
    for head, width in zip(names, shares, strict=True):
        table.add_column(Text(head), width=width, overflow="ellipsis", no_wrap=True)
    for head, width in zip(numbers, widths, strict=True):
        wrapped = "\n".join(textwrap.wrap(head, width))
        table.add_column(Text(wrapped, justify="right"), width=width, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(" ".join(cell.splitlines())) for cell in row))
    with wide(console, frame + sum(shares) + sum(widths)):
        console.print(table)


def _number_widths(room: int, heads: Sequence[str], exact: Sequence[int], kept: int) -> list[int]:
    """Return the widths of columns of numbers: with their headers in a line, or a word a line, or broken anywhere."""
    for width_of in (cell_len, lambda head: max(map(cell_len, head.split()), default=0)):
        widths = [max(width_of(head), width) for head, width in zip(heads, exact, strict=True)]
        if room - sum(widths) >= kept:
            return widths
    return list(exact)


@contextmanager
def wide(console: Console, width: int) -> Iterator[None]:
    """Let a console be at least so wide: what is printed may leave the terminal, but none of it is cut."""
    before = console.size
    try:
        if width > before.width:
            console.size = (width, before.height)
        yield
    finally:
        if width > before.width:
            console.size = before


def share(room: int, wanted: Sequence[int]) -> list[int]:
    """Divide a width: what wants less than its part gets it, the others share what is left; at least 4 each."""
    widths, left = dict.fromkeys(range(len(wanted)), 0), len(wanted)
    for i in sorted(widths, key=lambda i: wanted[i]):
        widths[i] = min(wanted[i], max(_LEAST, room // left))
        room, left = room - widths[i], left - 1
    return [widths[i] for i in range(len(wanted))]


def short(label: str, length: int = 26) -> str:
    """Cut a label that is longer than an axis or a column has room for."""
    return label if len(label) <= length else f"{label[: length - 1]}…"


def print_line(console: Console, text: str) -> None:
    """Print a line as it is: no markup is read in it, and it is not broken, so that a path can be copied."""
    console.print(Text(text), soft_wrap=True)
