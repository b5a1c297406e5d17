"""How much of a known circuit the search finds, and how much it makes up: recall and false discoveries.

    python scripts/compiled_models.py --write scripts/results/compiled.md

builds models from random circuits (`bilens.circuits.compiled`), writes each in the published format, loads it as any
checkpoint, searches the layer that holds the circuit, and tests the first pair found in the running model. What is
planted in an output feature is one motif: a block of pairs ("and"), two of opposite sign ("xor"), such with the self
terms that they flip ("negation"), or a square ("copy"). A second or two of one core for each model; models that are in
`--out` are not done again.
"""

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import bilens
from bilens import circuits
from bilens.circuits.circuit import Circuit
from bilens.circuits.compiled import Move, Plan, Product, Shape, compile_plan
from bilens.circuits.discovery import Discoveries
from bilens.circuits.layer import FeatureLayer
from bilens.circuits.trial import Protocol
from bilens.tensor.keeping import atomic_write, read_record, write_record

MOTIFS = ("and", "xor", "negation", "copy")
PART_OF = {  # motifs that an output with a planted one has too: what finds them is no false discovery
    "and": {"and", "outlier"},
    "xor": {"xor", "and", "outlier"},
    "negation": {"negation", "xor", "and", "outlier", "copy"},
    "copy": {"copy"},
}
NEGATORS, POLAR, OTHERS = 3, 4, 16  # input features: negators, of either sentiment, and all others that words have
STATED = 0.1  # noise at which recall and false discoveries are promised
QUICK = Protocol(n_bootstrap=50, n_pairs=20, n_directions=5, max_windows=8)
SHAPE = Shape(expansion=2)
N_FEATURES = SHAPE.expansion * SHAPE.d_model


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=50, help=f"at a noise of {STATED}")
    parser.add_argument("--beyond", type=int, help="at each other level, if not as many")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.05, 0.1, 0.125, 0.15, 0.2, 0.3])
    parser.add_argument(
        "--tilt", type=float, nargs="*", default=[0.25, 0.5], help=f"of the SAEs, at a noise of {STATED}"
    )
    parser.add_argument("--each", type=int, default=3, help="output features with each motif")
    parser.add_argument("--features", type=int, default=24, help="input features of an output that are looked at")
    parser.add_argument("--null", type=int, default=256, help="null outputs of a search")
    parser.add_argument("--fdr", type=float, default=0.05)
    parser.add_argument("--out", type=Path, default=Path("runs/compiled"), help="folder for results of each level")
    parser.add_argument("--write", type=Path, help="write the table to this file too")
    return parser.parse_args(arguments)


# -- random circuits --------------------------------------------------------------------------------------------------


class Planted(NamedTuple):
    """A motif of one output feature."""

    motif: str
    products: list[Product]


def plant(draw: random.Random, motif: str, out: int, roles: dict[str, list[int]]) -> Planted:
    """Draw the input features of a motif, each coefficient 1 or -1."""
    sign = draw.choice((-1.0, 1.0))
    negators = draw.sample(roles["negators"], draw.randint(1, 2))
    good, bad = (draw.sample(roles[side], draw.randint(2, 3)) for side in ("good", "bad"))
    if motif == "and":
        first = draw.sample(roles["others"], 5)
        return Planted(motif, [Product(out, i, j, sign) for i in first[:2] for j in first[2 : draw.randint(4, 5)]])
    if motif == "copy":
        (one,) = draw.sample(roles["others"], 1)
        return Planted(motif, [Product(out, one, one, sign)])
    across = [Product(out, n, p, sign) for n in negators for p in good]
    across += [Product(out, n, p, -sign) for n in negators for p in bad]
    if motif == "negation":
        across += [Product(out, p, p, -sign) for p in good] + [Product(out, p, p, sign) for p in bad]
    return Planted(motif, across)


