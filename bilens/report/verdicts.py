"""What the command line prints first; it needs no SAEs, whose import takes seconds."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bilens.circuits.verdict import Behaviour, Readout


def print_behaviour(console: Console, told: Behaviour, readout: Readout) -> None:
    """Print a model's verdicts on some statements."""
    words = f"{', '.join(readout.good)} against {', '.join(readout.bad)}"
    title = f"what the model says after “… {readout.prompt.strip()}”, and its log-odds of {words}"
    table = Table(title=title, title_justify="left")
    table.add_column("statement", overflow="fold", min_width=26)
    table.add_column("log-odds", justify="right")
    table.add_column("likeliest word", no_wrap=True)
    for statement, odds, word in zip(told.statements, told.log_odds.tolist(), told.words, strict=True):
        table.add_row(escape(statement), f"{odds:+.2f}", escape(word))
    console.print(table)
