"""Hugging Face's tokenizer of a model: what its files say, made when it is first used, and how its tokens are shown."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers

from bilens.tensor.keeping import atomic_write

# What special tokens are called where no file says which they are.
NAMES = {
    "bos": ("[BOS]", "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>", "[CLS]", "<|bos|>"),
    "eos": ("[EOS]", "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]", "<|bos|>"),
    "pad": (),  # EOS pads where no file says otherwise, as in the published models
    "unk": ("[UNK]", "<unk>"),
}
# Of tokenizer_config.json: what changes how a text is read, written or put into a chat.
_KEPT = ("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces", "model_max_length", "chat_template")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_UNREADABLE = "\ufffd"  # what a decoder makes of bytes that are no character


@dataclass(frozen=True)
class StoredTokenizer:
    """A tokenizer as files have it, and what they say of its special tokens.

    Each special token is that of `tokenizer_config.json` (or `special_tokens_map.json`); else the one that the
    tokenizer's own template puts before a text (BOS) or after it (EOS); else the one whose id `generation_config.json`
    or `config.json` gives, if the tokenizer marks it as special; else one of the usual names. EOS pads where none of
    these names a padding token.
    """

    backend: Tokenizer
    settings: Mapping[str, Any] = field(default_factory=dict)  # the files' keys
    ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of the model's configs: by role, "bos", "eos"

    def special(self, role: str) -> str | None:
        """Return the text of a special token, `"bos"`, `"eos"`, `"pad"` or `"unk"`; None if there is none."""
        return next((token for token in self._told(role) if self._knows(token)), None)

    @property
    def starts_texts(self) -> bool:
        """Whether the tokenizer itself puts a special token before a text: Llama's does, Qwen's does not."""
        said = self.settings.get("add_bos_token")
        if isinstance(said, bool):
            return said and self.special("bos") is not None
        return "bos" in self._template

    def made(self) -> Any:
        """Return Hugging Face's tokenizer; a token that files name and the vocabulary lacks is not added."""
        from transformers import PreTrainedTokenizerFast  # loaded when a tokenizer is first used

        tokens = {role: self.special(role) for role in NAMES}
        tokens |= {role: content(self.settings.get(f"{role}_token")) for role in ("sep", "cls", "mask")}
        tokens["pad"] = tokens["pad"] or tokens["eos"]
        known = {f"{role}_token": token for role, token in tokens.items() if self._knows(token)}
        kept = {"clean_up_tokenization_spaces": False}
        kept |= {key: self.settings[key] for key in _KEPT if self.settings.get(key) is not None}
        made = PreTrainedTokenizerFast(tokenizer_object=self.backend, **kept, **known)
        if self.backend.post_processor is None and not {"add_bos_token", "add_eos_token"} & kept.keys():
            made.backend_tokenizer.post_processor = None  # transformers puts in one that does nothing
        return made

    def _told(self, role: str) -> Iterator[str | None]:
        yield content(self.settings.get(f"{role}_token"))
        yield self._template.get(role)
        yield from (self._marked.get(index) for index in self.ids.get(role, ()))
        yield from NAMES[role]

    def _knows(self, token: str | None) -> bool:
        return token is not None and self.backend.token_to_id(token) is not None

    @cached_property
    def _marked(self) -> dict[int, str]:
        """The tokens that the tokenizer marks as special, by id."""
        added = self.backend.get_added_tokens_decoder().items()
        return {index: token.content for index, token in added if token.special}

    @cached_property
    def _template(self) -> dict[str, str]:
        """What the tokenizer's template puts around a text."""
        letter = "a" if self._knows("a") else next(filter(str.isalpha, self.backend.get_vocab()), "a")
        around = self.backend.encode(letter)
        special = [index for index, mask in enumerate(around.special_tokens_mask) if mask]
        last = len(around.ids) - 1
        found = {"bos": 0, "eos": last} if last else {"bos": 0}
        return {role: around.tokens[at] for role, at in found.items() if at in special}


