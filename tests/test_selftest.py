"""The self-test: it passes for every kind of model, and finds what is broken."""

import json

import pytest
import torch
from families import build
from transformer_lens.hook_points import HookPoint

import bilens
from bilens.__main__ import main
from bilens.models.attention import Attention
from bilens.models.blocks import Block
from bilens.models.mlp import MLP
from bilens.models.selftest import selftest
from bilens.models.transformer import BilinearTransformer

KINDS = {
    "bilinear": {},
    "no norms, biases": {"norm": "none", "mlp_bias": (True, True), "attn_bias": (True, True)},
    "gated, grouped heads, window": {"mlp": "gated", "act": "gelu", "n_key_value_heads": 1, "window": 4},
    "plain": {"mlp": "plain", "act": "relu"},
    "linear": {"mlp": "plain", "act": "identity", "norm": "rms_gain_shift"},
    "softmax-free": {"attention": "bilinear", "tied": True},
}
FAMILIES = ("qwen3", "olmo2", "gemma2", "gemma3", "nanochat", "simplestories", "bilinear gemma3")


def generator():
    return torch.Generator().manual_seed(0)


def failed(model):
    return {check.name: check.found for check in selftest(model, generator()) if not check.passed}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_passes(make_model, kind):
    model = make_model(dtype=torch.float32, n_ctx=16, **KINDS[kind])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert failed(model) == {}
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_passes(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    build(transformers, name).save_pretrained(tmp_path)
    assert failed(bilens.load(tmp_path)) == {}


def test_degrees_are_those_of_the_shape(make_model):
    found = {check.name: check.found for check in selftest(make_model(attention="bilinear"), generator())}
    assert "Degree(5," in found["degree of blocks.1.attn"]
    assert "Degree(2," in found["degree of blocks.1.mlp"]
    assert "1 of 2 blocks: measured Degree(10," in found["degree of the model, norms held"]
    assert found["degree of the model, norms held"].endswith("all: degree 100")


def test_a_hook_that_nothing_reads_is_named(make_model, monkeypatch):
    placed = Attention._placed

    def deaf(self, side, heads, rotary):
        getattr(self, f"hook_{side}")(heads)  # what it returns is thrown away
        return self.hook_rot_q(heads) if side == "q" else placed(self, side, heads, rotary)

    monkeypatch.setattr(Attention, "_placed", deaf)
    found = failed(make_model())
    assert "blocks.0.attn.hook_q is not read; blocks.1.attn.hook_q is not read" in found["and is read where it says"]


def test_a_hook_that_does_not_fire_is_named(make_model):
    model = make_model()
    model.blocks[1].hook_extra = HookPoint()
    model.setup()
    assert failed(model) == {"every hook fires": "silent: blocks.1.hook_extra"}


def test_a_stream_with_something_added_is_found(make_model, monkeypatch):
    forward = Block.forward

    def leak(self, x, frame, past=None):
        x, past, frame = forward(self, x, frame, past)
        return x + 1e-6, past, frame

    monkeypatch.setattr(Block, "forward", leak)
    assert set(failed(make_model())) == {"the stream is the sum of what is added"}


def test_a_tensor_that_is_another_is_found(make_model, monkeypatch):
    forward = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x: forward(self, x) + 1)
    assert set(failed(make_model())) == {"tensor() computes what the MLP does"}


def test_a_mask_that_is_not_heeded_is_found(make_model, monkeypatch):
    monkeypatch.setattr(BilinearTransformer, "check_mask", lambda self, mask, input: None)
    assert set(failed(make_model())) == {"a padded text gives what it gives alone"}


def test_the_command_prints_a_table_and_its_exit_code_tells(make_model, tmp_path, capsys, monkeypatch):
    bilens.save(make_model(dtype=torch.float32), tmp_path / "good")
    assert main(["check", str(tmp_path / "good"), "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["passed"]
    assert "every hook fires" in told.err
    monkeypatch.setattr(Attention, "W_O", property(lambda self: 2 * self.o.weight.T.unflatten(0, (-1, 8))))
    assert main(["check", str(tmp_path / "good")]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "none")]) == 1
    assert "bilens: no folder" in capsys.readouterr().err
