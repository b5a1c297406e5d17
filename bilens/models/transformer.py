"""The hooked bilinear transformer: transformer_lens' interface and hook names on a plain `nn.Module`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .attention import Attention, AttentionConfig, Frame, geometry
from .blocks import Block, StreamConfig
from .embedding import Embed, EmbedConfig, Unembed, UnembedConfig
from .generation import Generation
from .hooks import Point
from .layers import Norm, NormConfig, make_norm
from .lensconfig import LensConfig
from .lensnames import LensNames
from .losses import next_token_loss
from .mlp import MLPConfig, make_mlp
from .text import Ids, Text, token_ids


@dataclass(frozen=True)
class BilinearConfig(LensConfig):
    """The shape of a `BilinearTransformer`: its sizes, and the shape of each part beside the module that it shapes."""

    n_layers: int
    d_model: int
    n_ctx: int
    d_vocab: int
    attention: AttentionConfig
    mlp: MLPConfig | None  # None: attention only
    norm: NormConfig | None = field(
        default_factory=NormConfig
    )  # of attention, MLP and unembedding; None: there is none
    unembed: UnembedConfig = field(default_factory=UnembedConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    # where a model of this shape has its weights, and their dtype: set by the model, no part of the shape
    device: str | None = field(default=None, compare=False, repr=False, kw_only=True)
    dtype: torch.dtype | None = field(default=None, compare=False, repr=False, kw_only=True)

    def __post_init__(self):
        for name in ("n_layers", "d_model", "n_ctx", "d_vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        local = self.attention.local
        if local is not None and local.layers[-1] >= self.n_layers:
            raise ValueError(f"local layers must be below n_layers={self.n_layers}, got {local.layers}")

    @property
    def d_hidden(self) -> int:
        """Hidden units of an MLP, 0 if there is none."""
        return self.d_mlp

    @property
    def start_hook(self) -> str:
        """The hook point that sees what enters the first block."""
        return "hook_embed" if self.embed.norm is None else "hook_embed_normalized"

    @property
    def rereads(self) -> bool:
        """Whether blocks read the start of the stream, or the first block's values, beside the stream itself."""
        return self.stream.restart or self.attention.value_residual


