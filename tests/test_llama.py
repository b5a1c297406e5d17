"""Llama-family checkpoints: equal to transformers' own classes, round trips, grouped heads in every tool, refusals."""

import copy
import dataclasses
import json

import pytest
import torch
from families import FAMILIES, LLAMA3, SMALL, build
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import bilens
from bilens import AttentionConfig, BilinearConfig, BilinearTransformer, MLPConfig, NormConfig
from bilens.circuits import targets
from bilens.models.families import FULL, SLIDING
from bilens.models.hooks import KEY_VALUE_HOOKS
from bilens.models.ropes import read_rope, write_rope
from bilens.models.rotary import Rope
from bilens.models.windows import Windows

transformers = pytest.importorskip("transformers")

UP = "model.layers.1.mlp.up_proj.weight"  # [48, 32]


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """Build `originals(name)`: transformers' own model with random weights, and a folder it was saved to."""
    made = {}

    def make(name):
        if name not in made:
            original = build(transformers, name)
            folder = tmp_path_factory.mktemp("originals") / name
            original.save_pretrained(folder)
            made[name] = original, folder
        return made[name]

    return make


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def folder(originals, tmp_path):
    """A folder to break, with a small grouped-query Llama."""
    originals("tinyllama")[0].save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def ids():
    return torch.randint(SMALL["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(1))


def edit_config(folder, *gone, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in gone}))


def edit_tensors(folder, name, weight):
    tensors = {k: v.clone() for k, v in load_file(folder / "model.safetensors").items()} | {name: weight}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


def refusal(folder, error=bilens.CheckpointError):
    with pytest.raises(error) as caught:
        bilens.load(folder)
    return str(caught.value)


def assert_same(model, other):
    assert other.cfg == model.cfg
    state, other_state = model.state_dict(), other.state_dict()
    assert other_state.keys() == state.keys()
    assert all(torch.equal(weight, other_state[name]) for name, weight in state.items())


# -- what transformers computes ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_are_those_of_transformers(originals, family, ids):
    original, folder = originals(family)
    model = bilens.load(folder)
    assert model.ignored_keys == ()
    assert (model(ids) - original(ids).logits).abs().max() <= 1e-5
    kind = next((kind for word, kind in (("bilinear", "bilinear"), ("nanochat", "plain")) if word in family), "gated")
    assert model.cfg.mlp.kind == kind


class DoubleRotary(torch.nn.Module):
    """Transformers' rotary embedding without its casts to float32; the frequencies are compared by themselves."""

    def __init__(self, attention):
        super().__init__()
        self.attention, self.d_head = attention, attention.d_head

    def forward(self, x, position_ids, layer_type=FULL):
        local = self.attention.local if layer_type == SLIDING else None
        rope = (local and local.rope) or self.attention.rope
        angles = position_ids[..., None].double() * rope.frequencies(self.d_head, torch.float64)
        angles = torch.cat((angles, angles), -1)
        return angles.cos() * rope.gain, angles.sin() * rope.gain


class DoubleNorm(torch.nn.Module):
    """Transformers' norm without its casts to float32."""

    def __init__(self, norm, plus_one):
        super().__init__()
        self.eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        weight = getattr(norm, "weight", torch.ones(()))
        self.gain = 1 + weight if plus_one else weight

    def forward(self, x):
        return self.gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def doubled(original, model):
    """Return transformers' model in float64, without the casts to float32 that its classes have."""
    double = copy.deepcopy(original).double()
    for name, module in list(double.named_modules()):
        if name.endswith("norm"):
            double.set_submodule(name, DoubleNorm(module, model.cfg.norm.plus_one))
    double.model.rotary_emb = DoubleRotary(model.cfg.attention)
    if model.cfg.embed.scale != 1:
        double.model.embed_tokens.embed_scale = torch.tensor(model.cfg.embed.scale, dtype=torch.float64)
    return double


@torch.no_grad()
def test_logits_in_float64_are_those_of_transformers_without_its_casts(originals, family, ids, monkeypatch):
    original, folder = originals(family)
    model = bilens.load(folder, dtype=torch.float64)
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
    assert (model(ids) - doubled(original, model)(ids).logits).abs().max() <= 1e-12


