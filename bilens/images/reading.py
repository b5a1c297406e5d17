"""What an image classifier's weights say: eigenvectors as images, truncation, explanations, similarity, recursion."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens.tensor.bilinear import BilinearTensor
from bilens.tensor.decompositions import eigen
from bilens.tensor.records import Record, tabular
from bilens.tensor.tables import Images

from .classifiers import ImageClassifier
from .sets import ImageSet

Side = Literal["abs", "positive", "negative"]
_CHUNK = 2**24  # numbers held at once by what goes over many images

# -- eigenvectors of classes ------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False, eq=False)
class ClassEigen(Record, rows="classes"):
    """Eigenvectors of each class as images: `logit_c = Σ_i values[c,i] (pixels[c,i]·x + constant[c,i])²`."""

    values: Float[Tensor, "classes k"]
    pixels: Float[Tensor, "classes k pixels"]
    constant: Float[Tensor, "classes k"]  # zero in a model without biases
    size: tuple[int, int]

    def columns(self) -> dict[str, Any]:
        """Return each class's eigenvalues, and its three strongest eigenvectors as images."""
        images = self.pixels[:, :3].transpose(0, 1).unflatten(-1, self.size)
        shown = {f"vector_{index}": Images(one) for index, one in enumerate(images)}
        return {"class": list(range(len(self.values))), "value": self.values[:, 0], "values": self.values} | shown

    def __repr__(self) -> str:
        top = ", ".join(f"{value:+.3g}" for value in self.values[0, :3].tolist())
        classes, k = self.values.shape
        return f"ClassEigen({classes} classes, k={k}, {self.size[0]}x{self.size[1]}; first: {top} ...)"

    def contributions(self, x: Float[Tensor, "n pixels"]) -> Float[Tensor, "n classes k"]:
        """Return what each eigenvector adds to each logit; over all of them the sum is the logit."""
        classes, k, pixels = self.pixels.shape
        if x.shape[-1] != pixels:
            raise ValueError(f"x must be rows of {pixels} pixels, got shape {list(x.shape)}")
        read = (x @ self.pixels.flatten(0, 1).T).unflatten(-1, (classes, k)) + self.constant
        return read**2 * self.values

    def best(self, k: int, side: Side = "abs") -> "ClassEigen":
        """Return k for each class: the largest |value|, or from the positive or the negative end.

        Raises:
            ValueError: There are not that many, or not that many of that sign.
        """
        if side not in ("abs", "positive", "negative"):
            raise ValueError(f"side must be 'abs', 'positive' or 'negative', got {side!r}")
        score = {"abs": self.values.abs(), "positive": self.values, "negative": -self.values}[side]
        held = int((score > 0).sum(1).min()) if side != "abs" else self.values.shape[1]
        if not 1 <= k <= held:
            raise ValueError(f"k must lie between 1 and {held}, the {side} eigenvectors of each class, got {k}")
        return self._ordered(score.argsort(dim=1, descending=True, stable=True)[:, :k])

    def _ordered(self, index: Int[Tensor, "classes k"]) -> "ClassEigen":
        rows = self.pixels.gather(1, index[..., None].expand(-1, -1, self.pixels.shape[2]))
        return replace(self, values=self.values.gather(1, index), pixels=rows, constant=self.constant.gather(1, index))


