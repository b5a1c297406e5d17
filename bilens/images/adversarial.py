"""Adversarial masks read off the weights, measured on held-out images, and the best perturbation there is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bilens.tensor.bilinear import BilinearTensor
from bilens.tensor.decompositions import eigen
from bilens.tensor.records import Record
from bilens.tensor.tables import Images

from .classifiers import ImageClassifier
from .reading import affine
from .sets import ImageSet

Kind = Literal["dense", "edge", "top"]
_EDGE = 0.01  # mean brightness below which a pixel is an edge pixel
_IMAGES_FOR_SIGN = 500  # per class
_STEPS = 100

# -- masks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False, eq=False)
class Masks(Record, rows="classes"):
    """Images to add, one for each of the first eigenvectors of each class, in units of their strength."""

    mask: Float[Tensor, "classes n pixels"]
    kind: Kind
    size: tuple[int, int]

    def columns(self) -> dict[str, Any]:
        """Return the masks of each class as images."""
        masks = self.mask.transpose(0, 1).unflatten(-1, self.size)
        return {f"mask_{index}": Images(one) for index, one in enumerate(masks)}

    def __repr__(self) -> str:
        classes, n, _ = self.mask.shape
        return f"Masks({self.kind}, {n} for each of {classes} classes, {self.size[0]}x{self.size[1]})"


def masks(
    model: ImageClassifier | BilinearTensor,
    images: ImageSet,
    kind: Kind = "dense",
    n: int = 3,
    *,
    stack: int = 10,
    space: Literal["embed", "pixel"] = "embed",
) -> Masks:
    """Make masks that raise one eigenvector of a class and no other, from the weights (2410.08417, section 4.4).

    The `stack` most positive eigenvectors of all classes are stacked, `D`; the columns of the pseudo-inverse `D⁺` are
    dual to them. In `"embed"`, as published, that is done in the embedding and each column drawn by `Eᵀ`, which is not
    exactly dual in pixels; in `"pixel"` with the eigenvectors as images. The sign is the one that agrees with images of
    the other classes. Residual paths are ignored, as published.

    Args:
        model: A classifier with one layer, or a tensor from pixels to classes, where both spaces are the same.
        images: Images to take signs and edge pixels from, 500 of a class at most; not those to evaluate on.
        kind: `"dense"`: divided by its standard deviation; `"edge"`: only pixels of mean brightness below 0.01,
            divided by the standard deviation of its positive entries; `"top"`: divided by its largest magnitude, for
            `top_pixels`.
        n: How many for each class, the most positive eigenvectors first.
        stack: How many of each class to be dual to.
        space: Where to invert.

    Raises:
        ValueError: An argument out of range, fewer positive eigenvectors than `stack`, or no edge pixels.
    """
    if kind not in ("dense", "edge", "top"):
        raise ValueError(f"kind must be 'dense', 'edge' or 'top', got {kind!r}")
    if space not in ("embed", "pixel"):
        raise ValueError(f"space must be 'embed' or 'pixel', got {space!r}")
    if not 1 <= n <= stack:
        raise ValueError(f"n must lie between 1 and stack={stack}, got {n}")
    decoders, drawn, embed = _decoders(model, stack)
    if drawn.shape[2] != images.height * images.width:
        raise ValueError(f"images must have {drawn.shape[2]} pixels, got {images.height}x{images.width}")
    inverse = torch.linalg.pinv((decoders if space == "embed" else drawn).flatten(0, 1)).T
    dual = (inverse @ embed if space == "embed" else inverse).unflatten(0, decoders.shape[:2])[:, :n]
    if kind == "edge":
        edge = images.flat().mean(0) < _EDGE
        if not edge.any():
            raise ValueError(f"images must have pixels of mean brightness below {_EDGE} for edge masks, got none")
        dual = dual * edge
    dual = dual * _signs(drawn[:, :n] if kind == "dense" else dual, images)[..., None]
    return Masks(dual / _scale(dual, kind), kind, (images.height, images.width))


def _decoders(model: ImageClassifier | BilinearTensor, stack: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the most positive eigenvectors of each class, in the embedding and as images, and the embedding."""
    if isinstance(model, BilinearTensor):
        B, embed = model, torch.eye(model.inp - model.constant).to(model.down)
    else:
        B, embed = model.tensor(residual=False), model.embed.weight.detach()
        if model.cfg.n_layers != 1:
            raise ValueError(f"model must have one layer, got {model.cfg.n_layers}")
    values, vectors = eigen(B, torch.eye(B.out).to(B.down))
    held = int((values > 0).sum(1).min())
    if stack > held:
        raise ValueError(f"stack must be at most {held}, the positive eigenvectors of each class, got {stack}")
    index = values.argsort(dim=1, descending=True)[:, :stack, None].expand(-1, -1, vectors.shape[2])
    decoders = vectors.gather(1, index)[..., : len(embed)]
    return decoders, decoders @ embed, embed