@torch.no_grad()
def test_padded_rows_are_those_of_transformers(originals, family, ids):
    original, folder = originals(family)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = original(ids, attention_mask=mask, position_ids=positions).logits
    got = bilens.load(folder)(ids, attention_mask=mask)
    assert (got - expected)[mask.bool()].abs().max() <= 1e-5


@torch.no_grad()
def test_greedy_generation_is_that_of_transformers(originals, family, ids):
    original, folder = originals(family)
    model = bilens.load(folder)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    expected = original.generate(ids, max_new_tokens=20, **options)
    assert torch.equal(model.generate(ids, max_new_tokens=20, temperature=0), expected)
    assert torch.equal(model.generate(ids, max_new_tokens=20, temperature=0, use_past_kv_cache=False), expected)


def test_rotary_frequencies_are_those_of_transformers_to_the_last_bit(originals, family):
    original, folder = originals(family)
    attention, own = bilens.load(folder).cfg.attention, original.model.rotary_emb
    kinds = {"": attention.rope}
    if original.config.model_type == "gemma3_text":
        shapes = [attention.at(layer) for layer in range(3)]
        kinds = {f"{SLIDING if shape.window else FULL}_": shape.rope for shape in shapes}
    for kind, rope in kinds.items():
        frequencies = rope.frequencies(attention.d_head, torch.float32)
        if rope.kind == "yarn":  # blended in another order
            torch.testing.assert_close(frequencies, getattr(own, f"{kind}inv_freq"), rtol=3e-7, atol=0)
        else:
            assert torch.equal(frequencies, getattr(own, f"{kind}inv_freq"))
        assert rope.gain == pytest.approx(getattr(own, f"{kind}attention_scaling"), rel=1e-12)


@pytest.mark.parametrize(
    "stretch",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "llama3", "factor": 32.0, **LLAMA3},
        {"rope_type": "llama3", "factor": 8.0, **LLAMA3, "original_max_position_embeddings": 4},
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 8, "truncate": False},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7, "beta_fast": 20.0, "beta_slow": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.2},
    ],
    ids=str,
)
def test_stretched_frequencies_are_those_of_transformers(folder, stretch):
    edit_config(folder, "rope_parameters", head_dim=64, hidden_size=256, rope_theta=2e4, rope_scaling=stretch)
    config = transformers.AutoConfig.from_pretrained(folder)
    own = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    rope = read_rope(json.loads((folder / "config.json").read_text()), 128, folder / "config.json")
    torch.testing.assert_close(rope.frequencies(64, torch.float32), own.inv_freq, rtol=3e-7, atol=0)
    assert rope.gain == pytest.approx(own.attention_scaling, rel=1e-12)
    assert read_rope({"rope_scaling": write_rope(rope), "rope_theta": 2e4}, 128, folder) == rope


def test_older_spelling_of_the_rotary_keys_means_the_same(folder):
    model = bilens.load(folder)
    edit_config(folder, "rope_parameters", rope_theta=10000, rope_scaling=None)
    assert_same(model, bilens.load(folder))
    edit_config(folder, rope_scaling={"type": "linear", "factor": 2})
    assert bilens.load(folder).cfg.attention.rope == Rope(10000.0, "linear", 2.0)


@torch.no_grad()
def test_gate_is_the_left_factor_and_up_the_right_one(originals, ids):
    original, folder = originals("tinyllama")
    model = bilens.load(folder)
    _, cache = model.run_with_cache(ids)
    x, mlp = cache["blocks.1.hook_mlp_in"], original.model.layers[1].mlp
    assert (cache["blocks.1.mlp.hook_pre"] - mlp.gate_proj(x)).abs().max() <= 1e-5
    assert (cache["blocks.1.mlp.hook_pre_linear"] - mlp.up_proj(x)).abs().max() <= 1e-5
    with pytest.raises(TypeError, match="this one is gated with activation 'silu'"):
        model.blocks[1].mlp.tensor()


@torch.no_grad()
def test_norm_squares_half_precision_in_float32():
    norm = bilens.models.layers.RMSNorm(NormConfig(gain=True), 4).half()
    x = torch.tensor([[1000.0, -1000.0, 1000.0, 1000.0]]).half()  # squares overflow, and 1e-8 is zero in float16
    assert torch.equal(norm(x), x.sign())
    assert torch.equal(norm(0 * x), 0 * x)


