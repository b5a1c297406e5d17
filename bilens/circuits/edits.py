"""Edits of the running model: each a `with` block of hooks that touches no weight.

At its end, also after an exception, the model is what it was, bit for bit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, TypeAlias

from jaxtyping import Bool, Float, Int
from torch import Tensor

from bilens.models.transformer import BilinearTransformer
from bilens.saes.directions import writers
from bilens.tensor.bilinear import homogeneous

from .layer import FeatureLayer

Features: TypeAlias = Sequence[int] | Int[Tensor, " k"]


# -- what the weights say ---------------------------------------------------------------------------------------------


def interaction(lens: FeatureLayer, left: int, right: int) -> Float[Tensor, " d_model"]:
    """Return what the product of two input features writes to the residual stream, `B(d_i, d_j)` with B symmetric.

    The layer's output contains it `2 z_i z_j` times for i ≠ j (2410.08417, section 3.1).
    """
    return lens.tensor.polar(lens.writers[left], lens.writers[right])


def product(
    lens: FeatureLayer, z: Float[Tensor, "*batch feature"], left: Features, right: Features
) -> Float[Tensor, "*batch d_model"]:
    """Return what two groups of input features write together, `2 B(x_A, x_B)` with `x_A = Σ_{i in A} z_i d_i`.

    Args:
        lens: The layer.
        z: Activations of all input features.
        left: The features of the one group.
        right: Those of the other.
    """
    left, right = _indices(left), _indices(right)
    some = z[..., left].any(-1) & z[..., right].any(-1)  # both are there, or they write nothing
    parts = (z[some][:, group] @ lens.writers[group] for group in (left, right))
    written = 2 * lens.tensor.polar(*parts)
    return written.new_zeros(*z.shape[:-1], written.shape[-1]).index_put((some,), written)


def _indices(features: Features) -> list[int]:
    return features.tolist() if isinstance(features, Tensor) else list(features)


# -- edits ------------------------------------------------------------------------------------------------------------


@contextmanager
def without_feature(
    lens: FeatureLayer, feature: int, where: Bool[Tensor, "batch seq"] | None = None
) -> Iterator[BilinearTransformer]:
    """Take an input feature out of what enters the MLP, `x' = x - z_i d_i`; what its SAE does not explain stays.

    `z_i` is its code (`FeatureLayer.codes`): of an SAE before the norm the root mean square is held, and the residual
    stream that goes past the MLP keeps the feature.

    Args:
        lens: The layer.
        feature: Input feature.
        where: At which positions; everywhere if `None`.
    """
    lens.check_feature("inp", feature)

    seen = {}

    def look(x: Tensor, hook: object) -> None:
        seen["part"] = lens.codes(x)[..., feature, None] * lens.writers[feature]

    def edit(x: Tensor, hook: object) -> Tensor:
        return x - _at(where, seen.pop("part")).to(x)

    with lens.model.hooks(fwd_hooks=[(lens.hook_in, look), (lens.hook_entering, edit)]) as model:
        yield model


@contextmanager
def without_pair(
    lens: FeatureLayer, left: int, right: int, where: Bool[Tensor, "batch seq"] | None = None
) -> Iterator[BilinearTransformer]:
    """Take the product of two input features out of what the MLP computes, `y' = y - 2 z_i z_j B(d_i, d_j)`.

    With `B(a, b)` symmetric, that is `y = ... + z_i² B(d_i, d_i) + 2 z_i z_j B(d_i, d_j) + z_j² B(d_j, d_j)` without
    its middle term (2410.08417, section 3.1): either feature alone acts as before, on every output direction.

    Args:
        lens: The layer.
        left: Input feature.
        right: Another input feature.
        where: At which positions; everywhere if `None`.
    """
    with without_pairs(lens, [left], [right], where) as model:
        yield model


@contextmanager
def without_pairs(
    lens: FeatureLayer,
    left: Features,
    right: Features,
    where: Bool[Tensor, "batch seq"] | None = None,
    scale: float = 1.0,
) -> Iterator[BilinearTransformer]:
    """Take the products of two groups of input features out of what the MLP computes, `y' = y - 2 B(x_A, x_B)`.

    With `x_A = Σ_{i in A} z_i d_i` that is `Σ_{i,j} 2 z_i z_j B(d_i, d_j)`, every pair of one feature of either group
    at once; what each group does by itself stays.

    Args:
        lens: The layer.
        left: Input features.
        right: Other input features.
        where: At which positions; everywhere if `None`.
        scale: How many times they are taken out: 1 leaves none, -1 doubles them.
    """
    left, right = _indices(left), _indices(right)
    for name, group in (("left", left), ("right", right)):
        for index in group:
            lens.check_feature("inp", index, name)
    if twice := set(left) & set(right):
        raise ValueError(f"left and right must be different input features, got {min(twice)} twice")

    def between(x: Tensor) -> Tensor:
        return scale * product(lens, lens.codes(x), left, right)

    with _without(lens, between, where) as model:
        yield model


@contextmanager
def without_products(
    lenses: Mapping[int, FeatureLayer],
    groups: Mapping[int, tuple[Features, Features]],
    where: Bool[Tensor, "batch seq"] | None = None,
    scale: Mapping[int, float] | None = None,
) -> Iterator[BilinearTransformer]:
    """Take the products of two groups of input features out of several layers at once, as `without_pairs` does of one.

    A later layer's features are those of the edited model.

    Args:
        lenses: The layers, of one model.
        groups: By layer, the two groups.
        where: At which positions; everywhere if `None`.
        scale: By layer, how many times they are taken out; once if `None`.

    Raises:
        ValueError: No groups, or those of a layer without a lens.
    """
    if missing := sorted(groups.keys() - lenses.keys()) or not groups:
        raise ValueError(f"groups must be of the layers {sorted(lenses)}, got {missing if groups else 'none'}")
    with ExitStack() as edits:
        for layer, (left, right) in groups.items():
            times = 1.0 if scale is None else scale[layer]
            model = edits.enter_context(without_pairs(lenses[layer], left, right, where, times))
        yield model


@contextmanager
def without_eigenvector(
    lens: FeatureLayer, feature: int, index: int = 0, where: Bool[Tensor, "batch seq"] | None = None
) -> Iterator[BilinearTransformer]:
    """Take one eigenvector's share out of an output feature: `y' = y - λ (v·x)² r / ‖r‖²`.

    That changes the feature's pre-activation `r·y + offset` by exactly `-λ (v·x)²`, and is the smallest change of y
    that does: output directions orthogonal to the reader r keep what they had. (An eigenvector is one of a single
    output feature's matrix, so taking v out of x instead would say little about that feature alone.)

    Args:
        lens: The layer.
        feature: Output feature.
        index: Which eigenvector, 0 for that of the largest |λ|.
        where: At which positions; everywhere if `None`.
    """
    if not 0 <= index < lens.tensor.inp:
        raise ValueError(f"index must lie between 0 and {lens.tensor.inp - 1}, got {index}")
    top, reader = lens.eigen(feature, index + 1), lens.readers[feature]

    def share(x: Tensor) -> Tensor:
        strength = (homogeneous(lens.entering(x), lens.tensor) @ top.vectors[index]).pow(2) * top.values[index]
        return strength[..., None] * reader / reader.dot(reader)

    with _without(lens, share, where) as model:
        yield model


@contextmanager
def steer(
    lens: FeatureLayer,
    feature: int,
    amount: float,
    side: Literal["inp", "out"] = "out",
    where: Bool[Tensor, "batch seq"] | None = None,
) -> Iterator[BilinearTransformer]:
    """Add `amount` times a feature's decoder direction: to the MLP's input, or to its output.

    The MLP's output is what is added to the residual stream, so an output feature goes straight into the latter.

    Args:
        lens: The layer.
        feature: Input or output feature, by `side`.
        amount: In units of the feature's activation; of an input feature's code (`FeatureLayer.codes`).
        side: `"inp"` or `"out"`.
        where: At which positions; everywhere if `None`.
    """
    hook, direction = decoder_direction(lens, side, feature)
    with push(lens.model, hook, amount * direction, where) as model:
        yield model


@contextmanager
def push(
    model: BilinearTransformer,
    hook: str,
    direction: Float[Tensor, " d_model"],
    where: Bool[Tensor, "batch seq"] | None = None,
) -> Iterator[BilinearTransformer]:
    """Add a vector at a hook point.

    Args:
        model: The model.
        hook: Name of the hook point.
        direction: What is added.
        where: At which positions; everywhere if `None`.
    """

    def edit(value: Tensor, hook: object) -> Tensor:
        return value + _at(where, direction.expand_as(value)).to(value)

    with model.hooks(fwd_hooks=[(hook, edit)]):
        yield model


@contextmanager
def _without(
    lens: FeatureLayer,
    part: Callable[[Float[Tensor, "*position d"]], Float[Tensor, "*position d"]],
    where: Bool[Tensor, "batch seq"] | None,
) -> Iterator[BilinearTransformer]:
    """Subtract `part(x)` from what the MLP writes, x being what `hook_in` sees, at those positions alone."""
    seen = {}

    def look(x: Tensor, hook: object) -> None:
        seen["part"] = part(x if where is None else x[_checked(where, x)])

    def edit(y: Tensor, hook: object) -> Tensor:
        change = seen.pop("part").to(y)
        return y - change if where is None else y.index_put((where.to(y.device),), -change, accumulate=True)

    with lens.model.hooks(fwd_hooks=[(lens.hook_in, look), (lens.hook_out, edit)]) as model:
        yield model


def decoder_direction(lens: FeatureLayer, side: str, feature: int) -> tuple[str, Float[Tensor, " d_model"]]:
    """Return the hook point of one side, and what one of its features writes there at activation 1."""
    lens.check_feature(side, feature)
    return (lens.hook_entering, lens.writers[feature]) if side == "inp" else (lens.hook_out, writers(lens.out)[feature])


def _at(where: Bool[Tensor, "batch seq"] | None, change: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
    """Keep a change at some positions only."""
    return change if where is None else change * _checked(where, change)[..., None].to(change)


def _checked(where: Bool[Tensor, "..."], x: Float[Tensor, "b s d"]) -> Bool[Tensor, "..."]:
    if where.shape != x.shape[:2]:
        raise ValueError(f"where must have the tokens' shape {list(x.shape[:2])}, got {list(where.shape)}")
    return where
