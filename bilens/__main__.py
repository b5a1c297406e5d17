"""The command line: rank a layer of a bilinear model, find circuits, write a report."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:  # these take seconds to import, so that happens behind a spinner
    from .circuits import FeatureLayer, NegationCircuit
    from .interactions import Interactions
    from .report import FeatureReport
    from .transformer import BilinearTransformer


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bilens [MODEL] [--saes FOLDER] [--layer L] [--text FILE] [--out FILE]`; alone, on the embedded model."""
    parser = argparse.ArgumentParser(prog="bilens", description="Rank a bilinear layer's feature interactions.")
    parser.add_argument("model", nargs="?", default="bilens-mini", help="bilens-mini, a folder or a Hub repository")
    parser.add_argument("--saes", help="folder of SAEs that bilens.saes.fit wrote (default: the model's own)")
    parser.add_argument("--layer", type=int, help="which layer (default: where the negation circuit is strongest)")
    parser.add_argument("--text", type=Path, help="text file to test on (default: text sampled from the model)")
    parser.add_argument("--features", type=int, default=6, help="output features to report in detail")
    parser.add_argument("--out", type=Path, default=Path("bilens-report.html"), help="where the report goes")
    args = parser.parse_args(argv)
    try:
        run(args, Console(stderr=False, highlight=False))
    except (ValueError, OSError) as error:
        print(f"bilens: {error}", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace, console: Console) -> None:
    """Do the main job and print what was found."""
    began = time.perf_counter()
    with console.status("loading model and SAEs ..."):
        import bilens
        from bilens import circuits, report

        model = bilens.load(args.model)
        saes = args.saes or args.model
        layers = range(model.cfg.n_layers) if args.layer is None else [args.layer]
        lenses = {i: circuits.FeatureLayer.load(model, i, saes) for i in layers}
    console.print(
        f"{args.model}: {model.cfg.n_layers} layers, {lenses[layers[0]].out.cfg.d_sae} features at each end of an MLP"
    )
    with console.status("locating the sentiment-negation circuit ..."):
        negation = find_negation(lenses)
    lens = lenses[negation.layer if negation else layers[len(layers) // 2]]
    with console.status(f"ranking every pair of every output feature of layer {lens.layer} ..."):
        strongest = bilens.top_interactions(lens.tensor, 100, out=lens.readers, inp=lens.writers)
        ranking = circuits.outliers(lens)
    with console.status("testing predictions on text ..."):
        dataset = args.text.read_text().splitlines() if args.text else sample_text(model)
        chosen = ([negation.feature] if negation else []) + ranking.feature.tolist()
        chosen = list(dict.fromkeys(chosen))[: args.features]
        features = [report.describe(lens, feature, dataset) for feature in chosen]
    source = str(args.text) if args.text else f"{len(dataset)} texts sampled from the model itself"
    path = report.write_report(
        args.out, lens, ranking, strongest, features, negation,
        title=f"{args.model}, layer {lens.layer}", note=f"bilens {bilens.__version__}; predictions tested on {source}.",
    )  # fmt: skip
    print_ranking(console, lens, strongest)
    print_features(console, features)
    if negation is not None:
        print_negation(console, negation)
    console.print(f"report: {path}  ({time.perf_counter() - began:.0f} s)")


def find_negation(lenses: "dict[int, FeatureLayer]") -> "NegationCircuit | None":
    """Return the circuit, or None where no layer has one."""
    from bilens import circuits

    try:
        return circuits.find_negation(lenses)
    except ValueError as error:
        print(f"no negation circuit: {error}", file=sys.stderr)
        return None


def sample_text(model: "BilinearTransformer", n: int = 48, length: int = 96) -> torch.Tensor:
    """Return text that the model writes itself, as token windows: data that is always there, offline."""
    start = torch.full((n, 1), model.bos_id)
    generator = torch.Generator().manual_seed(0)
    return model.generate(start, length - 1, temperature=0.9, top_k=100, stop_at_eos=False, generator=generator)


def print_ranking(console: Console, lens: "FeatureLayer", strongest: "Interactions", n: int = 10) -> None:
    """Print the strongest pairs of the layer."""
    table = Table(title=f"strongest feature pairs of layer {lens.layer}, from the weights alone", title_justify="left")
    for name in ("input feature", "× input feature", "→ output feature"):
        table.add_column(name, max_width=34, overflow="ellipsis", no_wrap=True)
    table.add_column("coefficient", justify="right")
    for o, i, j, value in list(zip(*(part.tolist() for part in strongest), strict=True))[:n]:
        names = (lens.label("inp", i), lens.label("inp", j), lens.label("out", o))
        table.add_row(*map(escape, names), f"{value:+.3f}")
    console.print(table)


def print_features(console: Console, features: "Sequence[FeatureReport]") -> None:
    """Print the output features that the report shows in detail."""
    table = Table(title="output features by spectral outliers, and what two eigenvectors predict", title_justify="left")
    table.add_column("output feature", max_width=44, overflow="ellipsis", no_wrap=True)
    for name in ("λ₁", "λ₂", "r active", "r overall"):
        table.add_column(name, justify="right")
    for one in features:
        values = [f"{value:+.2f}" for value in one.values[:2].tolist()]
        correlations = [f"{r:.2f}" for r in (one.prediction.pearson_active, one.prediction.pearson)]
        table.add_row(escape(f"{one.feature} {one.label}"), *values, *correlations)
    console.print(table)


def print_negation(console: Console, found: "NegationCircuit") -> None:
    """Print the sentiment-negation circuit."""
    what = "not good" if found.target[1] == "positive" else "not bad"
    console.print(
        f"[b]sentiment negation[/b] in layer {found.layer}: output feature {found.feature} stands for “{what}”"
    )
    for role, index in (("negation", found.negation), ("sentiment", found.sentiment)):
        console.print(f"  {role} feature {index}: {found.labels[role]}", markup=False)
    console.print(
        f"  coefficient {found.coefficient:+.3f}, number {found.rank} of its pairs by strength; mean pre-activation "
        + ", ".join(f"{name} {value:.2f}" for name, value in found.removals.items())
    )


if __name__ == "__main__":
    raise SystemExit(main())