# -- round trips ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_round_trip_is_bit_identical_here_and_in_transformers(originals, family, ids, tmp_path):
    original, folder = originals(family)
    model = bilens.load(folder)
    bilens.save(model, tmp_path)
    assert_same(model, bilens.load(tmp_path))
    stored, written = (load_file(at / "model.safetensors") for at in (folder, tmp_path))
    assert written.keys() == stored.keys()
    assert all(torch.equal(weight, written[name]) for name, weight in stored.items())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(original)
    assert torch.equal(again(ids).logits, original(ids).logits)


def test_shards_load_like_a_whole_file(originals, family, tmp_path):
    original, folder = originals(family)
    original.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    assert_same(bilens.load(folder), bilens.load(tmp_path))


def linear(model):
    """Return a copy whose gate is gone: left and right are multiplied as they are."""
    cfg = dataclasses.replace(model.cfg, mlp=MLPConfig(model.cfg.d_hidden, bias=model.cfg.mlp.bias))
    other = BilinearTransformer(cfg, model.tokenizer, model.source)
    other.to(model.W_E.dtype).load_state_dict(model.state_dict())
    return other.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["tinyllama", "llama3", "biases", "mistral", "qwen2"])
def test_bilinear_mlp_is_written_in_the_layout_it_came_from(originals, name, ids, tmp_path):
    original, folder = originals(name)
    model = linear(bilens.load(folder))
    bilens.save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hidden_act"] == "linear"
    assert_same(model, bilens.load(tmp_path))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(original)
    assert (loaded(ids).logits - model(ids)).abs().max() <= 1e-5
    assert (original(ids).logits - model(ids)).abs().max() > 0.1
    _, cache = model.run_with_cache(ids)
    applied = model.blocks[1].mlp.tensor().apply(cache["blocks.1.hook_mlp_in"])
    assert (applied - cache["blocks.1.hook_mlp_out"]).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["tinyllama", "biases", "qwen2", "qwen3", "olmo2", "gemma2", "gemma3"])
def test_annealed_model_is_written_in_the_layout_it_came_from(originals, name, ids, tmp_path):
    model = bilens.models.annealing.prepare(bilens.load(originals(name)[1]))
    bilens.models.annealing.set_alpha(model, 1)
    folded = bilens.models.annealing.fold(model)
    bilens.save(folded, tmp_path)
    assert_same(folded, bilens.load(tmp_path))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded(ids).logits - model(ids)).abs().max() <= 1e-5
    assert (folded.unembed.weight is folded.embed.weight) == folded.cfg.unembed.tied


@pytest.mark.parametrize("name", ["qwen2", "olmo2", "gemma3"])
def test_folding_the_last_norm_unties_the_embedding(originals, name, ids):
    model = bilens.load(originals(name)[1])
    assert len(bilens.models.fits.norms_of(model)) == {"qwen2": 7, "olmo2": 7, "gemma3": 13}[name]
    fits = bilens.models.fits.fit_norms(model, ids)
    prepared = bilens.models.annealing.prepare(model, norms=fits)
    bilens.models.annealing.set_alpha(prepared, 1)
    folded = bilens.models.annealing.fold(prepared)
    assert not folded.cfg.unembed.tied
    assert (folded(ids) - prepared(ids)).abs().max() <= 1e-4


