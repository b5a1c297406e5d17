"""Circuits of one MLP between two SAEs: read off the weights, then tested by running the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from bilens import saes as _saes
from bilens.models.transformer import BilinearTransformer
from bilens.saes.cards import FILE, FeatureCards, check_sae
from bilens.saes.stored import SAE, activations, offsets, readers, to_rows, writers
from bilens.tensor.bilinear import BilinearTensor, homogeneous
from bilens.tensor.decompositions import Eigen, eigen
from bilens.tensor.interactions import Interactions, top_interactions


@dataclass(frozen=True, repr=False)
class FeatureLayer:
    """One bilinear MLP between an SAE at its input and an SAE at its output.

    `pre_f = readers_f · MLP(x) + offset_f` with `x = z · writers + b_dec + error` (2410.08417, section 3.1): output
    features are read with the encoder, input features written with the decoder.
    """

    model: BilinearTransformer
    layer: int
    inp: SAE
    out: SAE
    inp_cards: FeatureCards | None = None
    out_cards: FeatureCards | None = None

    @classmethod
    def load(cls, model: BilinearTransformer, layer: int, saes: str | Path = "bilens-mini") -> "FeatureLayer":
        """Put a layer between the SAEs stored under `saes`, with their feature cards if they have been stored too.

        Args:
            model: The model.
            layer: Which block.
            saes: `"bilens-mini"`, or a folder that `bilens.saes.fit` wrote.

        Raises:
            ValueError: No such layer; or SAEs that were fitted elsewhere, or to a model with other weights.
        """
        if not 0 <= layer < model.cfg.n_layers:
            raise ValueError(f"layer must lie between 0 and {model.cfg.n_layers - 1}, got {layer}")
        hooks = [f"blocks.{layer}.hook_mlp_in", f"blocks.{layer}.hook_mlp_out"]
        loaded = [_saes.load(saes, hook) for hook in hooks]
        for sae, hook in zip(loaded, hooks, strict=True):
            check_sae(model, sae, hook)
        stored = [
            FeatureCards.load(saes, hook, model) if (_saes.sae_folder(saes, hook) / FILE).exists() else None
            for hook in hooks
        ]
        return cls(model, layer, *loaded, *stored)

    def __repr__(self) -> str:
        n_in, n_out = self.inp.cfg.d_sae, self.out.cfg.d_sae
        return f"FeatureLayer(layer={self.layer}, {n_in} input features, {n_out} output features)"

    @property
    def hook_in(self) -> str:
        """Name of the hook point the input SAE reads."""
        return f"blocks.{self.layer}.hook_mlp_in"

    @property
    def hook_out(self) -> str:
        """Name of the hook point the output SAE reads."""
        return f"blocks.{self.layer}.hook_mlp_out"

    @cached_property
    def tensor(self) -> BilinearTensor:
        """The layer in the residual basis."""
        return self.model.blocks[self.layer].mlp.tensor().detach()

    @cached_property
    def readers(self) -> Float[Tensor, "feature d_model"]:
        """Encoder rows of the output features."""
        return readers(self.out)

    @cached_property
    def writers(self) -> Float[Tensor, "feature d_model"]:
        """Decoder rows of the input features."""
        return writers(self.inp)

    def coefficients(self, feature: int) -> Float[Tensor, "feature feature"]:
        """Return `Q` of one output feature among the input features, `writers · B.matrix(reader) · writersᵀ`."""
        return self.writers @ self._matrix(self.readers[feature]) @ self.writers.T

    def _matrix(self, directions: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model d_model"]:
        """Interaction matrices in the residual basis; what biases add is linear or constant, so no interaction."""
        matrix = self.tensor.matrix(directions)
        return matrix[..., :-1, :-1] if self.tensor.constant else matrix

    def label(
        self,
        side: Literal["inp", "out"],
        features: int | Sequence[int],
        weights: Sequence[float] | None = None,
    ) -> str:
        """Name a feature, or a group with weights, by the tokens at which it is most active (`saes.Contexts.label`)."""
        cards = self.inp_cards if side == "inp" else self.out_cards
        if side == "inp" and features == len(self.writers):
            return "(constant)"
        if cards is not None:
            return cards.contexts.label(features, self.model, weights=weights)
        return ", ".join(f"#{feature}" for feature in ([features] if isinstance(features, int) else features))


# -- from the weights -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Outliers:
    """Output features of a layer, the one with the strongest spectral outliers first."""

    feature: Int[Tensor, " feature"]
    values: Float[Tensor, "feature 2"]  # the two eigenvalues of largest magnitude
    bulk: Float[Tensor, " feature"]  # edge of the other eigenvalues' spectrum if they were a random matrix's

    @property
    def strength(self) -> Float[Tensor, " feature"]:
        """Sum of the magnitudes of the two strongest eigenvalues, the published ranking."""
        return self.values.abs().sum(1)

    @property
    def ratio(self) -> Float[Tensor, " feature"]:
        """How far the second outlier lies outside the bulk: `|λ₂| / edge`, about 1 for a random matrix."""
        return self.values[:, 1].abs() / self.bulk

    def __repr__(self) -> str:
        top = ", ".join(map(str, self.feature[:5].tolist()))
        return f"Outliers({len(self.feature)} features; first: {top} ...)"


def outliers(lens: FeatureLayer, by: Literal["strength", "ratio"] = "strength") -> Outliers:
    """Rank all output features of a layer by their spectral outliers, from the weights alone.

    `strength` is `|λ₁| + |λ₂|` (2410.08417, tutorial and section 5.2); `ratio` is `|λ₂|` over the edge
    `2 sqrt(Σ_{i>2} λ_i² / (n-2))` that the other eigenvalues would have as a random symmetric matrix (Wigner), so it
    finds features whose two outliers stand out whatever their scale. Cost: one `d_model × d_model`
    eigenvalue problem per feature.
    """
    if by not in ("strength", "ratio"):
        raise ValueError(f"by must be 'strength' or 'ratio', got {by!r}")
    values = torch.cat([torch.linalg.eigvalsh(lens.tensor.matrix(some)) for some in lens.readers.split(128)])
    values = values.gather(1, values.abs().argsort(dim=1, descending=True, stable=True))
    bulk = 2 * values[:, 2:].pow(2).mean(1).sqrt()
    found = Outliers(torch.arange(len(values)), values[:, :2], bulk.clamp(min=torch.finfo(bulk.dtype).tiny))
    order = getattr(found, by).argsort(descending=True, stable=True)
    return Outliers(found.feature[order], found.values[order], found.bulk[order])


def pairs(lens: FeatureLayer, feature: int, k: int = 10) -> Interactions:
    """Return the strongest pairs of input features of one output feature, from the weights alone."""
    found = top_interactions(lens.tensor, k, out=lens.readers[feature, None], inp=lens.writers)
    return found._replace(out=torch.full_like(found.out, feature))


def top_eigen(lens: FeatureLayer, feature: int, k: int | None = None) -> Eigen:
    """Return the eigenpairs of one output feature's interaction matrix in the residual basis."""
    return eigen(lens.tensor, lens.readers[feature], k)