def class_eigenvectors(
    model: ImageClassifier | BilinearTensor,
    k: int | None = None,
    *,
    space: Literal["embed", "pixel"] = "embed",
    directions: Float[Tensor, "n classes"] | None = None,
    data: ImageSet | None = None,
    size: tuple[int, int] | None = None,
) -> ClassEigen:
    """Decompose each class of a one-layer classifier, and show the eigenvectors as images (2410.08417, section 4).

    In `"embed"`, the published way, the matrix between embedding and logits is decomposed and each eigenvector v drawn
    as `Eᵀ v`: not of unit length, nor orthogonal. In `"pixel"` the matrix between pixels and logits is decomposed: unit
    vectors, orthogonal (with the constant as one more coordinate), the values another spectrum. With `data`, either is
    done in the coordinates in which these images have unit second moment, `S^½ Q S^½`: a value then says how much the
    eigenvector adds on such images, and the spectrum is the same in both spaces. In all cases all of them sum to the
    logit exactly.

    Args:
        model: A classifier with one layer, or a tensor from pixels to classes.
        k: How many for each class, strongest |value| first; all if `None`.
        space: Where to decompose; a tensor has no embedding, so both are the same.
        directions: Combinations of the logits to decompose in place of the classes, such as a difference of two.
        data: Images to weigh the input by; directions of less than a thousandth of their largest root mean square
            count as if they had that much.
        size: Height and width, for a tensor; one row if `None`.

    Raises:
        ValueError: `k` or `space` out of range, or the model has several layers (see `tree`).
    """
    if space not in ("embed", "pixel"):
        raise ValueError(f"space must be 'embed' or 'pixel', got {space!r}")
    if isinstance(model, BilinearTensor):
        B, writers, bias = model, None, None
        size = (1, B.inp - B.constant) if size is None else size
    else:
        B, size = model.pixel_tensor() if space == "pixel" else model.tensor(), (model.cfg.height, model.cfg.width)
        if model.cfg.n_layers != 1:
            raise ValueError(f"model must have one layer, got {model.cfg.n_layers}: see bilens.images.tree")
        writers, bias = (None, None) if space == "pixel" else (model.embed.weight.detach(), model.embed.bias)
    u = torch.eye(B.out).to(B.down) if directions is None else directions
    back = None
    if data is not None:
        x = data.flat().to(B.down)
        root, back = _roots(x if writers is None else x @ writers.T + (0 if bias is None else bias.detach()))
        B = B.project(inp=root)
    values, vectors = eigen(B, u, k)
    rows, constant = (vectors[..., :-1], vectors[..., -1]) if B.constant else (vectors, torch.zeros_like(values))
    rows = rows if back is None else rows @ back
    if bias is not None:
        constant = constant + rows @ bias.detach()
    return ClassEigen(values, rows if writers is None else rows @ writers, constant, size)