def test_new_model_that_only_llama_can_express_is_written_as_llama(tmp_path):
    attention = AttentionConfig(2, 8, n_key_value_heads=1, rope=Rope(1e4, "default"))
    cfg = BilinearConfig(2, 16, 32, 40, attention, MLPConfig(24), NormConfig(gain=True))
    model = BilinearTransformer(cfg)
    bilens.save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    assert_same(model, bilens.load(tmp_path))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("norm", {"gain": False}),
        ("mlp", {"kind": "plain"}),
        ("attention", {"scale": 0.5}),
        ("attention", {"rope": Rope()}),
    ],
    ids=str,
)
def test_what_llama_cannot_express_is_not_written(originals, part, change, tmp_path):
    model = bilens.load(originals("llama")[1])
    changed = {part: dataclasses.replace(getattr(model.cfg, part), **change)}
    other = BilinearTransformer(dataclasses.replace(model.cfg, **changed), source=model.source)
    with pytest.raises(ValueError, match="no published format can express this model"):
        bilens.save(other, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_tied_embedding_is_one_parameter(originals, tmp_path):
    model = bilens.load(originals("qwen2")[1])
    for one in (model, copy.deepcopy(model), BilinearTransformer(model.cfg), copy.copy(model).to(torch.float64)):
        assert one.unembed.weight is one.embed.weight
    bilens.save(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model.unembed.weight = torch.nn.Parameter(2 * model.W_E)
    with pytest.raises(ValueError, match=r"model\.unembed\.weight must equal model\.embed\.weight"):
        bilens.save(model, tmp_path)


def test_stored_copy_of_a_tied_embedding_must_equal_it(originals, tmp_path):
    original, _ = originals("qwen2")
    original.save_pretrained(tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(tmp_path, "lm_head.weight", embedding.clone())
    assert bilens.load(tmp_path).cfg.unembed.tied
    edit_tensors(tmp_path, "lm_head.weight", embedding + 1)
    assert "tensor lm_head.weight must equal the embedding, since config.json ties them" in refusal(tmp_path)


# -- grouped heads, biases and windows under the tools ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["tinyllama", "biases", "mistral", "qwen2", "qwen3"])
def test_weights_per_head_read_what_the_hooks_show(originals, name, ids):
    model = bilens.load(originals(name)[1], dtype=torch.float64)
    cfg, block = model.cfg, model.blocks[1]
    _, cache = model.run_with_cache(ids)
    x, attn = block.ln1(cache["blocks.1.hook_resid_pre"]), block.attn
    for part in "qkv":
        W, b = getattr(attn, f"W_{part.upper()}"), getattr(attn, f"b_{part.upper()}")
        assert W.shape == (cfg.n_heads, cfg.d_model, cfg.d_head)
        assert torch.equal(W, getattr(model, f"W_{part.upper()}")[1])
        shown = cache[f"blocks.1.attn.hook_{part}"]
        per_head = shown if part == "q" else shown.repeat_interleave(cfg.n_heads // shown.shape[2], 2)
        torch.testing.assert_close(per_head, torch.einsum("bsm,hme->bshe", x, W) + b)
    for hook in set(KEY_VALUE_HOOKS) - {"attn.hook_k_normalized"}:
        assert cache[f"blocks.1.{hook}"].shape == (*ids.shape, cfg.attention.n_key_value_heads, cfg.d_head)
    written = torch.einsum("bqhe,hem->bqhm", cache["blocks.1.attn.hook_z"], attn.W_O)
    torch.testing.assert_close(cache["blocks.1.attn.hook_result"], written)
    torch.testing.assert_close(written.sum(2) + attn.b_O, cache["blocks.1.hook_attn_out"])


@pytest.mark.parametrize("name", ["tinyllama", "biases", "mistral", "qwen2"])
def test_looking_at_heads_changes_nothing(originals, name, ids):
    model = bilens.load(originals(name)[1], dtype=torch.float64)
    logits, cache = model.run_with_cache(ids)
    torch.testing.assert_close(logits, model(ids))
    pattern = cache["blocks.2.attn.hook_pattern"]
    torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]))
    query, key = torch.arange(40)[:, None], torch.arange(40)[None, :]
    seen = (key <= query) & (key > query - (model.cfg.attention.window or 40))
    assert (pattern[:, :, ~seen] == 0).all()
    assert (pattern[:, :, seen] > 0).all()


@pytest.mark.parametrize("name", ["tinyllama", "biases", "mistral", "qwen2"])
def test_cache_decomposes_the_residual_stream(originals, name, ids):
    model = bilens.load(originals(name)[1], dtype=torch.float64)
    _, cache = model.run_with_cache(ids)
    last = cache["blocks.2.hook_resid_post"]
    torch.testing.assert_close(cache.decompose_resid().sum(0), last)
    mlps = sum(cache[f"blocks.{layer}.hook_mlp_out"] for layer in range(3))
    heads = cache.stack_head_results().sum(0) + model.accumulated_bias(3, include_mlp_biases=False)
    torch.testing.assert_close(cache["hook_embed"] + heads + mlps, last)
    parts = cache.get_full_resid_decomposition(mlp_input=False, expand_neurons=False)
    torch.testing.assert_close(parts.sum(0), last)
    with_mid = model.accumulated_bias(1, mlp_input=True) - model.accumulated_bias(1)
    torch.testing.assert_close(with_mid, model.blocks[1].attn.b_O)


@pytest.mark.parametrize("name", ["tinyllama", "biases", "mistral", "qwen3", "olmo2", "gemma2", "gemma3", "nanochat"])
def test_generation_with_a_cache_is_that_without_also_under_interventions(originals, name, ids):
    model = bilens.load(originals(name)[1], dtype=torch.float64)
    shift = torch.randn(model.cfg.d_head, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    hooks = [("blocks.1.attn.hook_v", lambda v, hook: shift - 3 * v)]
    runs = [model.generate(ids, 12, temperature=0, fwd_hooks=hooks, use_past_kv_cache=use) for use in (True, False)]
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], model.generate(ids, 12, temperature=0))


