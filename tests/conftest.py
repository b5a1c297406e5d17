"""Tiny models with random weights and a tiny tokenizer, shared by the tests."""

import dataclasses
import string

import jaxtyping
import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

settings.register_profile("bilens", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("bilens")

WORDS = ("the", "a", "cat", "dog", "sat", "ran", "on", "mat", "once", "upon", "time", "and", "saw", "big", "little")


def _vocab() -> dict[str, int]:
    letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    pieces = ["[UNK]", "[BOS]", "[EOS]", *dict.fromkeys([*WORDS, "##s", "##ed", "##ing", ".", ",", "!", *letters])]
    return {piece: index for index, piece in enumerate(pieces)}


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    """A lowercasing WordPiece tokenizer with whole words, single letters and the published special tokens."""
    tokenizer = Tokenizer(models.WordPiece(_vocab(), unk_token="[UNK]"))
    lower = [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence(lower)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Whitespace()])
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[BOS]", "[EOS]"])
    return tokenizer


@pytest.fixture(scope="session")
def make_model(tiny_tokenizer):
    """Build `make_model(seed=0, dtype=torch.float64, tokenizer=..., **config_overrides)`: a random tiny model."""
    from bilens.models.transformer import BilinearConfig, BilinearTransformer

    default = BilinearConfig(
        n_layers=2, d_model=16, d_hidden=24, n_heads=2, n_ctx=32, d_vocab=len(_vocab()), attn_scale=0.5
    )

    def make(seed: int = 0, dtype: torch.dtype = torch.float64, tokenizer: Tokenizer | None = tiny_tokenizer, **cfg):
        model = BilinearTransformer(dataclasses.replace(default, **cfg), tokenizer).to(dtype).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                spread = 1.0 if parameter.ndim == 1 or name == "embed.weight" else parameter.shape[-1] ** -0.5
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(spread * noise)
        return model

    return make


@pytest.fixture
def unchecked():
    """Errors as users meet them: without the shape checks under which the suite runs."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
