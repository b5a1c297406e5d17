"""Files that are whole or not there; fingerprints that follow the values of weights and nothing else."""

import copy
import gc
import hashlib
import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from bilens.models.files import fingerprint
from bilens.tensor.keeping import atomic_write


def test_text_bytes_and_safetensors_arrive(tmp_path):
    with atomic_write(tmp_path / "new folder" / "a.json") as path:
        path.write_text(json.dumps([1]))
        assert not (tmp_path / "new folder" / "a.json").exists()
    with atomic_write(str(tmp_path / "b.bin")) as path:
        path.write_bytes(b"\x00\xff")
    with atomic_write(tmp_path / "c.safetensors") as path:
        save_file({"x": torch.arange(3)}, path)
    assert json.loads((tmp_path / "new folder" / "a.json").read_text()) == [1]
    assert (tmp_path / "b.bin").read_bytes() == b"\x00\xff"
    assert load_file(tmp_path / "c.safetensors")["x"].tolist() == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.json", "b.bin", "c.safetensors", "new folder"]


def test_all_files_get_the_same_mode(tmp_path):
    (tmp_path / "plain").touch()
    with atomic_write(tmp_path / "weights") as path:
        save_file({"x": torch.ones(1)}, path)
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("before", ["old", None])
def test_a_failed_write_leaves_what_was_there(tmp_path, before):
    target = tmp_path / "file"
    if before is not None:
        target.write_text(before)

    def write():
        with atomic_write(target) as path:
            path.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [path.read_text() for path in tmp_path.iterdir()] == ([] if before is None else [before])


def test_a_float32_fingerprint_is_the_one_in_stored_files(make_model):
    model = make_model(dtype=torch.float32)
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode() + hashlib.sha256(weight.numpy().tobytes()).hexdigest().encode())
    assert fingerprint(model) == digest.hexdigest()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_equal_values_have_one_fingerprint(make_model, half):
    model = make_model(dtype=half)
    wider = {fingerprint(copy.deepcopy(model).to(dtype)) for dtype in (half, torch.float32, torch.float64)}
    assert wider == {fingerprint(model)}


def test_other_values_have_another(make_model):
    model = make_model()  # in float64, with digits that float32 does not have
    assert fingerprint(model) != fingerprint(copy.deepcopy(model).float())
    assert fingerprint(model) != fingerprint(make_model(seed=1))
    linear, other = torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2))
    other[0].load_state_dict(linear.state_dict())
    assert fingerprint(linear) != fingerprint(other)  # other names


def change_in_place(model):
    with torch.no_grad():
        model.embed.weight[3, 5] += 1


def replace_parameter(model):
    model.embed.weight = torch.nn.Parameter(model.embed.weight.detach() + 1)


def load_another(model):
    model.load_state_dict({name: weight + 1 for name, weight in model.state_dict().items()}, assign=True)


def narrow(model):
    model.float()


@pytest.mark.parametrize("change", [change_in_place, replace_parameter, load_another, narrow])
def test_a_change_is_seen(make_model, change):
    model = make_model()
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) == fingerprint(copy.deepcopy(model)) != before


def test_unchanged_weights_are_hashed_once(make_model, monkeypatch):
    model = make_model()
    first = fingerprint(model)
    monkeypatch.setattr(hashlib, "sha256", None)
    assert fingerprint(model) == first


def test_a_remembered_model_can_go(make_model):
    model = make_model()
    fingerprint(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