def _signs(rows: Float[Tensor, "classes n pixels"], images: ImageSet) -> Float[Tensor, "classes n"]:
    """Return the sign of each row's overlap with images of the other classes."""
    means = []
    for label in range(len(rows)):
        mine = images.flat()[images.y == label][:_IMAGES_FOR_SIGN]
        means.append(mine.sum(0))
    sums = torch.stack(means)
    others = sums.sum(0) - sums
    return torch.where((rows * others[:, None]).sum(-1) < 0, -1.0, 1.0).to(rows)


def _scale(rows: Float[Tensor, "classes n pixels"], kind: Kind) -> Float[Tensor, "classes n 1"]:
    if kind == "top":
        return rows.abs().amax(-1, keepdim=True)
    if kind == "dense":
        return rows.std(-1, keepdim=True)
    return torch.stack([torch.stack([row[row > 0].std() for row in part]) for part in rows])[..., None]


def top_pixels(mask: Float[Tensor, "*batch pixels"], n: int) -> Float[Tensor, "*batch pixels"]:
    """Keep the n entries of largest magnitude.

    Raises:
        ValueError: `n` is not between 1 and the number of pixels.
    """
    if not 1 <= n <= mask.shape[-1]:
        raise ValueError(f"n must lie between 1 and {mask.shape[-1]} pixels, got {n}")
    index = mask.abs().topk(n, dim=-1).indices
    return torch.zeros_like(mask).scatter(-1, index, mask.gather(-1, index))


# -- their effect -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False, eq=False)
class Attack(Record, rows="strengths", along=("strengths",)):
    """What masks do, for each class they aim at, each mask and each strength; and what permuted masks do."""

    strengths: tuple[float, ...]
    accuracy: Float[Tensor, "classes n strengths"]
    targeted: Float[Tensor, "classes n strengths"]  # of the images of other classes, what becomes the class aimed at
    control_accuracy: Float[Tensor, "classes n strengths"]  # means over the draws
    control_targeted: Float[Tensor, "classes n strengths"]
    others: Float[Tensor, " classes"]  # the share of images of other classes

    @property
    def targeted_of_all(self) -> Float[Tensor, "classes n strengths"]:
        """The published rate, whose denominator is all images."""
        return self.targeted * self.others[:, None, None]

    def columns(self) -> dict[str, Any]:
        """Return what masks of each strength do, and permuted ones, on average over classes and masks."""
        names = ("accuracy", "targeted", "control_accuracy", "control_targeted")
        return {"strength": torch.tensor(self.strengths)} | {
            name: getattr(self, name).flatten(0, 1).mean(0) for name in names
        }

    def __repr__(self) -> str:
        strongest = f"accuracy {float(self.accuracy[..., -1].mean()):.3f}"
        control = f"{float(self.control_accuracy[..., -1].mean()):.3f}"
        return f"Attack({len(self.strengths)} strengths to {self.strengths[-1]:g}: {strongest}, permuted {control})"


