"""Find the products of negators and sentiment that flip a model's verdicts, and take them out of the running model.

    python scripts/negation_circuit.py bilens-mini --saes bilens-mini --opinions opinions.parquet \
        --rated rated-sentences.train.parquet --reviews movie-reviews.train.parquet --out scripts/results/negation.md

Only held-out text is read: minimal pairs of words and frames that the model never saw (one half chooses the features,
the other, of other words and frames, tests them), rated sentences and reviews. Without --opinions the built-in pairs
serve.
"""

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from bag_of_words import has_negator, read_columns
from make_verdicts import rated_rows, read_reviews, review_rows
from torch import Tensor

import bilens
from bilens.circuits import FeatureLayer, Readout, candidates, couplings, edits, negating, turning, verdict
from bilens.circuits.lowrank import LowRank, Predictions, low_rank
from bilens.circuits.statements import MinimalPair, halves, minimal_pairs
from bilens.circuits.steering import unit_directions
from bilens.tensor.bilinear import homogeneous
from bilens.tensor.decompositions import eigen

SIMPLE = ("adjective", "clause", "noun", "verb", "effect", "feeling")  # kinds of opinions with one negator or none
KS = (1, 2, 4, 8, 16, 32, 64)
SHOWN = "the movie was not good"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="bilens-mini, or a folder")
    parser.add_argument("--saes", default="bilens-mini", help="bilens-mini, or a folder with SAEs of all layers")
    parser.add_argument("--layers", type=int, nargs="+", help="of the model, those that have SAEs (default: all)")
    parser.add_argument("--opinions", type=Path, help="parquet made by make_opinions.py: its held-out pairs")
    parser.add_argument("--rated", type=Path, help="parquet with columns source, sentiment, text")
    parser.add_argument("--reviews", type=Path, help="parquet with a column text")
    parser.add_argument("--holdout", type=float, nargs=2, default=(0.1, 0.01), help="of rated sentences, of reviews")
    parser.add_argument("--pairs", type=int, default=200, help="of either half, at most")
    parser.add_argument("--controls", type=int, default=40, help="random edits beside the circuit's")
    parser.add_argument("--directions", type=int, default=200, help="random directions to steer along")
    parser.add_argument("--windows", type=int, default=24, help="reviews that are edited")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="markdown file")
    return parser.parse_args(arguments)


# -- text -------------------------------------------------------------------------------------------------------------


def opinion_pairs(path: Path) -> list[MinimalPair]:
    """Return the held-out minimal pairs of an opinions corpus, in their order."""
    names = ("statement", "word", "polarity", "negated", "negator", "frame", "kind", "pair", "split")
    rows = [dict(zip(names, row, strict=True)) for row in zip(*read_columns(path, *names), strict=True)]
    sides: dict[str, dict[bool, dict]] = {}
    for row in rows:
        if row["split"] == "held-out" and row["kind"] in SIMPLE:
            sides.setdefault(row["pair"], {})[row["negated"]] = row
    return [
        MinimalPair(
            *(side[negated]["statement"] for negated in (False, True)),
            *(side[True][name] for name in ("word", "polarity", "negator", "frame")),
        )
        for side in sides.values()
        if len(side) == 2
    ]


def some_of(pairs: list[MinimalPair], n: int, seed: int) -> list[MinimalPair]:
    """Return n pairs at random, as many of good as of bad words."""
    draw = random.Random(seed)
    kinds = [[pair for pair in pairs if pair.polarity == polarity] for polarity in (1, -1)]
    each = min(n // 2, *map(len, kinds))
    return [pair for kind in kinds for pair in draw.sample(kind, each)]


def interval(share: float, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of n."""
    z, center = 1.96, (share + 1.92 / n) / (1 + 3.84 / n)
    half = z / (1 + 3.84 / n) * (share * (1 - share) / n + 0.96 / n**2) ** 0.5
    return center - half, center + half


# -- markdown ---------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a markdown table."""
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(share: float, n: int | None = None) -> str:
    """Return a share in percent, with its interval if it is known of how many."""
    if n is None:
        return f"{100 * share:.1f} %"
    low, high = interval(share, n)
    return f"{100 * share:.1f} % [{100 * low:.0f}, {100 * high:.0f}]"


def quantiles(values: Sequence[float]) -> str:
    """Return median, 5th and 95th percentile."""
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.05, 0.5, 0.95]).double())
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