def content(token: Any) -> str | None:
    """Return the text of a special token as the files have it, a string or a mapping; None of anything else."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) and token else None


def ids_of(role: str, *configs: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the ids that configs give a special token, the first config's first: a number, or a list of them."""
    said = [config.get(f"{role}_token_id") for config in configs]
    flat = [index for one in said for index in (one if isinstance(one, list) else [one])]
    return tuple(dict.fromkeys(index for index in flat if type(index) is int and index >= 0))


def save_tokenizer(tokenizer: Any, folder: Path, stack: ExitStack) -> set[str]:
    """Write a tokenizer's files, so that `AutoTokenizer` of any version reads them, and return their names.

    Args:
        tokenizer: The tokenizer.
        folder: Where to.
        stack: At whose end each file takes its place.
    """
    with tempfile.TemporaryDirectory() as partial:
        tokenizer.save_pretrained(partial)
        config = Path(partial) / "tokenizer_config.json"
        told = json.loads(config.read_text(encoding="utf-8"))
        if tokenizer.is_fast and not (told.get("tokenizer_class") or "").endswith("TokenizerFast"):
            told["tokenizer_class"] = "PreTrainedTokenizerFast"  # which versions before 5 know too
        config.write_text(json.dumps(told, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        # files of several chat templates lie in a folder of their own
        written = {path.relative_to(partial): path for path in sorted(Path(partial).rglob("*")) if path.is_file()}
        for name, path in written.items():
            stack.enter_context(atomic_write(folder / name)).write_bytes(path.read_bytes())
    return {name.as_posix() for name in written}


# -- how tokens are shown ---------------------------------------------------------------------------------------------


def shown(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return tokens as text, one by one; a number stands for an id that has no token.

    A space before a word is a space. Bytes that are a part of a character are `<0xC3>`. A piece that continues a word
    keeps WordPiece's `##`, without which it would look like a word.
    """
    names = tokenizer.convert_ids_to_tokens(list(ids))
    whole = tokenizer.convert_tokens_to_string(["a", "a"]) != "aa"  # tokens are words, which are put apart
    kept = set(tokenizer.added_tokens_decoder)
    return [
        str(index) if name is None else name if whole or index in kept else _decoded(tokenizer, name)
        for index, name in zip(ids, names, strict=True)
    ]


def _decoded(tokenizer: Any, name: str) -> str:
    """Decode one token, behind a letter, so that a space it begins with is kept."""
    text = tokenizer.convert_tokens_to_string(["a", name])[1:]
    return _bytes(name) if _UNREADABLE in text and _UNREADABLE not in name else text


def _bytes(name: str) -> str:
    """Return a byte-level token whose bytes are no text: what of them is text, and the others as `<0xC3>`."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    own = {letter: ord(letter) for letter in alphabet if ord(letter) < 256}  # the others are in order, from 256
    others = zip(sorted(set(alphabet) - own.keys()), sorted(set(range(256)) - set(own.values())), strict=True)
    own |= dict(others)
    if not own.keys() >= set(name):  # `<0xC3>` itself, as SentencePiece has it
        return name
    text = bytes(own[letter] for letter in name).decode("utf-8", "surrogateescape")
    return "".join(f"<0x{ord(one) - 0xDC00:02X}>" if 0xDC80 <= ord(one) <= 0xDCFF else one for one in text)


def with_decoder(tokenizer: Tokenizer) -> Tokenizer:
    """Give a tokenizer that has no decoder, as published ones may lack it, the one that its pieces call for."""
    if tokenizer.decoder is None:
        kind = json.loads(tokenizer.to_str())["model"]["type"]
        steps = str(tokenizer.pre_tokenizer)
        if kind == "WordPiece":
            tokenizer.decoder = decoders.WordPiece()
        elif "ByteLevel" in steps:
            tokenizer.decoder = decoders.ByteLevel()
        elif "Metaspace" in steps:
            tokenizer.decoder = decoders.Metaspace()
    return tokenizer