def _roots(x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
    """Return the root of the second moment and its inverse."""
    values, vectors = torch.linalg.eigh(x.double().T @ x.double() / len(x))
    scale = values.clamp(min=1e-6 * float(values[-1])).sqrt()
    return (vectors * scale @ vectors.T).to(x), (vectors / scale @ vectors.T).to(x)


@tabular(rows="classes")
class Activation(NamedTuple):
    """How eigenvectors respond to images."""

    mean: Float[Tensor, "classes k"]  # of `value · (v·x)²`
    frequency: Float[Tensor, "classes k"]  # of its magnitude above a threshold


def activation(full: ClassEigen, images: ImageSet, threshold: float = 0.01) -> Activation:
    """Return how much each eigenvector adds to its class on average, and how often more than a threshold (2406.03947).

    Raises:
        ValueError: The threshold is negative.
    """
    if threshold < 0:
        raise ValueError(f"threshold must not be negative, got {threshold}")
    total, often = torch.zeros_like(full.values), torch.zeros_like(full.values)
    for x, _ in _chunks(images, full):
        parts = full.contributions(x)
        total, often = total + parts.sum(0), often + (parts.abs() > threshold).sum(0)
    return Activation(total / len(images), often / len(images))


@tabular()
class Affine(NamedTuple):
    """The parts of a logit: `xᵀ Q x + linear·x + constant`."""

    quadratic: Float[Tensor, "pixels pixels"]
    linear: Float[Tensor, " pixels"]
    constant: Float[Tensor, ""]


def affine(model: ImageClassifier | BilinearTensor, direction: Float[Tensor, " classes"]) -> Affine:
    """Split a combination of logits into its quadratic, linear and constant part in the pixels."""
    B = model if isinstance(model, BilinearTensor) else model.pixel_tensor()
    Q = B.matrix(direction)
    if not B.constant:
        return Affine(Q, Q.new_zeros(B.inp), Q.new_zeros(()))
    return Affine(Q[:-1, :-1], 2 * Q[-1, :-1], Q[-1, -1])


# -- one prediction ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False, eq=False)
class Explanation(Record, rows="classes", along=("eigen",)):
    """What each eigenvector adds to each logit of one image."""

    x: Float[Tensor, " pixels"]
    contributions: Float[Tensor, "classes k"]
    eigen: ClassEigen

    @property
    def logits(self) -> Float[Tensor, " classes"]:
        """The sums of the contributions: the model's logits."""
        return self.contributions.sum(1)

    def top(self, n: int = 3) -> list[int]:
        """Return the n classes with the largest logits."""
        return self.logits.topk(n).indices.tolist()

    def columns(self) -> dict[str, Any]:
        """Return the logit of each class, what its eigenvectors add, and the strongest of these as images."""
        logits = {"class": list(range(len(self.contributions))), "logit": self.logits}
        return self.eigen.columns() | logits | {"contributions": self.contributions}

    def facts(self) -> dict[str, Any]:
        """Return the image."""
        return {"image": self.x.unflatten(0, self.eigen.size)}

    def __repr__(self) -> str:
        top = ", ".join(f"{label}: {float(self.logits[label]):+.2f}" for label in self.top(min(3, len(self.logits))))
        return f"Explanation(logits {top})"


def explain(model: ImageClassifier | BilinearTensor, x: Float[Tensor, "..."]) -> Explanation:
    """Split the logits of one image into what each eigenvector adds, which sum to them (2410.08417, appendix C).

    Args:
        model: A classifier with one layer, or a tensor from pixels to classes.
        x: The image, as a row of pixels or as `[height, width]`.
    """
    full = class_eigenvectors(model)
    row = x.flatten() if isinstance(model, BilinearTensor) else model.rows(x)
    if row.ndim != 1:
        raise ValueError(f"x must be one image, got shape {list(x.shape)}")
    return Explanation(row, full.contributions(row[None])[0], full)


# -- truncation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False, eq=False)
class Truncation(Record, rows="m", unit="numbers of eigenvectors"):
    """How well a model does with k eigenvectors for each class, against all of them."""

    k: Int[Tensor, " m"]
    accuracy: Float[Tensor, " m"]
    r2: Float[Tensor, " m"]  # of all logits
    kl: Float[Tensor, " m"]  # from the full model's probabilities, in nats
    full: float  # accuracy with all

    def smallest(self, within: float = 0.001) -> int | None:
        """Return the least k from which on the accuracy is never more than `within` below the full one; or `None`."""
        below = (self.full - self.accuracy > within + 1e-12).nonzero()[:, 0]
        first = 0 if not len(below) else int(below[-1]) + 1
        return int(self.k[first]) if first < len(self.k) else None

    def __repr__(self) -> str:
        return f"Truncation(k to {int(self.k[-1])}, within 0.1 points from k={self.smallest()}, full {self.full:.4f})"


def truncation(
    full: ClassEigen,
    images: ImageSet,
    k: Sequence[int] = tuple(range(31)),
    by: Literal["abs", "paired", "activation", "global"] = "abs",
) -> Truncation:
    """Classify with only some eigenvectors (2410.08417, figure 5B).

    Without any, all logits are zero and class 0 is predicted.

    Args:
        full: All eigenvectors of each class.
        images: What to classify.
        k: How many for each class, rising.
        by: `"abs"`: the k largest |value|, as published; `"paired"`: k most positive and k most negative (2406.03947);
            `"activation"`: the k largest mean |contribution| on these images; `"global"`: the largest |value| of all
            classes together, k times the number of classes.

    Raises:
        ValueError: `k` not rising or out of range, or `by` unknown.
    """
    if by not in ("abs", "paired", "activation", "global"):
        raise ValueError(f"by must be 'abs', 'paired', 'activation' or 'global', got {by!r}")
    n_all = full.values.shape[1]
    if not len(k) or list(k) != sorted(set(k)) or k[0] < 0 or k[-1] > n_all:
        raise ValueError(f"k must rise, from at least 0 to at most {n_all}, got {list(k)}")
    rank = _ranks(full, images, by).clamp(max=k[-1])  # the last place collects the rest
    right, squares, divergence, sums = torch.zeros(len(k)).double(), 0.0, 0.0, []
    for x, y in _chunks(images, full):
        parts = full.contributions(x)
        logits = parts.sum(-1)
        places = parts.new_zeros(*logits.shape, k[-1] + 2).scatter_add_(2, rank.expand(len(x), -1, -1) + 1, parts)
        some = places.cumsum(-1)[..., list(k)]
        right += (some.argmax(1) == y[:, None]).double().sum(0).cpu()
        squares = squares + (some - logits[..., None]).double().pow(2).sum((0, 1)).cpu()
        log_p = logits.log_softmax(1)[..., None]
        divergence = divergence + (log_p.exp() * (log_p - some.log_softmax(1))).double().sum((0, 1)).cpu()
        sums.append((logits, y))
    logits, y = (torch.cat(part) for part in zip(*sums, strict=True))
    spread = float((logits.double() - logits.double().mean()).pow(2).sum())
    accuracy, n = float((logits.argmax(1) == y).double().mean()), len(images)
    return Truncation(torch.tensor(k), right / n, 1 - squares / spread, divergence / n, accuracy)


def _ranks(full: ClassEigen, images: ImageSet, by: str) -> Int[Tensor, "classes k"]:
    """Return the k above which each eigenvector is kept."""
    if by == "global":
        return full.values.abs().flatten().argsort(descending=True).argsort().view(full.values.shape) // len(
            full.values
        )
    if by == "paired":
        ends = [(sign * full.values).argsort(1, descending=True).argsort(1) for sign in (1, -1)]
        return torch.where(full.values > 0, *ends)
    score = full.values.abs()
    if by == "activation":
        score = sum(full.contributions(x).abs().sum(0) for x, _ in _chunks(images, full))
    return score.argsort(dim=1, descending=True, stable=True).argsort(1)