# -- sections ---------------------------------------------------------------------------------------------------------


def behaviour_section(told: verdict.Behaviour, readout: Readout) -> str:
    """Show the verdicts on a few sentences."""
    rows = [(row["statement"], f"{row['log_odds']:+.2f}", row["word"]) for row in told.to_dict()]
    good, bad = (", ".join(words) for words in (readout.good, readout.bad))
    said = f"Log-odds of {good} over {bad} after `{readout.prompt}`"
    return f"## What the model does\n\n{said}:\n\n" + table(("statement", "log-odds", "likeliest word"), rows)


def search_section(found: negating.NegationSearch) -> str:
    """Show single pairs and groups."""
    single = [
        (
            one.layer,
            one.place,
            f"{one.left} {one.names[0]} × {one.right} {one.names[1]}",
            one.output,
            f"{one.value:+.3f}",
            f"{one.p:.2g}",
            f"{one.q:.2g}",
            f"{one.q_own:.2g}",
        )
        for one in found.pairs
    ]
    groups = [
        (
            one.coupling.layer,
            one.place,
            f"{len(one.coupling.left.features)} × {len(one.coupling.right.features)}",
            f"{one.names[0]} × {one.names[1]}",
            f"{one.coupling.z[0]:+.2f}",
            f"{one.coupling.p[0]:.2g}",
            f"{one.q:.2g}",
        )
        for one in found.groups
    ]
    held = "hold it" if found.by_singles else "do not hold it"
    head = ("layer", "place", "pair", "output", "interaction", "p", "q", "q, own size out")
    return (
        f"## The search\n\nSingle features {held}: of {found.n_tested} single pairs × outputs in all layers and "
        f"places, {found.n_found} have q < 0.01 among all pairs of the layer, {found.n_found_own} with each feature's "
        f"own size taken out. The strongest:\n\n{table(head, single)}\n\nGroups, on the verdict (a "
        f"negative z flips):\n\n{table(('layer', 'place', 'features', 'names', 'z', 'p', 'q'), groups)}"
    )


def flips_section(test: turning.FlipTest) -> str:
    """Show flips before, after, by place and under controls."""
    whole = {"as it is": test.before, "without the products": test.after}
    whole |= {f"without those at the {place} only": one for place, one in test.by_place.items()}
    rows = [
        (
            name,
            percent(one.good, one.n_good),
            percent(one.bad, one.n_bad),
            percent(one.all, one.n_good + one.n_bad),
            percent(one.plain, one.n_good + one.n_bad),
        )
        for name, one in whole.items()
    ]
    lines = [f"## Minimal pairs without the products\n\n{table(('', 'good words', 'bad words', 'all', 'plain'), rows)}"]
    for name in ("controls", "matched"):
        flips = [one.all for one in getattr(test, name)]
        kept = sum(one >= 0.85 for one in flips)
        strength = "" if name == "controls" else " at the circuit's strength"
        lines.append(
            f"{len(flips)} random edits{strength}: flips, median and 5th and 95th percentile {quantiles(flips)}; "
            f"{kept} leave at least 85 %, {sum(one < test.after.all for one in flips)} fewer than the circuit's edit."
        )
    n = len(test.measured)
    lines.append(
        f"Predicted (direct path) and measured change over {n} negated statements: r = {test.correlation:.3f}."
    )
    return "\n\n".join(lines)


@torch.no_grad()
def layers_section(
    lenses: dict[int, FeatureLayer], test: turning.FlipTest, pairs: list[MinimalPair], readout: Readout
) -> str:
    """Show what each layer's products do alone."""
    model, rows = next(iter(lenses.values())).model, []
    asked = verdict.ask_pairs(model, pairs, readout)
    for one in test.products:
        odds = verdict.log_odds(
            model, verdict.verdict_logits(model, asked, turning.edit_of(lenses, [one])), readout
        ).split(len(pairs))
        found = verdict.flips(pairs, *odds)
        rows.append(
            (one.layer, one.place, f"{len(one.left)} × {len(one.right)}", percent(found.all), percent(found.plain))
        )
    return "## One layer and place at a time\n\n" + table(("layer", "place", "features", "flips", "plain"), rows)


