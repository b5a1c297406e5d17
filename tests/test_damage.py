"""Damaged files that were met, one of each kind: refused by file and key, before memory or time is spent."""

import json
import os
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import bilens
from bilens import circuits, images
from bilens.models.files import casts, fingerprint
from bilens.models.sources import CheckpointError
from bilens.saes import FeatureCards, of_arrays
from bilens.tensor.keeping import read_state, write_state


@pytest.fixture
def saved(make_model, tmp_path):
    bilens.save(make_model(dtype=torch.float32), tmp_path / "model")
    return tmp_path / "model"


def rewrite(path, change):
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_layer": 10**9}, "n_layer must be at most 10000, got 1000000000"),
        ({"n_layer": 9_000}, "layers must be at most"),
        ({"d_model": 10**9}, "d_model must be at most"),
        ({"d_hidden": 2 * 10**9}, "d_hidden must be at most"),
        ({"d_hidden": 10**12}, "d_hidden must be at most 2147483647"),
        ({"n_head": 10**9}, "config.json"),
        ({"n_ctx": 1e100}, "n_ctx must be a positive integer"),
        ({"n_ctx": 10**100}, "n_ctx must be at most"),
        ({"vocab_size": -1}, "vocab_size must be a positive integer"),
        ({"vocab_size": 10**9}, "vocab_size is 1000000000, but the embedding has"),
        ({"model_type": []}, "model_type must be one of"),
        ({"n_layer": [[]]}, "n_layer must be a positive integer"),
    ],
)
def test_sizes_and_types_of_a_config(saved, changes, says):
    rewrite(saved / "config.json", lambda told: told.update(changes))
    if "model_type" in changes:
        rewrite(saved / "config.json", lambda told: told.update(hidden_size=16))
    with pytest.raises(CheckpointError, match=says) as refusal:
        bilens.load(saved)
    assert "config.json" in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested"),
        ('{"a": ' + "[" * 60 + "]" * 60 + "}", "nested more than 50 deep"),
        ('{"n_layer": 1, "n_layer": 2}', "n_layer must stand there once, got it 2 times"),
        ('{"n_layer": ' + "9" * 5000 + "}", "does not parse"),
        (" " * (1 << 24) + "{}", "of at most 16777216 bytes"),
    ],
)
def test_texts_of_a_config(saved, text, says):
    (saved / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config\.json.*{says}"):
        bilens.load(saved)


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("deep", torch.zeros([1] * 70), "tensor deep must have at most 8 dimensions, got 70"),
        ("x" * 300, torch.zeros(1), "at most 200 characters, got 300"),
        ("transformer.wte.weight", torch.full((2, 2), 1e30), "at most 4.29e.09 for finite results"),
        ("transformer.wte.weight", torch.full((2, 2), torch.nan), "must be finite"),
    ],
)
def test_tensors(saved, name, tensor, says):
    tensors = load_file(saved / "model.safetensors") | {name: tensor}
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"model\.safetensors.*{says}"):
        bilens.load(saved)


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "nowhere"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_something_else_in_the_place_of_a_file(saved, name, kind):
    path = saved / name
    path.unlink()
    make = {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "loop": lambda: path.symlink_to(name)}
    make.get(kind, lambda: path.symlink_to("no such file"))()
    with pytest.raises(CheckpointError, match=rf"{name} must be a file, but"):
        bilens.load(saved)


def test_a_device_that_is_not_there(saved):
    for device in ("nope", "vulkan:99"):
        with pytest.raises(ValueError, match="device must be one that torch has here"):
            bilens.load(saved, device=device)


@pytest.mark.parametrize("kind", ["elsewhere", "unknown", "unnamed"])
def test_an_index_that_contradicts_its_shards(saved, kind):
    tensors = load_file(saved / "model.safetensors")
    first, *rest = sorted(tensors)
    save_file({first: tensors[first]}, saved / "a.safetensors")
    save_file({name: tensors[name] for name in rest}, saved / "b.safetensors")
    (saved / "model.safetensors").unlink()
    where = dict.fromkeys(rest, "b.safetensors") | {first: "b.safetensors"}
    if kind != "elsewhere":
        where[first] = "a.safetensors"
        where.update({"x": "a.safetensors"} if kind == "unknown" else {})
    if kind == "unnamed":
        del where[rest[0]]
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises((CheckpointError, FileNotFoundError), match="weight_map must"):
        bilens.load(saved)


# -- SAEs, cards ------------------------------------------------------------------------------------------------------

HOOKS = ("blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out")


@pytest.fixture
def stored(make_model, tmp_path, unchecked):
    """Return a model, and a folder with SAEs and cards of it."""
    model = make_model(dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    saes = {hook: of_arrays(torch.randn(20, 16, generator=generator), hook=hook, k=4) for hook in HOOKS}
    for hook, sae in saes.items():
        sae.cfg.metadata.settings = {"model": fingerprint(model), "casts": casts(model)}
        bilens.saes.save(sae, tmp_path / "saes" / hook)
    for hook, cards in bilens.saes.collect(model, saes, ["the cat sat", "a dog ran on the mat"]).items():
        cards.save(tmp_path / "saes" / hook / "cards.safetensors")
    return model, tmp_path / "saes"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"k": 21}, "k must lie between 1 and 20"),
        ({"k": 0}, "k must lie between 1 and 20"),
        ({"d_sae": 10**9}, "W_dec must be"),
        ({"d_in": None}, "d_in must be a positive integer"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"metadata": []}, "metadata must be an object"),
        ({"activation": "sigmoid"}, "activation must be one of"),
        ({"apply_b_dec_to_input": 3}, "apply_b_dec_to_input must be true or false"),
        ({"architecture": "none"}, "none"),
    ],
)
def test_configs_of_saes(stored, change, says):
    folder = stored[1]
    rewrite(folder / HOOKS[0] / "cfg.json", lambda told: told.update(change))
    with pytest.raises(CheckpointError, match=says) as refusal:
        bilens.saes.load(folder, HOOKS[0])
    assert HOOKS[0] in str(refusal.value)