def _chunks(images: ImageSet, full: ClassEigen) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, _CHUNK // full.values.numel())
    return zip(images.flat().split(size), images.y.split(size), strict=True)


# -- similarity between models ----------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False, eq=False)
class Similarity(Record, rows="pairs", along=("pairs",)):
    """|cosine| of matched eigenvectors of different models."""

    cosine: Float[Tensor, "pairs classes k"]
    pairs: tuple[tuple[int, int], ...]  # numbers of the models
    paired: bool  # all pairs among one group, or each model against references

    @property
    def mean(self) -> Float[Tensor, " k"]:
        """Mean over pairs and classes, for each rank."""
        return self.cosine.mean((0, 1))

    def interval(self, level: float = 0.9) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
        """Return a t-interval of the mean for each rank, over models.

        Pairs that share a model are not independent, nor are classes. Among one group the standard error is the
        jackknife's, leaving out a model at a time; against references it is that of the models' means.

        Raises:
            ValueError: Fewer than three models.
        """
        from scipy.stats import t

        first, models = torch.tensor(self.pairs), sorted({a for a, _ in self.pairs} | self._second())
        if len(models) < 3:
            raise ValueError(f"an interval needs at least 3 models, got {len(models)}")
        each, n = self.cosine.mean(1), len(models)
        if self.paired:
            without = torch.stack([each[(first != model).all(1)].mean(0) for model in models])
            error = ((n - 1) / n * (without - without.mean(0)).pow(2).sum(0)).sqrt()
        else:
            error = torch.stack([each[first[:, 0] == model].mean(0) for model in models]).std(0) / n**0.5
        half = error * float(t.ppf((1 + level) / 2, n - 1))
        return self.mean - half, self.mean + half

    def _second(self) -> set[int]:
        return {b for _, b in self.pairs} if self.paired else set()

    def __repr__(self) -> str:
        return f"Similarity({len(self.pairs)} pairs, ranks {self.cosine.shape[2]}, first {float(self.mean[0]):.3f})"


