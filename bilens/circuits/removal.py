"""What an output feature is without an input feature, and a model without the interaction of two."""

import copy
from dataclasses import dataclass, replace

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn

from bilens.models.transformer import BilinearTransformer
from bilens.models.windows import Windows, observe
from bilens.tensor.bilinear import homogeneous
from bilens.tensor.records import Record

from .circuit import Circuit
from .edits import interaction, without_feature
from .layer import FeatureLayer

# -- an input feature, from the running model -------------------------------------------------------------------------


@dataclass(frozen=True, repr=False, eq=False)
class Removal(Record, rows="batch", unit="inputs"):
    """What happens to an output feature's pre-activation when an input feature is taken out of the MLP's input."""

    inp: int
    before: Float[Tensor, " batch"]
    predicted: Float[Tensor, " batch"]  # after the removal, computed from the weights
    measured: Float[Tensor, " batch"]  # after the removal, by running the model
    activation_before: Float[Tensor, " batch"]
    activation: Float[Tensor, " batch"]  # after the removal, top-k included

    def __repr__(self) -> str:
        error = (self.predicted - self.measured).abs().max() / self.before.abs().max()
        return (
            f"Removal(input feature {self.inp}: mean pre-activation {self.before.mean():.3f} -> "
            f"{self.measured.mean():.3f}, predicted from the weights with relative error {error:.1e})"
        )


@torch.no_grad()
def remove(lens: FeatureLayer, inp: int, feature: int, tokens: Int[Tensor, "batch seq"], position: int = -1) -> Removal:
    """Take one input feature out of what enters the MLP at a position, and see what an output feature does.

    `x' = x - z_i d_i`, for which the weights predict exactly what `removal_change` says. The model is really run with
    the edit: prediction and measurement must agree to rounding. An activation of zero there removes nothing. What an
    output SAE divides by, if it does, is held as it was.

    Args:
        lens: The layer.
        inp: Input feature to remove.
        feature: Output feature to watch.
        tokens: Token ids without padding.
        position: Where, the last position by default.
    """
    lens.check_feature("inp", inp, "inp")
    lens.check_feature("out", feature)
    where, everything = torch.zeros_like(tokens, dtype=torch.bool), torch.ones_like(tokens, dtype=torch.bool)
    where[:, position] = True
    windows = Windows(tokens, everything, everything, torch.arange(len(tokens)))

    def run() -> list[Tensor]:
        found = observe(lens.model, windows, [lens.hook_in, lens.hook_out])
        return [found[hook][:, position].to(lens.readers) for hook in (lens.hook_in, lens.hook_out)]

    x, y = run()
    with without_feature(lens, inp, where):
        _, after = run()
    scale, offset = lens.out_factor(y)[:, 0], lens.offsets[feature]
    before, measured = (value @ lens.readers[feature] * scale + offset for value in (y, after))
    change = removal_change(lens, inp, feature, lens.entering(x), lens.codes(x)[:, inp])
    predicted = before + change * scale
    encoded = (lens.outputs(x, value)[:, feature] for value in (y, after))
    return Removal(inp, before, predicted, measured, *encoded)


def removal_change(
    lens: FeatureLayer,
    inp: int,
    feature: int,
    x: Float[Tensor, "position d_model"],
    z: Float[Tensor, " position"],
) -> Float[Tensor, " position"]:
    """Return what removing an input feature does to what is read, `Δ = -2 z_i d_iᵀ Q x + z_i² d_iᵀ Q d_i`.

    Exact, biases of the layer included: with them Q and x have the constant leg, and d_i is zero there.

    Args:
        lens: The layer.
        inp: The input feature.
        feature: The output feature that is read.
        x: What enters the MLP.
        z: Codes of the input feature (`FeatureLayer.codes`).
    """
    matrix, gone = lens.tensor.matrix(lens.readers[feature]), z[:, None] * lens.writers[inp]
    x = homogeneous(x, lens.tensor)
    gone = nn.functional.pad(gone, (0, x.shape[1] - gone.shape[1]))
    return einsum(gone, matrix, gone - 2 * x, "position i, i j, position j -> position")


# -- a pair, from the weights -----------------------------------------------------------------------------------------


