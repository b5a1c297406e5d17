"""Text to token ids and back: the one owner of BOS, case and padding."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer
from torch import Tensor

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

    tokenizer: Tokenizer | None
    without_tokenizer: str = ""  # why the model has no tokenizer, where that is known
    has_bos: bool  # False for models trained without BOS, whose texts then start without (Qwen)

    @property
    def bos_id(self) -> int:
        """Id of the token that starts every text."""
        return self._special_id(
            "BOS", ("[BOS]", "<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>", "[CLS]", "<|bos|>")
        )

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a text; also used for padding, as in the published models."""
        return self._special_id(
            "EOS", ("[EOS]", "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]", "<|bos|>")
        )

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
                self.without_tokenizer
                or "this model has no tokenizer, so it takes token ids only; put a tokenizer.json beside its weights "
                "or pass tokenizer= to bilens.load"
            )
        return self.tokenizer

    def encode(
        self, text: Text, prepend_bos: bool, padding_side: str, truncate: bool
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
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        check_unicode(texts)
        rows = []
        for index, one in enumerate(texts):
            row = self._tokenizer.encode(one, add_special_tokens=False).ids
            if prepend_bos and self.has_bos and row[:1] != [self.bos_id]:  # not a second one after one spelt out
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

    def read(
        self,
        input: Text | Tensor | np.ndarray | Sequence[Any],
        mask: Tensor | None,
        prepend_bos: bool,
        padding_side: str = "right",
    ) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"] | None]:
        """Return text or token ids as ids on the model's device, and False at padding; `None` if there is none.

        Raises:
            ValueError: A token id outside the vocabulary, more tokens than the context, no token, a mask of another
                shape or with text.
        """
        if is_text(input):
            if mask is not None:
                raise ValueError("attention_mask goes with token ids; texts are padded and masked by the model itself")
            input, mask = self.encode(input, prepend_bos, padding_side, truncate=False)
        tokens = torch.atleast_2d(token_ids(input)).to(self.W_E.device)
        mask = self.check_mask(mask, tokens)
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
        return None if mask.all() else mask

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
        return self.encode(input, prepend_bos, padding_side, truncate)[0]

    def to_string(self, tokens: Ids | int, skip_special_tokens: bool = False) -> str | list[str]:
        """Turn token ids into text, special tokens included unless skipped; a batch gives a list."""
        tokens = token_ids(tokens, "tokens")
        if tokens.ndim > 1:
            return [self.to_string(row, skip_special_tokens) for row in tokens]
        return self._tokenizer.decode(torch.atleast_1d(tokens).tolist(), skip_special_tokens)

    def to_str_tokens(self, input: Text | Ids, prepend_bos: bool = True) -> list:
        """Show the tokens one by one; `##` marks a piece that continues a word. A list of texts gives a list."""
        if isinstance(input, str):
            input = self.to_tokens(input, prepend_bos, truncate=False)[0]
        elif is_text(input):
            return [self.to_str_tokens(text, prepend_bos) for text in input]
        input = token_ids(input)
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
        elif is_text(tokens):
            tokens = [self.to_single_token(token) for token in tokens]
        return self.W_U.T[token_ids(tokens, "tokens").to(self.W_U.device)]


def check_unicode(texts: Iterable[str]) -> None:
    """Raise a ValueError for a text that is not Unicode (half a surrogate pair), by its number."""
    for index, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"input must hold Unicode, but text {index} does not: {error}") from None
