"""What the command line prints: tables for people."""

from collections.abc import Mapping, Sequence
from functools import partial

from rich.console import Console

from bilens.circuits.attribution import Attribution
from bilens.circuits.costs import DRAWS, Plan
from bilens.circuits.couplings import CouplingTest, NegationCouplings
from bilens.circuits.discovery import Discoveries
from bilens.circuits.findings import Finding
from bilens.circuits.layer import FeatureLayer
from bilens.circuits.negating import Negation
from bilens.saes.cards import Card, FeatureCards
from bilens.tensor.interactions import Interactions
from bilens.tensor.tables import Tabular

from .columns import print_line, print_table, short

LONG = 60.0  # seconds after which somebody wants to know how long it takes
_WIDEST = 44  # characters of a name


def _ranked(console: Console, title: str, record: Tabular, shown: Mapping[str, str], number: str, spec: str) -> None:
    """Print a record: some of its columns under other names, and what each row's `value` is."""
    columns = record.columns()
    names = zip(*(columns[name] for name in shown), strict=True) if columns else ()
    values = columns.get("value", ())
    rows = [
        (*(short(name, _WIDEST) for name in row), f"{float(value):{spec}}")
        for row, value in zip(names, values, strict=True)
    ]
    print_table(console, title, tuple(shown.values()), (number,), rows)


def print_plan(console: Console, lens: FeatureLayer, plan: Plan) -> None:
    """Say what is left out of the ranking and the search, and how long they take if that is more than a minute."""
    say = partial(console.print, markup=False)
    if plan.outputs is not None:
        say(
            f"layer {lens.layer}: {len(plan.outputs)} of {plan.n_outputs} output features are ranked and searched, "
            f"those with the largest interactions; the others are left out. All take about {_time(plan.every)} here: "
            "--outputs all"
        )
    if plan.fewer:
        say(f"layer {lens.layer}: {plan.draws} outputs are drawn from each null model, not {DRAWS}: --draws {DRAWS}")
    if plan.ranking + plan.search > LONG:
        say(
            f"ranking takes about {_time(plan.ranking)}, the search with {plan.draws} null outputs about "
            f"{_time(plan.search)}; fewer --outputs and --draws make it shorter, --resume FOLDER lets it go on after a "
            "kill"
        )


