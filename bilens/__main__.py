"""The command line: find the circuits of a layer, attribute a prompt, look at features."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:  # these take seconds to import, so that happens behind a spinner
    from .circuits.attribution import Attribution
    from .circuits.couplings import CouplingTest, NegationCouplings
    from .circuits.discovery import Discoveries
    from .circuits.layer import FeatureLayer
    from .circuits.trial import CircuitTest
    from .models.transformer import BilinearTransformer
    from .report.page import Finding
    from .saes.cards import Card, FeatureCards
    from .tensor.interactions import Interactions

REPORT = Path("bilens-report.html")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bilens circuits [MODEL]`, `bilens attribute TEXT` or `bilens features [MODEL]`; alone, the first of them."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or (argv[0] not in COMMANDS and argv[0] not in ("-h", "--help")):
        argv.insert(0, "circuits")
    args = _parser().parse_args(argv)
    console = Console(stderr=args.json, highlight=False)
    try:
        found = COMMANDS[args.command](args, console)
    except (ValueError, OSError, IndexError, TypeError) as error:
        print(f"bilens: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(found, indent=1, allow_nan=False))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bilens", description="Circuits of bilinear transformers, from their weights."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser(
        "circuits", help="rank a layer, search it for motifs, test them, write a report (default)"
    )
    one.add_argument("model", nargs="?", default="bilens-mini", help="bilens-mini, a folder or a Hub repository")
    one.add_argument("--layer", type=int, help="which layer (default: where negators flip sentiment most)")
    one.add_argument("--text", help="text to test on: a file, or a Hub dataset (default: sampled from the model)")
    one.add_argument("--features", type=int, default=6, help="output features to report in detail")
    one.add_argument("--tests", type=int, default=1, help="of how many the strongest pair is tested on the text")
    one.add_argument("--controls", type=int, default=20, help="matched pairs that a tested pair is compared with")
    one.add_argument("--null", nargs="+", default=["readers"], help="readers, rotation, untrained; beside them signs")
    one.add_argument("--draws", type=int, default=1024, help="null outputs per null model")
    one.add_argument("--seed", type=int, default=0, help="of null models, controls and resampling")
    one.add_argument("--out", type=Path, help=f"where the report goes (default: {REPORT}; with --json: nowhere)")
    two = commands.add_parser(
        "attribute", help="what makes a feature, or a token's logit, on a text: exactly, by pairs"
    )
    two.add_argument("text")
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
    for command in (one, two, three):
        command.add_argument("--saes", help="folder of SAEs that bilens.saes.fit wrote (default: the model's own)")
        command.add_argument("--json", action="store_true", help="print JSON, and what is for people on stderr")
    return parser


# -- bilens circuits --------------------------------------------------------------------------------------------------


def run_circuits(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Rank a layer, search it, test what was found, and write the report."""
    began = time.perf_counter()
    for name, least in (("features", 1), ("tests", 0), ("controls", 1), ("draws", 200)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    with console.status("loading model and SAEs ..."):
        import bilens
        from bilens import circuits, report

        model = bilens.load(args.model)
        saes = args.saes or args.model
        layers = range(model.cfg.n_layers) if args.layer is None else [args.layer]
        lenses = {i: circuits.FeatureLayer.load(model, i, saes) for i in layers}
        texts = read_texts(args.text) if args.text else None
    generator = torch.Generator().manual_seed(args.seed)
    n_features = lenses[layers[0]].out.cfg.d_sae
    console.print(f"{args.model}: {model.cfg.n_layers} layers, {n_features} features at each end of an MLP")
    with console.status("asking in which layer negators flip sentiment ..."):
        couplings = find_couplings(lenses, generator)
    lens = lenses[args.layer if args.layer is not None else strongest_layer(couplings, len(layers) // 2)]
    with console.status(f"ranking every pair of every output feature of layer {lens.layer} ..."):
        strongest = bilens.top_interactions(lens.tensor, 100, out=lens.readers, inp=lens.writers)
        ranking = circuits.outliers(lens)
    print_ranking(console, lens, strongest)
    with console.status(f"searching {n_features} output features for motifs, and {args.draws} of null models ..."):
        found = circuits.search(lens, generator=generator, null=args.null, n=args.draws)
    with console.status("sampling text from the model ..."):
        dataset = sample_text(model) if texts is None else texts
    chosen = list(dict.fromkeys([one.out for one in found.found] + ranking.feature.tolist()))[: args.features]
    tested = run_tests(args, console, lens, found, chosen, dataset, generator)
    with console.status("testing predictions on text ..."):
        findings = report.describe(lens, chosen, dataset, found, tested)
    print_findings(console, found, findings)
    with console.status(f"testing negation in layer {lens.layer} on text ..."):
        coupling_test = test_couplings(lens, couplings, dataset, args.controls, generator)
    print_negation(console, couplings, coupling_test)
    source = args.text or f"{len(dataset)} texts sampled from the model itself"
    out = args.out or (None if args.json else REPORT)
    if out is not None:
        path = report.write_report(
            out, lens, findings, discoveries=found, ranking=ranking, strongest=strongest,
            couplings=couplings, coupling_test=coupling_test, generator=generator,
            title=f"{args.model}, layer {lens.layer}",
            note=f"bilens {bilens.__version__}, seed {args.seed}; predictions tested on {source}.",
        )  # fmt: skip
        console.print(f"report: {path}  ({time.perf_counter() - began:.0f} s)")
    about = {"model": args.model, "layer": lens.layer, "seed": args.seed, "text": source, "fdr": found.fdr}
    about["negation"] = None if couplings is None else report.couplings_to_json(couplings, coupling_test)
    return about | {"discoveries": len(found.found), "findings": report.to_json(lens, findings)}


def find_couplings(lenses: "dict[int, FeatureLayer]", generator: torch.Generator) -> "NegationCouplings | None":
    """Ask every layer whether negators flip sentiment; None, with the reason, where the cards cannot tell them."""
    from bilens.circuits.couplings import negation_couplings

    try:
        return negation_couplings(lenses, generator=generator)
    except ValueError as error:
        print(f"negation not looked for: {error}", file=sys.stderr)
        return None


def strongest_layer(couplings: "NegationCouplings | None", default: int) -> int:
    """Return the layer where the groups are coupled most significantly."""
    return default if couplings is None else couplings.layers[int(couplings.q.argmin())].layer


def test_couplings(
    lens: "FeatureLayer",
    couplings: "NegationCouplings | None",
    dataset: Sequence[str] | torch.Tensor,
    n_controls: int,
    generator: torch.Generator,
) -> "CouplingTest | None":
    """Take the layer's products of negators and sentiment out of the running model."""
    from bilens.circuits.couplings import test_coupling

    if couplings is None:
        return None
    here = next(one for one in couplings.layers if one.layer == lens.layer)
    try:
        return test_coupling(lens, here, dataset, generator=generator, n_controls=n_controls, max_windows=16)
    except ValueError as error:
        print(f"negation not tested: {error}", file=sys.stderr)
        return None


def run_tests(
    args: argparse.Namespace,
    console: Console,
    lens: "FeatureLayer",
    found: "Discoveries",
    chosen: Sequence[int],
    dataset: Sequence[str] | torch.Tensor,
    generator: torch.Generator,
) -> "list[CircuitTest]":
    """Test the strongest pair of the first discoveries; one that is never active in the text is passed over."""
    from bilens import circuits

    first = {one.out: one for one in reversed(found.found)}  # the most significant of each output
    protocol, tested = circuits.Protocol(n_pairs=args.controls, n_directions=5, max_windows=16), []
    for number, feature in enumerate([f for f in chosen if f in first][: args.tests], 1):
        circuit = circuits.Circuit.of(lens, first[feature])
        with console.status(f"testing circuit {number}, {circuit.left} × {circuit.right} → {feature}, on text ..."):
            try:
                tested.append(circuits.test(lens, circuit, dataset, protocol, generator=generator))
            except ValueError as error:
                console.print(f"not tested: {error}", markup=False)
    return tested


def sample_text(model: "BilinearTransformer", n: int = 48, length: int = 96) -> torch.Tensor:
    """Return text that the model writes itself, as token windows: data that is always there, offline."""
    start = torch.full((n, 1), model.bos_id)
    generator = torch.Generator().manual_seed(0)
    return model.generate(start, length - 1, temperature=0.9, top_k=100, stop_at_eos=False, generator=generator)


def print_ranking(console: Console, lens: "FeatureLayer", strongest: "Interactions", n: int = 10) -> None:
    """Print the strongest pairs of the layer."""
    table = _table(f"strongest feature pairs of layer {lens.layer}, from the weights alone")
    for name in ("input feature", "× input feature", "→ output feature"):
        table.add_column(name, max_width=34, overflow="ellipsis", no_wrap=True)
    table.add_column("coefficient", justify="right")
    for o, i, j, value in list(zip(*(part.tolist() for part in strongest), strict=True))[:n]:
        names = (lens.name("inp", i), lens.name("inp", j), lens.name("out", o))
        table.add_row(*map(escape, names), f"{value:+.3f}")
    console.print(table)


def print_findings(console: Console, found: "Discoveries", findings: "Sequence[Finding]") -> None:
    """Print what was found in the output features that the report shows in detail."""
    outs = len({one.out for one in found.found})
    console.print(f"{len(found.found)} motifs in {outs} of {len(found.score)} output features, FDR {found.fdr:g}")
    table = _table(
        "motifs from the weights; correlation with what two eigenvectors predict; removal of the pair tested"
    )
    left = console.width - 62  # what the numbers leave
    table.add_column("output feature", max_width=min(max(left, 12), 36), overflow="ellipsis", no_wrap=True)
    table.add_column("motif", no_wrap=True, min_width=8)
    for name, width in (("q", 7), ("λ₁", 5), ("λ₂", 5), ("r active", 8), ("KL pct.", 7)):
        table.add_column(name, justify="right", no_wrap=True, min_width=width)
    for one in findings:
        first = one.discoveries[0] if one.discoveries else None
        motif = ("-", "-") if first is None else (first.motif, f"{first.q:.1e}")
        values = [f"{value:+.2f}" for value in one.values[:2].tolist()]
        percentile = "-" if one.tested is None else f"{one.tested.percentile['kl']:.0f}"
        numbers = (*motif, *values, f"{one.prediction.pearson_active:.2f}", percentile)
        table.add_row(escape(f"{one.feature} {one.label}"), *numbers)
    console.print(table)


def print_negation(console: Console, couplings: "NegationCouplings | None", test: "CouplingTest | None") -> None:
    """Print whether negators flip sentiment: by the weights of every layer, and by the running model in this one."""
    if couplings is None:
        return
    console.print("[b]sentiment negation[/b]: negators × sentiment → good less bad words; a negative z flips")
    for one, q in zip(couplings.layers, couplings.q.tolist(), strict=True):
        sizes = f"{len(one.left.features)} × {len(one.right.features)} features"
        console.print(f"  layer {one.layer}: {sizes}, z = {one.z[0]:+.2f}, q = {q:.2g}", markup=False)
    if test is not None:
        ranks = test.percentile
        console.print(
            f"  without their products in layer {test.coupling.layer}: predicted and measured change correlate "
            f"{test.correlation:.3f}; KL at percentile {ranks['kl']:.0f}, loss at {ranks['loss']:.0f} of "
            f"{len(test.scale)} random groups"
        )


# -- bilens attribute -------------------------------------------------------------------------------------------------


def run_attribute(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Attribute an output feature, or a token's logit, at one position."""
    with console.status("loading model and SAEs ..."):
        import bilens
        from bilens import circuits
        from bilens.circuits import attribution

        model = bilens.load(args.model)
        lens = circuits.FeatureLayer.load(model, args.layer, args.saes or args.model)
    target = {"feature": args.feature, "token": args.token, "out": None if args.feature is None else lens.out}
    options = {"position": args.position, "label": partial(lens.name, "inp")}
    found = bilens.attribute(model, args.text, args.layer, inp=lens.inp, **target, **options)
    terms = found.top(args.k)
    print_attribution(console, lens, found, args.k)
    if args.graph is not None:
        attribution.write_graph(found, args.graph)
        console.print(f"graph: {args.graph.resolve()}")
    named = [{"left": t.left, "right": t.right, "labels": t.labels, "value": t.value} for t in terms]
    return {"target": found.target.name, "layer": args.layer, "terms": named} | _sums(found)


def _sums(found: "Attribution") -> dict[str, float]:
    """Return the kinds of terms at one position; they sum to `total`."""
    parts = {
        "feature × feature": found.pairs.sum(),
        "feature × bias": found.feature_bias.sum(),
        "feature × error": found.feature_error.sum(),
        "error × error": found.error.sum(),
        "error × bias": found.error_bias.sum(),
        "bias": found.bias.sum(),
        "total": found.total.sum(),
        "model": found.pre_activation.sum(),
    }
    return {name: value.item() for name, value in parts.items()}


def print_attribution(console: Console, lens: "FeatureLayer", found: "Attribution", k: int) -> None:
    """Print the strongest pairs and the sums of all kinds of terms."""
    place = found.places.position[0].item()
    word = found.places.words[0][place]
    target = found.target.name
    if found.target.kind == "feature":
        target += f" ({lens.name('out', found.target.index)})"
    table = _table(f"{target} at {place} {word!r}, layer {found.layer}: pairs that add or take away most")
    for name in ("input feature", "× input feature"):
        table.add_column(name, max_width=44, overflow="ellipsis", no_wrap=True)
    table.add_column("adds", justify="right")
    for term in found.top(k):
        table.add_row(*map(escape, term.labels), f"{term.value:+.4f}")
    console.print(table)
    for name, value in _sums(found).items():
        console.print(f"  {name:18} {value:+.5f}", markup=False)


# -- bilens features --------------------------------------------------------------------------------------------------


def run_features(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Show feature cards, stored ones or new ones."""
    with console.status("loading model and SAEs ..."):
        import bilens
        from bilens import saes

        model = bilens.load(args.model)
        hook = f"blocks.{args.layer}.hook_mlp_{'in' if args.side == 'inp' else 'out'}"
        folder = args.saes or args.model
    if args.text is not None:
        rows = read_rows(args.text)
        sae = saes.load(folder, hook)
        made = saes.collect(model, {hook: sae}, rows, folder=args.folder, label=args.label)[hook]
    else:
        made = saes.FeatureCards.load(folder, hook, model)
    chosen = args.feature if args.feature is not None else made.contexts.density.argsort(descending=True).tolist()
    found = [made[feature] for feature in chosen]
    found = [card for card in found if args.find is None or args.find in card.name]
    found = found if args.feature is not None else found[:20]
    print_cards(console, made, found)
    return {"hook": hook, "provenance": made.provenance, "features": [card._asdict() for card in found]}


def print_cards(console: Console, made: "FeatureCards", found: "Sequence[Card]") -> None:
    """Print cards: in full up to three, otherwise a line each."""
    console.print(f"{made!r}", markup=False)
    if len(found) > 3:
        table = _table("features")
        for name in ("feature", "active", "promotes", *(f"AUROC {label}" for label in made.labels)):
            table.add_column(name, max_width=44, overflow="ellipsis", no_wrap=True)
        for card in found:
            promoted = ", ".join(list(card.promoted)[:4])
            told = [f"{value:.2f}" for value in card.auroc.values()]
            table.add_row(escape(f"{card.feature} {card.name}"), f"{100 * card.density:.2f} %", escape(promoted), *told)
        console.print(table)
        return
    for card in found:
        told = "".join(f", AUROC for {label} {value:.2f}" for label, value in card.auroc.items())
        console.print(f"{card.feature}: {card.name}", style="bold", markup=False)
        console.print(f"  active at {100 * card.density:.2f} % of positions, {card.mean:.2f} on average there{told}")
        for verb, some in (("promotes", card.promoted), ("demotes", card.demoted)):
            tokens = ", ".join(f"{token} {effect:+.2f}" for token, effect in some.items())
            console.print(f"  {verb} {tokens or 'nothing'}", markup=False)
        for context in card.contexts:
            console.print(f"    {context}", markup=False)


# -- common parts -----------------------------------------------------------------------------------------------------


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left")


def read_rows(name: str) -> Iterable[dict[str, Any]]:
    """Return the rows of a text, parquet, json or csv file, or of a Hub dataset (`name:split`), read as a stream.

    Raises:
        FileNotFoundError: No such file.
    """
    import datasets

    kinds = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}
    suffix = Path(name).suffix
    if Path(name).is_file() or suffix in kinds:
        if not Path(name).is_file():
            raise FileNotFoundError(f"no such file: {name}")
        with contextlib.redirect_stdout(sys.stderr):
            return datasets.load_dataset(kinds.get(suffix, "text"), data_files=name, split="train", streaming=True)
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
        texts += [row["text"]] if row["text"].strip() else []
        if len(texts) == most:
            break
    if not texts:
        raise ValueError(f"{name} must hold a text that is not empty, got none")
    return texts


COMMANDS: dict[str, Callable[[argparse.Namespace, Console], dict[str, Any]]] = {
    "circuits": run_circuits,
    "attribute": run_attribute,
    "features": run_features,
}

if __name__ == "__main__":
    raise SystemExit(main())
