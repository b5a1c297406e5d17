"""The hooked bilinear transformer: transformer_lens' interface and hook names on a plain `nn.Module`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.hook_points import HookPoint

from .layers import MLP, Attention, Block, KeyValue, NoNorm, Norm, RMSNorm
from .rotary import Rope

Text = str | Sequence[str]
NamesFilter = str | Sequence[str] | Callable[[str], bool] | None


@dataclass(frozen=True)
class BilinearConfig:
    """The shape of a `BilinearTransformer`; transformer_lens' names where it has one."""

    n_layers: int
    d_model: int
    d_hidden: int
    n_heads: int
    n_ctx: int
    d_vocab: int
    mlp: Literal["bilinear", "gated", "plain"] = "bilinear"
    act: str | None = None  # activation on the left factor; None in a bilinear MLP
    mlp_bias: tuple[bool, bool] = (False, False)  # on the way in (left and right), on the way out
    norm: Literal["rms", "rms_gain", "rms_gain_shift", "none"] = "rms"
    attention: Literal["softmax", "bilinear"] = "softmax"
    attn_scale: float = 1.0  # factor on each attention output: 1/sqrt(2 n_layers) in the published models
    eps: float = 1e-8  # of every norm; that of the published bilinear models
    # What Llama-family models have besides.
    n_key_value_heads: int | None = None  # keys and values that groups of heads share; None: each has its own
    head_dim: int | None = None  # width of a head where it is not d_model / n_heads
    attn_bias: tuple[bool, bool] = (False, False)  # on queries, keys and values; on the output
    window: int | None = None  # how many positions each attends to, itself included; None: all before it
    rope: Rope = field(default_factory=Rope)
    tied: bool = False  # whether the unembedding is the embedding

    def __post_init__(self):
        for name in ("n_layers", "d_model", "d_hidden", "n_heads", "n_ctx", "d_vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("n_key_value_heads", "window"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {getattr(self, name)}")
        if self.head_dim is not None and (self.head_dim < 1 or self.head_dim % 2):
            raise ValueError(f"head_dim must be even (rotary embedding rotates pairs), got {self.head_dim}")
        if self.n_heads % (self.n_key_value_heads or 1):
            raise ValueError(
                f"n_key_value_heads must divide n_heads={self.n_heads}, got n_key_value_heads={self.n_key_value_heads}"
            )
        if self.attention == "bilinear" and self.n_key_value_heads not in (None, self.n_heads):
            raise ValueError(
                f"n_key_value_heads must be None for bilinear attention, got n_key_value_heads={self.n_key_value_heads}"
            )
        if self.head_dim is None and (self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2):
            raise ValueError(
                f"d_model must be an even multiple of n_heads (rotary embedding rotates pairs), "
                f"got d_model={self.d_model}, n_heads={self.n_heads}"
            )
        if (self.mlp == "bilinear") != (self.act is None):
            raise ValueError(
                f"act must be None for a bilinear MLP and named otherwise, got mlp={self.mlp!r}, act={self.act!r}"
            )

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.d_model // self.n_heads

    # What transformer_lens' ActivationCache asks of a config.
    d_mlp = property(lambda self: self.d_hidden)
    normalization_type = property(lambda self: None if self.norm == "none" else "RMS")
    attn_only = False
    positional_embedding_type = "rotary"
    device = None


class Embed(nn.Embedding):
    """Token embedding."""

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """Embedding matrix."""
        return self.weight


class Unembed(nn.Linear):
    """Map from the residual stream to logits."""

    @property
    def W_U(self) -> Float[Tensor, "d_model vocab"]:
        """Unembedding matrix."""
        return self.weight.T


