"""Loading and saving: equal to the authors' own code, bit-identical round trips, and every broken file refused."""

import json
import math
import os
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from hub_server import contents
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import bilens
from bilens.models.sources import read_tokenizer

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures" / "published-format"
GENERATIONS = (
    *("bilinear", "bias", "no-norm", "swiglu", "relu-mlp", "unscaled-attn", "bilinear-attn", "2024-06", "2024-05"),
)
DOWN = "transformer.h.1.mlp.p.weight"  # [d_model, d_hidden] = [16, 24] in the tiny models


@pytest.fixture(params=GENERATIONS)
def published(request):
    """A folder written by the authors' own code."""
    folder = FIXTURES / request.param
    if not folder.is_dir():
        pytest.skip(f"the authors' files are not here: {folder}")
    return folder


@pytest.fixture
def saved(make_model, tmp_path):
    """A folder with a tiny float32 model of the newest generation, and its tokenizer."""
    bilens.save(make_model(dtype=torch.float32), tmp_path / "model")
    return tmp_path / "model"


def assert_same(model, other):
    assert other.cfg == model.cfg
    state, other_state = model.state_dict(), other.state_dict()
    assert other_state.keys() == state.keys()
    for name, weight in state.items():
        assert other_state[name].dtype == weight.dtype, name
        assert torch.equal(other_state[name], weight), name


def edit_config(folder, *gone, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in gone}))


