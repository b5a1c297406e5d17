"""Tiny models with random weights and a tiny tokenizer, shared by the tests."""

import os
import string

import jaxtyping
import pytest
import torch
from checking import checked
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

if "PYTEST_XDIST_WORKER" in os.environ:  # there are as many workers as cores; processes that tests start count too
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # While a module of bilens is imported, jaxtyping's hook finds no stored bytecode for what that one imports first,
    # and compiles it anew; so all that is large comes before.
    import sae_lens  # noqa: F401

jaxtyping.jaxtyped = checked  # as its import hook finds it in each module of bilens

if "BILENS_DEFAULT_DTYPE" in os.environ:  # a user may have set it, and no result may hang on it
    torch.set_default_dtype(getattr(torch, os.environ["BILENS_DEFAULT_DTYPE"]))

settings.register_profile("bilens", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("bilens")

SLOW = {  # they train models, start processes, or open a browser
    *("test_adversarial", "test_anneal_script", "test_annealing", "test_any_model", "test_classifiers"),
    *("test_compiling", "test_elriggs", "test_exporting", "test_families", "test_hub"),
    *("test_images", "test_induction_heads", "test_kinds", "test_llama", "test_main"),
    *("test_motifs", "test_opinions", "test_pronoun_circuit", "test_publishing", "test_rank_layer"),
    *("test_readme", "test_report", "test_reproduce_images", "test_reproduce_language", "test_reproduce_published"),
    *("test_saes", "test_selftest", "test_site", "test_toys", "test_training"),
    *("test_tutorials",),
}


def pytest_collection_modifyitems(items):
    """Mark the tests of slow files, which CI runs once and not in every mode; they begin first.

    A file is one worker's, so that a slow one among the last would be waited for.
    """
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.path.stem not in SLOW)


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


FLAT = {  # what a test says of a part in a word, and the part's own field
    "attention": {"attention": "kind", "attn_scale": "scale", "attn_bias": "bias"}
    | {name: name for name in ("n_heads", "n_key_value_heads", "window", "rope")}
    | {name: name for name in ("score_scale", "qk_norm", "normalize", "value_residual")},
    "mlp": {"mlp": "kind", "act": "act", "mlp_bias": "bias", "d_hidden": "d_hidden"},
    "unembed": {"tied": "tied"},
}
NORMS = {"rms": {}, "rms_gain": {"gain": True}, "rms_gain_shift": {"gain": True, "shift": True}}
NORMS |= {"layer": {"gain": True, "shift": True, "kind": "layer"}}


def tiny_config(**overrides):
    """Return the config of a tiny model; what is overridden is said flatly, as in `VARIANTS` of the tests."""
    from bilens import AttentionConfig, BilinearConfig, MLPConfig, NormConfig, UnembedConfig

    said = {"n_layers": 2, "d_model": 16, "n_ctx": 32, "d_vocab": len(_vocab()), "n_heads": 2, "d_hidden": 24}
    said |= {"attn_scale": 0.5, "norm": "rms", "eps": 1e-8} | overrides
    norm, eps = said.pop("norm"), said.pop("eps")
    parts = {
        part: {field: said.pop(name) for name, field in fields.items() if name in said} for part, fields in FLAT.items()
    }
    return BilinearConfig(
        attention=AttentionConfig.of_width(said["d_model"], **parts["attention"]),
        mlp=MLPConfig(**parts["mlp"]),
        norm=None if norm == "none" else NormConfig(eps, **NORMS[norm]),
        unembed=UnembedConfig(**parts["unembed"]),
        **said,
    )


@pytest.fixture(scope="session")
def make_model(tiny_tokenizer):
    """Build `make_model(seed=0, dtype=torch.float64, tokenizer=..., **overrides)`: random weights on `tiny_config`."""
    from bilens import BilinearTransformer

    def make(seed: int = 0, dtype: torch.dtype = torch.float64, tokenizer: Tokenizer | None = tiny_tokenizer, **cfg):
        model = BilinearTransformer(tiny_config(**cfg), tokenizer).to(dtype).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                spread = 1.0 if parameter.ndim < 2 or name == "embed.weight" else parameter.shape[-1] ** -0.5
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(spread * noise)
        return model

    return make


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty place for the Hub's cache, beside which copies are written."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    return tmp_path / "home"


@pytest.fixture
def unchecked():
    """Errors as users meet them: without the shape checks under which the suite runs."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running server that the real client takes for the Hub, with an empty cache for the client."""
    from hub_server import as_the_hub

    with as_the_hub(monkeypatch, tmp_path / "home" / "hub") as hub:
        yield hub


@pytest.fixture
def offline(monkeypatch):
    """Call it to go offline, as HF_HUB_OFFLINE=1 does."""
    from huggingface_hub import constants

    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