@pytest.mark.parametrize(
    ("file", "name", "value", "says"),
    [
        ("sae_weights", "W_enc", torch.full((16, 20), torch.inf), "must be finite"),
        ("sae_weights", "W_enc", torch.ones((16, 20), dtype=torch.int8), "must be floating point"),
        ("sae_weights", "W_dec", torch.ones((20, 15)), "must be"),
        ("cards", "mean", torch.full((20,), torch.nan), "mean must lie between"),
        ("cards", "density", torch.full((20,), 2.0), "density must lie between 0 and 1"),
        ("cards", "tokens", torch.full((20, 20), 10**6), "tokens must lie between 0"),
        ("cards", "contexts.values", torch.zeros(20, 3), "contexts.values must be"),
    ],
)
def test_tensors_of_saes_and_cards(stored, file, name, value, says):
    model, folder = stored
    path = folder / HOOKS[0] / f"{file}.safetensors"
    from safetensors import safe_open

    with safe_open(path, "pt") as header:
        about = header.metadata()
    save_file(load_file(path) | {name: value}, path, about)
    with pytest.raises(CheckpointError, match=says) as refusal:
        bilens.saes.load(folder, HOOKS[0]) if file == "sae_weights" else FeatureCards.load(folder, HOOKS[0], model)
    assert path.name in str(refusal.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_that_was_cast_keeps_its_saes_and_cards(stored, dtype):
    model, folder = stored
    cast = bilens.BilinearTransformer(model.cfg, model.tokenizer).eval()
    cast.load_state_dict(model.state_dict())
    lens = circuits.FeatureLayer.load(cast.to(dtype), 1, folder)
    assert lens.inp_cards is not None
    assert circuits.outliers(lens, k=2).values.isfinite().all()
    with torch.no_grad():
        cast.embed.weight[3] += 0.5
    with pytest.raises(ValueError, match="other weights"):
        circuits.FeatureLayer.load(cast, 1, folder)


# -- states, images ---------------------------------------------------------------------------------------------------


def test_a_state_with_a_right_checksum_and_wrong_numbers(make_model, tmp_path):
    B = make_model().blocks[0].mlp.tensor().detach()
    whole = bilens.top_interactions(B, 9, checkpoint=tmp_path)
    path = next(tmp_path.glob("rank*"))
    tensors, about = read_state(path)
    for change, says in (({"all.size": torch.nan}, "size"), ({"all.left": 10**6}, "left"), ({"next": -3}, "next")):
        key, value = next(iter(change.items()))
        changed = {key: torch.full_like(tensors[key], value)} if key in tensors else {}
        write_state(path, tensors | changed, about | ({} if changed else change))
        with pytest.raises(ValueError, match=rf"is damaged: .*{says} must .*; delete it"):
            bilens.top_interactions(B, 9, checkpoint=tmp_path)
    path.unlink()
    assert torch.equal(bilens.top_interactions(B, 9, checkpoint=tmp_path).value, whole.value)


@pytest.mark.parametrize(
    ("y", "says"),
    [
        (np.array([0, 10**8]), "between 0 and 99999"),
        (np.array([0, 0.5]), "whole numbers"),
        (np.array([0, -1]), "between 0"),
        (np.array([0, np.nan]), "whole numbers"),
        (np.array([0]), "one for each"),
    ],
)
def test_labels_of_images(tmp_path, y, says):
    np.savez(tmp_path / "a.npz", x_train=np.zeros((2, 3, 3), np.uint8), y_train=y)
    with pytest.raises(ValueError, match=rf"a\.npz.*{says}"):
        images.sets.load(tmp_path / "a.npz")


def test_files_of_images(tmp_path):
    path = tmp_path / "a.npz"
    x, y = np.zeros((0, 3, 3), np.uint8), np.zeros(0, int)
    np.savez(path, x_train=x, y_train=y)
    with pytest.raises(ValueError, match="none of them zero"):
        images.sets.load(path)
    np.savez_compressed(path, x_train=np.zeros((2**17, 32, 32), np.uint8), y_train=np.zeros(2**17, np.uint8))
    with pytest.raises(ValueError, match="must be images that fit memory"):
        images.sets.load(path)
    with zipfile.ZipFile(path, "w") as archive:  # a header that lies
        head = b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999, 28, 28), }"
        archive.writestr("x_train.npy", head.ljust(127) + b"\n")
        archive.writestr("y_train.npy", head.ljust(127) + b"\n")
    with pytest.raises(ValueError, match="as large as its header says"):
        images.sets.load(path)