@pytest.mark.parametrize("name", ["tinyllama", "biases", "mistral", "qwen2"])
def test_attribution_through_heads_sums_to_what_the_model_computes(originals, name, ids):
    model = linear(bilens.load(originals(name)[1], dtype=torch.float64))
    _, cache = model.run_with_cache(ids[:1])
    came = bilens.circuits.sources.sources(model, ids[0], 2)
    assert ("attention biases" in came.names) == model.cfg.attention.bias[1]
    torch.testing.assert_close(came.values.sum(1), cache["blocks.2.hook_resid_mid"][0])
    direction = torch.randn(32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    split = bilens.circuits.sources.attribute_sources(model, ids[0], 2, bilens.circuits.Target.direction(direction))
    torch.testing.assert_close(split.table.sum((1, 2)), cache["blocks.2.hook_mlp_out"][0] @ direction)


@pytest.mark.parametrize("name", ["tinyllama", "biases", "mistral"])
def test_paths_through_the_last_layer_sum_to_the_logits(originals, name, ids):
    model = linear(bilens.load(originals(name)[1], dtype=torch.float64))
    expanded = bilens.circuits.paths.expand(model, ids[0])
    torch.testing.assert_close(expanded.logits(), model(ids[:1])[0])
    if any(model.cfg.attention.bias):
        with pytest.raises(ValueError, match=r"no attention biases, which belong to no token, got \(True, True\)"):
            bilens.circuits.virtual.virtual_tokens(model)


def test_hook_table_shows_the_heads_that_share_keys(originals, capsys):
    bilens.load(originals("tinyllama")[1]).hook_table()
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if "hook_" in line}
    assert "head=4" in lines["blocks.{i}.attn.hook_q"]
    shared = set(KEY_VALUE_HOOKS) - {"attn.hook_k_normalized"}  # keys are not normalised in this one
    assert all("head=2" in lines[f"blocks.{{i}}.{hook}"] for hook in shared)


# -- tokenizers -------------------------------------------------------------------------------------------------------


SPECIAL = {
    "llama": ("<s>", "</s>"),
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>"),
    "qwen": ("<|endoftext|>", "<|endoftext|>"),
}


def tokenizer_of(kind):
    """A word-level tokenizer that starts a text as that family's does."""
    start, end = SPECIAL[kind]
    words = dict.fromkeys(["<unk>", start, end, "a", "the", "cat", "sat"])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([start, end])
    if kind == "qwen":
        tokenizer.post_processor = processors.ByteLevel()
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, tokenizer.token_to_id(start))]
        )
    return tokenizer


