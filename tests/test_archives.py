"""Torch archives: tensors are read, by way of a safetensors copy; anything else is refused and never executed."""

import json
import logging
import os
import shutil
import zipfile
from collections import OrderedDict

import pytest
import torch
from hub_server import contents
from test_elriggs import FAMILIES, FLAT, SIZES, flat_shapes, gpt_shapes, random_state, write

import bilens
from bilens import CheckpointError
from bilens.models.archives import check_archive, read_archive

CONFIG = SIZES | FAMILIES["two branches, bilinear"]


pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def state():
    return random_state(gpt_shapes(CONFIG))


@pytest.fixture
def folder(tmp_path, state):
    return write(tmp_path / "model", CONFIG, state)


def refusal(folder, error=CheckpointError, **kwargs):
    with pytest.raises(error) as caught:
        bilens.load(folder, **kwargs)
    return str(caught.value)


def same(one, other):
    assert one.cfg == other.cfg
    state = other.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


# -- the copy ---------------------------------------------------------------------------------------------------------


def test_the_first_time_writes_a_copy_and_says_so(folder, home, caplog):
    before = contents(folder)
    first = bilens.load(folder)
    (copy,) = (home / "bilens").rglob("*.safetensors")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"{folder / 'pytorch_model.bin'}: wrote a safetensors copy" in caplog.text
    assert str(copy) in caplog.text
    caplog.clear()
    same(bilens.load(folder), first)
    assert caplog.records == []
    assert contents(folder) == before


def test_the_copy_is_what_is_read(folder, home, monkeypatch):
    bilens.load(folder)
    monkeypatch.setattr(torch, "load", None)
    same(bilens.load(folder), bilens.load(folder))