def remove_pair(lens: FeatureLayer, circuit: Circuit) -> BilinearTransformer:
    """Return a copy of the model in which two input features no longer interact in the output feature.

    The layer's tensor changes by as little as possible in Frobenius norm under `r · (B + ΔB)(d_i, d_j) = 0`:
    `ΔB = -Q_ij / (‖r‖² ‖S‖²) · r ⊗ S` with `Q_ij = r · B(d_i, d_j)`, `S = (d_i d_jᵀ + d_j d_iᵀ) / 2` and
    `‖S‖² = (‖d_i‖² ‖d_j‖² + (d_i·d_j)²) / 2`. As only the symmetric part of a rank-one term acts, it is one more hidden
    unit, `(d_i·x)(d_j·x)`. A config has one `d_hidden` for all layers, so every other layer gets a unit of zeros, and
    the copy, which has no hooks, can be saved and loaded; those layers compute what they did, up to the order of
    summation.

    It is not what `without_pair` does. The change reads `d·x` and not the code z, so it also acts on inputs that
    overlap with both directions, and it writes along r alone: see `removal_bound` for the other output features.

    Args:
        lens: The layer between its SAEs.
        circuit: The pair and the output feature.

    Raises:
        ValueError: A circuit of another layer, or a feature that does not exist.
        TypeError: The layer is not bilinear.
    """
    circuit.check(lens)
    if lens.model.cfg.mlp.kind != "bilinear":
        raise TypeError(f"only a bilinear MLP has hidden units of two factors; these are {lens.model.cfg.mlp.kind}")
    reader, d = lens.readers[circuit.feature].double(), lens.writers[[circuit.left, circuit.right]].double()
    model = copy.deepcopy(lens.model)
    model.reset_hooks(including_permanent=True)
    unit = {"left": d[0], "right": d[1], "down": -_excess(lens, circuit) * reader}
    wider = replace(model.cfg.mlp, d_hidden=model.cfg.d_hidden + 1)
    model.cfg = replace(model.cfg, mlp=wider)
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            _append_unit(block.mlp, unit if layer == circuit.layer else {})
            block.mlp.config = wider
    return model


def removal_bound(lens: FeatureLayer, circuit: Circuit) -> Float[Tensor, " feature"]:
    """Bound what `remove_pair` does to each output feature, per squared norm of what enters the MLP.

    `|Δpre_o| ≤ |Q_ij| |r_o·r| / ‖r‖² · ‖S‖_2 / ‖S‖_F² · ‖x‖²` with `‖S‖_2 = (‖d_i‖ ‖d_j‖ + |d_i·d_j|) / 2`, S and Q_ij
    as in `remove_pair`. After an RMS norm without gain `‖x‖²` is at most `d_model`.
    """
    circuit.check(lens)
    d = lens.writers[[circuit.left, circuit.right]].double()
    spectral = (d.norm(dim=1).prod() + d[0].dot(d[1]).abs()) / 2
    overlap = lens.readers.double() @ lens.readers[circuit.feature].double()
    return (_excess(lens, circuit).abs() * spectral * overlap.abs()).to(lens.readers.dtype)


def _excess(lens: FeatureLayer, circuit: Circuit) -> Float[Tensor, ""]:
    """Return `Q_ij / (‖r‖² ‖S‖²)`, in float64."""
    reader, (one, other) = lens.readers[circuit.feature].double(), lens.writers[[circuit.left, circuit.right]].double()
    coefficient = reader @ interaction(lens, circuit.left, circuit.right).double()
    squared = (one.dot(one) * other.dot(other) + one.dot(other) ** 2) / 2
    return coefficient / (reader.dot(reader) * squared)


def _append_unit(mlp: nn.Module, unit: dict[str, Tensor]) -> None:
    """Give an MLP one more hidden unit, of zeros where nothing is said."""
    w, p = mlp.w, mlp.p
    rows = [unit.get(name, w.weight.new_zeros(w.in_features)).to(w.weight)[None] for name in ("left", "right")]
    halves = zip(w.weight.chunk(2), rows, strict=True)
    _replace(w, "weight", torch.cat([part for half in halves for part in half]))
    if w.bias is not None:
        _replace(w, "bias", torch.cat([part for half in w.bias.chunk(2) for part in (half, half.new_zeros(1))]))
    column = unit.get("down", p.weight.new_zeros(p.out_features)).to(p.weight)
    _replace(p, "weight", torch.cat((p.weight, column[:, None]), 1))
    w.out_features, p.in_features = w.out_features + 2, p.in_features + 1


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    setattr(module, name, nn.Parameter(value, requires_grad=getattr(module, name).requires_grad))
