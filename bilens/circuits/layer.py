"""One bilinear MLP between an SAE at its input and an SAE at its output: what every claim about a layer is made of."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bilens.models.transformer import BilinearTransformer
from bilens.models.windows import Windows, observed
from bilens.saes.cards import FeatureCards
from bilens.saes.directions import Which, check_sae, is_transcoder, offsets, readers, reading, reads_at, writers
from bilens.saes.picking import fitting_hooks, pick, stored_cards
from bilens.saes.scaling import scale_of
from bilens.saes.stored import SAE, as_inference
from bilens.saes.wording import name_from_weights
from bilens.tensor.bilinear import BilinearTensor
from bilens.tensor.decompositions import Eigen, eigen
from bilens.tensor.resuming import UNKEPT, Stages

from .entry import MLP_IN, RESID_MID, Entry, first, input_hooks
from .places import check_layer

SIDES = {"inp": "input", "out": "output"}
_DECOMPOSED = 32  # output features whose eigenvectors are kept: 8 MB for width 256, 134 MB for 1024


@dataclass(frozen=True, repr=False, eq=False)
class FeatureLayer:
    """One bilinear MLP between an SAE at its input and an SAE at its output.

    `pre_f = readers_f · MLP(x) + offset_f` with `x = z · writers + bias + error` (2410.08417, section 3.1): output
    features are read with the encoder, input features written with the decoder.

    The input SAE may stand before the norm. What enters the MLP then is `gain · x / rms + shift`, so `writers` are
    decoder rows times the gain, and the codes `z` are the SAE's activations over the root mean square, one number for
    each position (`factor`). The weights rank pairs whatever that number is; every prediction and every edit of the
    running model takes it as it is measured at that position, and an edit holds it.

    SAEs of any SAELens kind are taken, those in training as the inference SAEs that they are saved as. They are brought
    to the model's device, and to its dtype if that is at least float32 (a half-precision model is widened here, which
    loses nothing); those that were passed stay as they are. What is read off the weights is kept: make a new one after
    changing them.

    Args:
        model: The model.
        layer: Which block.
        inp: The SAE at `hook_mlp_in`, `ln2.hook_normalized` or `hook_resid_mid`.
        out: The SAE at `hook_mlp_out`, or a transcoder from one of the former to it: it is read with its decoder.
        inp_cards: Feature cards of the former, which name its features.
        out_cards: Feature cards of the latter.
        read: Whether output features are read with the `"encoder"` or the `"decoder"`; if `None`, with the encoder if
            it reads the MLP's output.

    Raises:
        ValueError: No such layer; or an SAE of another width or hook point, or of a model with other weights.
    """

    model: BilinearTransformer
    layer: int
    inp: SAE
    out: SAE
    inp_cards: FeatureCards | None = None
    out_cards: FeatureCards | None = None
    read: Which | None = None
    _decomposed: dict[int, Eigen] = field(default_factory=dict, init=False)
    _names: dict[tuple[Any, ...], str] = field(default_factory=dict, init=False)

    def __post_init__(self):
        check_layer(self.model, self.layer)
        for side in SIDES:
            object.__setattr__(self, side, as_inference(getattr(self, side)))
        check_input(self.model, self.layer, self.inp, "inp")
        check_sae(self.model, self.out, self.hook_out, f"out, the SAE at {self.hook_out},")
        if is_transcoder(self.out):
            wanted = input_hooks(self.layer)[:-1]
            if (reads_at(self.out) or self.hook_entering) not in wanted:
                raise ValueError(f"out must read the MLP's input, {' or '.join(wanted)}, got {reads_at(self.out)}")
        object.__setattr__(self, "read", reading(self.out, self.read))
        for side in SIDES:
            object.__setattr__(self, side, _beside(self.model.W_E, getattr(self, side)))

    @classmethod
    def load(
        cls,
        model: BilinearTransformer,
        layer: int,
        saes: str | Path = "bilens-mini",
        inp: str | None = None,
        out: str | None = None,
        revision: str | None = None,
        read: Which | None = None,
    ) -> "FeatureLayer":
        """Put a layer between the SAEs stored under `saes`, with their feature cards if they have been stored too.

        Args:
            model: The model.
            layer: Which block.
            saes: `"bilens-mini"`, a folder that `bilens.saes.fit` wrote, a folder or Hub repository in the published
                -scope layout such as `"tdooms/ts-medium-scope"` or with SAEs of SAELens, or the name of a SAELens
                release.
            inp: Which of them stands before the MLP, by its name in `bilens.saes.catalogue(saes)`; may be left out
                where there is one.
            out: Which of them stands behind it, as `inp`.
            revision: Branch, tag or commit on the Hub.
            read: As for the class.

        Raises:
            FileNotFoundError: No such folder, repository or SAE; the message lists those that there are.
            ValueError: No such layer; no SAE of that layer and side, or several (the message lists them); SAEs that
                were fitted elsewhere, or to a model with other weights; cards of another model.
        """
        check_layer(model, layer)
        names = {"inp": inp, "out": out}
        picked = {side: pick(saes, names[side], fitting_hooks(layer, side), side, revision) for side in SIDES}
        loaded = {side: picked[side].load() for side in SIDES}
        lens = cls(model, layer, **loaded, read=read)
        found = {f"{side}_cards": stored_cards(picked[side], model, loaded[side]) for side in SIDES}
        return replace(lens, **loaded, **found)

    def __repr__(self) -> str:
        n_in, n_out = self.inp.cfg.d_sae, self.out.cfg.d_sae
        before = "" if self._entry.hook.endswith(MLP_IN) else f" at {self._entry.hook}"
        return f"FeatureLayer(layer={self.layer}, {n_in} input features{before}, {n_out} output features)"

    @property
    def hook_in(self) -> str:
        """Name of the hook point that `codes`, `entering` and `factor` take the values of: the input SAE's.

        It is the earlier one where an output transcoder reads further ahead.
        """
        return self._seen.hook

    @property
    def hook_entering(self) -> str:
        """Name of the hook point of what enters the MLP."""
        return f"blocks.{self.layer}.{MLP_IN}"

    @property
    def hook_out(self) -> str:
        """Name of the hook point that is read: what the MLP adds to the residual stream."""
        return f"blocks.{self.layer}.hook_mlp_out"

    @property
    def hooks(self) -> dict[str, str]:
        """Names of the hook points that the input SAE and the output SAE read."""
        return {"inp": self._entry.hook, "out": self.hook_out if self._reads is None else self._reads.hook}

    @cached_property
    def _entry(self) -> Entry:
        """Where the input SAE stands."""
        return Entry.of(self.model, self.layer, reads_at(self.inp) or self.hook_entering)

    @cached_property
    def _reads(self) -> Entry | None:
        """Where an output transcoder reads."""
        if not is_transcoder(self.out):
            return None
        return Entry.of(self.model, self.layer, reads_at(self.out) or self.hook_entering)

    @cached_property
    def _seen(self) -> Entry:
        return self._entry if self._reads is None else first(self._entry, self._reads)

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
        """Directions that the output features are read with: encoder rows, or decoder rows."""
        return readers(self.out, self.read)

    @cached_property
    def offsets(self) -> Float[Tensor, " feature"]:
        """Constants of the output features' pre-activations."""
        return offsets(self.out, self.read)

    @cached_property
    def writers(self) -> Float[Tensor, "feature d_model"]:
        """What each input feature writes to what enters the MLP at a code of 1: decoder rows, times the norm's gain."""
        rows = writers(self.inp)
        return rows * self._entry.affine(rows)[0].detach()

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
        """Return how much of each input feature is in what enters the MLP: its activation times `factor`.

        Args:
            x: What `hook_in` sees.
        """
        z = self.activations(x)
        return z * self.factor(x) if self.scaled else z

    def activations(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch feature"]:
        """Return the activations of the input features, as their SAE gives them.

        Args:
            x: What `hook_in` sees.
        """
        return self.inp.encode(self._seen.seen_at(self._entry, x.to(self.writers)))

    @property
    def scaled(self) -> bool:
        """Whether `factor` is anything but 1: the input SAE stands before the norm, or normalises what it reads."""
        return self._entry.hook.endswith(RESID_MID) or self.inp.cfg.normalize_activations != "none"

    def factor(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        """Return what an activation is multiplied by on its way into the MLP, at each position.

        `1 / sqrt(mean(x²) + eps)` of an SAE before the norm, and 1 behind it; times the size of what the SAE reads if
        it divides by that (`bilens.saes.scale_of`).

        Args:
            x: What `hook_in` sees.
        """
        x = self._seen.seen_at(self._entry, x.to(self.writers))
        return scale_of(self.inp, x).written / self._entry.rms(x)

    def rms(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        """Return what the norm between `hook_in` and the MLP divides by, `sqrt(mean(x²) + eps)`; 1 where none is.

        Args:
            x: What `hook_in` sees.
        """
        return self._seen.rms(x.to(self.writers))

    def entering(
        self, x: Float[Tensor, "*batch d_model"], factor: Float[Tensor, ""] | None = None
    ) -> Float[Tensor, "*batch d_model"]:
        """Return what enters the MLP.

        Args:
            x: What `hook_in` sees.
            factor: Taken for `1 / rms` at every position, in place of what is measured.
        """
        return self._seen.enter(x.to(self.writers), factor).detach()

    def outputs(
        self, x: Float[Tensor, "*batch d_model"], y: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch feature"]:
        """Return the activations of the output features, as their SAE gives them.

        Args:
            x: What `hook_in` sees: what a transcoder reads.
            y: What leaves the MLP: what any other SAE reads.
        """
        if self._reads is None:
            return self.out.encode(y.to(self.writers))
        return self.out.encode(self._seen.seen_at(self._reads, x.to(self.writers)))

    def out_factor(self, y: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        """Return what a reading of the MLP's output is multiplied by at each position: 1 unless the SAE normalises.

        Args:
            y: What leaves the MLP.
        """
        y = y.to(self.writers)
        return torch.ones_like(y[..., :1]) if self.read == "decoder" else 1 / scale_of(self.out, y).read

    @torch.no_grad()
    def at_positions(
        self,
        windows: Windows,
        of: Callable[[Float[Tensor, "position d_model"], Float[Tensor, "position d_model"]], Tensor],
        stages: Stages = UNKEPT,
        stage: str = "text",
    ) -> Tensor:
        """Return `of(x, y)` at all positions of text, in their order: `hook_in` sees x, and y leaves the MLP.

        Windows run a batch at a time, so only what `of` returns is held for all of them, for a moment twice.

        Args:
            windows: The text.
            of: What is asked of it.
            stages: Where it is kept, to go on from there after a kill.
            stage: Its name there.
        """
        number, n = windows.counts.flatten().cumsum(0).view_as(windows.counts) - 1, int(windows.counts.sum())

        def seen(start: int) -> Iterator[dict[str, Tensor]]:
            hooks = [self.hook_in, self.hook_out]
            for rows, some, values in observed(self.model, windows, hooks, start=start):
                x, y = (values[hook][some.counts].to(self.writers) for hook in hooks)
                yield {"value": of(x, y), "number": number[rows, : some.counts.shape[1]][some.counts]}

        rows = stages.run(stage, n, seen, unit="position")
        found = torch.empty_like(rows["value"])
        found[rows["number"]] = rows["value"]
        return found

    # -- names --------------------------------------------------------------------------------------------------------

    def name(
        self,
        side: Literal["inp", "out"],
        features: int | Sequence[int],
        weights: Sequence[float] | None = None,
    ) -> str:
        """Name a feature, or a group with weights, as its card does (`FeatureCards.name`).

        Without cards it is named by what it reads and writes, from the weights alone (`saes.name_from_weights`).

        Raises:
            ValueError: No such side or feature.
        """
        some = [features] if isinstance(features, int) else list(features)
        if side == "inp" and some == [len(self.writers)] and self.tensor.constant:
            return "(constant)"
        for feature in some:
            self.check_feature(side, feature)
        cards = self.inp_cards if side == "inp" else self.out_cards
        if cards is not None:
            return cards.name(features, weights)
        asked = (side, *some, *(weights or ()))
        if asked not in self._names:
            told = None if weights is None else list(weights)
            sae, hook = getattr(self, side), self.hooks[side]
            self._names[asked] = name_from_weights(self.model, sae, some, told, hook)
        return self._names[asked]

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
        vars(self).update(state, _decomposed={}, _names={})


def check_input(model: BilinearTransformer, layer: int, sae: SAE, name: str) -> None:
    """Make sure that an SAE can split what enters a layer's MLP, for all positions by the weights of that layer alone.

    Raises:
        ValueError: It cannot.
    """
    hooks = input_hooks(layer)
    hook = reads_at(sae) or hooks[0]
    wanted = " or ".join(hooks[:-1])
    if is_transcoder(sae):
        raise ValueError(
            f"{name} must write at the MLP's input, a {sae.cfg.architecture()} writes its output: pass it as out"
        )
    if hook == hooks[-1]:
        raise ValueError(
            f"{name} must be an SAE at {wanted}: at {hook} attention is still to come, so only "
            "bilens.attribute, which measures it, takes one there"
        )
    if hook not in model.hook_dict or hook not in hooks:
        raise ValueError(f"{name} must be an SAE at {wanted}, got one of {hook}")
    check_sae(model, sae, hook, f"{name}, the SAE at {hook},")


def _beside(weight: Tensor, sae: SAE) -> SAE:
    """Return an SAE on a weight's device, in its dtype but float32 at least; a copy where it is elsewhere."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    there = all(one.device == weight.device and one.dtype == dtype for one in sae.parameters())
    return sae if there and sae.dtype == dtype else copy.deepcopy(sae).to(weight.device, dtype)