@pytest.mark.parametrize("kind", SPECIAL)
def test_texts_start_as_the_tokenizer_itself_starts_them(folder, tmp_path, kind):
    tokenizer = tokenizer_of(kind)
    tokenizer.save(str(folder / "tokenizer.json"))
    model = bilens.load(folder)
    assert model.to_tokens("the cat sat")[0].tolist() == tokenizer.encode("the cat sat").ids
    assert model.has_bos == (kind != "qwen")
    assert len(model.to_tokens("the cat sat", prepend_bos=False)[0]) == 3
    padded = model.to_tokens(["the cat sat", "the"])
    assert (
        padded[1, -1]
        == model.eos_id
        == tokenizer.token_to_id({"llama": "</s>", "llama3": "<|end_of_text|>"}.get(kind, "<|endoftext|>"))
    )
    bilens.save(model, tmp_path / "again")
    assert bilens.load(tmp_path / "again").has_bos == model.has_bos
    for texts in (["the cat sat"], ["the", "a cat sat the cat"]):
        rows = Windows.of(model, texts, length=4)
        words = [token for text in texts for token in tokenizer.encode(text, add_special_tokens=False).ids]
        assert rows.tokens[rows.counts].tolist() == words
        assert bool((rows.tokens[:, 0] == model.bos_id).all()) == model.has_bos
        assert len(bilens.circuits.places.locate(model, texts).row) == len(words)
    if kind == "qwen":
        with pytest.raises(ValueError, match="input is empty text and the model has no BOS"):
            model.to_tokens("")


def test_tokenizer_with_an_id_beyond_the_embedding_is_refused(folder):
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "cat": 61}  # few tokens, but one is beyond
    Tokenizer(models.WordLevel(vocab, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    assert f"tokenizer of {folder} has 62 tokens, the embedding only 61 rows" in refusal(folder)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3_moe"}, "got 'qwen3_moe': it is a mixture of experts"),
        ({"num_experts": 8}, "num_experts must be absent, since a mixture of experts cannot be represented, got 8"),
        ({"model_type": "gemma3"}, "got 'gemma3': it reads images too"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping must be absent"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "attention to later positions"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 30.0}, "attn_logit_softcapping must be absent"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1e4}},
            "must be by full_attention and",
        ),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "for each of 3 layers, got ['full_attention']"),
        ({"model_type": "gemma2", "sliding_window": None}, "sliding_window must be a number, since some layers slide"),
        ({"model_type": "gemma2", "final_logit_softcapping": -1}, "final_logit_softcapping must be a positive number"),
        ({"model_type": "gemma2"}, "pre_feedforward_layernorm.weight of shape [32] is missing"),
        ({"model_type": "qwen3", "head_dim": 8}, "self_attn.q_norm.weight of shape [8] is missing"),
        ({"model_type": "olmo2"}, "self_attn.q_norm.weight of shape [32] is missing"),
    ],
    ids=str,
)
def test_what_a_config_asks_for_in_vain_is_refused_by_name(folder, changes, message):
    edit_config(folder, **changes)
    assert message in refusal(folder)


@pytest.mark.parametrize("name", ["olmo2", "gemma3"])
def test_tools_that_add_up_outputs_refuse_norms_after_them(originals, name, ids):
    model = linear(bilens.load(originals(name)[1], dtype=torch.float64))
    for tool in (
        lambda: bilens.circuits.sources.sources(model, ids[0], 1),
        lambda: bilens.circuits.paths.expand(model, ids[0]),
        lambda: bilens.circuits.virtual.virtual_tokens(model),
        lambda: bilens.circuits.bigrams.bigram_scores(model, torch.tensor([1])),
        lambda: targets.Reading.of(model, 1, targets.Target.token(model, 3)),
    ):
        with pytest.raises(ValueError, match="model must have its norms before attention and MLP only"):
            tool()


OLDER = {  # what transformers 4 wrote
    "gemma3": {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    | {"sliding_window_pattern": 3},
    "gemma2": {"rope_theta": 1e4, "cache_implementation": "hybrid"},
    "qwen3": {"rope_theta": 1e4, "rope_scaling": None, "max_window_layers": 3},
}


@pytest.mark.parametrize("name", OLDER)
def test_older_configs_of_the_families_mean_the_same(originals, name, tmp_path):
    original, folder = originals(name)
    original.save_pretrained(tmp_path)
    edit_config(tmp_path, "rope_parameters", "layer_types", **OLDER[name])
    model = bilens.load(tmp_path)
    assert_same(bilens.load(folder), model)
    assert model.ignored_keys == ()
    assert transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters == original.config.rope_parameters


@pytest.mark.parametrize("changes", [{"base": 0.0}, {"kind": "linear", "factor": -1.0}, {"kind": "yarn"}], ids=str)
def test_frequencies_that_make_no_sense_are_refused(changes):
    with pytest.raises(ValueError, match="must be positive"):
        Rope(**changes)