@torch.no_grad()
def attack(
    model: ImageClassifier | BilinearTensor,
    images: ImageSet,
    aimed: Masks,
    strengths: Sequence[int | float],
    *,
    controls: int = 5,
    generator: torch.Generator,
) -> Attack:
    """Add each mask to held-out images and classify them; likewise masks whose pixels were permuted.

    Dense and edge masks are multiplied by the strength and nothing is clipped; of a top-pixel mask the strength is the
    number of pixels kept, and the sum is clipped to [0, 1]: as published. A permutation keeps to the pixels that the
    mask uses if it is an edge mask. (Published: on the training set, one control, whose negative entries stayed.)

    Args:
        model: The classifier, or a tensor from pixels to classes; one layer, unless the masks are of top pixels.
        images: Images that neither the model nor the masks were made from.
        aimed: The masks; the i-th row aims at class i.
        strengths: Standard deviations, or numbers of pixels.
        controls: How many permutations of each mask.
        generator: Draws them.

    Raises:
        ValueError: No strengths, fewer than one control, or masks of another size than the images.
    """
    if not len(strengths) or controls < 1:
        raise ValueError(f"strengths and controls must be at least one each, got {len(strengths)} and {controls}")
    if aimed.size != (images.height, images.width):
        raise ValueError(f"aimed must be masks of {images.height}x{images.width}, got {aimed.size[0]}x{aimed.size[1]}")
    classify = _Clipped(model, images) if aimed.kind == "top" else _Quadratic(model, images)
    shape = (*aimed.mask.shape[:2], 1 + controls, len(strengths))
    accuracy, targeted = torch.zeros(shape).double(), torch.zeros(shape).double()
    for target, rows in enumerate(aimed.mask):
        others = images.y != target
        for number, mask in enumerate(rows):
            tried = [mask, *(permuted(mask, aimed.kind, generator) for _ in range(controls))]
            for draw, one in enumerate(tried):
                for place, predicted in enumerate(classify.along(one, strengths)):
                    accuracy[target, number, draw, place] = (predicted == images.y).double().mean()
                    hits = (predicted == target) & others
                    targeted[target, number, draw, place] = hits.double().sum() / others.sum()
    share = torch.stack([(images.y != target).double().mean() for target in range(len(aimed.mask))])
    control = (part[:, :, 1:].mean(2) for part in (accuracy, targeted))
    return Attack(tuple(float(s) for s in strengths), accuracy[:, :, 0], targeted[:, :, 0], *control, share)


def permuted(mask: Float[Tensor, " pixels"], kind: Kind, generator: torch.Generator) -> Float[Tensor, " pixels"]:
    """Permute the pixels of a mask; those that an edge mask uses, among themselves."""
    used = mask.nonzero()[:, 0] if kind == "edge" else torch.arange(len(mask), device=mask.device)
    order = used[torch.randperm(len(used), generator=generator, device=generator.device).to(used.device)]
    return torch.zeros_like(mask).index_copy(0, used, mask[order])


def _tensor(model: ImageClassifier | BilinearTensor) -> BilinearTensor:
    return model if isinstance(model, BilinearTensor) else model.pixel_tensor()


class _Quadratic:
    """Predictions along `x + s m`, whose logits are a parabola in s: `f(x) + s (G x + g) + s² f₂(m)`."""

    def __init__(self, model: ImageClassifier | BilinearTensor, images: ImageSet):
        self.B = _tensor(model)
        self.x = images.flat()
        self.logits = self.B.apply(self.x)

    def along(self, mask: Float[Tensor, " pixels"], strengths: Sequence[int | float]) -> Iterator[Int[Tensor, " n"]]:
        """Yield the predicted classes at each strength."""
        slope, curve = derivatives(self.B, self.x, mask)
        for strength in strengths:
            yield (self.logits + strength * slope + strength**2 * curve).argmax(1)


