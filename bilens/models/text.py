"""Text to token ids and back: the one owner of BOS, case and padding."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer
from torch import Tensor

from .logits import trained_logit_directions
from .tokenization import StoredTokenizer, ids_of, shown

Text: TypeAlias = str | Sequence[str]
Ids: TypeAlias = Tensor | np.ndarray | Sequence[Any]  # token ids of any integer type
INTEGERS = {torch.uint8, torch.uint16, torch.uint32, torch.int8, torch.int16, torch.int32, torch.int64}


def is_text(input: Any) -> bool:
    """Tell text, or several, from token ids."""
    return isinstance(input, str) or (
        isinstance(input, Sequence) and (not len(input) or any(isinstance(one, str) for one in input))
    )


def token_ids(input: Any, name: str = "input") -> Int[Tensor, "..."]:
    """Return token ids of any integer type, a tensor, an array or nested lists, as the int64 tensor that they are.

    Raises:
        ValueError: Something else.
    """
    if not isinstance(input, Tensor):
        try:
            array = np.asarray([np.asarray(one) for one in input] if isinstance(input, Sequence) else input)
        except ValueError:
            raise ValueError(f"{name} must hold rows of as many token ids each, got rows of several lengths") from None
        if array.dtype.kind not in "iu" and array.size:
            raise ValueError(f"{name} must be text or integer token ids, got {type(input).__name__} of {array.dtype}")
        return torch.from_numpy(array.astype(np.int64))
    if input.dtype not in INTEGERS:
        raise ValueError(f"{name} must hold integer token ids, got {str(input.dtype).removeprefix('torch.')}")
    return input.long()


class TextInterface:
    """What a model with a `tokenizer` does with text: transformer_lens' interface."""

    without_tokenizer: str = ""  # why the model has no tokenizer, where that is known
    has_bos: bool  # False for models trained without BOS, whose texts then start without (Qwen)
    source: Mapping[str, Any]  # `config.json` as published
    generation: Mapping[str, Any] = {}  # `generation_config.json` as published
    _stored: Any = None  # the tokenizer as files have it until it is asked for, or None

    @property
    def tokenizer(self) -> Any:
        """Hugging Face's tokenizer, made when it is first asked for; None if the model takes token ids only.

        A `PreTrainedTokenizerFast` where it came from files. Set it to another of theirs, to a `tokenizers.Tokenizer`,
        or to None.
        """
        if isinstance(self._stored, StoredTokenizer):
            self._stored = self._stored.made()
        return self._stored

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        """Take another, or none."""
        if isinstance(tokenizer, Tokenizer):
            tokenizer = StoredTokenizer(tokenizer)
        if not isinstance(tokenizer, StoredTokenizer | None):
            from transformers import PreTrainedTokenizerBase

            if not isinstance(tokenizer, PreTrainedTokenizerBase):
                got = type(tokenizer).__name__
                raise ValueError(f"tokenizer must be one of transformers or tokenizers, or None, got {got}")
        self._stored = tokenizer

    @property
    def bos_id(self) -> int:
        """Id of the token that starts every text; `tokenization.StoredTokenizer` says which that is."""
        return self._special_id("bos")

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a text; it pads too where the files name no padding token."""
        return self._special_id("eos")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids at any of which a text ends: the tokenizer's, and those of `generation_config.json` and `config.json`."""
        own = () if self._stored is None else (self.tokenizer.eos_token_id,)
        told = (*own, *ids_of("eos", self.generation, self.source))
        return tuple(dict.fromkeys(i for i in told if i is not None and i < self.cfg.d_vocab))

    @property
    def padding_ids(self) -> tuple[int, ...]:
        """Ids that stand for padding, the one to pad with first; a model without a tokenizer has none."""
        if self._stored is None:
            return ()
        names = self.tokenizer.convert_tokens_to_ids(["[PAD]", "<pad>", "<|pad|>"])
        named = [i for i in names if i is not None and i != self.tokenizer.unk_token_id]
        told = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, *named)
        return tuple(dict.fromkeys(i for i in told if i is not None and i < self.cfg.d_vocab))

    def _special_id(self, role: Literal["bos", "eos"]) -> int:
        found = getattr(self._tokenizer, f"{role}_token_id")
        if found is None:
            raise ValueError(
                f"the tokenizer has no {role.upper()} token: neither its files, its template nor the model's configs "
                f"name one; set model.tokenizer.{role}_token"
            )
        return found

    @property
    def _tokenizer(self) -> Any:
        if self._stored is None:
            raise ValueError(
                self.without_tokenizer
                or "this model has no tokenizer, so it takes token ids only; put a tokenizer.json beside its weights "
                "or pass tokenizer= to bilens.load"
            )
        return self.tokenizer

    def token_rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text as it stands: no BOS, no padding, of any length.

        Raises:
            ValueError: A text that is not Unicode (half a surrogate pair), by its number.
        """
        tokenizer = self._tokenizer
        check_unicode(texts)
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        return tokenizer(list(texts), add_special_tokens=False, **options)["input_ids"] if len(texts) else []

    def encodings(self, texts: Sequence[str]) -> list[Any]:
        """Return each text's `tokenizers.Encoding`, which knows where in the text each token is; errors as above."""
        check_unicode(texts)
        return self._tokenizer(list(texts), add_special_tokens=False, verbose=False).encodings

    def encode(
        self, text: Text, prepend_bos: bool | None, padding_side: str | None, truncate: bool | None
    ) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
        """Tokenise and pad: ids, and False at padding; arguments and errors as for `to_tokens`."""
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("input must hold at least one text, got an empty list")
        for index, one in enumerate(texts):
            if not isinstance(one, str):
                raise ValueError(
                    f"input must hold texts, or token ids, got {type(one).__name__} {one!r} as text {index}"
                )
        if padding_side not in ("left", "right", None):
            raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        rows = []
        for index, row in enumerate(self.token_rows(texts)):
            if prepend_bos is not False and self.has_bos and row[:1] != [self.bos_id]:  # no second one after one spelt
                row = [self.bos_id, *row]
            if len(row) > self.cfg.n_ctx and truncate is None:
                raise ValueError(
                    f"text {index} has {len(row)} tokens (BOS included), more than the context of {self.cfg.n_ctx}: "
                    f"shorten it, or cut it with model.to_tokens(text, truncate=True); it starts {texts[index][:40]!r}"
                )
            rows.append(row[: self.cfg.n_ctx] if truncate else row)
        length = max(map(len, rows))
        if length == 0 and truncate is None:
            missing = "prepend_bos is False" if self.has_bos else "the model has no BOS"
            raise ValueError(f"input is empty text and {missing}, so there is no token to run on")
        ids = torch.full((len(rows), length), next(iter(self.padding_ids), 0))  # padding is masked, whatever it is
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for index, row in enumerate(rows):
            where = slice(length - len(row), length) if padding_side == "left" else slice(0, len(row))
            ids[index, where], mask[index, where] = torch.tensor(row, dtype=torch.long), True
        return ids.to(self.W_E.device), mask.to(self.W_E.device)

    def read(
        self,
        input: Text | Tensor | np.ndarray | Sequence[Any],
        mask: Tensor | None,
        prepend_bos: bool | None,
        padding_side: str | None = None,
    ) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"] | None]:
        """Return text or token ids as ids on the model's device, and False at padding; `None` if there is none.

        Raises:
            ValueError: A token id outside the vocabulary, more tokens than the context, no token, a mask of another
                shape or with text.
        """
        if is_text(input):
            if mask is not None:
                raise ValueError("attention_mask goes with token ids; texts are padded and masked by the model itself")
            input, mask = self.encode(input, prepend_bos, padding_side, truncate=None)
        tokens = torch.atleast_2d(token_ids(input)).to(self.W_E.device)
        mask = self.check_mask(mask, tokens)
        if torch.compiler.is_compiling():  # values are not known while a graph is traced
            return tokens, mask
        if tokens.min() < 0 or tokens.max() >= self.cfg.d_vocab:
            bad = tokens[(tokens < 0) | (tokens >= self.cfg.d_vocab)][0].item()
            raise ValueError(f"input must hold token ids from 0 to {self.cfg.d_vocab - 1}, got {bad}")
        return tokens, mask

    def check_mask(self, mask: Tensor | None, input: Tensor) -> Bool[Tensor, "batch seq"] | None:
        """Return the mask of token ids or a residual stream, `None` if it masks nothing; both are checked."""
        batch, seq = input.shape[:2]
        if seq > self.cfg.n_ctx:
            raise ValueError(f"input has {seq} tokens, more than the context of {self.cfg.n_ctx}")
        if batch == 0 or seq == 0:
            raise ValueError(f"input must hold at least one token, got shape {tuple(input.shape[:2])}")
        if mask is None:
            return None
        if mask.shape != (batch, seq):
            raise ValueError(f"attention_mask must have the input's shape {(batch, seq)}, got {tuple(mask.shape)}")
        mask = mask.to(input.device).bool()
        return None if not torch.compiler.is_compiling() and mask.all() else mask

    def to_tokens(
        self,
        input: Text,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        move_to_device: bool = True,
        truncate: bool | None = None,
    ) -> Int[Tensor, "batch seq"]:
        """Tokenise text: case and accents as the tokenizer has it, exactly one BOS, padded (with EOS, mostly).

        Args:
            input: A text or a list of texts. Characters that the tokenizer does not know become its `[UNK]`.
            prepend_bos: Whether to start with BOS; `None` does so. A text that begins with a spelt-out BOS gets no
                second one, and none gets one from a model trained without (`has_bos`).
            padding_side: `"right"`, as if `None`, or `"left"`.
            move_to_device: Whether the ids go to the model's device.
            truncate: Keep the first `n_ctx` tokens of a longer text, or, if False, keep it whole, more tokens than the
                model runs on, or none. `None` raises.

        Raises:
            ValueError: A text longer than the context, or no tokens at all.
        """
        tokens = self.encode(input, prepend_bos, padding_side, truncate)[0]
        return tokens if move_to_device else tokens.cpu()

    def to_string(self, tokens: Ids | int, skip_special_tokens: bool = False) -> str | list[str]:
        """Turn token ids into text, special tokens included unless skipped; a batch gives a list."""
        tokens = token_ids(tokens, "tokens")
        if tokens.ndim > 1:
            return [self.to_string(row, skip_special_tokens) for row in tokens]
        return self._tokenizer.decode(torch.atleast_1d(tokens).tolist(), skip_special_tokens=skip_special_tokens)

    def to_str_tokens(
        self,
        input: Text | Ids,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
    ) -> list:
        """Show the tokens one by one, as `labels` does; a list of texts gives a list, without padding."""
        if isinstance(input, str):
            input = self.to_tokens(input, prepend_bos)[0]
        elif is_text(input):
            return [self.to_str_tokens(text, prepend_bos) for text in input]
        input = token_ids(input)
        if input.ndim == 2:
            rows = [self.to_str_tokens(row) for row in input]
            return rows[0] if len(rows) == 1 else rows
        return self.labels(torch.atleast_1d(input).tolist())

    def labels(self, tokens: Iterable[int]) -> list[str]:
        """Return what tokens are called wherever they are shown.

        That is their text: a space before a word is a space, bytes that are a part of a character are `<0xC3>`, and
        `##` marks a WordPiece piece that continues a word. An id without a token, or of a model without a tokenizer, is
        its number.
        """
        ids = [int(token) for token in tokens]
        return list(map(str, ids)) if self._stored is None else shown(self.tokenizer, ids)

    def label(self, token: int) -> str:
        """Return what one token is called: see `labels`."""
        return self.labels([token])[0]

    def spellings(self, tokens: Iterable[int]) -> list[str]:
        """Return tokens as they stand in a text, each with the space before it, whatever marks it in the vocabulary."""
        labels = self.labels(tokens)
        if any(label[:1].isspace() for label in self.labels(self._starts)):
            return labels
        return [label.removeprefix("##") if label.startswith("##") else f" {label}" for label in labels]

    def text_of(self, tokens: Iterable[int]) -> str:
        """Return tokens as text, or as numbers of a model without a tokenizer."""
        ids = [int(token) for token in tokens]
        return " ".join(map(str, ids)) if self._stored is None else self.to_string(ids)

    @property
    def _starts(self) -> list[int]:
        """Tokens of a word after a space, by which spaces are told to be in tokens or between them."""
        return [] if self._stored is None else self.token_rows([" a"])[0]

    def tokens_of(self, words: Iterable[str]) -> list[int]:
        """Return the tokens that are one of some words, with or without a space before it; others are left out."""
        words = list(words)
        unknown = self._tokenizer.unk_token_id
        exact = [(self.tokenizer.convert_tokens_to_ids(word),) for word in words]
        rows = self.token_rows([spaced for word in words for spaced in (word, f" {word}")])
        alone = (row[0] for row in (*exact, *rows) if len(row) == 1)
        return list(dict.fromkeys(i for i in alone if i is not None and i != unknown))

    def to_single_token(self, string: str) -> int:
        """Return the id of a text that is one token.

        Raises:
            ValueError: It is more than one token, or none that the tokenizer knows.
        """
        (tokens,) = self.token_rows([string])
        if len(tokens) != 1 or tokens[0] == self.tokenizer.unk_token_id:
            raise ValueError(f"{string!r} is not a single token: the tokenizer makes it {self.labels(tokens)}")
        return tokens[0]

    def tokens_to_residual_directions(self, tokens: Any) -> Float[Tensor, "*batch d_model"]:
        """Return the residual direction that raises each token's logit, the final norm's gain included.

        Tokens are texts or ids; the directions are those of `bilens.models.logits.logit_directions`. What they read of
        the stream, over the root mean square that the final norm divides by, is the logit, less the norm's shift.
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        elif is_text(tokens):
            tokens = [self.to_single_token(token) for token in tokens]
        ids = token_ids(tokens, "tokens")
        if len(bad := ids[(ids < 0) | (ids >= self.cfg.d_vocab)]):
            raise ValueError(f"tokens must hold ids from 0 to {self.cfg.d_vocab - 1}, got {int(bad[0])}")
        return trained_logit_directions(self, ids)


def check_unicode(texts: Iterable[str]) -> None:
    """Raise a ValueError for a text that is not Unicode (half a surrogate pair), by its number."""
    for index, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"input must hold Unicode, but text {index} does not: {error}") from None
