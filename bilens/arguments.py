"""The arguments of the command line: what each command takes, hints at mistyped words, completion in shells."""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

REPORT = Path("bilens-report.html")
NULLS = ("readers", "rotation", "signs", "untrained")  # those of circuits.nulls, which takes long to import


def mistyped(word: str, commands: Iterable[str]) -> str | None:
    """Return the command that a word was meant to be, if it is none and cannot be a model either."""
    if word.startswith("-") or "/" in word or word == "bilens-mini" or Path(word).is_dir():
        return None
    return next(iter(difflib.get_close_matches(word, commands, n=1, cutoff=0.7)), None)


class _Parser(argparse.ArgumentParser):
    """A parser that says which option was meant."""

    given: Sequence[str] = ()

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parse, and remember what was given."""
        self.given = list(args or ())
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with a message, and the nearest option for each word that is none."""
        known = self._option_string_actions
        for word in (word.partition("=")[0] for word in self.given if word.startswith("--")):
            near = difflib.get_close_matches(word, known, n=1)
            if near and not any(option.startswith(word) for option in known):
                message += f"; did you mean {near[0]} for {word}?"
        super().error(message)


class _Completion(argparse.Action):
    """Print what a shell needs to complete this command's arguments, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *values: Any) -> None:
        import shtab

        print(shtab.complete(parser, values[1]))
        parser.exit()


def _number_or_all(word: str) -> int | str:
    """Return a number, or the word `all`."""
    if word != "all" and not word.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number or all, got {word!r}")
    return word if word == "all" else int(word)


def parser_of_commands() -> argparse.ArgumentParser:
    """Return the parser of all commands, each with its options."""
    import bilens  # its table of names: nothing else is loaded

    parser = _Parser(prog="bilens", description="Circuits of bilinear transformers, from their weights.")
    parser.add_argument("--version", action="version", version=f"bilens {bilens.__version__}")
    shells = ("bash", "zsh", "tcsh")
    about = f'print a completion script for {", ".join(shells)}, e.g. eval "$(bilens --completion bash)"'
    parser.add_argument("--completion", action=_Completion, choices=shells, help=about)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser(
        "circuits", help="verdicts, negation, then the circuits of a layer; writes a report (default)"
    )
    one.add_argument("model", nargs="?", default="bilens-mini", help="bilens-mini, a folder or a Hub repository")
    one.add_argument("--layer", type=int, help="which layer (default: where negators turn the verdict most surely)")
    one.add_argument("--text", help="text to test on: a file, or a Hub dataset (default: sampled from the model)")
    one.add_argument("--texts", type=int, default=2000, help="how many texts of --text to read, from the first on")
    one.add_argument("--features", type=int, default=6, help="output features to report in detail")
    one.add_argument("--tests", type=int, default=1, help="of how many the strongest pair is tested on the text")
    one.add_argument("--controls", type=int, default=20, help="matched pairs that a tested pair is compared with")
    one.add_argument(
        "--null", nargs="+", choices=NULLS, default=["readers"], help="null models; signs only beside another"
    )
    some = "output features to rank and search, those with the largest interactions, or all (default: all, unless"
    one.add_argument("--outputs", type=_number_or_all, help=f"{some} that takes hours)")
    one.add_argument("--draws", type=int, help="null outputs per null model (default: 512, or 256 of a large layer)")
    one.add_argument("--seed", type=int, default=0, help="of null models, controls and resampling")
    one.add_argument("--out", type=Path, help=f"where the report goes (default: {REPORT}; with --json: nowhere)")
    one.add_argument("--resume", type=Path, help="keep what was found in this folder: a killed run goes on there")
    two = commands.add_parser(
        "attribute", help="what makes a feature, or a token's logit, on a text: exactly, by pairs"
    )
    two.add_argument("text", help="the text; - reads it from standard input")
    two.add_argument("--model", default="bilens-mini")
    two.add_argument("--layer", type=int, required=True)
    two.add_argument("--feature", type=int, help="output feature; or give --token")
    two.add_argument("--token", help="token whose logit is attributed, through this layer's MLP alone")
    two.add_argument("--position", type=int, default=-1, help="0 is BOS, -1 the last token")
    two.add_argument("-k", type=int, default=10, help="pairs to show")
    two.add_argument("--graph", type=Path, help="write the attribution graph as JSON here")
    three = commands.add_parser("features", help="feature cards: contexts, tokens, labels")
    three.add_argument("model", nargs="?", default="bilens-mini")
    three.add_argument("--layer", type=int, required=True)
    three.add_argument("--side", choices=("inp", "out"), default="out", help="features before or after the MLP")
    three.add_argument("--feature", type=int, nargs="+", help="which (default: the most frequent)")
    three.add_argument("--find", metavar="WORD", help="only features whose name contains this")
    three.add_argument("--text", help="make cards from this file or Hub dataset instead of reading those stored")
    three.add_argument("--label", help="column of the labels, for the AUROC of each")
    three.add_argument("--folder", type=Path, help="where progress and cards go; a killed run resumes from there")
    four = commands.add_parser("cards", help="make the cards of the SAEs of a layer, for the other commands to find")
    four.add_argument("model", help="bilens-mini, a folder or a Hub repository")
    four.add_argument("--layer", type=int, required=True)
    four.add_argument("--text", required=True, help="a file, or a Hub dataset such as roneneldan/TinyStories")
    four.add_argument("--label", help="column of the labels, for the AUROC of each")
    four.add_argument("--most", type=int, default=10_000, help="texts to read")
    five = commands.add_parser("check", help="self-test of a model: hooks, padding, generation, tensors, degrees")
    five.add_argument("model", nargs="?", default="bilens-mini", help="bilens-mini, a folder or a Hub repository")
    five.add_argument("--seed", type=int, default=0, help="of the tokens and the noise")
    for command in (one, two, three, four):
        where = "folder, Hub repository or SAELens release (default: the model's own)"
        command.add_argument("--saes", help=f"where the SAEs are: a {where}")
        command.add_argument("--revision", help="branch, tag or commit of the SAEs' Hub repository")
    for command in (one, two, three, four, five):
        command.add_argument("--json", action="store_true", help="print JSON, and what is for people on stderr")
        loudness = command.add_mutually_exclusive_group()
        loudness.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors, and JSON if asked")
        loudness.add_argument("-v", "--verbose", action="store_true", help="say what is done; errors with their trace")
    for command in (one, two, three, four):
        command.add_argument("--inp", help="name of the SAE before the MLP, if the layer has several")
        command.add_argument("--out-sae", help="name of the SAE behind the MLP, if the layer has several")
    return parser


def check_counts(args: argparse.Namespace) -> None:
    """Make sure that there is enough of everything.

    Raises:
        ValueError: There is not.
    """
    counts = {"features": 1, "tests": 0, "controls": 1, "draws": 200, "texts": 1, "outputs": 1}
    for name, least in counts.items():
        if isinstance(getattr(args, name), int) and getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}")