def random_plan(draw: random.Random, each: int, noise: float, tilt: float) -> tuple[Plan, list[Planted]]:
    """Draw features, words, heads that move the negators, and motifs."""
    free = draw.sample(range(N_FEATURES), 1 + 2 * NEGATORS + 2 * POLAR + OTHERS)
    always, sources, free = free[0], free[1 : 1 + NEGATORS], free[1 + NEGATORS :]
    roles = {"negators": free[:NEGATORS], "good": free[NEGATORS:][:POLAR], "bad": free[NEGATORS + POLAR :][:POLAR]}
    roles["others"] = free[NEGATORS + 2 * POLAR :]
    moves = [Move(source, target, 0.5) for source, target in zip(sources, roles["negators"], strict=True)]
    outs = draw.sample(range(N_FEATURES), each * len(MOTIFS))
    planted = [plant(draw, MOTIFS[i % len(MOTIFS)], out, roles) for i, out in enumerate(outs)]
    products = [one for motif in planted for one in motif.products]
    words = {f"polar{i}": {always: 1.0, f: draw.uniform(1, 2)} for i, f in enumerate(roles["good"] + roles["bad"])}
    words |= {f"not{i}": {always: 1.0, f: 1.5} for i, f in enumerate(sources)}
    pairs = [(one.left, one.right) for motif in planted if motif.motif == "and" for one in motif.products]
    words |= {f"both{i}": {always: 1.0} | {f: draw.uniform(1, 2) for f in both} for i, both in enumerate(pairs)}
    for codes in words.values():  # words have several features, as tokens do
        codes |= {f: draw.uniform(0.5, 1.5) for f in draw.sample(roles["others"], 2) if f not in codes}
    says = {word: {out: 0.5} for word, out in zip(draw.sample(sorted(words), len(outs)), outs, strict=True)}
    return Plan(words, products, moves, says, always, noise, tilt, SHAPE), planted


def texts_of(draw: random.Random, plan: Plan, n: int = 64, length: int = 48) -> list[str]:
    """Draw texts, a fifth of whose words are negators."""
    negators = [word for word in plan.words if word.startswith("not")]
    others = [word for word in plan.words if not word.startswith("not")]
    pick = lambda: draw.choice(negators if draw.random() < 0.2 else others)  # noqa: E731
    return [" ".join(pick() for _ in range(length)) for _ in range(n)]


# -- one model --------------------------------------------------------------------------------------------------------


def load(folder: Path, shape: Shape) -> FeatureLayer:
    """Load the model and its SAEs as any checkpoint."""
    model, scope = bilens.load(folder / "model"), folder / "scope"
    return FeatureLayer.load(model, shape.layer, saes=scope, inp=shape.names[0], out=shape.names[1])


def count(found: Discoveries, lens: FeatureLayer, planted: list[Planted]) -> Counter:
    """Count what was found of what was planted, and what else."""
    truth = {one.products[0].out: one for one in planted}
    counts = Counter()
    for one in planted:
        hits = [d for d in found.of(one.motif) if d.out == one.products[0].out]
        counts[f"planted/{one.motif}"] += 1
        counts[f"found/{one.motif}"] += len(hits)
        for hit in hits:
            counts += members(hit, one)
    for one in found.found:
        there = truth.get(one.out)
        counts["discoveries"] += 1
        counts["false"] += there is None or one.motif not in PART_OF[there.motif]
    for one in found.of("and") + found.of("xor") + found.of("negation"):
        pair, there = Circuit.of(lens, one), truth.get(one.out)
        pairs = set() if there is None else {frozenset((p.left, p.right)) for p in there.products}
        counts["circuits"] += 1
        counts["false circuits"] += frozenset((pair.left, pair.right)) not in pairs
    return counts


def members(found: circuits.discovery.Discovery, planted: Planted) -> Counter:
    """Count the input features in the groups of a discovery that has the right motif."""
    own = {f for one in planted.products for f in (one.left, one.right)}
    named = {int(f) for group in found.groups for f in group.features}
    return Counter({"own features": len(own), "named": len(named), "named rightly": len(own & named)})


def trial(
    lens: FeatureLayer, found: Discoveries, planted: list[Planted], texts: list[str], generator: torch.Generator
) -> dict | None:
    """Test the most significant "and" in the running model, if its pair is a planted one and active in the texts."""
    pairs = {(p.out, frozenset((p.left, p.right))) for one in planted for p in one.products}
    for one in found.of("and"):
        circuit = Circuit.of(lens, one)
        if (circuit.feature, frozenset((circuit.left, circuit.right))) in pairs:
            tested = circuits.trial.test(lens, circuit, texts, QUICK, generator=generator)
            edit = tested.edits["pair"]
            return {"error": edit.error, "positions": len(edit.measured)}
    return None


