"""What `bilens check` prints."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bilens.models.selftest import Check


def print_checks(console: Console, name: str, checks: Sequence[Check]) -> None:
    """Print what was checked of a model, whether it holds, and what was found."""
    failed = sum(not check.passed for check in checks)
    table = Table(box=box.SIMPLE, title=f"{escape(name)}: {len(checks)} checks, {failed} failed")
    for column in ("check", "", "found"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(escape(check.name), "ok" if check.passed else "FAILED", escape(check.found))
    console.print(table)
