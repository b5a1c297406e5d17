"""One bilinear MLP between an SAE at its input and an SAE at its output: what every claim about a layer is made of."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bilens import saes as _saes
from bilens.models.transformer import BilinearTransformer
from bilens.models.windows import Windows, observed
from bilens.saes.cards import FILE, FeatureCards
from bilens.saes.directions import check_sae, readers, writers
from bilens.saes.stored import SAE, sae_folder
from bilens.tensor.bilinear import BilinearTensor
from bilens.tensor.decompositions import Eigen, eigen

from .places import check_layer

SIDES = {"inp": "input", "out": "output"}
_DECOMPOSED = 32  # output features whose eigenvectors are kept: 8 MB for width 256, 134 MB for 1024


@dataclass(frozen=True, repr=False, eq=False)
class FeatureLayer:
    """One bilinear MLP between an SAE at its input and an SAE at its output.

    `pre_f = readers_f · MLP(x) + offset_f` with `x = z · writers + b_dec + error` (2410.08417, section 3.1): output
    features are read with the encoder, input features written with the decoder.

    The SAEs are brought to the model's device, and to its dtype if that is at least float32 (a half-precision model
    is widened here, which loses nothing); those that were passed stay as they are. What is read off the weights is
    kept: make a new one after changing them.

    Args:
        model: The model.
        layer: Which block.
        inp: The SAE at `hook_mlp_in`.
        out: The SAE at `hook_mlp_out`.
        inp_cards: Feature cards of the former, which name its features.
        out_cards: Feature cards of the latter.

    Raises:
        ValueError: No such layer; or an SAE of another width or hook point, or of a model with other weights.
    """

    model: BilinearTransformer
    layer: int
    inp: SAE
    out: SAE
    inp_cards: FeatureCards | None = None
    out_cards: FeatureCards | None = None
    _decomposed: dict[int, Eigen] = field(default_factory=dict, init=False)

    def __post_init__(self):
        check_layer(self.model, self.layer)
        for side, hook in (("inp", self.hook_in), ("out", self.hook_out)):
            check_sae(self.model, getattr(self, side), hook, f"{side}, the SAE at {hook},")
            object.__setattr__(self, side, _beside(self.model.W_E, getattr(self, side)))

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
        check_layer(model, layer)
        hooks = [f"blocks.{layer}.{name}" for name in ("hook_mlp_in", "hook_mlp_out")]
        stored = [
            FeatureCards.load(saes, hook, model) if (sae_folder(saes, hook) / FILE).exists() else None for hook in hooks
        ]
        return cls(model, layer, *(_saes.load(saes, hook) for hook in hooks), *stored)

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

    # -- from the weights ---------------------------------------------------------------------------------------------

    @cached_property
    def tensor(self) -> BilinearTensor:
        """The layer in the residual basis.

        Raises:
            TypeError: The MLP is not bilinear.
        """
        return self.model.blocks[self.layer].mlp.tensor().detach().to(self.inp.W_dec.dtype)

    @cached_property
    def readers(self) -> Float[Tensor, "feature d_model"]:
        """Encoder rows of the output features."""
        return readers(self.out)

    @cached_property
    def writers(self) -> Float[Tensor, "feature d_model"]:
        """Decoder rows of the input features."""
        return writers(self.inp)

    @cached_property
    def projected(self) -> BilinearTensor:
        """The layer from input features to output features, a constant leg passed through.

        Its factors are wider than those of `tensor`, so ranking and search change the basis as they go.
        """
        return self.tensor.project(self.readers, self.writers)

    def coefficients(self, feature: int) -> Float[Tensor, "feature feature"]:
        """Return `Q` of one output feature among the input features, `writers · B.matrix(reader) · writersᵀ`.

        What biases add is linear or constant, so no interaction.
        """
        self.check_feature("out", feature)
        return self.writers @ self.tensor.without_constant().matrix(self.readers[feature]) @ self.writers.T

    def eigen(self, feature: int, k: int | None = None) -> Eigen:
        """Return the k strongest eigenpairs of one output feature's interaction matrix in the residual basis.

        All of them if `k` is `None`. A matrix is decomposed once; the latest 32 are kept.

        Raises:
            ValueError: No such feature, or `k` exceeds the input leg.
        """
        self.check_feature("out", feature)
        k = self.tensor.inp if k is None else k
        if not 1 <= k <= self.tensor.inp:
            raise ValueError(f"k must lie between 1 and {self.tensor.inp}, got {k}")
        if feature not in self._decomposed:
            if len(self._decomposed) == _DECOMPOSED:
                del self._decomposed[next(iter(self._decomposed))]
            self._decomposed[feature] = eigen(self.tensor, self.readers[feature])
        found = self._decomposed[feature]
        return Eigen(found.values[:k], found.vectors[:k], found.residual[:k])

    # -- from the running model ---------------------------------------------------------------------------------------

    def codes(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch feature"]:
        """Return the activations of the input features in what enters the MLP."""
        return self.inp.encode(x.to(self.writers))

    @torch.no_grad()
    def at_positions(
        self,
        windows: Windows,
        of: Callable[[Float[Tensor, "position d_model"], Float[Tensor, "position d_model"]], Tensor],
    ) -> Tensor:
        """Return `of(x, y)` at all positions of text, in their order: x enters the MLP, y leaves it.

        Windows run a batch at a time, so only what `of` returns is held for all of them.
        """
        number, found = windows.counts.flatten().cumsum(0).view_as(windows.counts) - 1, None
        for rows, some, seen in observed(self.model, windows, [self.hook_in, self.hook_out]):
            value = of(*(seen[hook][some.counts].to(self.writers) for hook in (self.hook_in, self.hook_out)))
            if found is None:
                found = value.new_empty(int(windows.counts.sum()), *value.shape[1:])
            found[number[rows, : some.counts.shape[1]][some.counts]] = value
        return found

    # -- names --------------------------------------------------------------------------------------------------------

    def name(
        self,
        side: Literal["inp", "out"],
        features: int | Sequence[int],
        weights: Sequence[float] | None = None,
    ) -> str:
        """Name a feature, or a group with weights, as its card does (`FeatureCards.name`); by number without cards.

        Raises:
            ValueError: No such side or feature.
        """
        some = [features] if isinstance(features, int) else list(features)
        if side == "inp" and some == [len(self.writers)] and self.tensor.constant:
            return "(constant)"
        for feature in some:
            self.check_feature(side, feature)
        cards = self.inp_cards if side == "inp" else self.out_cards
        return ", ".join(f"#{feature}" for feature in some) if cards is None else cards.name(features, weights)

    def check_feature(self, side: str, feature: int, name: str = "feature") -> None:
        """Make sure that a feature exists, called `name` by who passed it.

        Raises:
            ValueError: No such side or feature.
        """
        if side not in SIDES:
            raise ValueError(f"side must be 'inp' or 'out', got {side!r}")
        n = (self.inp if side == "inp" else self.out).cfg.d_sae
        if not 0 <= feature < n:
            raise ValueError(
                f"{name} must lie between 0 and {n - 1} (layer {self.layer} has {n} {SIDES[side]} features), got "
                f"{feature}"
            )

    # SAELens' SAEs hold lambdas, which cannot be pickled: their weights and config can
    def __getstate__(self) -> dict[str, Any]:
        state = {one.name: getattr(self, one.name) for one in fields(self) if one.init}
        return state | {side: (state[side].cfg.to_dict(), state[side].state_dict()) for side in SIDES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for side in SIDES:
            config, weights = state[side]
            sae = SAE.from_dict(config).eval()
            sae.load_state_dict(weights)
            state = state | {side: sae}
        vars(self).update(state, _decomposed={})


def _beside(weight: Tensor, sae: SAE) -> SAE:
    """Return an SAE on a weight's device, in its dtype but float32 at least; a copy where it is elsewhere."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    there = all(one.device == weight.device and one.dtype == dtype for one in sae.parameters())
    return sae if there and sae.dtype == dtype else copy.deepcopy(sae).to(weight.device, dtype)