def one_model(seed: int, noise: float, tilt: float, args: argparse.Namespace) -> dict[str, Any]:
    """Build a model, load it, search it, and test a circuit."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    plan, planted = random_plan(draw, args.each, noise, tilt)
    with tempfile.TemporaryDirectory() as folder:
        compile_plan(plan, generator=generator).save(folder)
        lens = load(Path(folder), plan.shape)
    found = circuits.search(lens, generator=generator, n=args.null, fdr=args.fdr, features=args.features)
    tested = trial(lens, found, planted, texts_of(draw, plan), generator)
    return {"counts": count(found, lens, planted), "trial": tested}


# -- all of them ------------------------------------------------------------------------------------------------------


def level(noise: float, tilt: float, args: argparse.Namespace) -> dict:
    """Return the counts over all models at one level, all that are in the folder too; each is kept once done."""
    options = {"each": args.each, "features": args.features, "null": args.null, "fdr": args.fdr}
    name = "-".join(f"{key}-{value:g}" for key, value in ({"noise": noise, "tilt": tilt} | options).items())
    path = args.out / f"{name}.json"
    done = read_record(path).get("models", [])
    stated = (noise, tilt) == (STATED, 0)
    n = args.models if stated or args.beyond is None else args.beyond
    for seed in range(len(done), n):
        done.append(one_model(seed, noise, tilt, args))
        write_record(path, {"models": done})
    counts = sum((Counter(one["counts"]) for one in done), Counter())
    return {"counts": counts, "trials": [one["trial"] for one in done if one["trial"]], "models": len(done)}


def ratio(found: dict, of: str, among: str) -> float:
    """Return the ratio of two counts; NaN where the second is zero."""
    total = found.get(among, 0)
    return found.get(of, 0) / total if total else float("nan")


def row(noise: float, tilt: float, found: dict) -> str:
    """Return one level as a row of the table."""
    counts, trials = found["counts"], found["trials"]
    planted, hit = (sum(counts.get(f"{kind}/{motif}", 0) for motif in MOTIFS) for kind in ("planted", "found"))
    cells = [f"{noise:g}", f"{tilt:g}", f"{found['models']}", f"{hit / planted:.3f}"]
    cells += [f"{ratio(counts, f'found/{motif}', f'planted/{motif}'):.3f}" for motif in MOTIFS]
    cells += [f"{counts.get('discoveries', 0)}", f"{ratio(counts, 'false', 'discoveries'):.3f}"]
    cells += [
        f"{ratio(counts, 'false circuits', 'circuits'):.3f}",
        f"{ratio(counts, 'named rightly', 'own features'):.3f}",
    ]
    cells += [f"{1 - ratio(counts, 'named rightly', 'named'):.3f}"]
    cells += [f"{max(one['error'] for one in trials):.1e} ({len(trials)})" if trials else "none"]
    return f"| {' | '.join(cells)} |"


HEAD = (
    "noise",
    "tilt",
    "models",
    "recall",
    *MOTIFS,
    "discoveries",
    "false",
    "false pairs",
    "features",
    "false features",
    "error",
)


def lines(args: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of the result."""
    shape = SHAPE
    yield "# Compiled models: what the search finds of a known circuit"
    yield ""
    yield (
        f"Models at each level, each with {args.each} output features for each of {len(MOTIFS)} motifs "
        f"among {shape.expansion * shape.d_model}, between dictionaries of {shape.expansion * shape.d_model} features "
        f"in {shape.d_model} dimensions; written in the published format, loaded, and searched at a false discovery "
        f"rate of {args.fdr:g} with {args.null} null outputs, {args.features} features of each "
        f"looked at ({bilens.__version__}, torch {torch.__version__})."
    )
    yield ""
    yield (
        "A planted product has coefficient ±1; `noise` is the standard deviation of the coefficients of all other "
        "pairs, `tilt` how far the SAEs' directions are off. `recall`: planted motifs found by name in their output "
        "feature, over all and by motif. `false`: share of the discoveries in outputs without the motif or one that "
        "contains it. `false pairs`: share of the blocks found whose strongest pair is not a planted one. `features`: "
        "share of a found motif's input features that its groups name, `false features` what else they name. "
        "`error`: the first planted pair of each model taken out of the running model, largest difference of the "
        "change predicted and measured, over the change (and in how many models)."
    )
    yield ""
    yield f"| {' | '.join(HEAD)} |"
    yield "|---" * len(HEAD) + "|"
    for noise, tilt in [*((noise, 0.0) for noise in args.noise), *((STATED, tilt) for tilt in args.tilt)]:
        yield row(noise, tilt, level(noise, tilt, args))


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing and print the table."""
    args = parse_args(arguments)
    found = []
    for line in lines(args):
        print(line, flush=True)
        found.append(line)
    if args.write:
        with atomic_write(args.write) as partial:
            partial.write_text("\n".join(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
