"""transformer_lens' cache on models whose norms have gains: what each part of the residual stream is worth to a reader.

transformer_lens folds gains into the weights that read them, and then need not mind them. Here they are where the
checkpoint has them (`process_weights_` folds them), so the parts are taken through the norm whole.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities import Slice


class Cache(ActivationCache):
    """transformer_lens' cache, right with the gains of norms; it refuses what some models' streams do not do.

    With `apply_ln=True` parts are what the norm makes of them, `gain · part / rms`: they sum to what the layer reads,
    less the norm's shift, and `@ model.W_U` at the end gives the logits. A direction of `tokens_to_residual_directions`
    has the final gain already: it goes with parts as they are over the root mean square, which is what
    `apply_ln_to_stack` returns at the unembedding (and `logit_attrs` uses). On a model whose gains are folded
    (`model.process_weights_()`) the two are one.
    """

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: str = "all",
        apply_ln: bool = False,
        pos_slice: Any = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """Stack what each component added to the residual stream, as transformer_lens does.

        Raises:
            ValueError: The model's blocks scale the stream, so that it is not the sum of what was added to it.
        """
        self._check_sum()
        parts, labels = super(Cache, self._from_start()).decompose_resid(
            layer, mlp_input, mode, False, pos_slice, incl_embeds, True
        )
        parts = self._read(parts, layer, mlp_input, pos_slice) if apply_ln else parts
        return (parts, labels) if return_labels else parts

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Any = None,
        apply_ln: bool = False,
    ) -> Any:
        """Stack what each head added to the residual stream, as transformer_lens does.

        Raises:
            ValueError: A norm follows attention, so that what is added is not the sum of the heads.
        """
        self._check_parts()
        parts, labels = super().stack_head_results(layer, True, incl_remainder, pos_slice, False)
        parts = self._read(parts, layer, False, pos_slice) if apply_ln else parts
        return (parts, labels) if return_labels else parts

    def stack_neuron_results(
        self,
        layer: int,
        pos_slice: Any = None,
        neuron_slice: Any = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Float[Tensor, " d_model"] | Float[Tensor, "d_model n"] | None = None,
    ) -> Any:
        """Stack what each hidden unit added to the residual stream, as transformer_lens does.

        Raises:
            ValueError: A norm follows the MLP, so that what is added is not the sum over hidden units.
        """
        self._check_parts()
        onto = self._onto(project_output_onto, layer, False) if apply_ln else project_output_onto
        parts, labels = super().stack_neuron_results(
            layer, pos_slice, neuron_slice, True, incl_remainder, False, project_output_onto=onto
        )
        parts = self._read(parts, layer, False, pos_slice, onto) if apply_ln else parts
        return (parts, labels) if return_labels else parts

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Any = None,
        return_labels: bool = False,
        project_output_onto: Float[Tensor, " d_model"] | Float[Tensor, "d_model n"] | None = None,
    ) -> Any:
        """Stack what each head, hidden unit (or MLP), embedding and bias added to the stream, as transformer_lens does.

        Raises:
            ValueError: As `decompose_resid` and `stack_head_results`; attention interpolates rather than adds.
        """
        self._check_sum()
        self._check_parts()
        if self.model.cfg.stream.interpolate:
            raise ValueError(
                "attention of this model interpolates, x + s (o - x): its heads and biases do not sum to what it adds; "
                "use decompose_resid"
            )
        onto = self._onto(project_output_onto, layer, mlp_input) if apply_ln else project_output_onto
        parts, labels = super(Cache, self._from_start()).get_full_resid_decomposition(
            layer, mlp_input, expand_neurons, False, pos_slice, True, project_output_onto=onto
        )
        parts = self._read(parts, layer, mlp_input, pos_slice, onto) if apply_ln else parts
        return (parts, labels) if return_labels else parts

    def apply_ln_to_stack(
        self,
        residual_stack: Float[Tensor, "part *batch d_model"],
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Float[Tensor, "part *out d_model"]:
        """Take parts of the stream through the norm before a layer, by the root mean square that was measured there.

        `gain · part / rms`, where a LayerNorm first takes the mean away: what the layer reads, less the norm's shift.
        At the unembedding `part / rms`: the gain is in the directions that raise logits
        (`tokens_to_residual_directions`). Arguments are transformer_lens'; with `recompute_ln` there, each part goes
        through the whole norm by itself, shift included (a logit lens, `@ model.W_U`).
        """
        norm, last = self._norm(layer, mlp_input)[1], self._is_last(layer)
        if has_batch_dim:
            residual_stack = _slice(batch_slice).apply(residual_stack, dim=1)
        if recompute_ln and last:
            factor, shift = norm.linear(residual_stack)
            return factor * residual_stack + shift
        parts = norm.center(residual_stack) / self._scale(layer, mlp_input, pos_slice, batch_slice, residual_stack)
        return parts if last else parts * norm.affine(parts)[0]

    def _read(
        self, parts: Tensor, layer: int | None, mlp_input: bool, pos_slice: Any, onto: Tensor | None = None
    ) -> Tensor:
        """Take parts through a norm, gain included; those that were projected have all but the scale already."""
        scale = self._scale(layer, mlp_input, pos_slice, None, parts)
        if onto is not None:
            return parts / (scale[..., 0] if onto.ndim == 1 and scale.ndim else scale)
        norm = self._norm(layer, mlp_input)[1]
        return norm.center(parts) / scale * norm.affine(parts)[0]

    def _onto(self, onto: Tensor | None, layer: int | None, mlp_input: bool) -> Tensor | None:
        """Return the projection of a part as it is that is `onto` of what the norm makes of it, but for the scale."""
        if onto is None:
            return None
        norm = self._norm(layer, mlp_input)[1]
        rows = onto.mT if onto.ndim > 1 else onto
        rows = norm.center(rows * norm.affine(rows)[0])
        return rows.mT if onto.ndim > 1 else rows

    def _is_last(self, layer: int | None) -> bool:
        return layer in (None, -1, self.model.cfg.n_layers)

    def _norm(self, layer: int | None, mlp_input: bool) -> tuple[str, Any]:
        if self._is_last(layer):
            return "ln_final", self.model.ln_final
        name = "ln2" if mlp_input else "ln1"
        return f"blocks.{layer}.{name}", getattr(self.model.blocks[layer], name)

    def _scale(
        self, layer: int | None, mlp_input: bool, pos_slice: Any, batch_slice: Any, like: Tensor
    ) -> Float[Tensor, "*batch 1"] | Float[Tensor, ""]:
        """Return what the norm divided by, where a run met it; 1 where there is no norm."""
        name = self._norm(layer, mlp_input)[0]
        if f"{name}.hook_scale" not in self.model.hook_dict:
            return like.new_ones(())
        if f"{name}.hook_scale" not in self.cache_dict:
            raise ValueError(f"the cache must hold {name}.hook_scale for a norm to be applied: add it to names_filter")
        scale = _slice(pos_slice).apply(self.cache_dict[f"{name}.hook_scale"], dim=-2)
        return _slice(batch_slice).apply(scale) if self.has_batch_dim else scale

    def _from_start(self) -> "Cache":
        """Return a cache whose embeddings are what the stream starts with: normalised, where they are."""
        if self.model.cfg.embed.norm is None or "hook_embed_normalized" not in self.cache_dict:
            return self
        start = {"hook_embed": self.cache_dict["hook_embed_normalized"]}
        return Cache(self.cache_dict | start, self.model, has_batch_dim=self.has_batch_dim)

    def _check_sum(self) -> None:
        if self.model.cfg.stream.restart:
            raise ValueError(
                "the residual stream of this model is not the sum of what was added to it: its blocks scale it and mix "
                "in its start; bilens.circuits.sources.sources splits it exactly"
            )

    def _check_parts(self) -> None:
        norm = self.model.cfg.norm
        if norm is not None and norm.place != "before":
            raise ValueError(
                "a norm follows attention and MLP of this model, so what they add is not the sum of heads or hidden "
                "units; use decompose_resid"
            )


def _slice(some: Any) -> Slice:
    return some if isinstance(some, Slice) else Slice(some)
