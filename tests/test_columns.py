"""Tables of the terminal: numbers are whole at any width and in any encoding, names give way, nothing is markup."""

import io
import re

import pytest
from rich.console import Console

from bilens.report.columns import print_line, print_table, share

NUMBERS = ("-12345.678", "+0.001")


def shown(width, encoding="utf-8"):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    console = Console(file=stream, width=width, highlight=False)
    rows = [
        ("a long name of a feature → [red]", "x × y\nz", NUMBERS[0], "0.57"),
        ("b", "[/] λ", NUMBERS[1], "1.00"),
    ]
    print_table(console, "title [b] of it", ("input feature", "× other"), ("coefficient", "AUROC negative"), rows)
    print_line(console, "graph: /tmp/a folder/with/a/long/path/g[red].json")
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
@pytest.mark.parametrize("width", [1, 20, 40, 60, 80, 200])
def test_numbers_are_whole_at_any_width(width, encoding):
    text = shown(width, encoding)
    for number in (*NUMBERS, "0.57", "1.00"):
        assert len(re.findall(rf"[ │|]{re.escape(number)} [│|]", text)) == 1
    assert "graph: /tmp/a folder/with/a/long/path/g[red].json\n" in text
    lines = [line for line in text.splitlines() if line.strip().startswith(("│", "|"))]
    assert sum("0.57" in line or "1.00" in line for line in lines) == 2  # a newline in a name does not break its row
    assert max(map(len, lines)) <= max(width, 40)


def test_names_are_whole_where_there_is_room():
    text = shown(200)
    for part in ("title [b] of it", "a long name of a feature → [red]", "x × y z", "[/] λ", "AUROC negative"):
        assert part in text
    assert "…" in shown(60)
    assert "coefficient" in shown(60)


@pytest.mark.parametrize(
    ("room", "wanted", "widths"),
    [(30, [10, 50, 5], [10, 15, 5]), (30, [50, 50, 50], [10, 10, 10]), (0, [9, 2], [4, 2]), (99, [9, 2], [9, 2])],
)
def test_what_wants_less_leaves_more_for_the_others(room, wanted, widths):
    assert share(room, wanted) == widths