def _time(seconds: float) -> str:
    """Say a time to a digit or two."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def print_ranking(
    console: Console, lens: FeatureLayer, strongest: Interactions, plan: Plan | None = None, n: int = 10
) -> None:
    """Print the strongest pairs of the layer, and of how many of its output features they are if not of all."""
    shown = {"left_name": "input feature", "right_name": "× input feature", "out_name": "→ output feature"}
    title = f"strongest feature pairs of layer {lens.layer}, from the weights alone"
    if plan is not None and plan.outputs is not None:
        title += f", of {len(plan.outputs)} of {plan.n_outputs} output features"
    _ranked(console, title, strongest[:n].named(lens.name), shown, "coefficient", "+.3f")


def print_findings(console: Console, found: Discoveries, findings: Sequence[Finding]) -> None:
    """Print what was found in the output features that the report shows in detail."""
    outs = len({one.out for one in found.found})
    some = "" if found.outputs is None else f" searched, {found.n_outputs} in all"
    console.print(f"{len(found.found)} motifs in {outs} of {len(found.score)} output features{some}, FDR {found.fdr:g}")
    title = "motifs from the weights; correlation with what two eigenvectors predict; removal of the pair tested"
    rows = []
    for one in findings:
        first = one.discoveries[0] if one.discoveries else None
        motif = ("-", "-") if first is None else (first.motif, f"{first.q:.1e}")
        values = [f"{value:+.2f}" for value in one.values[:2].tolist()]
        percentile = "-" if one.tested is None else f"{one.tested.percentile['kl']:.0f}"
        numbers = (*motif, *values, f"{one.prediction.pearson_active:.2f}", percentile)
        rows.append((short(f"{one.feature} {one.label}", 36), *numbers))
    print_table(console, title, ("output feature",), ("motif", "q", "λ₁", "λ₂", "r active", "KL pct."), rows)


def print_negation(console: Console, found: Negation, n: int = 5) -> None:
    """Print where negators turn the verdict, by which features, and what the running model does without these."""
    search, test = found.search, found.test
    console.print("[b]where “not” turns the verdict[/b]: negators × sentiment → good less bad; a negative z turns it")
    for one in sorted(search.groups, key=lambda one: (one.coupling.layer, one.place)):
        groups = one.coupling
        sizes = f"{len(groups.left.features)} × {len(groups.right.features)} features"
        about = f"layer {groups.layer}, at the {one.place}: {sizes}, z = {groups.z[0]:+.2f}, q = {one.q:.2g}"
        console.print(f"  {about}", markup=False)
    if search.groups:
        left, right = search.groups[0].names
        console.print(f"  the strongest groups: {left} × {right}", markup=False)
    console.print(f"  single pairs: {search.n_found} of {search.n_tested} have q < 0.01", markup=False)
    for one in search.pairs[: min(n, search.n_found)]:
        where, names = f"layer {one.layer}, at the {one.place}", " × ".join(one.names)
        console.print(f"    {where}: {names} → {one.output}, q = {one.q:.2g}", markup=False)
    if test is not None:
        before, after = test.before, test.after
        console.print(
            f"  [b]without their products[/b] {after.all:.0%} of {len(test.measured)} sentences flip, with them "
            f"{before.all:.0%}; plain ones are judged right at {after.plain:.0%}, {before.plain:.0%}"
        )
        if controls := [*test.controls, *test.matched]:
            least = min(one.all for one in controls)
            console.print(f"  without as many random products at least {least:.0%} flip ({len(controls)} edits)")


def print_couplings(console: Console, couplings: NegationCouplings | None) -> None:
    """Print whether negators flip sentiment by the weights of every layer."""
    if couplings is None:
        return
    console.print("[b]sentiment negation[/b]: negators × sentiment → good less bad words; a negative z flips")
    for one, q in zip(couplings.layers, couplings.q.tolist(), strict=True):
        sizes = f"{len(one.left.features)} × {len(one.right.features)} features"
        console.print(f"  layer {one.layer}: {sizes}, z = {one.z[0]:+.2f}, q = {q:.2g}", markup=False)


def print_coupling_test(console: Console, test: CouplingTest | None) -> None:
    """Print what the running model says of it in one layer."""
    if test is not None:
        ranks = test.percentile
        console.print(
            f"negators × sentiment, without their products in layer {test.coupling.layer}: predicted and measured "
            f"change correlate {test.correlation:.3f}; KL at percentile {ranks['kl']:.0f}, loss at "
            f"{ranks['loss']:.0f} of {len(test.scale)} random groups"
        )


def print_attribution(console: Console, lens: FeatureLayer, found: Attribution, k: int) -> None:
    """Print the strongest pairs at one position, and the sums of all kinds of terms."""
    place, word, target = found.places.position[0].item(), found.places.word(0), found.target.name
    if found.target.kind == "feature":
        target += f" ({lens.name('out', found.target.index)})"
    title = f"{target} at {place} {word!r}, layer {found.layer}: pairs that add or take away most"
    _ranked(console, title, found.top(k), {"labels_0": "input feature", "labels_1": "× input feature"}, "adds", "+.4f")
    for name, value in found.sums.items():
        print_line(console, f"  {name:18} {value.item():+.5f}")


def print_cards(console: Console, made: FeatureCards, found: Sequence[Card]) -> None:
    """Print cards: in full up to three, otherwise a line each."""
    console.print(f"{made!r}", markup=False)
    if len(found) > 3:
        rows = [
            (
                short(f"{card.feature} {card.name}", _WIDEST),
                short(", ".join(list(card.promoted)[:4]), _WIDEST),
                f"{100 * card.density:.2f} %",
                *(f"{value:.2f}" for value in card.auroc.values()),
            )
            for card in found
        ]
        labels = [f"AUROC {label}" for label in made.labels]
        print_table(console, "features", ("feature", "promotes"), ("active", *labels), rows)
        return
    for card in found:
        told = f"active at {100 * card.density:.2f} % of positions, {card.mean:.2f} on average there"
        told += "".join(f", AUROC for {label} {value:.2f}" for label, value in card.auroc.items())
        console.print(f"{card.feature}: {card.name}", style="bold", markup=False)
        console.print(f"  {told}", markup=False)
        for verb, some in (("promotes", card.promoted), ("demotes", card.demoted)):
            tokens = ", ".join(f"{token} {effect:+.2f}" for token, effect in some.items())
            console.print(f"  {verb} {tokens or 'nothing'}", markup=False)
        for context in card.contexts:
            console.print(f"    {context}", markup=False)