# -- weights against the running model --------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Prediction:
    """What a few eigenvectors say an output feature does, against what it does on text."""

    actual: Float[Tensor, " position"]  # activation, zero where the feature is not among the k largest
    predicted: Float[Tensor, " position"]  # Σ_i λ_i (v_i · x)² over the chosen eigenpairs
    pearson: float  # over all positions
    pearson_active: float  # over the positions where the feature is active
    n_active: int

    def __repr__(self) -> str:
        return (
            f"Prediction(pearson={self.pearson:.3f}, active only {self.pearson_active:.3f} at {self.n_active} of "
            f"{len(self.actual)} positions)"
        )


def predict(
    lens: FeatureLayer, feature: int, dataset: Sequence[str] | Int[Tensor, "row seq"], k: int = 2
) -> Prediction:
    """Predict an output feature's activation from its k strongest eigenvectors, and correlate with the real one.

    `ŷ = Σ_{i≤k} λ_i (v_i · x)²` with x what enters the MLP (2410.08417, section 5.2 and figure 9). BOS and padding are
    left out. A correlation over fewer than three positions is NaN.
    """
    return predict_all(lens, [feature], dataset, k)[0]


@torch.no_grad()
def predict_all(
    lens: FeatureLayer, features: Sequence[int], dataset: Sequence[str] | Int[Tensor, "row seq"], k: int = 2
) -> list[Prediction]:
    """Do what `predict` does for several output features, in one pass over the dataset."""
    x, y = _inputs_and_outputs(lens, dataset)
    activations_, x = lens.out.encode(y), homogeneous(x, lens.tensor)
    return [_predict(x, activations_[:, feature], top_eigen(lens, feature, k)) for feature in features]


