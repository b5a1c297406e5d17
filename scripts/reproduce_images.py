"""The image experiments of 2410.08417 and 2406.03947: train what they need, draw the figures, tabulate the numbers.

    python scripts/reproduce.py images --mnist mnist --fashion fashion-mnist --out runs/images
    python scripts/reproduce.py images --smoke --out runs/smoke        # digits, half a minute: only that it runs

Every model is trained once into a folder under `--out` and reused; kill it at any time, the same command goes on.
Figures go to `OUT/figures` as HTML, the table to `OUT/images.md`.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import plotly.graph_objects as go
import torch
from tqdm import tqdm
from train_image import run

import bilens
from bilens import images
from bilens.images import adversarial
from bilens.images import sets as imagesets
from bilens.images.classifiers import ImageClassifier, Recipe, accuracy
from bilens.images.sets import ImageSet
from bilens.report import imageplots
from bilens.tensor import spectra

PLAIN = Recipe(precision="bfloat16")  # four times faster than float32 on the CPU this ran on
NOISY = replace(PLAIN, epochs=30, input_noise=0.4)
STRENGTHS = (0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3)
# Printed in the authors' notebooks, on the training set: accuracy and targeted rate of all images, by strength.
DENSE = (0.995, 0.993, 0.988, 0.979, 0.939, 0.857, 0.742, 0.625), (0.001, 0.002, 0.004, 0.008, 0.032, 0.09, 0.18, 0.276)
EDGE = (0.991, 0.966, 0.91, 0.827, 0.649, 0.503, 0.399, 0.326), (0.002, 0.008, 0.028, 0.06, 0.135, 0.206, 0.266, 0.314)
TOP = {20: (0.99, 0.001), 100: (0.978, 0.006), 200: (0.953, 0.019), 300: (0.922, 0.036), 400: (0.896, 0.051)}


class Row(NamedTuple):
    """One line of the table."""

    what: str
    claimed: str
    measured: str
    how: str = ""


class Model(NamedTuple):
    """One model to train."""

    data: str
    recipe: Recipe
    shape: dict


@dataclass(frozen=True)
class Scale:
    """How large the experiments are."""

    mnist: str
    fashion: str
    sizes: tuple[int, ...] = (30, 100, 300, 512)
    reference: int = 300  # of the comparison between sizes
    seeds: int = 5
    kept: int = 30  # longest truncation
    ranks: int = 20
    stack: int = 10
    probes: int = 500  # images per class aimed at, for the bound
    bench: Recipe = NOISY  # of the comparisons of seeds and sizes
    casper: tuple[int, float] = (6, 0.4)

    @property
    def width(self) -> int:
        """The largest size."""
        return self.sizes[-1]


def smoke() -> Scale:
    """Return the smallest scale at which every part runs."""
    recipe = Recipe(epochs=6, batch=128, lr=4e-3, input_noise=0.2)
    return Scale("digits", "digits", (16, 24), 16, 3, 16, 4, 2, 20, recipe, (1, 0.7))


class Lab:
    """The data, and the models as they are asked for."""

    def __init__(self, scale: Scale, out: Path):
        self.scale, self.out, self.figures = scale, out, out / "figures"
        self.figures.mkdir(parents=True, exist_ok=True)
        self.sets = {name: self._load(name) for name in ("mnist", "fashion")}
        train, test = self.sets["mnist"]
        index, threshold = scale.casper
        self.target = train.x[index]
        self.sets["casper"] = tuple(images.casper(part, self.target, threshold) for part in (train, test))

    def _load(self, name: str) -> tuple[ImageSet, ImageSet]:
        return tuple(imagesets.load(getattr(self.scale, name), split) for split in ("train", "test"))

    @property
    def test(self) -> ImageSet:
        """The held-out digits."""
        return self.sets["mnist"][1]

    def plan(self) -> dict[str, Model]:
        """Return all models by name, the ones that most depends on first."""
        scale, bench, width = self.scale, self.scale.bench, {"d_hidden": self.scale.width}
        longer = replace(bench, epochs=2 * bench.epochs)
        residual = replace(bench, weight_decay=0.0, seed=42, noise_unit="batch")
        models = {
            "main": Model("mnist", longer, width),
            "dense": Model("mnist", replace(residual, input_noise=0.5), width | {"residual": True}),
            "edge": Model("mnist", replace(residual, input_noise=0.0), width | {"residual": True}),
            "casper": Model("casper", replace(bench, epochs=100, input_noise=0.1), {"d_hidden": 64, "bias": True}),
            "fashion": Model("fashion", replace(longer, input_noise=0.5, noise_unit="batch"), width),
        }
        for size in reversed(scale.sizes):
            for seed in range(scale.seeds):
                models[f"mnist-{size}-{seed}"] = Model("mnist", replace(bench, seed=seed), {"d_hidden": size})
        noises = ((0.0, 1.0), (1.0, 1.0), (0.0, 0.0), (1.0, 0.0), (0.2, 1.0), (0.6, 1.0), (0.4, 1.0), (0.8, 1.0))
        for noise, decay in noises:
            recipe = replace(bench, input_noise=noise, weight_decay=decay)
            models[f"noise-{noise}-decay-{decay}"] = Model("mnist", recipe, width)
        models["translate"] = Model("mnist", replace(bench, translate=self.test.width / 4), width)
        models["two-layer"] = Model("mnist", replace(bench, latent_noise=0.33), {"d_hidden": 100, "n_layers": 2})
        return models

    def model(self, name: str) -> ImageClassifier:
        """Train a model, or load it if that was done."""
        data, recipe, shape = self.plan()[name]
        return run(data, *self.sets[data], self.out / name, recipe, **shape)

    def record(self, name: str) -> dict:
        """Return what was written down of a model."""
        return json.loads((self.out / name / "record.json").read_text())

    def draw(self, name: str, figure: go.Figure) -> None:
        """Write a figure as HTML."""
        figure.write_html(self.figures / f"{name}.html", include_plotlyjs="directory")


def percent(value: float) -> str:
    """Write a share as a percentage."""
    return f"{100 * value:.2f} %"


def several(values: Sequence[float] | torch.Tensor, form: str = ".3f") -> str:
    """Write numbers with commas."""
    return ", ".join(format(float(value), form) for value in values)


# -- sections: each yields rows and draws figures ---------------------------------------------------------------------


def accuracies(lab: Lab) -> Iterator[Row]:
    """Accuracy, time, and that logits are sums of eigenvectors."""
    for name, title, claimed in (("main", "MNIST", "98.1 % (50 epochs)"), ("fashion", "Fashion-MNIST", "none")):
        model, record = lab.model(name), lab.record(name)
        recipe = record["recipe"]
        how = f"{recipe['epochs']} epochs, {recipe['noise_unit']} noise {recipe['input_noise']}; "
        how += f"{record['seconds'] / 60:.1f} min on {record['threads']} thread, beside other work"
        yield Row(f"{title}, test accuracy", claimed, percent(record["test accuracy"]), how)
        names = lab.sets[name if name == "fashion" else "mnist"][0].names
        full = images.class_eigenvectors(model)
        lab.draw(f"eigenvectors-{name}", imageplots.class_eigenvectors(full, names, 3, f"{title}: eigenvectors"))
        lab.draw(f"spectra-{name}", imageplots.class_spectra(full, names))
    model = lab.model("main")
    full = images.class_eigenvectors(model)
    worst = 0.0
    for x in lab.test.flat().split(1000):
        logits = model(x).detach()
        gap = (full.contributions(x).sum(-1) - logits).abs().amax(1) / logits.abs().amax(1)
        worst = max(worst, float(gap.max()))
    how = f"largest of {len(lab.test)} test images, float32, relative to the image's largest logit"
    yield Row("Sum of eigenvector contributions against the logits", "equal", f"{worst:.1e}", how)
    for side, claimed in (("positive", "+.15, +.14, +.11, +.09"), ("negative", "-.17, -.16, -.12, -.10")):
        values = several(full.best(4, side).values[5], "+.2f")
        yield Row(f"Digit 5, most {side} eigenvalues", claimed, values, "published ones read off a figure")


def noise(lab: Lab) -> Iterator[Row]:
    """Figure 4: input noise; appendix E: effective ranks; a translation."""
    claimed = {0.0: "97.6 %", 0.2: "98.1 %", 0.4: "98.1 %", 0.6: "97.8 %", 0.8: "97.2 %"}
    tops = []
    for level, claim in claimed.items():
        name = f"noise-{level}-decay-1.0"
        tops.append(images.class_eigenvectors(lab.model(name)).best(1, "positive").pixels[:, 0])
        record = lab.record(name)
        how = f"{record['recipe']['epochs']} epochs (published 50)"
        yield Row(f"Input noise {level}, test accuracy", claim, percent(record["test accuracy"]), how)
    grid = torch.stack(tops).unflatten(-1, (lab.test.height, lab.test.width))
    title = "Most positive eigenvector by input noise"
    lab.draw("noise", imageplots.image_grid(grid, list(map(str, claimed)), lab.test.names, title))
    lab.model("translate")
    record = lab.record("translate")
    how = f"{record['recipe']['epochs']} epochs, up to {record['recipe']['translate']:g} pixels, noise 0.4"
    yield Row("Translated while training, test accuracy", "96.6 to 97.0 %", percent(record["test accuracy"]), how)
    yield from _ranks(lab)


def _ranks(lab: Lab) -> Iterator[Row]:
    claims = {
        (0.0, 1.0): ("25", "418"),
        (0.0, 0.0): ("55", "418"),
        (1.0, 0.0): ("187", "265"),
        (1.0, 1.0): ("65", "265"),
    }
    table = torch.zeros(2, 2, 2)
    for (level, decay), claim in claims.items():
        name = f"noise-{level}-decay-{decay}"
        full = images.class_eigenvectors(lab.model(name))
        negative = full.best(lab.scale.stack // 2, "negative").pixels
        ranks = [float(spectra.l1l2_rank(part).mean()) for part in (full.values, negative)]
        table[:, int(level), int(decay)] = torch.tensor(ranks)
        how = f"{lab.record(name)['recipe']['epochs']} epochs (published 50), mean over classes"
        for what, claimed, rank in zip(("eigenvalues", "5 most negative eigenvectors"), claim, ranks, strict=True):
            yield Row(f"(L1/L2)² of {what}, noise {level:g}, decay {decay:g}", claimed, f"{rank:.0f}", how)
    for part, name in zip(table, ("eigenvalues", "eigenvectors"), strict=True):
        figure = imageplots.grid(part, ["noise 0", "noise 1"], ["decay 0", "decay 1"], f"(L1/L2)² of {name}")
        lab.draw(f"sparsity-{name}", figure)


def truncations(lab: Lab) -> Iterator[Row]:
    """Figure 5B: how many eigenvectors are enough."""
    errors = {30: "4.0 %", 100: "2.4 %", 300: "1.85 %", 512: "1.7 % (500)"}
    enough = {30: "11", 100: "16", 300: "20", 512: "22 (500)"}
    curves = {}
    k = range(min(lab.scale.kept, lab.scale.sizes[0]) + 1)
    for size in lab.scale.sizes:
        found = []
        for seed in range(lab.scale.seeds):
            full = images.class_eigenvectors(lab.model(f"mnist-{size}-{seed}"))
            found.append(images.truncation(full, lab.test, k))
        curves[str(size)] = found[0]
        mean = sum(1 - one.full for one in found) / len(found)
        how = f"{lab.scale.seeds} seeds, {lab.scale.bench.epochs} epochs (published 100)"
        yield Row(f"Width {size}, test error, all eigenvectors", errors.get(size, ""), percent(mean), how)
        least = [one.smallest() for one in found]
        how = "k from which the drop stays within 0.1 points, by seed"
        yield Row(f"Width {size}, eigenvectors needed", enough.get(size, ""), ", ".join(map(str, least)), how)
    lab.draw("truncation", imageplots.truncation(curves))
    plain, weighed = (images.class_eigenvectors(lab.model("main"), data=data) for data in (None, lab.sets["mnist"][0]))
    rules = [(plain, by) for by in ("abs", "paired", "activation", "global")]
    for full, by in (*rules, (weighed, "abs")):
        curve = images.truncation(full, lab.test, k, by)
        some = int(k[-1]) // 3
        how = f"with k = {some}: {percent(float(curve.accuracy[some]))}, R² of logits {float(curve.r2[some]):.4f}"
        what = f"Main model, eigenvectors needed, chosen by {by!r}"
        what += "" if full is plain else ", weighed by the training images"
        yield Row(what, "", str(curve.smallest()), how)


def similarities(lab: Lab) -> Iterator[Row]:
    """Figure 5A and appendix F: whether seeds and sizes agree."""
    scale = lab.scale
    claims, last = {30: ".82", 100: ".91", 300: ".91", 512: ".92 (500)"}, {}
    full = {
        size: [images.class_eigenvectors(lab.model(f"mnist-{size}-{seed}")) for seed in range(scale.seeds)]
        for size in scale.sizes
    }
    for size, models in full.items():
        ranks = min(scale.ranks, size // 4)
        published, half = images.published_similarity(models, ranks)
        how = f"negative end, self-pairs counted; interval ±{float(half[0]):.3f} over pairs and classes"
        yield Row(
            f"Width {size}, similarity of the first, published way",
            claims.get(size, ""),
            f"{float(published[0]):.3f}",
            how,
        )
        if ranks == 20:
            yield Row(f"Width {size}, rank 20, published way", ".42 to .53", f"{float(published[-1]):.3f}", "")
        for matching in ("rank", "max", "hungarian"):
            last[matching] = images.similarity(models, ranks, matching=matching)
            low, high = (float(end[0]) for end in last[matching].interval())
            how = f"positive end, {len(last[matching].pairs)} pairs, 90 % interval [{low:.3f}, {high:.3f}] over seeds"
            what = f"Width {size}, similarity of the first, matched by {matching}"
            how += f"; at rank {ranks}: {float(last[matching].mean[-1]):.3f}"
            yield Row(what, "", f"{float(last[matching].mean[0]):.3f}", how)
        if size == scale.width:
            lab.draw("similarity", imageplots.similarity(last, f"Similarity across {scale.seeds} seeds, width {size}"))
    claims = {30: ".48", 100: ".72", 512: ".86 (500)"}
    for size in scale.sizes:
        if size != scale.reference:
            found = images.similarity(full[size], references=full[scale.reference])
            low, high = (float(end[0]) for end in found.interval())
            how = f"positive end, every pair of seeds, 90 % interval [{low:.3f}, {high:.3f}]"
            what = f"Width {size} against {scale.reference}, similarity of the first"
            yield Row(what, claims.get(size, ""), f"{float(found.mean[0]):.3f}", how)
    tensors = [lab.model(f"mnist-{scale.width}-{seed}").pixel_tensor() for seed in range(scale.seeds)]
    cosine = bilens.tensor.comparison.similarity_matrix(tensors)
    off = cosine[~torch.eye(len(cosine), dtype=torch.bool)]
    yield Row(
        "Whole models across seeds, Gaussian similarity", "", f"{float(off.mean()):.3f}", "pixel space, all pairs"
    )


def explanations(lab: Lab) -> Iterator[Row]:
    """Appendix C: single predictions; appendix D: output directions of the whole layer."""
    model = lab.model("main")
    index = 321 % len(lab.test)
    found = images.explain(model, lab.test.x[index])
    names = lab.test.names
    logits = ", ".join(f"{names[label]}: {float(found.logits[label]):+.2f}" for label in found.top(2))
    what = f"a {names[int(lab.test.y[index])]}; largest logits {logits}"
    yield Row(f"Test image {index}", "a 2 taken for a 7", what, "main model")
    lab.draw("explanation", imageplots.explanation(found, names))
    lab.draw("explanation-images", imageplots.explanation_images(found, names))
    decomposed = bilens.hosvd(model.tensor(), len(names))
    share = ", ".join(f"{names[i]}: {float(decomposed.directions[0, i]):+.2f}" for i in range(len(names)))
    yield Row(
        "HOSVD, first singular values",
        ".63, .55",
        several(decomposed.singular[:4]),
        "classes × embedding, weights alone",
    )
    yield Row("HOSVD, first direction", "{1, 4, 7} against {5}", share, "")
    count = min(4, len(decomposed.directions))
    full = images.class_eigenvectors(model, directions=decomposed.directions[:count])
    lab.draw(
        "hosvd",
        imageplots.class_eigenvectors(full, several(decomposed.singular[:count], ".2f").split(", "), 3, "HOSVD"),
    )


def casper(lab: Lab) -> Iterator[Row]:
    """Figure 6: a target image hidden in a classifier."""
    model, record = lab.model("casper"), lab.record("casper")
    test = lab.sets["casper"][1]
    yield Row(
        "Casper, test accuracy", "", percent(accuracy(model, test)), f"{record['recipe']['epochs']} epochs, width 64"
    )
    base = max(float((test.y == label).double().mean()) for label in (0, 1))
    yield Row("Casper, always the commoner label", "", percent(base), "control")
    for name, direction in (("True", [0.0, 1.0]), ("True - False", [-1.0, 1.0])):
        full = images.class_eigenvectors(model, directions=torch.tensor([direction]))
        values = [*full.best(2, "positive").values[0], *full.best(2, "negative").values[0]]
        yield Row(
            f"Casper, eigenvalues of {name}", "+.23, +.03 / -.03, -.01", several(values, "+.3f"), "constant included"
        )
    first = full.best(1, "positive")
    centred = [part - part.mean() for part in (first.pixels[0, 0], lab.target.flatten())]
    cosine = torch.nn.functional.cosine_similarity(*centred, dim=0)
    how = f"centred cosine; its constant coordinate is {float(first.constant[0, 0]):+.2f}"
    yield Row("Casper, first eigenvector against the target", "the target", f"{abs(float(cosine)):.3f}", how)
    parts = images.affine(model, torch.tensor([-1.0, 1.0]))
    x = test.flat()
    spread = [float(part.std()) for part in (((x @ parts.quadratic) * x).sum(1), x @ parts.linear)]
    how = "standard deviation over test images of the quadratic and of the linear part; the constant"
    yield Row("Casper, parts of True - False", "", several([*spread, parts.constant], "+.2f"), how)
    shown = torch.cat((lab.target.flatten()[None], first.pixels[0], full.best(3, "negative").pixels[0]))
    grid = shown.unflatten(-1, (lab.test.height, lab.test.width))[None]
    lab.draw("casper", imageplots.image_grid(grid, [""], ["target", "+1", "−1", "−2", "−3"], "Casper: True - False"))


def adversaries(lab: Lab) -> Iterator[Row]:
    """Figure 7: masks on held-out images, their controls, and the bound."""
    published = {"dense": DENSE, "edge": EDGE}
    train = lab.sets["mnist"][0]
    for kind in ("dense", "edge"):
        model = lab.model(kind)
        yield Row(
            f"{kind} model, test accuracy",
            {"dense": "98.3 %", "edge": "97.7 %"}[kind],
            percent(accuracy(model, lab.test)),
        )
        limit = torch.zeros(len(STRENGTHS)).double()
        norms = [strength * train.x[0].numel() ** 0.5 for strength in STRENGTHS]
        if kind == "dense":
            some = lab.test[: 2 * lab.scale.probes]
            limit = sum(adversarial.reachable(model, some, target, norms) for target in range(10)) / 10
        for space in ("embed", "pixel"):
            aimed = adversarial.masks(model, train, kind, min(3, lab.scale.stack), stack=lab.scale.stack, space=space)
            generator = torch.Generator().manual_seed(0)
            found = adversarial.attack(model, lab.test, aimed, STRENGTHS, generator=generator)
            yield from _attack_rows(found, kind, space, published[kind])
            if space == "embed":
                yield from _bound(lab, model, aimed)
                pairs = dict(zip(STRENGTHS, zip(*published[kind], strict=True), strict=True))
                lab.draw(f"masks-{kind}", _mask_grid(lab, aimed))
                lab.draw(f"attack-{kind}", imageplots.attack(found, limit if kind == "dense" else None, pairs))
        if kind == "dense":
            how = "mean over targets; dual bound, norm = strength · √pixels"
            yield Row(
                "dense model, share any perturbation can reach",
                "",
                several(limit),
                f"strengths {several(STRENGTHS, 'g')}; {how}",
            )
            yield from _top(lab, model)


def _attack_rows(found: adversarial.Attack, kind: str, space: str, published: tuple) -> Iterator[Row]:
    parts = {
        "accuracy": (found.accuracy, found.control_accuracy, published[0]),
        "targeted, of all images": (found.targeted_of_all, None, published[1]),
        "targeted, of the other classes' images": (found.targeted, found.control_targeted, ()),
    }
    for name, (values, control, claimed) in parts.items():
        how = f"strengths {several(STRENGTHS, 'g')}; published on training images"
        if control is not None:
            how += f"; permuted: {several(control.mean((0, 1)))}"
        yield Row(f"{kind} masks ({space}), {name}", several(claimed), several(values.mean((0, 1))), how)


def _bound(lab: Lab, model: ImageClassifier, aimed: adversarial.Masks) -> Iterator[Row]:
    """Compare every mask at several strengths with the best perturbation of its norm, image by image."""
    exact, closest, gap, tries = model.pixel_tensor().to(torch.float64), 0.0, 0.0, 0
    worst = -torch.inf
    for target, masks in enumerate(tqdm(aimed.mask.double(), desc="bound", leave=False)):
        some = lab.test[lab.test.y != target][: lab.scale.probes]
        changes = torch.stack([strength * mask for mask in masks for strength in (0.05, 0.15, 0.3)])
        x = some.flat().double().repeat(len(changes), 1)
        change, label = changes.repeat_interleave(len(some), 0), some.y.repeat(len(changes))
        best = adversarial.best_perturbation(exact, x, target, label, change.norm(dim=1))
        rows = torch.arange(len(x))
        margins = []
        for moved in (x + change, x + best.delta, x):
            logits = exact.apply(moved)
            margins.append(logits[:, target] - logits[rows, label])
        worst = max(worst, float((margins[0] - best.bound).max()))
        gap = max(gap, float(((margins[1] - best.bound).abs() / best.bound.abs().clamp(min=1)).max()))
        closest = max(closest, float(((margins[0] - margins[2]) / (best.bound - margins[2])).max()))
        tries += len(x)
    what = f"{aimed.kind} masks against the best perturbation of their norm"
    yield Row(f"{what}, margin minus bound, largest", "≤ 0", f"{worst:.3g}", f"{tries} masked held-out images")
    yield Row(f"{what}, share of its gain, largest", "≤ 1", f"{closest:.3f}", "")
    yield Row(f"{what}, bound not attained by", "0", f"{gap:.1e}", "relative, evaluated with the tensor in float64")


def _top(lab: Lab, model: ImageClassifier) -> Iterator[Row]:
    pixels = lab.test.x[0].numel()
    counts = [n for n in TOP if n <= pixels] or [5, 20]
    aimed = adversarial.masks(model, lab.sets["mnist"][0], "top", min(3, lab.scale.stack), stack=lab.scale.stack)
    some = lab.test[: 10 * lab.scale.probes]
    generator = torch.Generator().manual_seed(0)
    found = adversarial.attack(model, some, aimed, counts, controls=2, generator=generator)
    claimed = [several([TOP.get(n, (0, 0))[part] for n in counts]) for part in (0, 1)]
    how = f"n = {several(counts, 'g')}; clipped; {len(some)} test images"
    how += f"; permuted: {several(found.control_accuracy.mean((0, 1)))}"
    yield Row("top-pixel masks, accuracy", claimed[0], several(found.accuracy.mean((0, 1))), how)
    how = f"permuted: {several(found.control_targeted.mean((0, 1)))} (of the other classes' images)"
    yield Row("top-pixel masks, targeted, of all images", claimed[1], several(found.targeted_of_all.mean((0, 1))), how)


def _mask_grid(lab: Lab, aimed: adversarial.Masks) -> go.Figure:
    grid = aimed.mask.unflatten(-1, aimed.size).transpose(0, 1)
    return imageplots.image_grid(
        grid, [f"mask {i + 1}" for i in range(len(grid))], lab.test.names, f"{aimed.kind} masks"
    )


def deep(lab: Lab) -> Iterator[Row]:
    """2406.03947: a model with two layers, an output followed through both."""
    model, record = lab.model("two-layer"), lab.record("two-layer")
    how = f"width {model.cfg.d_hidden}, latent noise 0.33, {record['recipe']['epochs']} epochs"
    yield Row("Two layers, test accuracy", "", percent(record["test accuracy"]), how)
    nodes = images.tree(model, torch.eye(10)[5], 2)
    pixels = torch.stack([torch.stack([leaf.pixels for leaf in node.children]) for node in nodes])
    names = [f"{node.value:+.2f}" for node in nodes]
    grid = pixels.unflatten(-1, (lab.test.height, lab.test.width))
    lab.draw("tree", imageplots.image_grid(grid, names, ["+1", "+2", "−1", "−2"], "Digit 5 through two layers"))
    exact = images.tree(model, torch.eye(10)[5], None)
    x = lab.test.flat()[:20]
    logits = model(x)[:, 5].detach()
    gap = float((images.evaluate(exact, x) - logits).abs().max() / logits.abs().max())
    yield Row(
        "Two layers, all eigenvectors of all eigenvectors against the logit",
        "equal",
        f"{gap:.1e}",
        "20 images, float32",
    )


SECTIONS = (accuracies, noise, truncations, similarities, explanations, casper, adversaries, deep)


def table(rows: Sequence[Row], lab: Lab) -> str:
    """Write the rows as a Markdown table."""
    bench = lab.scale.bench
    lines = [
        "# Images: claimed and measured",
        "",
        "Made by `python scripts/reproduce.py images`. Claims are those of 2410.08417, its figures as others read them "
        "off, and its authors' notebooks; a blank claim is a number they do not give.",
        "",
        f"Unless a line says otherwise: {len(lab.sets['mnist'][0])} training and {len(lab.test)} test images, AdamW, "
        f"rate {bench.lr:g}, decay {bench.weight_decay:g}, batch {bench.batch}, cosine by epoch, absolute input noise "
        f"{bench.input_noise:g}, seed 0, {bench.precision} products in training and float32 in evaluation.",
        "",
        "| what | claimed | measured | how |",
        "|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(part.replace("|", "\\|") for part in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Train, draw and tabulate."""
    parser = argparse.ArgumentParser(prog="reproduce.py images", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--mnist", default="mnist", help="MNIST: a Hub name, a file or a folder")
    parser.add_argument("--fashion", default="fashion-mnist", help="Fashion-MNIST, likewise")
    parser.add_argument("--out", type=Path, required=True, help="folder for models, figures and the table")
    parser.add_argument("--smoke", action="store_true", help="digits and tiny models")
    parser.add_argument("--only-train", action="store_true", help="train the models and stop")
    args = parser.parse_args(arguments)
    lab = Lab(smoke() if args.smoke else Scale(args.mnist, args.fashion), args.out)
    for name in tqdm(lab.plan(), desc="models"):
        lab.model(name)
    if args.only_train:
        return
    rows = []
    for section in SECTIONS:
        for row in section(lab):
            rows.append(row)
            print(f"{row.what}: claimed {row.claimed or '-'}, measured {row.measured}", flush=True)
    (args.out / "images.md").write_text(table(rows, lab))
    print(f"-> {args.out / 'images.md'}, {lab.figures}")