class BilinearTransformer(HookedRootModule):
    """A causal language model with bilinear (or gated, or plain) MLPs, rotary positions and pre-norm blocks.

    Source: 2410.08417, section 5 and appendix G; the Llama family as in transformers. The interface is
    transformer_lens': `run_with_cache`, `run_with_hooks`, `hooks`, `add_hook`, `to_tokens`, the weight properties
    `W_E`, `W_Q`, ...

    Args:
        cfg: The model's shape.
        tokenizer: Owner of BOS, case and padding. Without one the model takes token ids only.
        source: The published `config.json` the model came from, unknown keys included; empty for a new model.
    """

    def __init__(self, cfg: BilinearConfig, tokenizer: Tokenizer | None = None, source: dict[str, Any] | None = None):
        super().__init__()
        self.cfg, self.tokenizer, self.source = cfg, tokenizer, dict(source or {})
        self.ignored_keys: tuple[str, ...] = ()  # keys of `source` without meaning here
        self.has_bos = True  # False for models trained without BOS, whose texts then start without (Qwen)
        self.embed = Embed(cfg.d_vocab, cfg.d_model)
        self.hook_embed = HookPoint()
        self.blocks = nn.ModuleList(
            Block(
                _norm(cfg),
                Attention(
                    cfg.d_model,
                    cfg.n_heads,
                    cfg.attn_scale,
                    cfg.attention,
                    cfg.d_head,
                    cfg.n_key_value_heads,
                    cfg.attn_bias,
                ),
                _norm(cfg),
                MLP(cfg.d_model, cfg.d_hidden, cfg.mlp, cfg.act, *cfg.mlp_bias),
            )
            for _ in range(cfg.n_layers)
        )
        self.ln_final = _norm(cfg)
        self.unembed = Unembed(cfg.d_model, cfg.d_vocab, bias=False)
        if cfg.tied:
            self.unembed.weight = self.embed.weight
        self.setup()

    def forward(
        self,
        input: Text | Int[Tensor, "batch seq"] | Int[Tensor, " seq"] | Float[Tensor, "batch seq d_model"],
        return_type: Literal["logits", "loss", "both"] | None = "logits",
        *,
        attention_mask: Bool[Tensor, "batch seq"] | Int[Tensor, "batch seq"] | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        tokens: Int[Tensor, "batch seq"] | None = None,
        loss_per_token: bool = False,
        prepend_bos: bool = True,
    ) -> Any:
        """Run the model.

        Args:
            input: Text, a list of texts (padded on the right and masked), token ids, or, with `start_at_layer`, the
                residual stream that enters that layer.
            return_type: `"logits"` `[batch, seq, vocab]`, `"loss"`, `"both"` or `None`. The loss is the mean cross
                entropy, in nats, of each token given those before it, over unmasked pairs of neighbours.
            attention_mask: 1 at tokens, 0 at padding, on either side: a padded row gives at its tokens what it gives
                alone. Values at padding positions are finite and mean nothing.
            start_at_layer: First block to run, on a residual stream as input.
            stop_at_layer: Stop before this block (negative: from the end) and return the residual stream there.
            tokens: With `start_at_layer`, the token ids that a loss needs.
            loss_per_token: Return the loss at each position, `[batch, seq - 1]`, zero where masked.
            prepend_bos: Whether a text starts with BOS.

        Raises:
            ValueError: A token id outside the vocabulary, more tokens than the context, a mask of another shape, a loss
                of a single token.
        """
        start, stop = self._layer_range(start_at_layer, stop_at_layer)
        ids, mask = self._prepare(input, attention_mask, prepend_bos, start_at_layer is not None)
        tokens = tokens if ids is None else ids
        x = input if start_at_layer is not None else self.hook_embed(self.embed(ids))
        rotary, attend = self._geometry(mask, *x.shape[:2], dtype=x.dtype)
        for block in self.blocks[start:stop]:
            x, _ = block(x, rotary, attend)
        if stop_at_layer is not None:
            return x
        if return_type is None:
            return None
        logits = self.unembed(self.ln_final(x))
        if return_type == "logits":
            return logits
        if tokens is None:
            raise ValueError("a loss needs token ids: with start_at_layer, give them as tokens=")
        loss = _loss(logits, tokens, mask, loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Load weights, as `nn.Module` does; a tied unembedding stays the embedding's own parameter."""
        found = super().load_state_dict(state_dict, strict, assign)
        if self.cfg.tied:  # assigning makes two parameters of it
            self.unembed.weight = self.embed.weight
        return found

    def _layer_range(self, start: int | None, stop: int | None) -> tuple[int, int]:
        n = self.cfg.n_layers
        for name, layer in (("start_at_layer", start), ("stop_at_layer", stop)):
            if layer is not None and not -n <= layer <= n:
                raise ValueError(f"{name} must lie between {-n} and {n} for a model of {n} layers, got {layer}")
        return start or 0, n if stop is None else stop

    def _prepare(
        self, input: Text | Tensor, mask: Tensor | None, prepend_bos: bool, is_residual: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return token ids `[batch, seq]` (None for a residual stream) and the mask (None: no padding)."""
        if isinstance(input, Tensor):
            tokens = None if is_residual else torch.atleast_2d(input)
            shape = input.shape[:2] if is_residual else tokens.shape
        elif is_residual:
            raise ValueError(
                f"start_at_layer takes a residual stream [batch, seq, d_model], got {type(input).__name__}"
            )
        else:
            if mask is not None:
                raise ValueError("attention_mask goes with token ids; texts are padded and masked by the model itself")
            tokens, mask = self._encode(input, prepend_bos, "right", truncate=False)
            shape = tokens.shape
        if shape[1] > self.cfg.n_ctx:
            raise ValueError(f"input has {shape[1]} tokens, more than the context of {self.cfg.n_ctx}")
        if shape[0] == 0 or shape[1] == 0:
            raise ValueError(f"input must hold at least one token, got shape {tuple(shape)}")
        if tokens is not None and (tokens.min() < 0 or tokens.max() >= self.cfg.d_vocab):
            bad = tokens[(tokens < 0) | (tokens >= self.cfg.d_vocab)][0].item()
            raise ValueError(f"input must hold token ids from 0 to {self.cfg.d_vocab - 1}, got {bad}")
        if mask is not None:
            if mask.shape != shape:
                raise ValueError(f"attention_mask must have the input's shape {tuple(shape)}, got {tuple(mask.shape)}")
            mask = mask.bool()
            mask = None if mask.all() else mask
        return tokens, mask

    def _geometry(self, mask: Tensor | None, batch: int, keys: int, dtype: torch.dtype, new: int | None = None):
        """Return rotary angles and attention mask for the last `new` of `keys` positions (default: all)."""
        new = keys if new is None else new
        device = self.W_E.device
        positions = torch.arange(keys, device=device).expand(batch, keys)
        attend = None
        if mask is not None:
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        window = self.cfg.window
        cut = window is not None and keys > window
        if mask is not None or new != keys or cut:
            index = torch.arange(keys, device=device)
            back = index[keys - new :, None] - index[None, :]
            attend = ((back >= 0) & (back < window) if cut else back >= 0).expand(batch, new, keys)
            if mask is not None:  # padding sees itself, so that no row of the softmax is empty
                attend = attend & (mask[:, None, :] | (index[None, :] == index[keys - new :, None]))
        return self.cfg.rope.angles(positions[:, keys - new :], self.cfg.d_head, dtype), attend

    # -- hooks and cache ----------------------------------------------------------------------------------------------

    @contextmanager
    def hooks(self, fwd_hooks=(), bwd_hooks=(), reset_hooks_end: bool = True, clear_contexts: bool = False):
        """Add hooks for the length of a `with` block; they are removed at its end, also after an exception.

        Args:
            fwd_hooks: Pairs of a hook name (or a predicate on names) and a function `f(activation, hook)`; what it
                returns replaces the activation, unless it is `None`.
            bwd_hooks: The same for gradients.
            reset_hooks_end: Whether to remove the hooks at the end.
            clear_contexts: Whether to clear the hook points' `ctx` too.

        Raises:
            ValueError: No hook point has that name.
        """
        fwd_hooks, bwd_hooks = list(fwd_hooks), list(bwd_hooks)
        for name, _ in (*fwd_hooks, *bwd_hooks):
            self._check_hook_name(name)
        with super().hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            yield self

    def add_hook(self, name: str | Callable[[str], bool], hook: Callable, *args: Any, **kwargs: Any) -> None:
        """Add a hook that stays until `reset_hooks()`; see `hooks` for one that removes itself.

        Raises:
            ValueError: No hook point has that name.
        """
        self._check_hook_name(name)
        super().add_hook(name, hook, *args, **kwargs)

    def run_with_cache(
        self, *model_args: Any, names_filter: NamesFilter = None, return_cache_object: bool = True, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Run the model and keep the activations of the hook points that `names_filter` selects.

        Args:
            *model_args: As for `forward`.
            names_filter: A name, a list of names or a predicate; `None` keeps everything. Cost: keeping
                `attn.hook_result` makes attention write head by head, `[batch, seq, head, d_model]`.
            return_cache_object: Return transformer_lens' `ActivationCache` rather than a dict.
            **kwargs: As for `forward` (`attention_mask`, `stop_at_layer`, ...) and transformer_lens' `run_with_cache`
                (`remove_batch_dim`, `incl_bwd`, `device`, `pos_slice`).

        Returns:
            The model's output and the cache.

        Raises:
            ValueError: `names_filter` names no hook point.
        """
        if isinstance(names_filter, str):
            self._check_hook_name(names_filter)
        elif names_filter is not None and not callable(names_filter):
            names_filter = list(names_filter)
            for name in names_filter:
                self._check_hook_name(name)
        out, cache = super().run_with_cache(*model_args, names_filter=names_filter, **kwargs)
        if not return_cache_object:
            return out, cache
        return out, ActivationCache(cache, self, has_batch_dim=not kwargs.get("remove_batch_dim", False))

    def _check_hook_name(self, name: str | Callable[[str], bool]) -> None:
        if callable(name) or name in self.hook_dict:
            return
        near = get_close_matches(name, self.hook_dict, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "model.hook_table() lists them"
        raise ValueError(f"no hook point is named {name!r}; {hint}")

    def hook_table(self) -> None:
        """Print every hook point with its shape and meaning; a block's are listed once, for all layers."""
        from rich import box
        from rich.console import Console
        from rich.table import Table

        axes = {name: getattr(self.cfg, name) for name in ("d_model", "d_head")}
        axes |= {"head": self.cfg.n_heads, "hidden": self.cfg.d_hidden}
        shared = axes | {"head": self.cfg.n_key_value_heads or self.cfg.n_heads}
        table = Table(box=box.SIMPLE, title=f"hook points; i = 0..{self.cfg.n_layers - 1}")
        for column in ("hook point", "shape", "meaning"):
            table.add_column(column, overflow="fold")
        for name, (shape, meaning) in HOOK_MEANINGS.items():
            if name in self.hook_dict or f"blocks.0.{name}" in self.hook_dict:
                sizes = shared if name in KEY_VALUE_HOOKS else axes
                sized = [f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in shape.split()]
                table.add_row(name if name in self.hook_dict else f"blocks.{{i}}.{name}", ", ".join(sized), meaning)
        Console(width=120).print(table)

    # -- text ---------------------------------------------------------------------------------------------------------

    @property
    def bos_id(self) -> int:
        """Id of the token that starts every text."""
        return self._special_id("BOS", ("[BOS]", "<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>", "[CLS]"))

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a text; also used for padding, as in the published models."""
        return self._special_id("EOS", ("[EOS]", "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"))

    def _special_id(self, role: str, names: Sequence[str]) -> int:
        for name in names:
            token = self._tokenizer.token_to_id(name)
            if token is not None:
                return token
        raise ValueError(f"the tokenizer has no {role} token: looked for {', '.join(names)}")

    @property
    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "this model has no tokenizer, so it takes token ids only; put a tokenizer.json beside its weights or "
                "pass tokenizer= to bilens.load"
            )
        return self.tokenizer

    def _encode(self, text: Text, prepend_bos: bool, padding_side: str, truncate: bool) -> tuple[Tensor, Tensor]:
        """Tokenise and pad; return ids and mask."""
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("input must hold at least one text, got an empty list")
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        rows = []
        for index, one in enumerate(texts):
            row = self._tokenizer.encode(one, add_special_tokens=False).ids
            if (
                prepend_bos and self.has_bos and row[:1] != [self.bos_id]
            ):  # a text that spells BOS out does not get a second one
                row = [self.bos_id, *row]
            if len(row) > self.cfg.n_ctx and not truncate:
                raise ValueError(
                    f"text {index} has {len(row)} tokens (BOS included), more than the context of {self.cfg.n_ctx}: "
                    f"shorten it, or cut it with model.to_tokens(text, truncate=True); it starts {one[:40]!r}"
                )
            rows.append(row[: self.cfg.n_ctx])
        length = max(map(len, rows))
        if length == 0:
            missing = "prepend_bos is False" if self.has_bos else "the model has no BOS"
            raise ValueError(f"input is empty text and {missing}, so there is no token to run on")
        ids = torch.full((len(rows), length), self.eos_id)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for index, row in enumerate(rows):
            where = slice(length - len(row), length) if padding_side == "left" else slice(0, len(row))
            ids[index, where], mask[index, where] = torch.tensor(row, dtype=torch.long), True
        return ids.to(self.W_E.device), mask.to(self.W_E.device)

    def to_tokens(
        self, input: Text, prepend_bos: bool = True, padding_side: str = "right", truncate: bool = False
    ) -> Int[Tensor, "batch seq"]:
        """Tokenise text: case and accents as the tokenizer has it, exactly one BOS, padded with EOS.

        Args:
            input: A text or a list of texts. Characters that the tokenizer does not know become its `[UNK]`.
            prepend_bos: Whether to start with BOS. A text that begins with a spelt-out BOS gets no second one, and
                none gets one from a model trained without (`has_bos`).
            padding_side: `"right"` or `"left"`.
            truncate: Keep the first `n_ctx` tokens of a longer text rather than raise.

        Raises:
            ValueError: A text longer than the context, or no tokens at all.
        """
        return self._encode(input, prepend_bos, padding_side, truncate)[0]

    def to_string(self, tokens: Tensor | Sequence[int] | int) -> str | list[str]:
        """Turn token ids into text, special tokens included; a batch gives a list."""
        tokens = torch.as_tensor(tokens)
        if tokens.ndim > 1:
            return [self.to_string(row) for row in tokens]
        return self._tokenizer.decode(torch.atleast_1d(tokens).tolist(), skip_special_tokens=False)

    def to_str_tokens(self, input: Text | Tensor | Sequence[int], prepend_bos: bool = True) -> list:
        """Show the tokens one by one; `##` marks a piece that continues a word. A list of texts gives a list."""
        if isinstance(input, str):
            input = self.to_tokens(input, prepend_bos, truncate=False)[0]
        elif len(input) and isinstance(input[0], str):
            return [self.to_str_tokens(text, prepend_bos) for text in input]
        input = torch.as_tensor(input)
        if input.ndim == 2:
            rows = [self.to_str_tokens(row) for row in input]
            return rows[0] if len(rows) == 1 else rows
        return [self._tokenizer.id_to_token(token) for token in torch.atleast_1d(input).tolist()]

    def to_single_token(self, string: str) -> int:
        """Return the id of a text that is one token.

        Raises:
            ValueError: It is more than one token, or none that the tokenizer knows.
        """
        tokens = self._tokenizer.encode(string, add_special_tokens=False).ids
        if len(tokens) != 1 or self._tokenizer.id_to_token(tokens[0]) in ("[UNK]", "<unk>"):
            pieces = [self._tokenizer.id_to_token(token) for token in tokens]
            raise ValueError(f"{string!r} is not a single token: the tokenizer makes it {pieces}")
        return tokens[0]

    def tokens_to_residual_directions(self, tokens: Any) -> Float[Tensor, "*batch d_model"]:
        """Return the unembedding direction of each token (text or id): the residual direction that raises its logit."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        elif isinstance(tokens, Sequence) and tokens and isinstance(tokens[0], str):
            tokens = [self.to_single_token(token) for token in tokens]
        return self.W_U.T[torch.as_tensor(tokens, device=self.W_U.device)]

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Return the sum of the output biases before `layer`; with `mlp_input`, before that layer's MLP.

        The biases of attention always, those of the MLPs with `include_mlp_biases`.
        """
        biases = [block.attn.b_O for block in self.blocks[: layer + 1 if mlp_input else layer]]
        biases += [block.mlp.b_out for block in self.blocks[:layer]] if include_mlp_biases else []
        return sum(biases, self.W_E.new_zeros(self.cfg.d_model))

    @torch.no_grad()
    def generate(
        self,
        input: Text | Int[Tensor, "batch seq"] | Int[Tensor, " seq"] = "",
        max_new_tokens: int = 40,
        *,
        temperature: int | float = 1.0,
        top_k: int | None = None,
        attention_mask: Bool[Tensor, "batch seq"] | Int[Tensor, "batch seq"] | None = None,
        fwd_hooks: Iterable[tuple[str | Callable[[str], bool], Callable]] = (),
        stop_at_eos: bool = True,
        prepend_bos: bool = True,
        use_past_kv_cache: bool = True,
        generator: torch.Generator | None = None,
    ) -> str | list[str] | Int[Tensor, "batch total"]:
        """Continue a text, or each text of a list, or token ids.

        Keys and values are kept for the blocks before the first hooked one, and the residual stream that enters it;
        from there on every step runs the whole sequence. So a hook always sees `[batch, everything so far, ...]`, and
        the result is that of generation without a cache, also under interventions.

        Args:
            input: A text, a list of texts (padded on the left), or token ids.
            max_new_tokens: How many tokens to add at most.
            temperature: Logits are divided by it; 0 takes the most probable token.
            top_k: Sample among the `top_k` most probable tokens only.
            attention_mask: Marks padding in token ids, which must be on the left.
            fwd_hooks: Interventions, as for `hooks`.
            stop_at_eos: A text that has produced EOS is finished; the others go on.
            prepend_bos: Whether a text starts with BOS.
            use_past_kv_cache: Whether to keep keys and values between steps; the result is the same.
            generator: Source of randomness; torch's default one if `None`.

        Returns:
            Text for a text (without special tokens), a list for a list, ids for ids (prompt included in each).

        Raises:
            ValueError: Prompt and new tokens exceed the context, or an argument is out of range.
        """
        if temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1 or None, got {top_k}")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
        if isinstance(input, Tensor):
            tokens, mask = self._prepare(input, attention_mask, prepend_bos, is_residual=False)
            if mask is not None and not mask[:, -1].all():
                raise ValueError("attention_mask must pad on the left for generation: the last position is a padding")
        else:
            tokens, mask = self._encode(input, prepend_bos, "left", truncate=False)
        if tokens.shape[1] + max_new_tokens > self.cfg.n_ctx:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} on top of a prompt of {tokens.shape[1]} tokens exceeds the context "
                f"of {self.cfg.n_ctx}; ask for at most {self.cfg.n_ctx - tokens.shape[1]}"
            )
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        eos = self.eos_id if stop_at_eos and self.tokenizer is not None else None
        with self.hooks(fwd_hooks=list(fwd_hooks)):
            steps = _Stepper(self, use_past_kv_cache)
            for _ in range(max_new_tokens):
                chosen = _sample(steps.next_logits(tokens, mask), temperature, top_k, generator)
                if eos is not None:
                    chosen = chosen.masked_fill(done, eos)
                    done |= chosen == eos
                tokens = torch.cat((tokens, chosen[:, None]), 1)
                mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
                if done.all():
                    break
        if isinstance(input, Tensor):
            return tokens
        texts = [self._tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in tokens]
        return texts[0] if isinstance(input, str) else texts

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


class _Stepper:
    """Next-token logits for a growing sequence, without running again what cannot have changed."""

    def __init__(self, model: BilinearTransformer, use_cache: bool):
        self.model = model
        self.first_hooked = _first_hooked_layer(model) if use_cache else 0
        self.past: list[KeyValue | None] = [None] * self.first_hooked
        self.resid: Tensor | None = None

    def next_logits(self, tokens: Tensor, mask: Tensor) -> Float[Tensor, "batch vocab"]:
        """Return the logits after the last of `tokens`, which extend those of the call before by any number."""
        model, (batch, keys) = self.model, tokens.shape
        padding = None if mask.all() else mask
        new = keys if self.resid is None or not self.first_hooked else keys - self.resid.shape[1]
        x = model.hook_embed(model.embed(tokens[:, keys - new :]))
        rotary, attend = model._geometry(padding, batch, keys, x.dtype, new)
        for layer, block in enumerate(model.blocks[: self.first_hooked]):
            x, self.past[layer] = block(x, rotary, attend, self.past[layer])
        if self.resid is not None and self.first_hooked:
            x = torch.cat((self.resid, x), 1)
        self.resid = x
        rotary, attend = model._geometry(padding, batch, keys, x.dtype)
        for block in model.blocks[self.first_hooked :]:
            x, _ = block(x, rotary, attend)
        return model.unembed(model.ln_final(x)[:, -1])


def _first_hooked_layer(model: BilinearTransformer) -> int:
    """Return the first block with a hook, 0 if the embedding has one, n_layers if none has."""
    if model.hook_embed.has_hooks():
        return 0
    for layer, block in enumerate(model.blocks):
        if any(module.has_hooks() for module in block.modules() if isinstance(module, HookPoint)):
            return layer
    return model.cfg.n_layers


def _sample(logits: Tensor, temperature: int | float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _loss(logits: Tensor, tokens: Tensor, mask: Tensor | None, per_token: bool) -> Tensor:
    if tokens.shape[1] < 2:
        raise ValueError("a loss needs at least two tokens (BOS and one more), got one")
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    losses = losses.unflatten(0, tokens[:, 1:].shape)
    weight = torch.ones_like(losses) if mask is None else (mask[:, 1:] & mask[:, :-1]).to(losses)
    if per_token:
        return losses * weight
    if weight.sum() == 0:
        raise ValueError("a loss needs two neighbouring unmasked tokens, the attention_mask leaves none")
    return (losses * weight).sum() / weight.sum()


def _norm(cfg: BilinearConfig) -> Norm:
    if cfg.norm == "none":
        return NoNorm()
    return RMSNorm(cfg.d_model, cfg.eps, gain="gain" in cfg.norm, shift="shift" in cfg.norm)


KEY_VALUE_HOOKS = ("attn.hook_k", "attn.hook_v", "attn.hook_rot_k")  # their heads are key-value heads
# Shape and meaning of each hook point, by its name within the block.
HOOK_MEANINGS = {
    "hook_embed": ("batch seq d_model", "token embeddings, the start of the residual stream"),
    "hook_resid_pre": ("batch seq d_model", "residual stream entering the block"),
    "ln1.hook_scale": ("batch seq 1", "root mean square of resid_pre, what the norm divides by"),
    "ln1.hook_normalized": ("batch seq d_model", "resid_pre / scale, before the norm's gain if it has one"),
    "attn.hook_q": ("batch seq head d_head", "queries before rotation"),
    "attn.hook_k": ("batch seq head d_head", "keys before rotation"),
    "attn.hook_v": ("batch seq head d_head", "values"),
    "attn.hook_rot_q": ("batch seq head d_head", "queries after rotation by position"),
    "attn.hook_rot_k": ("batch seq head d_head", "keys after rotation by position"),
    "attn.hook_q2": ("batch seq head d_head", "second queries before rotation (bilinear attention)"),
    "attn.hook_k2": ("batch seq head d_head", "second keys before rotation (bilinear attention)"),
    "attn.hook_rot_q2": ("batch seq head d_head", "second queries after rotation (bilinear attention)"),
    "attn.hook_rot_k2": ("batch seq head d_head", "second keys after rotation (bilinear attention)"),
    "attn.hook_attn_scores": ("batch head query key", "scores before the softmax, -inf where masked"),
    "attn.hook_pattern": ("batch head query key", "weights of the values, after the softmax"),
    "attn.hook_z": ("batch seq head d_head", "pattern-weighted sum of values"),
    "attn.hook_result": ("batch seq head d_model", "what each head adds to the residual stream, scale included"),
    "hook_attn_out": ("batch seq d_model", "what attention adds to the residual stream, scale included"),
    "hook_resid_mid": ("batch seq d_model", "residual stream between attention and MLP"),
    "ln2.hook_scale": ("batch seq 1", "root mean square of resid_mid"),
    "ln2.hook_normalized": ("batch seq d_model", "resid_mid / scale, before the norm's gain if it has one"),
    "hook_mlp_in": ("batch seq d_model", "what enters the MLP, after the norm"),
    "mlp.hook_pre": ("batch seq hidden", "left factor, before its activation if the MLP is gated or plain"),
    "mlp.hook_pre_linear": ("batch seq hidden", "right factor"),
    "mlp.hook_post": ("batch seq hidden", "their product, what the down projection reads"),
    "hook_mlp_out": ("batch seq d_model", "what the MLP adds to the residual stream"),
    "hook_resid_post": ("batch seq d_model", "residual stream leaving the block"),
    "ln_final.hook_scale": ("batch seq 1", "root mean square of the last resid_post"),
    "ln_final.hook_normalized": ("batch seq d_model", "last resid_post / scale, what the unembedding reads"),
}
