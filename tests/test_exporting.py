"""Models written as Llamas: transformers' own classes, and what stands on them, compute what the model does."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import bilens
from bilens import EmbedConfig, NormConfig, QKNormConfig, UnembedConfig
from bilens.models.exporting import as_llama
from bilens.models.rotary import Rope

transformers = pytest.importorskip("transformers")

PUBLISHED = Path(__file__).parents[1] / "../shared/fixtures/published-format"
TEXT = "the big dog sat on the mat"
VARIANTS = {
    "bilinear": {"attn_scale": 0.3},
    "biases": {"mlp_bias": (True, True), "attn_bias": (True, True), "attn_scale": 0.3},
    "query and key biases": {"attn_bias": ("qk", False)},
    "bias on the way in": {"mlp_bias": (True, False)},
    "no norm": {"norm": "none"},
    "gains": {"norm": "rms_gain", "eps": 1e-6},
    "gated": {"mlp": "gated", "act": "silu"},
    "plain": {"mlp": "plain", "act": "relu"},
    "plain with biases": {"mlp": "plain", "act": "gelu", "mlp_bias": (True, True)},
    "identity": {"mlp": "plain", "act": "identity"},
    "squared": {"mlp": "squared", "mlp_bias": (True, False)},
    "shared heads": {"n_heads": 4, "n_key_value_heads": 2, "attn_bias": (True, False), "score_scale": 0.7},
    "reversed rotation": {"rope": Rope(500.0, "default", reverse=True), "attn_bias": (True, True)},
    "stretched rotation": {"rope": Rope(kind="llama3", factor=4.0, original_ctx=16, turns=(1.0, 4.0))},
    "tied": {"tied": True},
    "tied, scaled and normed embeddings": {"tied": True, "embed": EmbedConfig(3.0, NormConfig(1e-5))},
    "window as long as the context": {"window": 32},
}


def shifted(make_model, **options):
    """A model whose norms have shifts, the last one's zero: a Llama's logits have no bias."""
    model = make_model(norm="rms_gain_shift", **options)
    model.ln_final.bias.data.zero_()
    return model


@pytest.fixture(params=[*VARIANTS, "shifts"])
def model(request, make_model):
    return shifted(make_model) if request.param == "shifts" else make_model(**VARIANTS[request.param])


@pytest.fixture
def ids(make_model):
    return torch.randint(3, make_model().cfg.d_vocab, (2, 20), generator=torch.Generator().manual_seed(1))


def quietly(cls, folder):
    transformers.utils.logging.disable_progress_bar()
    return cls.from_pretrained(folder)


@torch.no_grad()
def test_every_model_that_a_llama_can_compute_is_one(model, ids, tmp_path):
    logits = model(ids)
    assert (as_llama(model)(ids) - logits).abs().max() <= 1e-12 * logits.abs().max()
    single = model.float()
    bilens.save(single, tmp_path, layout="llama")
    logits, back = single(ids), bilens.load(tmp_path)
    assert torch.equal(back(ids), as_llama(single)(ids))
    assert back.has_bos
    theirs = quietly(transformers.AutoModelForCausalLM, tmp_path)
    assert type(theirs) is transformers.LlamaForCausalLM
    assert (theirs(ids).logits - logits).abs().max() <= 2e-6 * max(logits.abs().max(), 10)
    again = tmp_path / "again"
    bilens.save(back, again)
    assert (again / "config.json").read_text() == (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"attention": "bilinear"}, "attention.kind must be 'softmax', got 'bilinear'"),
        ({"qk_norm": QKNormConfig()}, "attention.qk_norm must be None"),
        ({"window": 8}, "attention.window must be None or n_ctx=32 at least, got 8"),
        ({"value_residual": True}, "attention.value_residual must be False, got True"),
        ({"norm": "rms_gain_shift"}, "ln_final.bias must be zero"),
        ({"rope": Rope(tables="bfloat16")}, "attention.rope.tables must be 'float32', got 'bfloat16'"),
        ({"unembed": UnembedConfig(cap=30.0)}, "unembed.cap must be None, got 30.0"),
        ({"unembed": UnembedConfig(norm=NormConfig(1e-3))}, "unembed.norm must have the eps of norm"),
        ({"mlp": None}, "mlp must be there, got None"),
    ],
    ids=str,
)
def test_what_stands_in_the_way_is_named_and_nothing_written(make_model, tmp_path, options, says):
    model = make_model(**{name: one for name, one in options.items() if name not in ("unembed", "mlp")})
    changed = {name: options[name] for name in ("unembed", "mlp") if name in options}
    if changed:
        model = bilens.BilinearTransformer(dataclasses.replace(model.cfg, **changed))
    with pytest.raises(ValueError, match="layout 'llama' cannot hold this model: ") as caught:
        bilens.save(model, tmp_path / "there", layout="llama")
    assert says in str(caught.value)
    assert not (tmp_path / "there").exists()


@pytest.mark.usefixtures("unchecked")
def test_another_layout_is_refused(make_model, tmp_path):
    with pytest.raises(ValueError, match="layout must be 'llama' or None"):
        bilens.save(make_model(), tmp_path, layout="gpt2")


@pytest.fixture(scope="module")
def written(make_model, tmp_path_factory):
    """A model, and the folder that it was written to as a Llama."""
    folder = tmp_path_factory.mktemp("llama")
    model = make_model(dtype=torch.float32, attn_scale=0.3)
    bilens.save(model, folder, layout="llama")
    return model, folder


def test_the_tokenizer_is_that_of_auto_tokenizer(written):
    model, folder = written
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.model_max_length == model.cfg.n_ctx
    roles = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert roles == (model.bos_id, model.eos_id, model.eos_id)
    found = theirs([TEXT, "a cat ran"], return_tensors="pt", padding=True)
    assert torch.equal(found.input_ids, model.to_tokens([TEXT, "a cat ran"]))
    assert theirs.decode(found.input_ids[0]) == model.to_string(found.input_ids[0])
    config = json.loads((folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (model.bos_id, model.eos_id)
    assert (config["model_type"], config["hidden_act"]) == ("llama", "linear")


def test_a_model_without_bos_is_written_without(make_model, tmp_path):
    model = make_model(dtype=torch.float32)
    model.has_bos = False
    bilens.save(model, tmp_path, layout="llama")
    found = transformers.AutoTokenizer.from_pretrained(tmp_path)(TEXT).input_ids
    back = bilens.load(tmp_path)
    assert not back.has_bos
    assert [found] == model.to_tokens(TEXT).tolist() == back.to_tokens(TEXT).tolist()


def test_a_model_card_says_what_it_is_and_a_card_that_is_there_stays(make_model, written, tmp_path):
    card = (written[1] / "README.md").read_text()
    assert card.startswith("---\n")
    assert "AutoModelForCausalLM" in card
    assert "`blocks.{i}.hook_mlp_out`" in card
    (tmp_path / "README.md").write_text("mine")
    bilens.save(written[0], tmp_path, layout="llama")
    assert (tmp_path / "README.md").read_text() == "mine"
    bilens.save(make_model(tokenizer=None), tmp_path, layout="llama")
    assert not (tmp_path / "tokenizer_config.json").exists()


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs the published fixtures in ../shared")
@pytest.mark.parametrize("name", ["bilinear", "bias", "no-norm", "swiglu", "relu-mlp", "unscaled-attn"])
@torch.no_grad()
def test_published_models_give_the_published_logits_in_transformers(name, tmp_path):
    bilens.save(bilens.load(PUBLISHED / name), tmp_path, layout="llama")
    expected = load_file(PUBLISHED / name / "expected.safetensors")
    logits = quietly(transformers.AutoModelForCausalLM, tmp_path)(expected["input_ids"]).logits
    assert (logits - expected["logits"]).abs().max() <= 2e-6 * expected["logits"].abs().max().clamp(min=10)


# -- what stands on transformers ---------------------------------------------------------------------------------------


def test_trainer_trains_it_and_what_it_saves_loads_here(written, tmp_path):
    _, folder = written
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = quietly(transformers.AutoModelForCausalLM, folder)
    before = theirs.model.layers[0].mlp.gate_proj.weight.clone()
    where = {"output_dir": str(tmp_path / "run"), "save_strategy": "no", "report_to": [], "use_cpu": True}
    trainer = transformers.Trainer(
        theirs,
        transformers.TrainingArguments(**where, max_steps=1, per_device_train_batch_size=2, disable_tqdm=True),
        train_dataset=[{"input_ids": tokenizer(text).input_ids} for text in (TEXT, "a cat ran")],
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    assert not torch.equal(theirs.model.layers[0].mlp.gate_proj.weight, before)
    theirs.save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    back = bilens.load(tmp_path / "trained")
    assert back.cfg.mlp.kind == "bilinear"
    with torch.no_grad():
        ids = back.to_tokens(TEXT)
        torch.testing.assert_close(back(ids), theirs.eval()(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_transformer_bridge_runs_it(written):
    from transformer_lens.model_bridge import TransformerBridge

    model, folder = written
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
    ids = model.to_tokens(TEXT)
    torch.testing.assert_close(bridge(ids), model(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_nnsight_sees_what_our_hooks_see(written, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", torch.Tensor.backward)  # which nnsight replaces, for other tests too
    nnsight = pytest.importorskip("nnsight")
    model, folder = written
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = nnsight.LanguageModel(str(folder), tokenizer=tokenizer, device_map="cpu")
    with theirs.trace(TEXT):
        mlp = theirs.model.layers[1].mlp.output.save()
        logits = theirs.lm_head.output.save()
    expected, cache = model.run_with_cache(TEXT)
    torch.testing.assert_close(mlp, cache["blocks.1.hook_mlp_out"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_captum_attributes_a_token_to_words(written):
    attr = pytest.importorskip("captum.attr")
    model, folder = written
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = quietly(transformers.AutoModelForCausalLM, folder)
    attribution = attr.LLMAttribution(attr.FeatureAblation(theirs), tokenizer)
    inputs = attr.TextTokenInput(TEXT, tokenizer, skip_tokens=[tokenizer.bos_token_id])
    found = attribution.attribute(inputs, target=" cat", skip_tokens=[tokenizer.bos_token_id])
    cat, ids = model.to_single_token("cat"), model.to_tokens(TEXT)
    for i in range(1, ids.shape[1]):
        gone = ids.clone()
        gone[0, i] = 0  # what captum puts there
        whole, without = (model(one)[0, -1].log_softmax(-1)[cat] for one in (ids, gone))
        assert found.seq_attr[i - 1].item() == pytest.approx((whole - without).item(), abs=1e-4)