@torch.no_grad()
def rated_section(
    lenses: dict[int, FeatureLayer], test: turning.FlipTest, rated: Path, holdout: float, readout: Readout
) -> str:
    """Show the accuracy on held-out rated sentences with and without a negator, before and after."""
    model, rows = next(iter(lenses.values())).model, []
    held = [row for row in rated_rows(rated, holdout) if row["split"] == "held-out" and abs(row["rating"]) > 0.7]
    for name, wanted in (("with a negator", True), ("without", False)):
        some = [row for row in held if has_negator(row["sentence"]) == wanted]
        asked = verdict.Asked.of(model, [row["sentence"] for row in some], readout)
        right = []
        for edit in (None, turning.edit_of(lenses, test.products)):
            odds = verdict.log_odds(model, verdict.verdict_logits(model, asked, edit), readout)
            good = torch.tensor([row["rating"] > 0 for row in some])
            right.append(((odds > 0) == good).double().mean().item())
        rows.append((name, len(some), *(percent(one, len(some)) for one in right)))
    head = ("held-out rated sentences, beyond 0.7", "n", "right", "right without the products")
    return "## Rated sentences\n\n" + table(head, rows)


def reviews_section(
    lenses: dict[int, FeatureLayer],
    search: negating.NegationSearch,
    texts: dict[str, list[str]],
    args: argparse.Namespace,
) -> str:
    """Show what removing the products of the significant groups does on natural text, beside controls."""
    rows, generator = [], torch.Generator().manual_seed(args.seed)
    for one in search.groups:
        for name, some in texts.items():
            if one.q < 0.01:
                rows.append(review_row(lenses[one.coupling.layer], one, name, some, args.windows, generator))
    head = ("layer", "groups of the", "reviews", "positions", "r predicted, measured", "KL", "logits", "loss")
    about = (
        "Groups with q < 0.01, their products taken out where both are active. In brackets the percentile among 100 "
        "groups in place of the negators, as they are / at equal strength."
    )
    return f"## Natural reviews\n\n{about}\n\n{table(head, rows)}"


def review_row(
    lens: FeatureLayer, one: negating.GroupCoupling, name: str, texts: list[str], n: int, generator: torch.Generator
) -> list[object]:
    """Test the groups of one layer and place on some texts."""
    start = [one.coupling.layer, one.place, name]
    try:
        found = couplings.test_coupling(lens, one.coupling, texts, generator=generator, n_controls=100, max_windows=n)
    except ValueError as error:  # the groups may never be active together there
        return [*start, error, "", "", "", ""]
    equal, raw = found.percentile_rescaled, found.percentile
    effect = {name: value[0].item() for name, value in found.effect._asdict().items()}
    measured = (f"{effect[kind]:+.2g} ({raw[kind]:.1f} / {equal[kind]:.1f})" for kind in ("kl", "logits", "loss"))
    return [*start, len(found.measured), f"{found.correlation:.3f}", *measured]


def held_out_reviews(path: Path, model: bilens.BilinearTransformer, fraction: float, seed: int) -> dict[str, list[str]]:
    """Return held-out reviews as they are, and the ends of those with a mark, with their verdict."""
    reviews = [review for review in read_reviews(path, fraction) if review.split == "held-out"]
    ends = review_rows(reviews, model.tokenizer.backend_tokenizer, 120, random.Random(seed))
    return {
        "as they are": [review.text for review in reviews[:150]],
        "ends and verdicts": [row["text"] for row in ends],
    }