def edit_tensors(folder, name, weight):
    """Replace or add a tensor; `None` removes it."""
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / "model.safetensors").items()} | {name: weight}
    save_file({k: tensor for k, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


def refusal(folder, error=bilens.CheckpointError, **kwargs):
    with pytest.raises(error) as caught:
        bilens.load(folder, **kwargs)
    return str(caught.value)


# -- the authors' own files -------------------------------------------------------------------------------------------


def test_published_checkpoint_computes_what_the_authors_code_computes(published):
    expected = load_file(published / "expected.safetensors")
    model = bilens.load(published)
    tokens = expected.pop("input_ids")
    (logits, loss), cache = model.run_with_cache(tokens, return_type="both")
    got = {"logits": logits, "loss": loss[None], **cache}
    for layer in range(model.cfg.n_layers):
        unscaled = cache[f"blocks.{layer}.hook_attn_out"] / model.cfg.attention.scale
        got[f"blocks.{layer}.attn_module_out_unscaled"] = unscaled
    assert len(expected) >= 14
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        assert (got[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


def test_published_checkpoint_survives_a_round_trip(published, tmp_path):
    model = bilens.load(published)
    bilens.save(model, tmp_path)
    again = bilens.load(tmp_path)
    assert_same(model, again)
    assert again.tokenizer.backend_tokenizer.to_str() == model.tokenizer.backend_tokenizer.to_str()
    source, written = (load_file(folder / "model.safetensors") for folder in (published, tmp_path))
    assert written.keys() == source.keys()
    for name, weight in source.items():
        torch.testing.assert_close(written[name], weight, rtol=1e-6 if "inv_freq" in name else 0, atol=0)
    config, kept = (json.loads((folder / "config.json").read_text()) for folder in (published, tmp_path))
    assert {key: kept.get(key, "gone") for key in config} == config


def test_every_published_folder_is_tested():
    if not FIXTURES.is_dir():
        pytest.skip(f"the authors' files are not here: {FIXTURES}")
    assert {folder.name for folder in FIXTURES.iterdir()} == {*GENERATIONS, "bilinear-scope"}


# -- what the formats can express -------------------------------------------------------------------------------------

PLAIN = ("relu", "silu", "gelu", "identity")
NEWEST = product(
    [("bilinear", None), *(("gated", act) for act in PLAIN[:3]), *(("plain", act) for act in PLAIN)],
    [(False, False), (True, True)],
    ["rms", "none"],
    ["softmax", "bilinear"],
    [0.5, 1.0],  # 1/sqrt(2 n_layers), and unscaled
)
MIDDLE = product(
    [("bilinear", None), ("gated", "relu"), ("plain", "relu"), ("plain", "identity")],
    [(False, False), (True, True)],
    ["rms_gain_shift"],
)
OLDEST = [
    *product([("bilinear", None), ("gated", "gelu")], [(False, False), (True, False)], ["rms_gain", "rms_gain_shift"]),
    *product([("plain", "gelu")], [(True, False)], ["rms_gain", "rms_gain_shift"]),
]
VARIANTS = [(*v, "softmax", 1.0) for v in (*MIDDLE, *OLDEST)] + list(NEWEST)
INEXPRESSIBLE = [
    {"attn_scale": 0.7},
    {"norm": "rms_gain", "attn_scale": 0.5},
    {"norm": "rms_gain_shift", "attention": "bilinear", "attn_scale": 1.0},
    {"mlp_bias": (True, False)},
    {"mlp_bias": (False, True)},
    {"mlp": "gated", "act": "identity"},
    {"norm": "rms_gain", "attn_scale": 1.0, "mlp": "plain", "act": "relu", "mlp_bias": (True, False)},
    {"norm": "rms_gain", "attn_scale": 1.0, "mlp": "plain", "act": "gelu"},
    {"norm": "rms_gain_shift", "attn_scale": 1.0, "mlp": "gated", "act": "silu"},
]


@pytest.mark.parametrize(("mlp_act", "mlp_bias", "norm", "attention", "attn_scale"), VARIANTS)
def test_every_variant_survives_a_round_trip(make_model, tmp_path, mlp_act, mlp_bias, norm, attention, attn_scale):
    cfg = {"mlp": mlp_act[0], "act": mlp_act[1], "mlp_bias": mlp_bias, "norm": norm, "attention": attention}
    model = make_model(dtype=torch.float32, attn_scale=attn_scale, **cfg)
    bilens.save(model, tmp_path)
    assert_same(model, bilens.load(tmp_path))


@pytest.mark.parametrize("n_layers", [1, 3, 7])
def test_attention_scale_survives_for_any_number_of_layers(make_model, tmp_path, n_layers):
    model = make_model(dtype=torch.float32, n_layers=n_layers, attn_scale=1 / math.sqrt(2 * n_layers))
    bilens.save(model, tmp_path)
    assert_same(model, bilens.load(tmp_path))


@pytest.mark.parametrize("cfg", INEXPRESSIBLE, ids=str)
def test_saving_what_no_format_can_express_is_refused(make_model, tmp_path, cfg):
    with pytest.raises(ValueError, match="no published format can express this model"):
        bilens.save(make_model(dtype=torch.float32, **cfg), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_model_from_one_generation_is_not_written_as_another(make_model, tmp_path):
    model = make_model(dtype=torch.float32, norm="rms_gain_shift", attn_scale=1.0, mlp="gated", act="gelu")
    model.source = {"n_vocab": model.cfg.d_vocab}  # of 2024-06, whose only gate is relu; 2024-05 could express it
    with pytest.raises(ValueError, match="no published format"):
        bilens.save(model, tmp_path)


@pytest.mark.parametrize(
    ("cfg", "keys", "down"),
    [
        (
            {"mlp": "gated", "act": "silu", "attn_scale": 0.5},
            {"gate": "silu", "bilinear": True, "scale_attn": True},
            "p",
        ),
        ({"mlp": "plain", "act": "identity", "attn_scale": 1.0}, {"gate": None, "bilinear": False}, "p"),
        ({"mlp": "gated", "act": "relu", "norm": "rms_gain_shift"}, {"gate": True, "normalization": True}, "o"),
        ({"mlp": "plain", "act": "identity", "norm": "rms_gain_shift"}, {"gate": False, "bilinear": False}, "o"),
        ({"mlp": "bilinear", "norm": "rms_gain"}, {"mlp": "blp", "normalization": "rms", "norm_bias": False}, "o"),
        ({"mlp": "gated", "act": "gelu", "norm": "rms_gain_shift"}, {"mlp": "glp", "norm_bias": True}, "o"),
        ({"mlp": "plain", "act": "gelu", "norm": "rms_gain", "mlp_bias": (True, False)}, {"mlp": "mlp"}, "o"),
    ],
    ids=str,
)
def test_each_generation_is_written_in_its_own_words(make_model, tmp_path, cfg, keys, down):
    bilens.save(make_model(dtype=torch.float32, **{"attn_scale": 1.0, **cfg}), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {key: config.get(key, "absent") for key in keys} == keys
    assert f"transformer.h.0.mlp.{down}.weight" in load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("stored", "loaded"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_stored_dtypes_load_exactly(make_model, tmp_path, stored, loaded):
    model = make_model(dtype=stored)
    bilens.save(model, tmp_path)
    assert load_file(tmp_path / "model.safetensors")[DOWN].dtype == stored
    assert_same(model.to(loaded), bilens.load(tmp_path))


def test_sharded_checkpoint_loads_like_a_whole_one(saved):
    whole = bilens.load(saved)
    shard(saved)
    assert_same(whole, bilens.load(saved))


def shard(folder, **index):
    """Split the weights over two files with an index; `index` replaces what it says."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for part, half in enumerate((names[::2], names[1::2])):
        file = f"model-{part + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, folder / file)
        weight_map |= dict.fromkeys(half, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map} | index
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# -- what a loaded model is -------------------------------------------------------------------------------------------


def test_loaded_model_is_in_eval_mode_with_real_weights_and_gradients(saved):
    model = bilens.load(saved)
    assert not any(module.training for module in model.modules())
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    model(torch.arange(6)[None], return_type="loss").backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_argument_converts_the_stored_weights(saved, dtype):
    assert_same(bilens.load(saved).to(dtype), bilens.load(saved, dtype=dtype))


def test_device_argument_moves_every_weight(saved):
    assert {p.device.type for p in bilens.load(saved, device="meta").parameters()} == {"meta"}


def test_unknown_config_keys_are_listed_and_kept(saved, tmp_path):
    edit_config(saved, wandb_run="x1", rope_theta=5, _name_or_path="elsewhere", vocab_size=70)
    model = bilens.load(saved)
    assert model.ignored_keys == ("rope_theta", "wandb_run")
    bilens.save(model, tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["wandb_run"], config["rope_theta"], config["_name_or_path"]) == ("x1", 5, "elsewhere")


def test_config_of_only_what_is_required_loads(saved):
    model = bilens.load(saved)
    edit_config(
        saved, "architectures", "dtype", "bilinear", "gate", "bias", "normalization", "scale_attn", "attention2"
    )
    assert_same(model, bilens.load(saved))


def test_folder_without_tokenizer_loads_without_one(saved, make_model):
    (saved / "tokenizer.json").unlink()
    assert bilens.load(saved).tokenizer is None


@pytest.mark.parametrize("given", ["folder", "folder/tokenizer.json"])
def test_tokenizer_argument_names_a_folder_or_a_file(saved, tiny_tokenizer, tmp_path, given):
    (saved / "tokenizer.json").unlink()
    (tmp_path / "folder").mkdir()
    tiny_tokenizer.save(str(tmp_path / "folder" / "tokenizer.json"))
    assert bilens.load(saved, tokenizer=tmp_path / given).tokenizer.get_vocab() == tiny_tokenizer.get_vocab()


def test_published_tokenizer_gets_its_decoder_and_loses_padding_and_truncation(tiny_tokenizer, tmp_path):
    bare = Tokenizer.from_str(tiny_tokenizer.to_str())
    bare.enable_padding(length=9)
    bare.enable_truncation(3)
    text = json.loads(bare.to_str()) | {"decoder": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(text))
    read = read_tokenizer(tmp_path / "tokenizer.json")
    ids = read.encode("the cats sat on the mat").ids
    assert len(ids) == 7
    assert read.decode(ids) == "the cats sat on the mat"
    assert isinstance(read.decoder, decoders.WordPiece)


# -- what is refused --------------------------------------------------------------------------------------------------


def bad(value, dtype=torch.float32):
    weight = torch.ones(16, 24, dtype=dtype)
    weight[3, 5] = value
    return weight


@pytest.mark.parametrize(
    ("name", "weight", "says"),
    [
        (DOWN, None, ["[16, 24]", "missing", "it has transformer.h.1.mlp.w.weight"]),
        ("transformer.wte.weight", None, ["[vocab, d_model]", "missing"]),
        ("lm_head.weight", None, [", 16]", "missing"]),
        (DOWN, torch.zeros(24, 16), ["[16, 24]", "[24, 16]"]),
        ("transformer.wte.weight", torch.zeros(16), ["[vocab, d_model]", "[16]"]),
        ("lm_head.weight", torch.zeros(7, 16), [", 16]", "[7, 16]"]),
        ("transformer.h.0.mlp.w.bias", torch.zeros(48), ["[48]", "no place", "bias=(False, False)"]),
        ("transformer.h.0.n1.norm.weight", torch.zeros(16), ["[16]", "no place", "NormConfig(eps=1e-08, gain=False"]),
        ("transformer.h.2.mlp.p.weight", torch.zeros(16, 24), ["[16, 24]", "no place", "2 layers"]),
        ("stray", torch.zeros(1), ["[1]", "no place"]),
        (DOWN, bad(math.nan), ["must be finite", "1 of 384", "nan at [3, 5]"]),
        (DOWN, bad(math.inf), ["must be finite", "1 of 384", "inf at [3, 5]"]),
        (DOWN, bad(-math.inf, torch.bfloat16), ["must be finite", "-inf at [3, 5]"]),
        (DOWN, bad(7, torch.int64), ["floating point", "torch.int64"]),
        (DOWN, bad(True, torch.bool), ["floating point", "torch.bool"]),
        ("transformer.h.0.attn.rotary.inv_freq", torch.ones(4), ["10000^(-2i/8)", "n_head=2", "[1.0, 1.0, 1.0]"]),
        ("transformer.h.0.attn.rotary.inv_freq", torch.ones(2), ["4 rotary frequencies", "[2]"]),
    ],
)
def test_broken_tensors_are_refused(saved, name, weight, says):
    edit_tensors(saved, name, weight)
    message = refusal(saved)
    assert all(part in message for part in (str(saved / "model.safetensors"), name, *says)), message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_layer": 3}, ["model.safetensors", "transformer.h.2.", "is missing"]),
        ({"n_layer": 1}, ["model.safetensors", "transformer.h.1.", "no place", "1 layers"]),
        ({"n_head": 4}, ["model.safetensors", "rotary.inv_freq", "2 rotary frequencies", "n_head=4", "[4]"]),
        ({"n_head": 3}, ["config.json", "d_model=16, n_heads=3"]),
        ({"d_hidden": 12}, ["model.safetensors", "mlp.w.weight", "[24, 16]", "[48, 16]"]),
        ({"d_model": 32}, ["model.safetensors", "wte.weight", ", 32]", ", 16]"]),
        ({"bias": True}, ["model.safetensors", "mlp.w.bias", "[48]", "is missing"]),
        ({"attention2": True}, ["model.safetensors", "attn.qkv.weight", "[80, 16]", "[48, 16]"]),
        ({"bilinear": False}, ["model.safetensors", "mlp.w.weight", "[24, 16]", "[48, 16]"]),
        ({"n_layer": "2"}, ["config.json", "n_layer must be a positive integer, got '2'"]),
        ({"n_layer": 2.0}, ["config.json", "n_layer must be a positive integer, got 2.0"]),
        ({"n_layer": True}, ["config.json", "n_layer must be a positive integer, got True"]),
        ({"n_ctx": 0}, ["config.json", "n_ctx must be a positive integer, got 0"]),
        ({"d_model": None}, ["config.json", "d_model must be a positive integer, got None"]),
        ({"gate": "tanh"}, ["config.json", "gate must be one of", "'silu'", "got 'tanh'"]),
        ({"gate": ["relu"]}, ["config.json", "gate must be one of", "got ['relu']"]),
        ({"normalization": "layer"}, ["config.json", "normalization must be one of True, False, got 'layer'"]),
        ({"normalization": None}, ["config.json", "normalization must be one of True, False, got None"]),
        ({"scale_attn": 1}, ["config.json", "scale_attn must be one of True, False, got 1"]),
        ({"attention2": "yes"}, ["config.json", "attention2 must be one of True, False, got 'yes'"]),
        ({"bilinear": "yes"}, ["config.json", "bilinear must be one of True, False, got 'yes'"]),
        ({"mlp": "xlp"}, ["config.json", "mlp must be one of 'blp', 'glp', 'mlp', got 'xlp'"]),
        ({"mlp": "blp", "normalization": "layer"}, ["config.json", "normalization must be one of 'rms', None"]),
        ({"norm_bias": True}, ["config.json", "mlp must be one of 'blp', 'glp', 'mlp', got nothing"]),
        ({"n_vocab": 999}, ["config.json", "n_vocab is 999"]),
    ],
    ids=str,
)
def test_config_that_contradicts_itself_or_the_tensors_is_refused(saved, changes, says):
    edit_config(saved, **changes)
    message = refusal(saved)
    assert all(part in message for part in (str(saved), *says)), message


@pytest.mark.parametrize("key", ["n_layer", "n_head", "n_ctx", "d_model", "d_hidden"])
def test_config_without_a_size_is_refused(saved, key):
    edit_config(saved, key)
    assert f"{saved / 'config.json'}: {key} must be a positive integer, got nothing" in refusal(saved)


@pytest.mark.parametrize("generation", [{"norm": "rms_gain_shift"}, {"norm": "rms_gain"}], ids=str)
def test_vocabulary_that_contradicts_the_embedding_is_refused(make_model, tmp_path, generation):
    model = make_model(dtype=torch.float32, attn_scale=1.0, **generation)
    bilens.save(model, tmp_path)
    edit_config(tmp_path, n_vocab=model.cfg.d_vocab + 1)
    says = f"n_vocab is {model.cfg.d_vocab + 1}, but the embedding has {model.cfg.d_vocab} rows"
    assert refusal(tmp_path) == f"{tmp_path / 'config.json'}: {says}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "does not parse"),
        (b'{"n_layer": 2', "does not parse"),
        (b"\xff\xfe{}", "does not parse"),
        (b"[1, 2]", "must be a JSON object, got list"),
        (b"null", "must be a JSON object, got NoneType"),
    ],
)
def test_config_that_is_not_a_json_object_is_refused(saved, text, says):
    (saved / "config.json").write_bytes(text)
    message = refusal(saved)
    assert str(saved / "config.json") in message
    assert says in message


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_under_another_name_is_refused_and_never_unpickled(saved, tmp_path, zipped):
    torch.save({"trap": Trap(tmp_path / "sprung")}, saved / "model.safetensors", _use_new_zipfile_serialization=zipped)
    message = refusal(saved)
    assert str(saved / "model.safetensors") in message
    assert "is a pickle under another name; bilens reads safetensors only" in message
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("kept", [0, 4, 8, 200, 0.5, -1])
def test_truncated_file_is_refused(saved, kept):
    data = (saved / "model.safetensors").read_bytes()
    cut = int(kept * len(data)) if isinstance(kept, float) else kept
    (saved / "model.safetensors").write_bytes(data[:cut])
    message = refusal(saved)
    assert f"{saved / 'model.safetensors'} must be a safetensors file, but is damaged" in message


def test_folder_with_pickled_weights_only_is_refused(saved):
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    message = refusal(saved, FileNotFoundError)
    assert message.startswith(f"{saved} has no model.safetensors, only pytorch_model.bin: a pickle")
    assert "bilens reads safetensors only" in message


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_folder_without_a_file_it_must_have_is_refused(saved, file):
    (saved / file).unlink()
    message = refusal(saved, FileNotFoundError)
    assert message.startswith(f"{saved} has no {file} (it has ")
    assert "tokenizer.json" in message


def test_index_that_points_outside_the_folder_is_refused(saved, tmp_path):
    (saved / "model.safetensors").rename(tmp_path / "outside.safetensors")  # what it points at would load
    names = load_file(tmp_path / "outside.safetensors")
    for outside in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        index = {"weight_map": dict.fromkeys(names, outside)}
        (saved / "model.safetensors.index.json").write_text(json.dumps(index))
        message = refusal(saved)
        assert str(saved / "model.safetensors.index.json") in message
        assert f"names of files beside it, got {outside!r}" in message


@pytest.mark.parametrize(("weight_map", "got"), [(None, "None"), ([], "[]"), ({"a": 1}, "1"), ({"a": "a/b"}, "'a/b'")])
def test_index_without_a_weight_map_is_refused(saved, weight_map, got):
    shard(saved, weight_map=weight_map)
    message = refusal(saved)
    assert message.startswith(str(saved / "model.safetensors.index.json"))
    assert message.endswith(f"got {got}")


def test_missing_shard_is_refused(saved):
    shard(saved)
    (saved / "model-00002-of-00002.safetensors").unlink()
    assert f"{saved} has no model-00002-of-00002.safetensors" in refusal(saved, FileNotFoundError)


def test_tensor_missing_from_every_shard_is_refused(saved):
    edit_tensors(saved, DOWN, None)
    shard(saved)
    message = refusal(saved)
    assert f"tensor {DOWN} of shape [16, 24] is missing" in message
    assert str(saved / "model-00001-of-00002.safetensors") in message


def test_tensor_in_two_shards_is_refused(saved):
    shard(saved)
    first, second = (saved / f"model-0000{part}-of-00002.safetensors" for part in (1, 2))
    (name, weight), *_ = load_file(first).items()
    save_file(load_file(second) | {name: weight + 1}, second)
    message = refusal(saved)
    assert name in message
    assert str(first) in message
    assert str(second) in message


def test_tokenizer_larger_than_the_embedding_is_refused(saved):
    tokenizer = Tokenizer.from_file(str(saved / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens(["zebra"])
    tokenizer.save(str(saved / "tokenizer.json"))
    message = refusal(saved)
    assert f"tokenizer of {saved} has {size + 1} tokens, the embedding only {size} rows" in message


@pytest.mark.parametrize("text", ["", "{}", '{"model": {"type": "Psychic"}}'])
def test_broken_tokenizer_is_refused(saved, text):
    (saved / "tokenizer.json").write_text(text)
    assert f"{saved / 'tokenizer.json'} must be a tokenizers file, but does not parse" in refusal(saved)


def test_dtype_that_cannot_hold_the_weights_is_refused(saved):
    edit_tensors(saved, DOWN, bad(1e6))
    assert "must be finite in torch.float16" in refusal(saved, dtype=torch.float16)
    assert bilens.load(saved, dtype=torch.bfloat16).blocks[1].mlp.down[3, 5] == bad(1e6, torch.bfloat16)[3, 5]


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_dtype_that_is_not_floating_point_is_refused(saved, dtype):
    assert f"dtype must be one of torch.bfloat16, torch.float16, torch.float32, torch.float64, got {dtype}" == refusal(
        saved, ValueError, dtype=dtype
    )


# -- names ------------------------------------------------------------------------------------------------------------


def test_empty_name_is_refused():
    assert "name must be 'bilens-mini', a folder or a Hub repository" in refusal("", ValueError)


def test_file_instead_of_a_folder_is_refused(saved):
    message = refusal(saved / "model.safetensors", FileNotFoundError)
    assert (
        message
        == f"{saved / 'model.safetensors'} is a file; give the folder that holds config.json and model.safetensors"
    )


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "/no/where", "a/b/c", Path("no/where")])
def test_folder_that_does_not_exist_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(name, FileNotFoundError)
    assert f"no folder '{name}'" in message
    assert "did you mean" not in message


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("bilens-mni", "bilens-mini"),
        ("bilens_mini", "bilens-mini"),
        ("Bilens-Mini", "bilens-mini"),
        ("ts-mediun", "tdooms/ts-medium"),
        ("fw-small", "tdooms/fw-small"),
    ],
)
def test_typo_is_answered_with_the_name_that_was_meant(typo, meant):
    assert refusal(typo, FileNotFoundError).endswith(f"did you mean {meant!r}?")


@pytest.mark.parametrize("name", ["bilens-mini", "folder"])
def test_revision_of_a_folder_is_refused(saved, name):
    assert "got 'v1'" in refusal(saved if name == "folder" else name, ValueError, revision="v1")


# -- what is written --------------------------------------------------------------------------------------------------


def test_loading_writes_nothing(saved, tmp_path):
    before, entries = contents(tmp_path), {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    bilens.load(saved)
    assert contents(tmp_path) == before
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == entries


def test_saving_writes_config_weights_and_tokenizer_and_nothing_else(make_model, tmp_path):
    bilens.save(make_model(dtype=torch.float32), tmp_path / "deep" / "model")
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    files = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    assert written == [f"deep/model/{file}" for file in files]
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["model"]


def test_saved_files_can_be_read_by_whom_other_new_files_can(saved):
    (saved / "other").touch()
    assert {file.stat().st_mode for file in saved.iterdir()} == {(saved / "other").stat().st_mode}


def test_saving_over_a_checkpoint_leaves_a_model_loaded_from_it_alone(saved, make_model):
    first = bilens.load(saved)
    kept = {name: weight.clone() for name, weight in first.state_dict().items()}
    (saved / "notes.txt").write_text("mine")
    bilens.save(make_model(seed=1, dtype=torch.float32), saved)
    assert all(torch.equal(weight, kept[name]) for name, weight in first.state_dict().items())
    assert_same(make_model(seed=1, dtype=torch.float32), bilens.load(saved))
    assert sorted(p.name for p in saved.iterdir()) == [
        "config.json",
        "model.safetensors",
        "notes.txt",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_model_can_be_saved_where_it_came_from(saved):
    model = bilens.load(saved)
    with torch.no_grad():
        model.blocks[0].mlp.p.weight.mul_(2)
    changed = model.blocks[0].mlp.down.clone()
    assert not torch.equal(bilens.load(saved).blocks[0].mlp.down, changed)
    bilens.save(model, saved)
    assert torch.equal(bilens.load(saved).blocks[0].mlp.down, changed)


def test_nothing_of_an_earlier_checkpoint_is_read_again(saved, make_model):
    shard(saved)
    model = make_model(seed=1, dtype=torch.float32, tokenizer=None)
    bilens.save(model, saved)
    again = bilens.load(saved)
    assert_same(model, again)
    assert again.tokenizer is None


@pytest.mark.parametrize("flaw", ["weight", "tokenizer"])
def test_failed_save_leaves_the_folder_as_it_was(saved, make_model, flaw):
    before = contents(saved)
    model = make_model(seed=1, dtype=torch.float32)
    if flaw == "weight":
        with torch.no_grad():
            model.blocks[1].mlp.p.weight[3, 5] = math.nan
    else:  # fails after config and weights are written
        model.tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
        model.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(object())
    with pytest.raises(Exception, match=r"blocks\.1\.mlp\.p\.weight must be finite|cannot be serialized"):
        bilens.save(model, saved)
    assert contents(saved) == before
    assert not [path for path in saved.iterdir() if path.is_dir()]


def test_tied_and_transposed_weights_are_written_as_they_are(make_model, tmp_path):
    model = make_model(dtype=torch.float32)
    model.unembed.weight = model.embed.weight
    model.blocks[0].mlp.p.weight = torch.nn.Parameter(torch.randn(24, 16, generator=torch.Generator()).T)
    bilens.save(model, tmp_path)
    assert_same(model, bilens.load(tmp_path))


def test_read_only_folder_loads(saved, tmp_path):
    locked = tmp_path / "locked"
    shutil.copytree(saved, locked)
    locked.chmod(0o555)
    try:
        assert_same(bilens.load(saved), bilens.load(locked))
    finally:
        locked.chmod(0o755)