def derivatives(
    B: BilinearTensor, x: Float[Tensor, "n pixels"], m: Float[Tensor, " pixels"]
) -> tuple[Float[Tensor, "n out"], Float[Tensor, " out"]]:
    """Return `slope` and `curve` such that `B(x + s m) = B(x) + s slope + s² curve`, at `out · inp` for each x."""
    pixels = len(m)
    left, right = B.left[:, :pixels] @ m, B.right[:, :pixels] @ m
    G = B.down @ (right[:, None] * B.left + left[:, None] * B.right)
    slope = x @ G[:, :pixels].T
    return (slope + G[:, -1] if B.constant else slope), B.without_constant().apply(m)


class _Clipped:
    """Predictions with the strongest pixels of a mask added and the sum clipped to [0, 1]."""

    def __init__(self, model: ImageClassifier | BilinearTensor, images: ImageSet):
        self.logits, self.x = model.apply if isinstance(model, BilinearTensor) else model, images.flat()

    def along(self, mask: Float[Tensor, " pixels"], strengths: Sequence[int | float]) -> Iterator[Int[Tensor, " n"]]:
        """Yield the predicted classes with each number of pixels."""
        for n in strengths:
            changed = (self.x + top_pixels(mask, int(n))).clamp(0, 1)
            yield torch.cat([self.logits(part) for part in changed.split(4096)]).argmax(1)


# -- the bound --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False, eq=False)
class Perturbation(Record, rows="n", unit="images"):
    """The change of each image, of norm at most eps, that raises one logit most above another."""

    delta: Float[Tensor, "n pixels"]
    margin: Float[Tensor, " n"]  # logit aimed at minus the other, at x + delta
    bound: Float[Tensor, " n"]  # from the dual problem: no change of that norm has a larger margin
    multiplier: Float[Tensor, " n"]
    hard: Bool[Tensor, " n"]  # the linear part does not see the largest eigenvalue's space

    def __repr__(self) -> str:
        gap = float((self.bound - self.margin).max())
        return f"Perturbation({len(self.margin)} images, mean margin {float(self.margin.mean()):.3g}, gap {gap:.1g})"


def best_perturbation(
    model: ImageClassifier | BilinearTensor,
    x: Float[Tensor, "n pixels"],
    target: int,
    against: int | Int[Tensor, " n"],
    eps: float | Float[Tensor, " n"],
) -> Perturbation:
    """Return the best perturbation of norm at most eps: the bound that no mask can beat, and that is attained.

    The margin `logit_target - logit_against` is a quadratic form plus linear terms, so its maximum over a ball is a
    trust-region problem: with `Q` and `g = 2 Q x + l`, some `μ ≥ max(λ_max, 0)` solves `2 (μ - Q) m = g`, `‖m‖ = eps`
    (or `μ = 0` inside the ball); if g vanishes on the largest eigenvalue's space (the hard case), a vector from there
    fills the norm. Pixels may leave [0, 1], as in the published masks. Computed in float64.

    Args:
        model: A classifier with one layer, or a tensor from pixels to classes.
        x: Images as rows of pixels.
        target: The class to raise.
        against: The class to lower, for all images or for each.
        eps: Euclidean norm, for all images or for each.

    Returns:
        Perturbations with the margin at each and the dual bound. Cost `pixels³` for each different `against` and some
        tens of `pixels` for each image.

    Raises:
        ValueError: `eps` is not positive, a class is out of range, or target and against are the same.
    """
    B = _tensor(model).to(torch.float64)
    eps = torch.as_tensor(eps, dtype=torch.float64, device=x.device).expand(len(x))
    if not ((eps > 0) & eps.isfinite()).all():
        raise ValueError(f"eps must be positive and finite, got {eps.min():g} to {eps.max():g}")
    against = torch.full((len(x),), against) if isinstance(against, int) else against
    for name, label in (("target", torch.tensor([target])), ("against", against)):
        if len(label) and not (int(label.min()) >= 0 and int(label.max()) < B.out):
            raise ValueError(f"{name} must lie between 0 and {B.out - 1}, got {label.unique().tolist()}")
    if (against == target).any():
        raise ValueError(f"against must be another class than the target, got {target} for both")
    x, against = x.double(), against.to(x.device)
    parts = [torch.zeros_like(x), *(x.new_zeros(len(x)) for _ in range(3)), x.new_zeros(len(x)).bool()]
    for label in against.unique().tolist():
        chosen = against == label
        for whole, part in zip(parts, _Margin(B, target, label).best(x[chosen], eps[chosen]), strict=True):
            whole[chosen] = part
    return Perturbation(*parts)