@torch.no_grad()
def steering_section(
    lenses: dict[int, FeatureLayer], test: turning.FlipTest, pairs: list[MinimalPair], args: argparse.Namespace
) -> str:
    """Add the mean product of negators and sentiment to plain statements of the same polarity, beside random ones."""
    rows = []
    for one in test.products:
        if one.place == "readout":
            for polarity, name in ((1, "good"), (-1, "bad")):
                some = [pair for pair in pairs if pair.polarity == polarity][:32]
                moved = steer(lenses[one.layer], one, some, args)
                rows += [(one.layer, f"not × {name}", len(some), *moved)] if moved else []
    head = ("layer", "product", "plain statements", "norm", "log-odds", "moved by")
    head += (f"{args.directions} random: median, largest", "moved less")
    return f"## Steering at the readout\n\n{table(head, rows)}"


def steer(
    lens: FeatureLayer, one: turning.Products, pairs: list[MinimalPair], args: argparse.Namespace
) -> list[object] | None:
    """Return what the mean product of a layer, from negated statements, does to the plain ones; None if it is zero."""
    model, readout = lens.model, Readout.of(args.model)
    seen = candidates.Seen.of({one.layer: lens}, verdict.Asked.of(model, [pair.negated for pair in pairs], readout))
    along = edits.product(lens, lens.codes(seen.x[one.layer][seen.at["readout"]]), one.left, one.right).mean(0)
    if not along.any():
        return None
    asked = verdict.Asked.of(model, [pair.plain for pair in pairs], readout)
    mask, last = asked.windows.attend, (torch.arange(len(asked)), asked.last)
    resid = model(asked.windows.tokens, attention_mask=mask, stop_at_layer=one.layer + 1)

    def odds(change: Tensor) -> float:
        after = resid.clone()
        after[last] += change.to(after)
        if one.layer + 1 < model.cfg.n_layers:
            span = {"start_at_layer": one.layer + 1, "stop_at_layer": model.cfg.n_layers}
            after = model(after, attention_mask=mask, tokens=asked.windows.tokens, **span)
        return verdict.log_odds(model, model.unembed(model.ln_final(after[last])), readout).mean().item()

    before, moved = odds(torch.zeros_like(along)), odds(along)
    others = unit_directions(args.directions, len(along), torch.Generator().manual_seed(args.seed)).to(along)
    far = (torch.tensor([odds(other * along.norm()) for other in others]) - before).abs()
    less = percent((far < abs(moved - before)).double().mean().item())
    return [
        f"{along.norm():.2f}",
        f"{before:+.2f}",
        f"{moved - before:+.2f}",
        f"{far.median():.2f}, {far.max():.2f}",
        less,
    ]


@torch.no_grad()
def spectrum_section(
    lenses: dict[int, FeatureLayer],
    pairs: list[MinimalPair],
    search: negating.NegationSearch,
    seed: int,
    readout: Readout,
) -> str:
    """Show the eigenvalues of the verdict in each layer, where the groups lie, and what a few eigenvectors predict."""
    model = next(iter(lenses.values())).model
    direction = verdict.verdict_direction(model, readout)
    seen = candidates.Seen.of(lenses, verdict.ask_pairs(model, pairs, readout))
    at, rows, planes = seen.at["readout"], [], []
    for layer, lens in lenses.items():
        found = eigen(lens.tensor, direction.to(lens.writers))
        x, y = (some[layer][at].to(lens.writers) for some in (seen.x, seen.y))
        parts = ((homogeneous(x, lens.tensor) @ found.vectors[: max(KS)].T) ** 2 * found.values[: max(KS)]).cumsum(1)
        predicted = Predictions(KS, y @ direction.to(y), parts[:, [k - 1 for k in KS]], seen.statement[at])
        options = {"min_active": 10, "n_bootstrap": 500, "confidence": 0.95}
        curve: LowRank = low_rank(predicted, **options, generator=torch.Generator().manual_seed(seed))
        values = ", ".join(f"{value:+.2f}" for value in found.values[:6].tolist())
        shown = [
            f"{k}: {v:.2f} [{low:.2f}, {high:.2f}]"
            for k, v, low, high in zip(KS, *(part.tolist() for part in curve.pearson), strict=True)
        ]
        rows.append((layer, values, ", ".join(shown)))
        planes += plane(layer, lens, search, found.vectors[:2])
    n = int(at.sum())
    curve_head = ("layer", "eigenvalues of the verdict", f"r by k at the readout of {n} statements")
    plane_head = ("layer", "group at the readout", "on eigenvector 1", "on eigenvector 2")
    return (
        f"## Spectrum and low-rank curve of the verdict\n\n{table(curve_head, rows)}\n\nWhere the groups lie in the "
        f"plane of the two strongest eigenvectors (mean of the features' directions):\n\n{table(plane_head, planes)}"
    )


