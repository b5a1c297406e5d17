"""Continuing a text token by token, without running again what cannot have changed."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .attention import KeyValue, geometry
from .hooks import HookedModel
from .text import Ids, Text, TextInterface, is_text


class Generation(TextInterface, HookedModel):
    """What a model of blocks that reads text does to continue it."""

    @torch.no_grad()
    def generate(
        self,
        input: Text | Ids = "",
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
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1 or None, got {top_k}")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
        tokens, mask = self.read(input, attention_mask, prepend_bos, padding_side="left")
        if mask is not None and not mask[:, -1].all():
            raise ValueError("attention_mask must pad on the left for generation: the last position is a padding")
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
        if not is_text(input):
            return tokens
        texts = self.to_string(tokens, skip_special_tokens=True)
        return texts[0] if isinstance(input, str) else texts


class _Stepper:
    """Next-token logits for a growing sequence, without running again what cannot have changed."""

    def __init__(self, model: Generation, use_cache: bool):
        self.model = model
        self.first_hooked = _first_hooked_layer(model) if use_cache else 0
        self.past: list[KeyValue | None] = [None] * self.first_hooked
        # what the first hooked block reads: the stream, the stream's start, the first block's values
        self.read: list[Tensor | None] | None = None

    def next_logits(self, tokens: Tensor, mask: Tensor) -> Float[Tensor, "batch vocab"]:
        """Return the logits after the last of `tokens`, which extend those of the call before by any number."""
        model, keys = self.model, tokens.shape[1]
        padding = None if mask.all() else mask
        new = keys if self.read is None else keys - self.read[0].shape[1]
        x = model.stream_start(tokens[:, keys - new :])
        frame = replace(geometry(model.cfg.attention, padding, keys, new, x), start=x if model.cfg.rereads else None)
        for layer, block in enumerate(model.blocks[: self.first_hooked]):
            x, self.past[layer], frame = block(x, frame, self.past[layer])
        x, start, values = self._extend([x, frame.start, frame.values])
        frame = replace(geometry(model.cfg.attention, padding, keys, keys, x), start=start, values=values)
        for block in model.blocks[self.first_hooked :]:
            x, _, frame = block(x, frame)
        x, cap = model.ln_final(x), model.unembed.before_cap
        whole = cap is not None and cap.has_hooks()  # a hook sees all positions, else only the last one is needed
        return model.unembed(x)[:, -1] if whole else model.unembed(x[:, -1])

    def _extend(self, new: list[Tensor | None]) -> list[Tensor | None]:
        """Put what the first hooked block reads at the new positions behind that at the old ones."""
        if not self.first_hooked:
            return new
        if self.read is not None:
            new = [
                after if after is None else torch.cat((old, after), 1)
                for old, after in zip(self.read, new, strict=True)
            ]
        self.read = new
        return new


def _first_hooked_layer(model: Generation) -> int:
    """Return the first block with a hook, 0 if what comes before has one, n_layers if none has; torch's own count."""
    before = [module for name, module in model.named_children() if name not in ("blocks", "ln_final", "unembed")]
    if any(map(_hooked, before)):
        return 0
    return next((layer for layer, block in enumerate(model.blocks) if _hooked(block)), model.cfg.n_layers)


def _hooked(module: nn.Module) -> bool:
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def _sample(logits: Tensor, temperature: int | float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / float(temperature)
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