class BilinearTransformer(LensNames, Generation):
    """A causal language model with bilinear (or gated, or plain, or no) MLPs and rotary positions.

    Source: 2410.08417, section 5 and appendix G; the Llama family as in transformers. The interface is
    transformer_lens': `run_with_cache`, `run_with_hooks`, `hooks`, `add_hook`, `to_tokens`, the weight properties
    `W_E`, `W_Q`, ...

    Args:
        cfg: The model's shape.
        tokenizer: Owner of BOS, case and padding, one of transformers or tokenizers. Without one the model takes token
            ids only.
        source: The published `config.json` the model came from, unknown keys included; empty for a new model.
    """

    def __init__(self, cfg: BilinearConfig, tokenizer: Any = None, source: dict[str, Any] | None = None):
        super().__init__()
        self.cfg, self.tokenizer, self.source = cfg, tokenizer, dict(source or {})
        self.generation: dict[str, Any] = {}  # `generation_config.json` the model came with
        self.ignored_keys: tuple[str, ...] = ()  # keys of `source` without meaning here
        self.has_bos, self.name = True, ""  # what it was loaded by
        self.embed = Embed(cfg.embed, cfg.d_vocab, cfg.d_model)
        self.hook_embed = Point()
        if cfg.embed.norm is not None:
            self.ln_embed, self.hook_embed_normalized = make_norm(cfg.embed.norm, cfg.d_model), Point()
        self.blocks = nn.ModuleList(
            Block(cfg.stream, cfg.norm, Attention(cfg.attention, cfg.d_model, layer), make_mlp(cfg.mlp, cfg.d_model))
            for layer in range(cfg.n_layers)
        )
        self.ln_final = make_norm(cfg.unembed.norm or cfg.norm, cfg.d_model)
        if cfg.unembed.cap is not None:
            self.unembed_out_before_cap = Point()
        before_cap = None if cfg.unembed.cap is None else self.unembed_out_before_cap
        self.unembed = Unembed(cfg.unembed, cfg.d_model, cfg.d_vocab, before_cap)
        if cfg.unembed.tied:
            self.unembed.weight = self.embed.weight
        self._placed()
        self.setup()

    def _placed(self) -> None:
        weight = self.embed.weight
        self.cfg = replace(self.cfg, device=str(weight.device), dtype=weight.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BilinearTransformer":
        """Do what `to` and `double` do; the config then says where the weights are, and their dtype."""
        super()._apply(fn, recurse)
        self._placed()
        return self

    def forward(
        self,
        input: Text | Ids | Float[Tensor, "batch seq d_model"],
        return_type: Literal["logits", "loss", "both"] | None = "logits",
        *,
        attention_mask: Bool[Tensor, "batch seq"] | Int[Tensor, "batch seq"] | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        tokens: Ids | None = None,
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
    ) -> Any:
        """Run the model.

        Args:
            input: Text, a list of texts (padded on the right and masked), token ids, or, with `start_at_layer`, the
                residual stream that enters that layer.
            return_type: `"logits"` `[batch, seq, vocab]`, `"loss"`, `"both"` or `None`. The loss is the mean cross
                entropy, in nats, of each token given those before it, over unmasked pairs of neighbours.
            attention_mask: 1 at tokens, 0 at padding, on either side: a padded row gives at its tokens what it gives
                alone. Values at padding positions are finite and mean nothing.
            start_at_layer: First block to run, on what the block before it left (`hook_resid_post`).
            stop_at_layer: Stop before this block (negative: from the end) and return the residual stream there.
            tokens: With `start_at_layer`, the token ids that a loss needs, and a model whose later blocks read the
                start of the stream or the first block's values again (then computed without hooks).
            loss_per_token: Return the loss at each position, `[batch, seq - 1]`, zero where masked.
            prepend_bos: Whether a text starts with BOS; as the model was trained, if `None`.
            padding_side: Where texts are padded; on the right, if `None`.

        Raises:
            ValueError: A token id outside the vocabulary, more tokens than the context, a mask of another shape, a loss
                of a single token, no `tokens` where they are needed.
        """
        self.check_thread()
        start, stop = self._layer_range(start_at_layer, stop_at_layer)
        tokens = None if tokens is None else torch.atleast_2d(token_ids(tokens, "tokens"))
        if start_at_layer is None:
            tokens, mask = self.read(input, attention_mask, prepend_bos, padding_side)
            self.notice(tokens)
            x = self.stream_start(tokens)
        elif isinstance(input, Tensor):
            self.notice(tokens)
            x, mask = input, self.check_mask(attention_mask, input)
        else:
            raise ValueError(
                f"start_at_layer takes a residual stream [batch, seq, d_model], got {type(input).__name__}"
            )
        frame = geometry(self.cfg.attention, mask, x.shape[1], x.shape[1], x)
        if self.cfg.rereads and start < stop:
            frame = self._reread(frame, x, tokens, start)
        for block in self.blocks[start:stop]:
            x, _, frame = block(x, frame)
        if stop_at_layer is not None:
            return x
        if return_type is None:
            return None
        logits = self.unembed(self.ln_final(x))
        if return_type == "logits":
            return logits
        if tokens is None:
            raise ValueError("a loss needs token ids: with start_at_layer, give them as tokens=")
        loss = next_token_loss(logits, tokens.to(logits.device), mask, loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    def stream_start(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d_model"]:
        """Return what enters the first block: the embeddings, normalised if they are to be."""
        return self.started(self.embed(tokens))

    def started(self, embedded: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        """Return what `stream_start` does, of embeddings."""
        x = self.hook_embed(embedded)
        return x if self.cfg.embed.norm is None else self.hook_embed_normalized(self.ln_embed(x))

    def embedded(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch d_model"]:
        """Return what `stream_start` does, of tokens in any shape; no hook sees it."""
        x = self.embed(tokens)
        return x if self.cfg.embed.norm is None else _unseen(self.ln_embed, x)

    def _reread(self, frame: Frame, x: Tensor, tokens: Tensor | None, start: int) -> Frame:
        """Add to a frame what blocks read again, for a run that starts with `x` at block `start`."""
        if start == 0:
            return replace(frame, start=x)
        if tokens is None:
            raise ValueError(
                f"tokens must be given with start_at_layer={start}: this model's blocks read the start of the stream, "
                f"or the first block's values, again"
            )
        first, begun = self.blocks[0], self.embedded(tokens.to(x.device)).to(x.dtype)
        read = _unseen(first.ln1, first.entering(begun, begun))
        return replace(frame, start=begun, values=first.attn.own_values(read))

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Load weights, as `nn.Module` does; a tied unembedding stays the embedding's own parameter."""
        found = super().load_state_dict(state_dict, strict, assign)
        if self.cfg.unembed.tied:  # assigning makes two parameters of it
            self.unembed.weight = self.embed.weight
        self._placed()
        return found

    def _layer_range(self, start: int | None, stop: int | None) -> tuple[int, int]:
        n = self.cfg.n_layers
        for name, layer in (("start_at_layer", start), ("stop_at_layer", stop)):
            if layer is not None and not -n <= layer <= n:
                raise ValueError(f"{name} must lie between {-n} and {n} for a model of {n} layers, got {layer}")
        start, stop = start or 0, n if stop is None else stop
        return start + n * (start < 0), stop + n * (stop < 0)

    # -- weights, in transformer_lens' shapes -------------------------------------------------------------------------

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """Embedding matrix."""
        return self.embed.weight

    @property
    def W_U(self) -> Float[Tensor, "d_model vocab"]:
        """Unembedding matrix."""
        return self.unembed.W_U

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Query weights of all layers."""
        return torch.stack([block.attn.W_Q for block in self.blocks])

    @property
    def W_K(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Key weights of all layers."""
        return torch.stack([block.attn.W_K for block in self.blocks])

    @property
    def W_V(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Value weights of all layers."""
        return torch.stack([block.attn.W_V for block in self.blocks])

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        """Attention output weights of all layers, the attention scale included."""
        return torch.stack([block.attn.W_O for block in self.blocks])

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Return the sum of the output biases before `layer`; with `mlp_input`, before that layer's MLP.

        The biases of attention always, those of the MLPs with `include_mlp_biases`.
        """
        biases = [block.attn.b_O for block in self.blocks[: layer + 1 if mlp_input else layer]]
        if include_mlp_biases and self.cfg.mlp is not None:
            biases += [block.mlp.b_out for block in self.blocks[:layer]]
        return sum(biases, self.W_E.new_zeros(self.cfg.d_model))


def _unseen(norm: Norm, x: Tensor) -> Tensor:
    factor, shift = norm.linear(x)
    return factor * x + shift
