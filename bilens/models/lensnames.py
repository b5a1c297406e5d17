"""transformer_lens' other names for a model: its weights stacked, small questions about it, and switches.

The names that are left out raise an AttributeError that says what to use: `LEFT_OUT` lists them.
"""

from typing import Any, Literal, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import FactoredMatrix
from transformer_lens.utilities import composition_scores

from .folding import folded_gains, process_weights
from .lensconfig import explain
from .losses import next_token_loss
from .text import Ids, Text, token_ids

_POSITIONS = "positions are rotary, so no matrix holds them; see cfg.attention.rope and block.attn.score_tensor"
_LOAD = "use bilens.load(name)"
_DATA = "use datasets.load_dataset(...); every function that takes texts takes its rows"
_PLACE = "use model.to(device)"
LEFT_OUT = {
    "W_pos": _POSITIONS,
    "W_E_pos": _POSITIONS,
    "from_pretrained": _LOAD,
    "from_pretrained_no_processing": f"{_LOAD}, which never changes weights",
    "load_and_process_state_dict": "use load_state_dict(state), then process_weights_()",
    "fill_missing_keys": "load_state_dict(state) is strict; bilens.load reads checkpoints",
    "center_writing_weights": "an RMS norm does not take the mean away, so centred weights compute something else",
    "center_unembed": "use process_weights_(fold_ln=False, center_unembed=True)",
    "fold_value_biases": "accumulated_bias and block.attn.b_V have them; the formats have no other place for them",
    "refactor_factored_attn_matrices": "rotary positions stand between queries and keys; use model.OV.svd(), or "
    "block.attn.score_tensor(head) and block.attn.ov(head)",
    "init_weights": "new models are initialised as torch does; see scripts/train_language.py",
    "get_pos_offset": "generate keeps keys and values itself",
    "get_residual": "use model.stream_start(tokens), or run_with_cache",
    "load_sample_training_dataset": _DATA,
    "sample_datapoint": _DATA,
    "dataset": _DATA,
    "move_model_modules_to_device": _PLACE,
    "mps": _PLACE,
    "set_tokenizer": "use model.tokenizer = tokenizer, or bilens.load(name, tokenizer=...)",
    "set_ungroup_grouped_query_attention": "hook_k and hook_v have one row for each key-value head; model.W_K and W_V "
    "repeat it for every head that reads it",
    "pos_embed": _POSITIONS,
    "hook_pos_embed": _POSITIONS,
}


class _Explaining(type):
    """The class's own AttributeErrors say what to use too: `BilinearTransformer.from_pretrained`."""

    def __getattr__(cls, name: str) -> NoReturn:
        raise AttributeError(explain(cls.__name__, name, LEFT_OUT))


