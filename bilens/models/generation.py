"""Continuing a text token by token, without running again what cannot have changed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from .attention import KeyValue, geometry
from .hooks import Point
from .sampling import Sampling
from .splicing import Splicing
from .text import Ids, Text, TextInterface, is_text

ReturnType: TypeAlias = Literal["input", "str", "tokens", "embeds"]
Hooks: TypeAlias = Iterable[tuple[str | Callable[[str], bool], Callable]]


class Generation(TextInterface, Splicing):
    """What a model of blocks that reads text does to continue it."""

    @torch.no_grad()
    def generate(
        self,
        input: Text | Ids | Float[Tensor, "batch seq d_model"] = "",
        max_new_tokens: int = 40,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: int | float = 1.0,
        freq_penalty: int | float = 0.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        return_type: ReturnType = "input",
        verbose: bool = False,
        *,
        attention_mask: Bool[Tensor, "batch seq"] | Int[Tensor, "batch seq"] | None = None,
        fwd_hooks: Hooks = (),
        generator: torch.Generator | None = None,
        output_logits: bool = False,
        return_dict_in_generate: bool = False,
    ) -> Any:
        """Continue a text, or each text of a list, or token ids, or embeddings; the arguments are transformer_lens'.

        Keys and values are kept for the blocks before the first hooked one, and the residual stream that enters it;
        from there on every step runs the whole sequence. So a hook always sees `[batch, everything so far, ...]`, and
        the result is that of generation without a cache, also under interventions.

        Args:
            input: A text, a list of texts (padded on the left), token ids, or what the embedding makes of them.
            max_new_tokens: How many tokens to add at most.
            stop_at_eos: A text that has produced EOS is finished; the others go on.
            eos_token_id: What EOS is, one id or several; `eos_ids` if `None`, and no end where there are none.
            do_sample: Sample; else take the most probable token.
            top_k: Sample among the `top_k` most probable tokens only; `top_p` does not count then.
            top_p: Sample among the most probable tokens only that reach this probability together.
            temperature: Logits are divided by it; 0 takes the most probable token.
            freq_penalty: Subtracted from the logit of a token, after the division, as often as the text has it.
            use_past_kv_cache: Whether to keep keys and values between steps; the result is the same.
            prepend_bos: Whether a text starts with BOS; as the model was trained, if `None`.
            padding_side: Either is accepted, and texts are padded on the left, as transformer_lens does.
            return_type: `"str"`, `"tokens"`, `"embeds"` (what the embedding makes of prompt and new tokens), or the
                kind of the `"input"`. Embeddings become the new tokens, or their text, alone.
            verbose: Whether to show a progress bar.
            attention_mask: Marks padding in token ids, which must be on the left.
            fwd_hooks: Interventions, as for `hooks`.
            generator: Source of randomness; if `None` torch's default one, which `torch.manual_seed` seeds.
            output_logits: Return transformers' `GenerateDecoderOnlyOutput`, with `sequences` and the `logits` of each
                step.
            return_dict_in_generate: For transformers' sake; it changes nothing.

        Returns:
            Text for a text (without special tokens), a list for a list, ids for ids `[batch, seq]`, embeddings for
            embeddings `[batch, seq, d_model]`; the prompt included in each.

        Raises:
            ValueError: Prompt and new tokens exceed the context, or an argument is out of range.
        """
        sampling = Sampling(do_sample, top_k, top_p, temperature, freq_penalty, generator)
        if return_type not in ("input", "str", "tokens", "embeds"):
            raise ValueError(f"return_type must be 'input', 'str', 'tokens' or 'embeds', got {return_type!r}")
        prompt = self._prompt(input, attention_mask, prepend_bos, padding_side)
        run = _Run(self, prompt, sampling, self._ends(stop_at_eos, eos_token_id))
        with self.hooks(fwd_hooks=list(fwd_hooks)):
            steps = tqdm(run.steps(max_new_tokens, use_past_kv_cache), total=max_new_tokens, disable=not verbose)
            logits = tuple(logits for logits in steps if output_logits)
        if output_logits:
            from transformers.generation import GenerateDecoderOnlyOutput

            return GenerateDecoderOnlyOutput(sequences=run.tokens, logits=logits)
        return run.returned(input, return_type)

    @torch.no_grad()
    def generate_stream(
        self,
        input: Text | Ids = "",
        max_new_tokens: int = 40,
        max_tokens_per_yield: int = 25,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: int | float = 1.0,
        freq_penalty: int | float = 0.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        return_type: Literal["input", "str", "tokens"] = "input",
        verbose: bool = False,
        *,
        attention_mask: Bool[Tensor, "batch seq"] | Int[Tensor, "batch seq"] | None = None,
        fwd_hooks: Hooks = (),
        generator: torch.Generator | None = None,
    ) -> Iterator[Any]:
        """Continue as `generate` does, and yield what is new from time to time, as transformer_lens does.

        The first part has the prompt too; the parts behind one another are what `generate` returns as tokens. Hooks are
        on the model from the first part to the last; closing the iterator removes them.

        Args:
            input: A text, a list of texts, or token ids.
            max_new_tokens: How many tokens to add at most.
            max_tokens_per_yield: A part has at least so many tokens, but for the last.
            stop_at_eos: As for `generate`, as are the others that are not explained.
            eos_token_id: What EOS is.
            do_sample: Sample, or take the most probable token.
            top_k: How many tokens to sample among.
            top_p: Their probability.
            temperature: Of the sampling.
            freq_penalty: On tokens that are there.
            use_past_kv_cache: Whether to keep keys and values.
            prepend_bos: Whether a text starts with BOS.
            padding_side: Accepted, and the left.
            return_type: `"tokens"`, which `"input"` means as in transformer_lens for ids, or `"str"`, for text.
            verbose: Whether to show a progress bar.
            attention_mask: Marks padding.
            fwd_hooks: Interventions.
            generator: Source of randomness.

        Yields:
            Token ids `[batch, new]`, or a text (of a list of texts a list).

        Raises:
            ValueError: As `generate`; or embeddings.
        """
        sampling = Sampling(do_sample, top_k, top_p, temperature, freq_penalty, generator)
        if return_type not in ("input", "str", "tokens"):
            raise ValueError(f"return_type must be 'input', 'str' or 'tokens', got {return_type!r}")
        if max_tokens_per_yield < 1:
            raise ValueError(f"max_tokens_per_yield must be at least 1, got {max_tokens_per_yield}")
        prompt = self._prompt(input, attention_mask, prepend_bos, padding_side)
        if prompt.tokens is None:
            raise ValueError("input must be text or token ids for generate_stream, got embeddings")
        run = _Run(self, prompt, sampling, self._ends(stop_at_eos, eos_token_id))
        given = 0
        with self.hooks(fwd_hooks=list(fwd_hooks)):
            steps = tqdm(run.steps(max_new_tokens, use_past_kv_cache), total=max_new_tokens, disable=not verbose)
            for _ in steps:
                if run.tokens.shape[1] - given >= max_tokens_per_yield:
                    yield run.part(given, input, return_type)
                    given = run.tokens.shape[1]
        if run.tokens.shape[1] > given:
            yield run.part(given, input, return_type)

    def _ends(self, stop_at_eos: bool, eos_token_id: int | Sequence[int] | None) -> tuple[list[int], int]:
        """Return the ids at which a text ends, none if it never does, and what finished ones are filled with."""
        if not stop_at_eos:
            return [], 0
        ends = self.eos_ids if eos_token_id is None else eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends)
        for index in ends:
            if not 0 <= index < self.cfg.d_vocab:
                raise ValueError(f"eos_token_id must hold ids from 0 to {self.cfg.d_vocab - 1}, got {index}")
        own = None if self.tokenizer is None or len(ends) == 1 else self.tokenizer.eos_token_id
        return ends, own if own is not None and own < self.cfg.d_vocab else next(iter(ends), 0)

    def _prompt(self, input: Any, mask: Tensor | None, prepend_bos: bool | None, padding_side: str | None) -> "_Prompt":
        if padding_side not in ("left", "right", None):
            raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        if isinstance(input, Tensor) and input.is_floating_point() and input.ndim == 3:
            if input.shape[2] != self.cfg.d_model:
                raise ValueError(f"input must have d_model={self.cfg.d_model} numbers a token, got {input.shape[2]}")
            tokens, embedded, mask = None, input.to(self.W_E), self.check_mask(mask, input)
        else:
            tokens, mask = self.read(input, mask, prepend_bos, "left")
            embedded = self.embed(tokens)
        if mask is not None and not mask[:, -1].all():
            raise ValueError("attention_mask must pad on the left for generation: the last position is a padding")
        mask = embedded.new_ones(embedded.shape[:2], dtype=torch.bool) if mask is None else mask
        return _Prompt(tokens, embedded, mask)


@dataclass(frozen=True)
class _Prompt:
    """What is continued."""

    tokens: Int[Tensor, "batch seq"] | None  # None: of embeddings nobody knows them
    embedded: Float[Tensor, "batch seq d_model"]
    mask: Bool[Tensor, "batch seq"]


@dataclass
class _Run:
    """A text that grows."""

    model: Generation
    prompt: _Prompt
    sampling: Sampling
    ends: tuple[list[int], int]
    new: list[Tensor] = field(default_factory=list)

    @property
    def tokens(self) -> Int[Tensor, "batch total"]:
        """The prompt's tokens, where they are known, and the new ones."""
        start = self.prompt.mask.new_zeros(len(self.prompt.mask), 0, dtype=torch.int64)
        return torch.cat((start if self.prompt.tokens is None else self.prompt.tokens, *self.new), 1)

    def steps(self, n: int, use_cache: bool) -> Iterator[Float[Tensor, "batch vocab"]]:
        """Add up to n tokens, and yield the logits that each was chosen by."""
        self._check(n)
        model, embedded, mask = self.model, self.prompt.embedded, self.prompt.mask
        ends, filler = torch.tensor(self.ends[0], dtype=torch.int64).to(mask.device), self.ends[1]
        done = mask.new_zeros(len(mask))
        stepper, hooking = _Stepper(model, use_cache), model.hooking
        for _ in range(n):
            if model.hooking != hooking:  # hooked since, perhaps by another thread
                model.check_thread()
            model.notice(None if self.prompt.tokens is None else self.tokens)
            logits = stepper.next_logits(embedded, mask)
            chosen = self.sampling.choose(logits, self.tokens, mask)
            if len(ends):
                chosen = chosen.masked_fill(done, filler)
                done = done | torch.isin(chosen, ends)
            self.new.append(chosen[:, None])
            embedded = torch.cat((embedded, model.embed(chosen[:, None])), 1)
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
            yield logits
            if done.all():
                return

    def _check(self, n: int) -> None:
        length, most = self.prompt.mask.shape[1], self.model.cfg.n_ctx
        if n < 0:
            raise ValueError(f"max_new_tokens must not be negative, got {n}")
        if length + n > most:
            raise ValueError(
                f"max_new_tokens={n} on top of a prompt of {length} tokens exceeds the context of {most}; ask for at "
                f"most {most - length}"
            )
        if self.sampling.freq_penalty and self.prompt.tokens is None:
            raise ValueError("freq_penalty must be 0 for embeddings, of which nobody knows the tokens")

    def returned(self, input: Any, kind: ReturnType) -> Any:
        """Return the text as it is wanted."""
        if kind == "input":
            kind = "str" if is_text(input) else "embeds" if self.prompt.tokens is None else "tokens"
        if kind == "embeds":
            return torch.cat((self.prompt.embedded, *map(self.model.embed, self.new)), 1)
        return self.part(0, input, kind)

    def part(self, start: int, input: Any, kind: str) -> Any:
        """Return the tokens from one on, or their text."""
        tokens = self.tokens[:, start:]
        if kind == "tokens" or (kind == "input" and not is_text(input)):
            return tokens
        texts = self.model.to_string(tokens, skip_special_tokens=True)
        return texts[0] if isinstance(input, str) else texts


class _Stepper:
    """Next-token logits for a growing sequence, without running again what cannot have changed."""

    def __init__(self, model: Generation, use_cache: bool):
        self.model = model
        self.first_hooked = _first_hooked_layer(model) if use_cache else 0
        self.past: list[KeyValue | None] = [None] * self.first_hooked
        # what the first hooked block reads: the stream, the stream's start, the first block's values
        self.read: list[Tensor | None] | None = None

    def next_logits(self, embedded: Tensor, mask: Tensor) -> Float[Tensor, "batch vocab"]:
        """Return the logits after the last of the embeddings, which extend those of the call before by any number."""
        model, keys = self.model, embedded.shape[1]
        padding = None if mask.all() else mask
        new = keys if self.read is None else keys - self.read[0].shape[1]
        x = model.started(embedded[:, keys - new :])
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
    """Tell whether something reads or changes what a module computes: hooks, or an SAE in place of a hook point."""
    return any(
        part._forward_hooks or part._forward_pre_hooks or (isinstance(part, Point) and part.altered)
        for part in module.modules()
    )
