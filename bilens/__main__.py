"""The command line: circuits of a layer, attribution of a prompt, features and their cards, checks of a model."""

import argparse
import io
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import REPORT, check_counts, mistyped, parser_of_commands

if TYPE_CHECKING:  # these take seconds to import, so that happens behind a spinner; `--help` needs none of them
    import torch
    from rich.console import Console

    from .circuits.costs import Plan
    from .circuits.couplings import CouplingTest, NegationCouplings
    from .circuits.discovery import Discoveries, Discovery
    from .circuits.layer import FeatureLayer
    from .circuits.marks import Marked
    from .circuits.negating import Negation
    from .circuits.trial import CircuitTest
    from .circuits.verdict import Readout
    from .models.transformer import BilinearTransformer
    from .saes.cards import Card, FeatureCards
    from .tensor.interactions import Interactions

CONTROLS = 3  # random edits beside that of the negation, each at two strengths: a few seconds
GROUPED = 64  # input features of each output that are looked at for groups
SHOWN = 12  # output features in the report's table of the layer


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of `bilens circuits`, `attribute`, `features`, `cards` or `check`; alone, the first of them.

    Returns the exit code: 0, 1 for what the library refuses, 130 after Ctrl-C; nobody reading on is no mistake. Letters
    that the terminal does not know are replaced.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("bilens: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head -1`; what is left in the buffer must not be written at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(argv: list[str]) -> int:
    """Read the arguments, run the command, print what it found."""
    if not argv or (argv[0] not in COMMANDS and argv[0] not in ("-h", "--help", "--version", "--completion")):
        if argv and (meant := mistyped(argv[0], COMMANDS)):
            print(f"bilens: no command is named {argv[0]!r}; did you mean {meant!r}?", file=sys.stderr)
            return 2
        argv.insert(0, "circuits")
    args = parser_of_commands().parse_args(argv)
    if args.quiet:
        os.environ["TQDM_DISABLE"] = "1"
    if args.verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    from rich.console import Console

    console = Console(stderr=args.json, highlight=False, quiet=args.quiet)
    try:
        found = COMMANDS[args.command](args, console)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:  # what the library raises for bad input; anything else is a fault of ours
        if args.verbose:
            raise
        print(f"bilens: {error}", file=sys.stderr)
        return 1
    if args.json:
        from .circuits.records import plain

        print(json.dumps(plain(found), indent=1, allow_nan=False))
    sys.stdout.flush()
    return 0 if found.get("passed", True) else 1


# -- bilens circuits --------------------------------------------------------------------------------------------------


def run_circuits(args: argparse.Namespace, console: "Console") -> dict[str, Any]:
    """Say what the model does with negators and by which features, search a layer, test, and write the report."""
    began = time.perf_counter()
    check_counts(args)
    out, model = load_checked(args, console)
    import torch

    import bilens
    from bilens import circuits
    from bilens.report import columns, terminal

    generator = torch.Generator().manual_seed(args.seed)
    texts = read_texts(args.text, args.texts) if args.text else None
    lens, negation, couplings = choose_layer(args, console, model, generator)
    n_features, ends = len(lens.readers), "at each end of an MLP"
    if len(lens.writers) != n_features:
        ends = f"behind an MLP, {len(lens.writers)} before it"
    columns.print_line(console, f"{args.model}: {model.cfg.n_layers} layers, {n_features} features {ends}")
    # tests take several passes over it
    run = {"progress": texts is not None and forecast(console, args, lens, texts) > terminal.LONG / 3}
    run["checkpoint"] = None if args.resume is None else args.resume / f"layer-{lens.layer}"
    plan, strongest, found = search_layer(args, console, lens, generator, run["checkpoint"])
    with console.status("sampling text from the model ..."):
        dataset = sample_text(model) if texts is None else texts
    with console.status("ranking output features by their spectra ..."):
        ranking = circuits.outliers(lens, k=max(args.features, SHOWN), found=found)
    chosen = list(dict.fromkeys([one.out for one in found.found] + ranking.feature.tolist()))[: args.features]
    first = {one.out: one for one in reversed(found.found)}  # the most significant of each output
    firsts = [first[feature] for feature in chosen if feature in first][: args.tests]
    tested = run_tests(args, console, lens, firsts, dataset, generator, run)
    with console.status("testing predictions on text ..."):
        findings = circuits.describe(lens, chosen, dataset, found, tested, **run)
    terminal.print_findings(console, found, findings)
    coupling_test = None
    if couplings is not None:
        with console.status(f"testing negation in layer {lens.layer} on text ..."):
            coupling_test = run_coupling_test(lens, couplings, dataset, args.controls, generator, run)
        terminal.print_coupling_test(console, coupling_test)
    source = f"{len(dataset)} texts " + (f"of {args.text}" if args.text else "sampled from the model itself")
    some = "" if found.outputs is None else f"; of the {found.looked_at} output features with the largest interactions"
    if out is not None:
        with console.status("writing the report ..."):
            from bilens import report

            path = report.write_report(
                out, lens, findings, discoveries=found, ranking=ranking, strongest=strongest, negation=negation,
                marked=mark_sentences(lens, negation), couplings=couplings, coupling_test=coupling_test,
                generator=generator, title=f"{args.model}, layer {lens.layer}",
                note=f"bilens {bilens.__version__}, seed {args.seed}; predictions tested on {source}{some}.",
            )  # fmt: skip
        columns.print_line(console, f"report: {path}  ({time.perf_counter() - began:.0f} s)")
    about = {"model": args.model, "layer": lens.layer, "seed": args.seed, "text": source, "fdr": found.fdr}
    about |= {"outputs": len(found.score), "left_out": n_features - len(found.score), "draws": plan.draws}
    about["negation"] = None if negation is None else negation.to_dict()
    if couplings is not None:
        tested = None if coupling_test is None else coupling_test.to_dict()
        about["negation"] = couplings.to_dict() | {"test": tested}
    return about | {"discoveries": len(found.found), "findings": [one.to_dict() for one in findings]}


def load_checked(args: argparse.Namespace, console: "Console") -> "tuple[Path | None, BilinearTransformer]":
    """Return where the report goes, and the model; what cannot be written to is refused before the work."""
    with console.status("loading the model ..."):
        from bilens.circuits.places import check_layer
        from bilens.tensor.keeping import check_folder, check_writable

        if (out := args.out or (None if args.json else REPORT)) is not None:
            check_writable(out)
        if args.resume is not None:
            check_folder(args.resume)
        model = load_bilinear(args.model)
        if args.layer is not None:
            check_layer(model, args.layer)
    return out, model


def choose_layer(
    args: argparse.Namespace, console: "Console", model: "BilinearTransformer", generator: "torch.Generator"
) -> "tuple[FeatureLayer, Negation | None, NegationCouplings | None]":
    """Return the layer to look at, and what was found of negators in all of them; say it."""
    from bilens.report import terminal

    readout = ask(args, console, model)
    with console.status("loading the SAEs ..."):
        layers = chosen_layers(args)
        lenses = {i: load_layer(args, model, i) for i in layers}
    negation = find_negation(console, lenses, readout, generator)
    couplings = find_couplings(console, lenses, generator) if negation is None else None
    terminal.print_couplings(console, couplings)
    return lenses[strongest_layer(negation, couplings, layers[len(layers) // 2])], negation, couplings


def search_layer(
    args: argparse.Namespace, console: "Console", lens: "FeatureLayer", generator: "torch.Generator", state: Path | None
) -> "tuple[Plan, Interactions, Discoveries]":
    """Rank the pairs of a layer and search it for motifs, as far as is planned; `state` is the folder to keep it in."""
    import bilens
    from bilens import circuits
    from bilens.report import terminal

    with console.status("looking how long the ranking will take ..."):
        n_features = len(lens.readers)
        n = n_features if args.outputs == "all" else args.outputs
        if n is not None and n > n_features:
            raise ValueError(f"--outputs must be at most {n_features} in layer {lens.layer}, got {n}")
        plan = circuits.costs.Plan.of(lens, n, args.draws, args.null)
    terminal.print_plan(console, lens, plan)
    readers = lens.readers if plan.outputs is None else lens.readers[plan.outputs]
    with console.status(f"ranking every pair of {len(readers)} output features of layer {lens.layer} ..."):
        strongest = bilens.top_interactions(
            lens.tensor, 100, out=readers, inp=lens.writers, features=GROUPED,
            progress=plan.ranking > terminal.LONG, checkpoint=state,
        )  # fmt: skip
        if plan.outputs is not None:
            strongest = strongest._replace(out=plan.outputs[strongest.out])
    terminal.print_ranking(console, lens, strongest, plan)
    with console.status(f"searching {len(readers)} output features for motifs, and {plan.draws} of null models ..."):
        found = circuits.search(
            lens, generator=generator, null=args.null, n=plan.draws, outputs=plan.outputs,
            # a constant is no feature of a group, but may be one of the strongest
            features=GROUPED if lens.tensor.constant else strongest.features,
            progress=plan.search > terminal.LONG, checkpoint=state,
        )  # fmt: skip
    return plan, strongest, found


def ask(args: argparse.Namespace, console: "Console", model: "BilinearTransformer") -> "Readout | None":
    """Print the model's verdicts; return how it was asked, or None, with the reason, if it gives none."""
    from bilens.circuits import verdict
    from bilens.report.verdicts import print_behaviour

    readout = verdict.Readout.of(args.model)
    try:
        told = verdict.behaviour(model, verdict.SENTENCES[:4], readout)
    except ValueError as error:
        print(f"no verdicts: {error}", file=sys.stderr)
        return None
    if not {*readout.good, *readout.bad} & set(told.words):
        words = ", ".join(map(repr, dict.fromkeys(told.words)))
        print(f"no verdicts: after {readout.prompt!r} the model says {words}", file=sys.stderr)
        return None
    print_behaviour(console, told, readout)
    return readout


def find_negation(
    console: "Console", lenses: "dict[int, FeatureLayer]", readout: "Readout | None", generator: "torch.Generator"
) -> "Negation | None":
    """Find the products that turn the verdict, and take them out of the running model."""
    from bilens.circuits.negating import negation
    from bilens.report import terminal

    if readout is None:
        return None
    with console.status("looking for what turns the verdict in every layer, and taking it out ..."):
        found = negation(lenses, generator=generator, readout=readout, n_controls=CONTROLS)
    terminal.print_negation(console, found)
    return found


def find_couplings(
    console: "Console", lenses: "dict[int, FeatureLayer]", generator: "torch.Generator"
) -> "NegationCouplings | None":
    """Ask every layer of a model without verdicts whether negators flip sentiment; None where the cards cannot tell."""
    from bilens.circuits.couplings import negation_couplings

    with console.status("asking in which layer negators flip sentiment ..."):
        try:
            return negation_couplings(lenses, generator=generator)
        except ValueError as error:
            print(f"negation not looked for: {error}", file=sys.stderr)
            return None


def strongest_layer(negation: "Negation | None", couplings: "NegationCouplings | None", default: int) -> int:
    """Return the layer where negators turn the verdict, or flip sentiment, most significantly."""
    if negation is not None and negation.search.groups:
        return negation.search.groups[0].coupling.layer
    return default if couplings is None else couplings.layers[int(couplings.q.argmin())].layer


def run_coupling_test(
    lens: "FeatureLayer",
    couplings: "NegationCouplings | None",
    dataset: "Sequence[str] | torch.Tensor",
    n_controls: int,
    generator: "torch.Generator",
    run: dict[str, Any],
) -> "CouplingTest | None":
    """Take the layer's products of negators and sentiment out of the running model."""
    from bilens.circuits.couplings import test_coupling
    from bilens.tensor.keeping import StateError

    if couplings is None:
        return None
    here = next(one for one in couplings.layers if one.layer == lens.layer)
    try:
        return test_coupling(lens, here, dataset, generator=generator, n_controls=n_controls, max_windows=16, **run)
    except StateError:  # of --resume, not of the text
        raise
    except ValueError as error:
        print(f"negation not tested: {error}", file=sys.stderr)
        return None


def mark_sentences(lens: "FeatureLayer", negation: "Negation | None") -> "list[Marked]":
    """Say where the layer's groups are active in a sentence about something good, and in one about something bad."""
    from bilens.circuits import verdict
    from bilens.circuits.marks import mark
    from bilens.report.negation import halves

    here = () if negation is None else [one for one in negation.search.groups if one.coupling.layer == lens.layer]
    if not here:
        return []
    asked = [sentence + negation.readout.prompt for sentence in verdict.SENTENCES[1:4:2]]
    return [mark(lens, sentence, halves(here[0])) for sentence in asked]


def forecast(console: "Console", args: argparse.Namespace, lens: "FeatureLayer", texts: Sequence[str]) -> float:
    """Say how much text was read, and how long the model will take over it: what a few texts take, as many times."""
    from bilens.models.windows import Windows, observed

    with console.status("looking how long the text will take ..."):
        windows = Windows.of(lens.model, texts)
        some = windows[:: -(-len(windows) // 16)]
        began = time.perf_counter()
        for _ in observed(lens.model, some, [lens.hook_out]):
            pass
        n_tokens = int(windows.attend.sum())
        seconds = (time.perf_counter() - began) * n_tokens / int(some.attend.sum())
    cut = f" (the first of {args.text}; --texts for more)" if len(texts) == args.texts else ""
    read = f"{len(texts)} texts{cut}, {n_tokens} tokens"
    console.print(f"{read}: the model will read them in about {seconds:.0f} s", markup=False)
    return seconds


def run_tests(
    args: argparse.Namespace,
    console: "Console",
    lens: "FeatureLayer",
    found: "Sequence[Discovery]",
    dataset: "Sequence[str] | torch.Tensor",
    generator: "torch.Generator",
    run: dict[str, Any],
) -> "list[CircuitTest]":
    """Test the strongest pair of each discovery; one that is never active in the text is passed over."""
    from bilens import circuits
    from bilens.tensor.keeping import StateError

    protocol, tested = circuits.Protocol(n_pairs=args.controls, n_directions=5, max_windows=16), []
    for number, one in enumerate(found, 1):
        circuit = circuits.Circuit.of(lens, one)
        name, folder = f"test-{circuit.left}-{circuit.right}-{one.out}", run["checkpoint"]
        here = run | {"checkpoint": None if folder is None else folder / name}
        with console.status(f"testing circuit {number}, {circuit.left} × {circuit.right} → {one.out}, on text ..."):
            try:
                tested.append(circuits.test(lens, circuit, dataset, protocol, generator=generator, **here))
            except StateError:  # of --resume, not of the text
                raise
            except ValueError as error:
                console.print(f"not tested: {error}", markup=False)
    return tested


def sample_text(model: "BilinearTransformer", n: int = 40, length: int = 80) -> "torch.Tensor":
    """Return text that the model writes itself, as token windows: data that is always there, offline."""
    import torch

    start = torch.full((n, 1), model.bos_id)
    generator = torch.Generator().manual_seed(0)
    return model.generate(start, length - 1, temperature=0.9, top_k=100, stop_at_eos=False, generator=generator)


# -- bilens attribute -------------------------------------------------------------------------------------------------


def run_attribute(args: argparse.Namespace, console: "Console") -> dict[str, Any]:
    """Attribute an output feature, or a token's logit, at one position."""
    with console.status("loading model and SAEs ..."):
        import bilens
        from bilens.report import columns, graph, terminal
        from bilens.tensor.keeping import check_writable

        if args.graph is not None:
            args.graph = check_writable(args.graph)
        text = args.text if args.text != "-" else read_stdin()
        model = load_bilinear(args.model)
        lens = load_layer(args, model, args.layer)
    target = {"feature": args.feature, "token": args.token, "out": None if args.feature is None else lens.out}
    options = {"position": args.position, "label": partial(lens.name, "inp")}
    found = bilens.attribute(model, text, args.layer, inp=lens.inp, **target, **options)
    terms = found.top(args.k)
    terminal.print_attribution(console, lens, found, args.k)
    if args.graph is not None:
        graph.write_graph(found, args.graph)
        columns.print_line(console, f"graph: {args.graph.resolve()}")
    named = [{"left": t.left, "right": t.right, "labels": t.labels, "value": t.value} for t in terms]
    sums = {name: value.item() for name, value in found.sums.items()}
    return {"target": found.target.name, "layer": args.layer, "terms": named} | sums


def read_stdin() -> str:
    """Return what is written to the command, without the line's end.

    Raises:
        ValueError: Nothing is.
    """
    text = sys.stdin.read().rstrip("\r\n")
    if not text.strip():
        raise ValueError("text must be written to standard input where it is '-', got nothing")
    return text


# -- bilens features --------------------------------------------------------------------------------------------------


def run_features(args: argparse.Namespace, console: "Console") -> dict[str, Any]:
    """Show feature cards, stored ones or new ones."""
    with console.status("loading model and SAEs ..."):
        import bilens
        from bilens import saes
        from bilens.report import terminal
        from bilens.saes.picking import fitting_hooks, pick, stored_cards
        from bilens.tensor.keeping import check_folder

        model = bilens.load(args.model)
        name = args.inp if args.side == "inp" else args.out_sae
        chosen = pick(args.saes or args.model, name, fitting_hooks(args.layer, args.side), args.side, args.revision)
        sae = chosen.load()
        hook = saes.hook_of(sae)
    if args.folder is not None:
        check_folder(args.folder)
    if args.text is not None:
        made = saes.collect(model, {hook: sae}, read_rows(args.text), folder=args.folder, label=args.label)[hook]
    else:
        made = stored_cards(chosen, model, sae)
    if made is None:
        raise FileNotFoundError(f"{chosen.name} of {chosen.where} has no cards: bilens cards makes them, or --text")
    found = list(choose_cards(made, args.feature, args.find))
    terminal.print_cards(console, made, found)
    if not found:
        print(f"no feature at {hook} has {args.find!r} in its name", file=sys.stderr)
    return {"hook": hook, "provenance": made.provenance, "features": found}


def choose_cards(
    made: "FeatureCards", features: Sequence[int] | None, word: str | None, n: int = 20
) -> "Iterator[Card]":
    """Yield the cards of some features, or of the n most frequent ones; only those whose name contains a word.

    Raises:
        ValueError: No such feature.
    """
    for feature in features or ():
        if not 0 <= feature < len(made):
            raise ValueError(f"--feature must lie between 0 and {len(made) - 1}, got {feature}")
    chosen = made.contexts.density.argsort(descending=True).tolist() if features is None else features
    cards = (made[feature] for feature in chosen if word is None or word in made.name(feature))
    return islice(cards, n if features is None else None)


# -- bilens cards -----------------------------------------------------------------------------------------------------


def run_cards(args: argparse.Namespace, console: "Console") -> dict[str, Any]:
    """Make the feature cards of both SAEs of a layer, and keep them where the other commands find them."""
    if args.most < 1:
        raise ValueError(f"--most must be at least 1, got {args.most}")
    with console.status("loading model and SAEs ..."):
        import bilens
        from bilens.report import terminal
        from bilens.report.columns import print_line
        from bilens.saes.shelf import cards_folder, cards_path, keep_cards
        from bilens.tensor.keeping import check_folder

        check_folder(cards_folder())
        lens = load_layer(args, bilens.load(args.model), args.layer)
    source = f"{args.text}, {args.most} texts"
    made = keep_cards(lens.model, [lens.inp, lens.out], First(args.text, args.most), source, label=args.label)
    kept = {}
    for side, cards in zip(("inp", "out"), made, strict=True):
        terminal.print_cards(console, cards, list(choose_cards(cards, None, None, n=5)))
        kept[side] = str(cards_path(lens.model, getattr(lens, side)))
    print_line(console, f"kept in {cards_folder()}")
    return {"layer": args.layer, "kept": kept, "provenance": [cards.provenance for cards in made]}


class First:
    """The first rows of a file or dataset, as often as they are asked for."""

    def __init__(self, name: str, most: int):
        self.name, self.most = name, most

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return islice(read_rows(self.name), self.most)


# -- bilens check -----------------------------------------------------------------------------------------------------


def run_check(args: argparse.Namespace, console: "Console") -> dict[str, Any]:
    """Check that a model's hooks, masks, caches and tensors mean what they say; the exit code tells."""
    with console.status("loading the model ..."):
        import torch

        import bilens
        from bilens.models.selftest import selftest
        from bilens.report.selftests import print_checks

        model = bilens.load(args.model)
    with console.status("checking ..."):
        checks = selftest(model, torch.Generator().manual_seed(args.seed))
    print_checks(console, args.model, checks)
    told = [{"check": check.name, "passed": check.passed, "found": check.found} for check in checks]
    return {"model": args.model, "passed": all(check.passed for check in checks), "checks": told}


# -- common parts -----------------------------------------------------------------------------------------------------


def chosen_layers(args: argparse.Namespace) -> Sequence[int]:
    """Return the layers to look at: the one that is named, or all that have SAEs at both sides."""
    from bilens.saes.picking import layers_between

    return layers_between(args.saes or args.model, args.revision) if args.layer is None else [args.layer]


def load_layer(args: argparse.Namespace, model: "BilinearTransformer", layer: int) -> "FeatureLayer":
    """Put a layer between the SAEs that the arguments name."""
    from bilens import circuits

    options = {"inp": args.inp, "out": args.out_sae, "revision": args.revision}
    return circuits.FeatureLayer.load(model, layer, args.saes or args.model, **options)


def load_bilinear(name: str) -> "BilinearTransformer":
    """Load a model whose MLPs must be bilinear.

    Raises:
        ValueError: They are not.
    """
    import bilens

    model = bilens.load(name)
    if (mlp := model.cfg.mlp) is None or not mlp.quadratic:
        raise ValueError(f"model must have bilinear MLPs, those of {name} are {mlp.kind if mlp else 'missing'}")
    return model


def read_rows(name: str) -> Iterable[dict[str, Any]]:
    """Return the rows of a text, parquet, json or csv file, or of a Hub dataset (`name:split`), read as a stream.

    Raises:
        FileNotFoundError: No such file.
    """
    import datasets

    from bilens.tensor.keeping import user_path

    from .models.texts import READERS, stream_of

    path = user_path(name)
    if path.is_file() or path.suffix in READERS:
        return stream_of(path)
    repository, _, split = name.partition(":")
    return datasets.load_dataset(repository, split=split or "train", streaming=True)


def read_texts(name: str, most: int = 2000) -> list[str]:
    """Return the first texts of a file or dataset that are not empty.

    Raises:
        ValueError: Rows without a column `text`, or no text.
    """
    texts = []
    for row in read_rows(name):
        if "text" not in row:
            raise ValueError(f"{name} must have a column 'text', got {', '.join(map(repr, row))}")
        text = row["text"] or ""  # a row may have none
        if not isinstance(text, str):
            raise ValueError(f"{name} must hold text in its column 'text', got {text!r}")
        texts += [text] if text.strip() else []
        if len(texts) == most:
            break
    if not texts:
        raise ValueError(f"{name} must hold a text that is not empty, got none")
    return texts


COMMANDS: "dict[str, Callable[[argparse.Namespace, Console], dict[str, Any]]]" = {
    "circuits": run_circuits,
    "attribute": run_attribute,
    "features": run_features,
    "cards": run_cards,
    "check": run_check,
}

if __name__ == "__main__":
    raise SystemExit(main())