def plane(layer: int, lens: FeatureLayer, search: negating.NegationSearch, vectors: Tensor) -> list[tuple[object, ...]]:
    """Return where a layer's groups lie in the plane of two eigenvectors."""
    rows: list[tuple[object, ...]] = []
    for one in search.candidates:
        if (one.layer, one.place) != (layer, "readout"):
            continue
        for group in (one.negators, one.sentiment):
            weights = group.weights.to(lens.writers)
            if len(weights):
                mean = weights @ lens.writers[group.features] / weights.abs().sum()
                rows.append((layer, group.role, *(f"{v:+.3f}" for v in (vectors[:, : len(mean)] @ mean).tolist())))
    return rows


def attribution_section(lenses: dict[int, FeatureLayer], search: negating.NegationSearch, readout: Readout) -> str:
    """Show the strongest pairs behind the verdict on one sentence, in the layer of the strongest groups."""
    layer = search.groups[0].coupling.layer if search.groups else max(lenses)
    lens = lenses[layer]
    found = bilens.attribute(
        lens.model,
        SHOWN + readout.prompt,
        layer,
        inp=lens.inp,
        direction=verdict.verdict_direction(lens.model, readout),
        position=-1,
        label=lambda feature: f"{feature} {lens.name('inp', feature)}",
    )
    rows = [(" × ".join(term.labels), f"{term.value:+.3f}") for term in found.top(12)]
    sums = ", ".join(f"{name} {value[0]:+.3f}" for name, value in found.sums.items())
    return f'## "{SHOWN}", layer {layer}, read along the verdict\n\n{sums}.\n\n{table(("pair", "adds"), rows)}'


# -- all of it --------------------------------------------------------------------------------------------------------


def sections(args: argparse.Namespace) -> Iterator[str]:
    """Search and test, a section at a time."""
    begin = time.time()
    model, readout = bilens.load(args.model), Readout.of(args.model)
    lenses = {n: FeatureLayer.load(model, n, args.saes) for n in args.layers or range(model.cfg.n_layers)}
    choose, test = halves(opinion_pairs(args.opinions) if args.opinions else minimal_pairs())
    choose, test = some_of(choose, args.pairs, args.seed), some_of(test, args.pairs, args.seed)
    yield (
        f"# The negation circuit of {args.model}\n\nBy `scripts/negation_circuit.py`, seed {args.seed}: features "
        f"chosen on {len(choose)} minimal pairs, tested on {len(test)} of other words and frames."
    )
    yield behaviour_section(verdict.behaviour(model, readout=readout), readout)
    generator = torch.Generator().manual_seed(args.seed)
    search = negating.search_negation(lenses, choose, generator=generator, readout=readout)
    yield search_section(search)
    yield spectrum_section(lenses, test, search, args.seed, readout)
    yield attribution_section(lenses, search, readout)
    tested = turning.flip_test(
        lenses, search.candidates, test, generator=generator, readout=readout, n_controls=args.controls
    )
    yield flips_section(tested)
    yield layers_section(lenses, tested, test, readout)
    yield steering_section(lenses, tested, test, args)
    if args.rated:
        yield rated_section(lenses, tested, args.rated, args.holdout[0], readout)
    if args.reviews:
        texts = held_out_reviews(args.reviews, model, args.holdout[1], args.seed)
        yield reviews_section(lenses, search, texts, args)
    yield f"{time.time() - begin:.0f} s, {torch.get_num_threads()} threads."


def main(arguments: list[str] | None = None) -> None:
    """Write the report, and print it as it grows."""
    args, written = parse_args(arguments), []
    for section in sections(args):
        print(section, flush=True)
        written.append(section)
    if args.out:
        args.out.write_text("\n\n".join(written) + "\n")


if __name__ == "__main__":
    main()
