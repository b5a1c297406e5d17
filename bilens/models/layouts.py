"""What is common to the families of checkpoints: how a config is read, and what a layout has to say."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from .sources import CheckpointError
from .tokenization import StoredTokenizer
from .transformer import BilinearConfig, BilinearTransformer

TOKENIZERS = {
    "ts-4096": "tdooms/ts-tokenizer-4096",
    "mistral": "mistral-community/Mixtral-8x22B-v0.1",
    "gpt2": "openai-community/gpt2",
}
UNREAD = {  # written by transformers or by training; without effect on what the model computes
    *("architectures", "transformers_version", "dtype", "torch_dtype", "model_type", "auto_map", "_name_or_path"),
    *("repo", "modifier", "noise", "attn_dropout", "embed_dropout", "mlp_dropout", "resid_dropout"),
}


DEPTHS = ("n_layer", "n_layers", "num_hidden_layers")  # config keys that say how many layers there are
MOST_LAYERS = 10_000
LARGEST_SIZE = 2**31 - 1  # of a width, a context, a vocabulary
LARGEST_NUMBER = 1e30  # of what is no size: beyond it float32 overflows


class Layout(ABC):
    """A family of checkpoints: what its config keys mean, and which tensors make up each parameter of the model."""

    embedding: str  # the published name of the token embedding
    labels: dict[str, Any]  # config keys that name the format
    known: frozenset[str]  # config keys that are read, or that change nothing of what the model computes
    overridable: tuple[str, ...] = ()  # config keys that a user may set against a checkpoint
    attention_only: bool = False  # whether its models have no MLPs
    archived: bool = False  # whether its publishers have torch archives only, no safetensors

    @abstractmethod
    def shape(self, config: Mapping[str, Any], d_vocab: int, path: Path) -> BilinearConfig:
        """Read the model's shape off a config.

        Args:
            config: The published keys.
            d_vocab: Rows of the embedding, which decide the vocabulary.
            path: The file, for error messages.

        Raises:
            CheckpointError: A key that contradicts itself, the embedding, or what the hooked model can compute.
        """

    @abstractmethod
    def keys(self, cfg: BilinearConfig) -> dict[str, Any]:
        """Return the config keys that say what the model computes; `shape` reads them back."""

    @abstractmethod
    def parts(self, name: str, rows: int, cfg: BilinearConfig) -> dict[str, int]:
        """Return the tensors that a parameter of so many rows is made of, one above the other, each with its rows."""

    def override(self, config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config with keys that a user sets.

        Raises:
            ValueError: A key that this format has not, or that is not a user's to set.
        """
        for key in overrides:
            if key not in self.overridable:
                allowed = f"one of {', '.join(self.overridable)}" if self.overridable else "absent"
                raise ValueError(f"overrides: a key must be {allowed} for a model of this format, got {key!r}")
        return {**config, **overrides}

    def prepare(
        self, tensors: dict[str, tuple[Tensor, Path]], config: Mapping[str, Any]
    ) -> dict[str, tuple[Tensor, Path]]:
        """Return the tensors as the model holds them, each with its file, where a format stores them otherwise."""
        return tensors

    def tokenizer(self, config: Mapping[str, Any]) -> str | None:
        """Return the Hub repository of the tokenizer of a model that lacks its own; None if the config names none."""
        named = TOKENIZERS.get(str(config.get("tokenizer")))
        return f"tdooms/TinyStories-{config['n_vocab']}" if named is None and "n_vocab" in config else named

    def undecodable(self, config: Mapping[str, Any]) -> str | None:
        """Return why the token ids of such a model cannot be decoded; None if a tokenizer does."""
        return None

    def has_bos(self, tokenizer: StoredTokenizer) -> bool:
        """Tell whether models of this format were trained on texts that start with BOS; the published ones were."""
        return True

    def expresses(self, cfg: BilinearConfig) -> bool:
        """Tell whether a config of this format can say what the model computes."""
        if (cfg.mlp is None) != self.attention_only:
            return False
        try:
            return self.shape(self.keys(cfg), cfg.d_vocab, Path("config.json")) == cfg
        except CheckpointError:  # an activation that no model of this format has
            return False

    def config(self, model: BilinearTransformer) -> dict[str, Any]:
        """Return the config of a model: what it came with, updated by what it is."""
        dtype = str(model.W_E.dtype).removeprefix("torch.")
        return {**model.source, **self.labels, "dtype": dtype, **self.keys(model.cfg)}


@contextmanager
def blaming(what: str | Path) -> Iterator[None]:
    """Turn a ValueError, of a config's part that refuses its fields, into a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{what}: {error}") from error


class Keys:
    """Typed access to a config, with errors that name the file and the key."""

    def __init__(self, config: Mapping[str, Any], path: Path):
        self.config, self.path = config, path

    def size(self, key: str, default: int | None = None) -> int:
        """Return a positive integer; `default`, if there is one, also where the config says null."""
        value = self.config.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{self.path}: {key} must be a positive integer, got {self._got(key)}")
        if value > (most := MOST_LAYERS if key in DEPTHS else LARGEST_SIZE):
            raise CheckpointError(f"{self.path}: {key} must be at most {most}, got {self._got(key)}")
        return value

    def _got(self, key: str) -> str:
        """Say what a key holds, in a line."""
        said = repr(self.config[key]) if key in self.config else "nothing"
        return said if len(said) <= 80 else f"{said[:77]}..."

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive finite number; `default`, if there is one, also where the config says null."""
        value = self.config.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < LARGEST_NUMBER:
            raise CheckpointError(f"{self.path}: {key} must be a positive number, got {self._got(key)}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean."""
        return self.one_of(key, {True: True, False: False}, default)

    def one_of(self, key: str, allowed: Mapping[Any, Any], default: Any = ...) -> Any:
        """Return what the key's value means, by a table."""
        value = self.config.get(key, default)
        for choice, meaning in allowed.items():
            if value == choice and type(value) is type(choice):
                return meaning
        choices = ", ".join(repr(choice) for choice in allowed)
        got = "nothing" if value is ... else self._got(key)
        raise CheckpointError(f"{self.path}: {key} must be one of {choices}, got {got}")
