"""What the command line prints first; it needs no SAEs, whose import takes seconds."""

from rich.console import Console

from bilens.circuits.verdict import Behaviour, Readout

from .columns import print_table


def print_behaviour(console: Console, told: Behaviour, readout: Readout) -> None:
    """Print a model's verdicts on some statements."""
    words = f"{', '.join(readout.good)} against {', '.join(readout.bad)}"
    title = f"what the model says after “… {readout.prompt.strip()}”, and its log-odds of {words}"
    rows = [
        (statement, word, f"{odds:+.2f}")
        for statement, odds, word in zip(told.statements, told.log_odds.tolist(), told.words, strict=True)
    ]
    print_table(console, title, ("statement", "likeliest word"), ("log-odds",), rows)