def similarity(
    models: Sequence[ClassEigen],
    k: int = 1,
    *,
    side: Side = "positive",
    matching: Literal["rank", "max", "hungarian"] = "rank",
    references: Sequence[ClassEigen] | None = None,
) -> Similarity:
    """Compare the eigenvectors of models as images, `|cos(p, p')|`, class by class (2410.08417, figure 5A, appendix F).

    A model is never compared with itself. With `matching="max"` or `"hungarian"` the two directions of a pair (whose
    ranks are kept) are averaged.

    Args:
        models: All eigenvectors of each model, of one size of images; which space they come from was chosen there.
        k: How many of each class.
        side: From which end of the spectrum.
        matching: `"rank"`: the i-th with the i-th; `"max"`: with the best among all of the other model's (2406.03947);
            `"hungarian"`: the best one-to-one match among the k of both.
        references: Compare each model with each of these instead of all pairs of models.

    Raises:
        ValueError: Fewer than two models, `k`, `side` or `matching` out of range, or images of different sizes.
    """
    if matching not in ("rank", "max", "hungarian"):
        raise ValueError(f"matching must be 'rank', 'max' or 'hungarian', got {matching!r}")
    others = models if references is None else references
    numbers = (
        list(combinations(range(len(models)), 2))
        if references is None
        else [(a, b) for a in range(len(models)) for b in range(len(others)) if models[a] is not others[b]]
    )
    if not numbers:
        raise ValueError(f"models must be at least two different ones, got {len(models)}")
    shapes = {tuple(model.pixels.shape[::2]) for model in (*models, *others)}
    if len(shapes) > 1:
        raise ValueError(f"models must have the same classes and pixels, got {sorted(shapes)}")
    cosine = [(_matched(models[a], others[b], k, side, matching)) for a, b in numbers]
    return Similarity(torch.stack(cosine), tuple(numbers), references is None)


def _matched(a: ClassEigen, b: ClassEigen, k: int, side: Side, matching: str) -> Float[Tensor, "classes k"]:
    tops = [_unit(model.best(k, side).pixels) for model in (a, b)]
    if matching == "rank":
        return (tops[0] * tops[1]).sum(-1).abs()
    if matching == "max":
        ways = [(top @ _unit(other.pixels).mT).abs().amax(-1) for top, other in zip(tops, (b, a), strict=True)]
        return (ways[0] + ways[1]) / 2
    from scipy.optimize import linear_sum_assignment

    cosine = (tops[0] @ tops[1].mT).abs()
    result = torch.empty_like(cosine[..., 0])
    for matrix, row in zip(cosine, result, strict=True):
        mine, theirs = linear_sum_assignment(matrix.cpu().numpy(), maximize=True)
        best = matrix[mine, theirs]
        row.copy_((best + best[torch.as_tensor(theirs).argsort()]) / 2)
    return result


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=-1)