class LensNames(metaclass=_Explaining):
    """Names of transformer_lens' `HookedTransformer`, answered by a model that has blocks."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(type(self), name, None)
        if isinstance(found, property):  # whose own AttributeError torch would hide
            return found.fget(self)
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(explain(type(self).__name__, name, LEFT_OUT)) from None

    # -- weights ------------------------------------------------------------------------------------------------------

    def _of_attention(self, name: str) -> Tensor:
        return torch.stack([getattr(block.attn, name) for block in self.blocks])

    def _of_mlps(self, name: str) -> Tensor:
        if self.cfg.mlp is None:
            raise AttributeError(f"{name} is of MLPs, and this model has attention only")
        return torch.stack([getattr(block.mlp, name) for block in self.blocks])

    @property
    def W_gate(self) -> Float[Tensor, "layer d_model hidden"] | None:
        """Left weights of all MLPs, those before the activation if there is one; `None` of plain and squared MLPs."""
        return self._of_mlps("W_gate") if self.cfg.gated_mlp else None

    @property
    def W_in(self) -> Float[Tensor, "layer d_model hidden"]:
        """Right weights of all MLPs; of plain and squared ones, their only weights on the way in."""
        return self._of_mlps("W_in")

    @property
    def W_out(self) -> Float[Tensor, "layer hidden d_model"]:
        """Weights on the way out of all MLPs."""
        return self._of_mlps("W_out")

    @property
    def b_gate(self) -> Float[Tensor, "layer hidden"] | None:
        """Biases of the left factor, added before the product; zero if there are none."""
        return self._of_mlps("b_gate") if self.cfg.gated_mlp else None

    @property
    def b_in(self) -> Float[Tensor, "layer hidden"]:
        """Biases of the right factor, added before the product; zero if there are none."""
        return self._of_mlps("b_in")

    @property
    def b_out(self) -> Float[Tensor, "layer d_model"]:
        """Output biases of all MLPs, zero if there are none."""
        return self._of_mlps("b_out")

    @property
    def b_Q(self) -> Float[Tensor, "layer head d_head"]:
        """Query biases of all layers, zero if there are none."""
        return self._of_attention("b_Q")

    @property
    def b_K(self) -> Float[Tensor, "layer head d_head"]:
        """Key biases of all layers, zero if there are none."""
        return self._of_attention("b_K")

    @property
    def b_V(self) -> Float[Tensor, "layer head d_head"]:
        """Value biases of all layers, zero if there are none."""
        return self._of_attention("b_V")

    @property
    def b_O(self) -> Float[Tensor, "layer d_model"]:
        """Output biases of attention in all layers, the attention scale included; zero if there are none."""
        return self._of_attention("b_O")

    @property
    def b_U(self) -> Float[Tensor, " vocab"]:
        """Biases of the logits: zero, no format has them. A shift of the last norm adds `ln_final.bias @ W_U`."""
        return self.W_U.new_zeros(self.cfg.d_vocab)

    @property
    def QK(self) -> FactoredMatrix:
        """`W_Q W_Kᵀ` of each head, `[layer, head, d_model, d_model]` in factors: rotation, scale and gains left out."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """`W_V W_O` of each head, `[layer, head, d_model, d_model]` in factors, the attention scale included."""
        return FactoredMatrix(self.W_V, self.W_O)

    @property
    def n_params_total(self) -> int:
        """Number of parameters, embeddings, biases and gains included; one that is in two places counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def all_composition_scores(self, mode: str) -> Float[Tensor, "layer head layer head"]:
        """Return how much each head composes with each of a later layer, `|A B| / (|A| |B|)` in Frobenius norms.

        A is the earlier head's OV, B the later one's QK (`"Q"`), its transpose (`"K"`) or its OV (`"V"`); zero for all
        other pairs. Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.

        Raises:
            ValueError: Another mode.
        """
        if mode not in ("Q", "K", "V"):
            raise ValueError(f"mode must be 'Q', 'K' or 'V', got {mode!r}")
        left, right = self.OV, {"Q": self.QK, "K": self.QK.T, "V": self.OV}[mode]
        scores = composition_scores(left, right, broadcast_dims=True)
        layers = torch.arange(self.cfg.n_layers, device=scores.device)
        later = layers[:, None, None, None] < layers[None, None, :, None]
        return torch.where(later, scores, torch.zeros_like(scores))

    def all_head_labels(self) -> list[str]:
        """Return the names of all heads, `"L0H0"` and on."""
        return [f"L{layer}H{head}" for layer in range(self.cfg.n_layers) for head in range(self.cfg.n_heads)]

    # -- questions ----------------------------------------------------------------------------------------------------

    def to_single_str_token(self, int_token: int) -> str:
        """Return the text of one token id, as `to_str_tokens` shows it."""
        return self.to_str_tokens([int_token])[0]

    def get_token_position(
        self,
        single_token: str | int,
        input: Text | Ids,
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
    ) -> int:
        """Return the position of a token, a text or an id, in one text or one row of token ids.

        Raises:
            ValueError: It is not there, or not one token; several rows; another mode.
        """
        if mode not in ("first", "last"):
            raise ValueError(f"mode must be 'first' or 'last', got {mode!r}")
        tokens = self.to_tokens(input, prepend_bos) if isinstance(input, str) else torch.atleast_2d(token_ids(input))
        if len(tokens) != 1:
            raise ValueError(f"input must be one text, or one row of token ids, got {len(tokens)} rows")
        wanted = self.to_single_token(single_token) if isinstance(single_token, str) else single_token
        found = (tokens[0] == wanted).nonzero()[:, 0].tolist()
        if not found:
            raise ValueError(f"single_token must occur in the input, got {single_token!r}")
        return found[0 if mode == "first" else -1]

    def loss_fn(
        self,
        logits: Float[Tensor, "batch seq vocab"],
        tokens: Int[Tensor, "batch seq"],
        attention_mask: Bool[Tensor, "batch seq"] | Int[Tensor, "batch seq"] | None = None,
        per_token: bool = False,
    ) -> Float[Tensor, ""] | Float[Tensor, "batch next"]:
        """Return the loss that `forward` does: the mean cross entropy, in nats, of each token given those before it.

        Args:
            logits: The model's.
            tokens: What it read.
            attention_mask: 1 at tokens, 0 at padding.
            per_token: Whether to return that of each position, zero where masked.

        Raises:
            ValueError: No two neighbouring tokens.
        """
        mask = None if attention_mask is None else attention_mask.bool().to(logits.device)
        return next_token_loss(logits, tokens.to(logits.device), mask, per_token)

    def input_to_embed(
        self,
        input: Text | Ids,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        attention_mask: Bool[Tensor, "batch seq"] | Int[Tensor, "batch seq"] | None = None,
    ) -> tuple[Float[Tensor, "batch seq d_model"], Int[Tensor, "batch seq"], None, Bool[Tensor, "batch seq"] | None]:
        """Return what enters the first block, the token ids, `None`, and the mask (`None` if it masks nothing).

        In transformer_lens the third is for positions, which here are rotary. `model(residual, start_at_layer=0,
        attention_mask=mask)` goes on from there.

        Args:
            input: As for `forward`.
            prepend_bos: Whether a text starts with BOS.
            padding_side: Where several texts are padded; on the right, if `None`.
            attention_mask: As for `forward`.
        """
        tokens, mask = self.read(input, attention_mask, prepend_bos, padding_side)
        return self.stream_start(tokens), tokens, None, mask

    # -- switches -----------------------------------------------------------------------------------------------------

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Do nothing: `attn.hook_result` is always there, and costs nothing until it is looked at."""

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Do nothing: `hook_mlp_in`, what enters the MLP after the norm, is always there."""

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Refuse to turn on hook points of copies of the stream for queries, keys and values.

        Raises:
            ValueError: `use_split_qkv_input` is True.
        """
        if use_split_qkv_input:
            raise ValueError("use_split_qkv_input must be False: edit attn.hook_q, attn.hook_k or attn.hook_v instead")

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Refuse to turn on hook points of a copy of the stream for each head.

        Raises:
            ValueError: `use_attn_in` is True.
        """
        if use_attn_in:
            raise ValueError(
                "use_attn_in must be False: edit hook_resid_pre, ln1.hook_normalized or attn.hook_q instead"
            )

    # -- weights made simpler -----------------------------------------------------------------------------------------

    def fold_layer_norm(
        self, state_dict: dict[str, Tensor], fold_biases: bool = True, center_weights: bool = False
    ) -> dict[str, Tensor]:
        """Return a state dict in which the gains of norms are part of the weights that read them, exactly.

        See `bilens.models.folding.folded_gains`; shifts stay with their norms, `fold_biases` or not.

        Args:
            state_dict: This model's `state_dict()`.
            fold_biases: Taken, as transformer_lens does.
            center_weights: Must be False: a norm that does not take the mean away reads it.

        Raises:
            ValueError: `center_weights`; or the unembedding is the embedding, so that it cannot take a gain.
        """
        if center_weights:
            raise ValueError(f"center_weights must be False: {LEFT_OUT['center_writing_weights']}")
        if self.cfg.unembed.tied:
            raise ValueError(
                "this model's unembedding is its embedding, so no state dict of it has one with gains: use "
                "process_weights_(), which parts them"
            )
        return folded_gains(self, state_dict)

    def process_weights_(
        self,
        fold_ln: bool = True,
        center_writing_weights: bool = False,
        center_unembed: bool = False,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """Make the weights simpler in place: fold the gains of norms, so that they are all 1; what is computed stays.

        Unlike in transformer_lens nothing else is done unless it is asked for. SAEs fitted behind a norm no longer fit.

        Args:
            fold_ln: Whether to fold gains into the weights that read them (`bilens.models.folding`).
            center_writing_weights: Must be False.
            center_unembed: Whether to take the mean over the vocabulary from the unembedding: log probabilities stay.
            refactor_factored_attn_matrices: Must be False.

        Raises:
            ValueError: What no model here can have; `center_unembed` where logits are capped.
        """
        for name, asked in (
            ("center_writing_weights", center_writing_weights),
            ("refactor_factored_attn_matrices", refactor_factored_attn_matrices),
        ):
            if asked:
                raise ValueError(f"{name} must be False: {LEFT_OUT[name]}")
        process_weights(self, fold_ln, center_unembed)