@torch.no_grad()
def reachable(
    model: ImageClassifier | BilinearTensor, images: ImageSet, target: int, eps: Sequence[float]
) -> Float[Tensor, " eps"]:
    """Return, for each norm, the share of images of other classes that some perturbation could take to the target.

    An upper bound on `Attack.targeted` of any mask of that norm: an image counts if the bound of its margin
    `logit_target - logit_own` is positive.
    """
    B = _tensor(model).to(torch.float64)
    counts, total = torch.zeros(len(eps)).double(), 0
    for label in range(B.out):
        x = images.flat()[images.y == label].double()
        if label == target or not len(x):
            continue
        margin, total = _Margin(B, target, label), total + len(x)
        counts += torch.stack([(margin.best(x, x.new_tensor(e))[2] > 0).double().sum() for e in eps]).cpu()
    if not total:
        raise ValueError(f"images must hold some of another class than the target {target}, got none")
    return counts / total


class _Margin:
    """The difference of two logits as a quadratic form with linear terms, decomposed once."""

    def __init__(self, B: BilinearTensor, target: int, against: int):
        direction = B.down.new_zeros(B.out)
        direction[target], direction[against] = 1, -1
        self.Q, self.linear, self.constant = affine(B, direction)
        self.values, self.vectors = torch.linalg.eigh(self.Q)

    def best(self, x: Float[Tensor, "n pixels"], eps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the perturbation, its margin, the dual bound, the multiplier, and whether the case is hard."""
        Qx = x @ self.Q
        now = (Qx * x).sum(1) + x @ self.linear + self.constant
        half = (Qx + self.linear / 2) @ self.vectors  # of the gradient, in the eigenbasis
        mu, inside = self._multiplier(half, eps)
        gap = mu[:, None] - self.values
        m = half / gap
        missing = (eps**2 - m.pow(2).sum(1)).clamp(min=0).masked_fill(inside, 0)  # rounding, but in the hard case
        m[:, -1] = torch.where(half[:, -1] < 0, -1, 1) * (m[:, -1] ** 2 + missing).sqrt()
        bound = now + (half**2 / gap).sum(1) + mu * eps**2
        margin = now + 2 * (half * m).sum(1) + (m**2 * self.values).sum(1)
        return m @ self.vectors.T, margin, bound, mu, missing > 1e-6 * eps**2

    def _multiplier(self, half: Float[Tensor, "n pixels"], eps: Tensor) -> tuple[Tensor, Tensor]:
        """Solve `‖m(μ)‖ = eps` by Newton's method on `1/‖m‖`, kept in a bracket; say where `μ = 0` is inside."""
        floor = self.values[-1].clamp(min=0)
        low, width = floor.expand(len(half)).clone(), half.norm(dim=1) / eps
        tiny = torch.finfo(half.dtype).eps * self.values.abs().max().clamp(min=torch.finfo(half.dtype).tiny)
        high = floor + width + 4 * tiny  # ‖m(high)‖ ≤ eps
        inside = torch.zeros_like(low).bool()
        if self.values[-1] < 0:
            inside = (half / self.values).norm(dim=1) <= eps
        mu = high.clone()
        for _ in range(_STEPS):
            gap = mu[:, None] - self.values
            squares = (half / gap) ** 2
            norm = squares.sum(1).sqrt()
            solved = (norm / eps - 1).abs() < 1e-12
            low, high = torch.where(norm > eps, mu, low), torch.where((norm > eps) & ~solved, high, mu)
            if ((high - low <= 4 * tiny) | solved).all():
                break
            newton = mu + (norm / eps - 1) * norm**2 / (squares / gap).sum(1)
            mu = torch.where((newton > low) & (newton < high), newton, (low + high) / 2)
        return torch.where(inside, 0, high), inside