def published_similarity(models: Sequence[ClassEigen], k: int = 20) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Return figure 5A of 2410.08417 as published code computes it: mean |cosine| by rank, and its half-interval.

    Three things differ from `similarity`, and all matter: the eigenvectors are the k most *negative* ones, each model
    is also compared with itself (a third of the pairs for five models), and the 90 % t-interval takes every pair and
    class for an independent sample.
    """
    from scipy.stats import t

    ends = [_unit(model.best(k, "negative").pixels) for model in models]
    pairs = [(a, b) for a in range(len(ends)) for b in range(a, len(ends))]
    samples = torch.stack([(ends[a] * ends[b]).sum(-1).abs() for a, b in pairs]).flatten(0, 1)
    half = samples.std(0) / len(samples) ** 0.5 * float(t.ppf(0.95, len(samples) - 1))
    return samples.mean(0), half


# -- the Casper challenge ---------------------------------------------------------------------------------------------


def casper(images: ImageSet, target: Float[Tensor, "height width"], threshold: float = 0.4) -> ImageSet:
    """Label images by the rule of the Casper challenge: like the target or like its complement (2410.08417, sec. 4.3).

    True if `cos(x, t) > threshold` or `cos(x, 1 - t) > threshold`; the published target is training image 6 of MNIST.
    """
    if target.shape != images.x.shape[1:]:
        raise ValueError(f"target must be {images.height}x{images.width}, got {list(target.shape)}")
    both = torch.stack((target, 1 - target)).flatten(1)
    cosine = _unit(images.flat()) @ _unit(both).T
    return replace(images, y=(cosine > threshold).any(1).long(), names=("False", "True"))


# -- deep models ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False, eq=False)
class Node(Record, held="children"):
    """One eigenvector in a recursive decomposition: it gives `value · reading²`.

    The reading is `pixels·x + constant` in the first layer, and above the sum over `children` plus `constant`.
    """

    value: float
    constant: float
    pixels: Float[Tensor, " pixels"] | None
    children: tuple["Node", ...]

    def reading(self, x: Float[Tensor, "n pixels"]) -> Float[Tensor, " n"]:
        """Return what is squared."""
        below = x @ self.pixels if self.pixels is not None else evaluate(self.children, x)
        return below + self.constant

    def __repr__(self) -> str:
        return f"Node(value={self.value:+.3g}, {len(self.children)} children)"


def evaluate(nodes: Sequence[Node], x: Float[Tensor, "n pixels"]) -> Float[Tensor, " n"]:
    """Return what nodes give together, `Σ value · reading²`."""
    return sum((node.value * node.reading(x) ** 2 for node in nodes), x.new_zeros(len(x)))


def tree(model: ImageClassifier, direction: Float[Tensor, " classes"], k: int | None = 2) -> tuple[Node, ...]:
    """Decompose an output through all layers: an eigenvector of one layer is an output of the layer before.

    2406.03947's code, for two layers; here for any number, with biases and residual paths exact.

    Args:
        model: The classifier.
        direction: A combination of logits, such as one class.
        k: How many most positive and how many most negative eigenvectors to follow at each step; all if `None`, and
            then `evaluate` gives the logit exactly (`d_hidden ** n_layers` leaves).

    Raises:
        ValueError: `k` is below 1, or the direction is of another width.
    """
    if k is not None and k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if direction.shape != (model.cfg.n_classes,):
        raise ValueError(f"direction must have {model.cfg.n_classes} entries, got shape {list(direction.shape)}")
    return _grow(model, model.cfg.n_layers - 1, direction, k)


def _grow(model: ImageClassifier, layer: int, direction: Tensor, k: int | None) -> tuple[Node, ...]:
    B = model.tensor(layer)
    values, vectors = eigen(B, direction)
    if k is not None:
        order = values.argsort(descending=True)
        ends = torch.cat((order[values[order] > 0][:k], order[values[order] < 0][-k:]))
        values, vectors = values[ends], vectors[ends]
    rows, constants = (vectors[:, :-1], vectors[:, -1]) if B.constant else (vectors, torch.zeros_like(values))
    nodes = []
    for value, row, constant in zip(values.tolist(), rows, constants.tolist(), strict=True):
        if layer:
            nodes.append(Node(value, constant, None, _grow(model, layer - 1, row, k)))
            continue
        bias = model.embed.bias
        shift = 0.0 if bias is None else float(row @ bias.detach())
        nodes.append(Node(value, constant + shift, row @ model.embed.weight.detach(), ()))
    return tuple(nodes)