def _predict(x: Float[Tensor, "position inp"], actual: Float[Tensor, " position"], top: Eigen) -> Prediction:
    predicted = (x @ top.vectors.T).pow(2) @ top.values
    active = actual != 0
    overall, alone = _pearson(predicted, actual), _pearson(predicted[active], actual[active])
    return Prediction(actual, predicted, overall, alone, int(active.sum()))


def _inputs_and_outputs(lens: FeatureLayer, dataset: Sequence[str] | Tensor) -> tuple[Tensor, Tensor]:
    """Return what enters and what leaves the MLP at every position that counts, `[position, d_model]`."""
    rows = to_rows(lens.model, dataset)
    found = activations(lens.model, rows, [lens.hook_in, lens.hook_out])
    return found[lens.hook_in][rows.counts], found[lens.hook_out][rows.counts]


def _pearson(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack((a, b)))[0, 1].item() if len(a) > 2 else float("nan")


@dataclass(frozen=True, repr=False)
class Removal:
    """What happens to an output feature's pre-activation when an input feature is taken out of the MLP's input."""

    inp: int
    before: Float[Tensor, "*batch"]
    predicted: Float[Tensor, "*batch"]  # after the removal, computed from the weights
    measured: Float[Tensor, "*batch"]  # after the removal, by running the model
    activation_before: Float[Tensor, "*batch"]
    activation: Float[Tensor, "*batch"]  # after the removal, top-k included

    def __repr__(self) -> str:
        error = (self.predicted - self.measured).abs().max() / self.before.abs().max()
        return (
            f"Removal(input feature {self.inp}: mean pre-activation {self.before.mean():.3f} -> "
            f"{self.measured.mean():.3f}, predicted from the weights with relative error {error:.1e})"
        )


@torch.no_grad()
def remove(lens: FeatureLayer, inp: int, feature: int, tokens: Int[Tensor, "batch seq"], position: int = -1) -> Removal:
    """Take one input feature out of what enters the MLP at a position, and see what an output feature does.

    `x' = x - z_i d_i`, for which the weights predict exactly `Δpre = -2 z_i d_iᵀ Q x + z_i² d_iᵀ Q d_i` (biases of the
    layer included). The model is really run with the edit: prediction and measurement must agree to rounding.
    An activation of zero there removes nothing.

    Args:
        lens: The layer.
        inp: Input feature to remove.
        feature: Output feature to watch.
        tokens: Token ids without padding.
        position: Where, the last position by default.
    """
    found = activations(lens.model, to_rows(lens.model, tokens), [lens.hook_in, lens.hook_out])
    x, y = found[lens.hook_in][:, position], found[lens.hook_out][:, position]
    removed = lens.inp.encode(x)[:, inp, None] * lens.writers[inp]

    def edit(value: Tensor, hook: object) -> Tensor:
        value = value.clone()
        value[:, position] -= removed
        return value

    with lens.model.hooks(fwd_hooks=[(lens.hook_in, edit)]):
        _, cache = lens.model.run_with_cache(tokens, names_filter=lens.hook_out, stop_at_layer=lens.layer + 1)
    after = cache[lens.hook_out][:, position]
    reader, offset = lens.readers[feature], offsets(lens.out)[feature]
    before, measured = y @ reader + offset, after @ reader + offset
    matrix, full, gone = lens.tensor.matrix(reader), x, removed
    if lens.tensor.constant:
        full, gone = torch.cat((x, x.new_ones(len(x), 1)), 1), torch.cat((removed, x.new_zeros(len(x), 1)), 1)
    predicted = before + einsum(gone, matrix, gone - 2 * full, "b i, i j, b j -> b")
    encoded = (lens.out.encode(part)[:, feature] for part in (y, after))
    return Removal(inp, before, predicted, measured, *encoded)