def test_an_archive_that_changes_is_read_anew(folder, state):
    first = bilens.load(folder)
    stat = (folder / "pytorch_model.bin").stat()
    torch.save({name: tensor + 1 for name, tensor in state.items()}, folder / "pytorch_model.bin")
    os.utime(folder / "pytorch_model.bin", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as copying with times kept does
    assert (folder / "pytorch_model.bin").stat().st_size == stat.st_size
    assert torch.equal(bilens.load(folder).W_E, first.W_E + 1)


def test_without_room_for_a_copy_the_archive_is_read_itself(folder, home, caplog):
    expected = bilens.load(folder)
    shutil.rmtree(home)
    home.write_text("a file where the folder would be")
    caplog.clear()
    same(bilens.load(folder), expected)
    assert "no safetensors copy could be written" in caplog.text


def test_half_precision_is_widened_and_shared_memory_told_apart(folder, state):
    whole = torch.randn(4, 16)
    mixed = {"a": whole, "b": whole[1:3], "c": torch.randn(3).bfloat16(), "d": torch.tensor(2.0), "e": whole.T}
    torch.save(mixed, folder / "pytorch_model.bin")
    for _ in range(2):
        read = {name: tensor for name, (tensor, _) in read_archive(folder / "pytorch_model.bin", None).items()}
        assert {name: tensor.dtype for name, tensor in read.items()} == dict.fromkeys(mixed, torch.float32)
        assert all(torch.equal(read[name], tensor.float()) for name, tensor in mixed.items())


def test_safetensors_come_first(folder, tmp_path):
    model = bilens.load(folder)
    bilens.save(model, tmp_path / "other")
    (tmp_path / "other" / "pytorch_model.bin").write_bytes(b"not read")
    same(bilens.load(tmp_path / "other"), model)


# -- several checkpoints ----------------------------------------------------------------------------------------------


@pytest.fixture
def several(tmp_path):
    config = FLAT | {"norm_type": "tok0_batch", "use_bias_qk": True}
    states = [random_state(flat_shapes(config), seed) for seed in range(2)]
    folder = tmp_path / "several"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model": config}))
    for step, state in enumerate(states):
        held = {"step": step, "model_state_dict": OrderedDict(state), "scheduler_state_dict": {"lr_lambdas": [None]}}
        torch.save(held, folder / "checkpoints" / f"step_0000{step}.pt")
    return folder, states


def test_one_of_several_is_named(several):
    folder, states = several
    for step, state in enumerate(states):
        model = bilens.load(folder, checkpoint=f"step_0000{step}.pt")
        assert torch.equal(model.W_E, state["embed.weight"])
    assert "checkpoint must name one of the 2 of" in refusal(folder, ValueError)
    assert "did you mean step_00001.pt" in refusal(folder, FileNotFoundError, checkpoint="step_0001.pt")
    assert "must be the name of a file" in refusal(folder, ValueError, checkpoint="../step_00001.pt")
    (folder / "checkpoints" / "step_00000.pt").unlink()
    assert torch.equal(bilens.load(folder).W_E, states[1]["embed.weight"])


# -- what is refused --------------------------------------------------------------------------------------------------


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["trap", "transformer.wte.weight"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_and_never_run(folder, state, tmp_path, home, name, zipped):
    held = state | {name: Trap(tmp_path / "sprung")}
    torch.save(held, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    message = refusal(folder)
    assert str(folder / "pytorch_model.bin") in message
    assert "asks for posix.mkdir; nothing was executed" in message if zipped else "is no zip file" in message
    assert not (tmp_path / "sprung").exists()
    assert not home.exists()


@pytest.mark.parametrize("asked", [b"cos\nsystem\n(S'true'\ntR.", b"\x80\x04\x8c\x02os\x8c\x06system\x93."])
def test_a_pickle_that_imports_by_other_means_is_refused(folder, asked):
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", asked)
    with pytest.raises(CheckpointError, match=r"asks for (os\.system|STACK_GLOBAL); nothing was executed"):
        check_archive(path)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"step": 3}, "'step' is int 3"),
        ({"note": "text"}, "'note' is str 'text'"),
        ({"more": {"a": torch.ones(2)}}, "'more' is dict"),
        ({7: torch.ones(2)}, "7 is Tensor"),
        ({"count": torch.ones(2, dtype=torch.long)}, "count must be floating point, got torch.int64"),
        ({"extra": torch.ones(2)}, r"tensor extra of shape \[2\] has no place"),
        ({"transformer.h.1.lambdas": torch.ones(3)}, r"transformer.h.1.lambdas must have shape \[2\]"),
        ({"transformer.h.0.attn.lamb": torch.ones(1)}, r"transformer.h.0.attn.lamb must have shape \[\] .* got \[1\]"),
        ({"lm_head.weight": torch.full((23, 16), torch.nan)}, "lm_head.weight must be finite"),
        ({"model_state_dict": {"a": torch.ones(2)}}, "'model_state_dict' is dict"),
        ({"size": torch.Size([2])}, "asks for torch.Size; nothing was executed"),
    ],
)
def test_anything_but_the_tensors_of_the_model_is_refused(folder, state, added, message):
    torch.save(state | added, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        bilens.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 4}, "tensor transformer.h.3.lambdas of shape .* is missing"),
        ({"n_layer": 2}, "transformer.h.2.* has no place"),
        ({"vocab_size": 24}, "vocab_size is 24, but the embedding has 23 rows"),
        ({"expansion_factor": 3}, r"Left.weight must have shape \[48, 16\] .* got \[32, 16\]"),
        ({"bilinear": False}, "c_fc.weight of shape .* is missing"),
        ({"bilinear_attn": False}, "c_(k2|q2).* has no place"),
        ({"squared_attn": False}, r"bilinear_lamb of shape \[\] is missing"),
        ({"n_head": 3}, "d_model must be an even multiple of n_heads"),
        ({"squared_attn": "yes"}, "squared_attn must be one of True, False, got 'yes'"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(folder, changes, message):
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(CheckpointError, match=message):
        bilens.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_type": "rmsnorm"}, "norm_type must be one of 'layernorm', 'tok0_batch', got 'rmsnorm'"),
        ({"attn_type": "softmax"}, "attn_type must be one of 'bilinear', got 'softmax'"),
        ({"use_rmsnorm_qk": True}, "use_rmsnorm_qk must be one of False, got True"),
        ({"norm_places": ["pre_attn"]}, r"norm_places must be \['pre_unembed'\], got \['pre_attn'\]"),
        ({"use_bias_qk": False}, r"[qk][12]\.bias .* has no place"),
        ({"norm_type": "layernorm"}, "final_norm.weight .* is missing"),
    ],
)
def test_attention_alone_that_cannot_be_represented_is_refused(tmp_path, changes, message):
    config = FLAT | {"norm_type": "tok0_batch", "use_bias_qk": True}
    folder = write(tmp_path / "flat", config, random_state(flat_shapes(config)))
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=message):
        bilens.load(folder)


def test_a_batch_norm_must_be_whole(tmp_path):
    config = FLAT | {"norm_type": "layernorm"}
    state = random_state(flat_shapes(config))
    del state["layers.1.bn_k2.running_var"]
    assert "tensor layers.1.bn_k2.running_var of shape [16] is missing" in refusal(write(tmp_path / "a", config, state))


@pytest.mark.parametrize("kept", [0, 100, 0.5, -1])
def test_a_damaged_archive_is_refused(folder, kept):
    data = (folder / "pytorch_model.bin").read_bytes()
    cut = int(kept * len(data)) if isinstance(kept, float) else kept
    (folder / "pytorch_model.bin").write_bytes(data[:cut])
    assert "must be a torch archive of tensors only, but is no zip file" in refusal(folder)


def test_an_archive_with_code_beside_the_tensors_is_refused(folder):
    with zipfile.ZipFile(folder / "pytorch_model.bin", "a") as archive:
        archive.writestr("pytorch_model/code/__torch__.py", "raise SystemExit")
    assert "but it holds pytorch_model/code/__torch__.py" in refusal(folder)
