"""The Elriggs and attention-only models: equal to the authors' code where its values are at hand, and to plain sums."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

import bilens
from bilens import CheckpointError
from bilens.circuits.bigrams import bigram_scores
from bilens.circuits.sources import sources
from bilens.circuits.virtual import virtual_input, virtual_tokens
from bilens.models.logits import logit_directions

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures" / "elriggs-format"
FOLDERS = (
    *("attn-only-batchnorm", "attn-only-tok0", "bilinear", "bilinear-sqrd-attn-one-branch", "differential-attn"),
    *("bilinear-sqrd-attn-one-branch-raw", "bilinear-sqrd-attn-two-branch", "relu2", "sqrd-attn-one-branch"),
    *("squared-mlp", "swiglu", "swiglu-sqrd-attn-two-branch"),
)
OTHERS = {"bf16_tables": {"rotary_dtype": "bfloat16"}, "lerp": {"residual": "lerp"}}
SOFTMAX, TWO = {"squared_attn": False, "bilinear_attn": False}, {"squared_attn": True, "bilinear_attn": True}
FAMILIES = {  # the flags of a config; absent ones are false
    "softmax, bilinear": SOFTMAX | {"bilinear": True, "expansion_factor": 2},
    "two branches, bilinear": TWO | {"bilinear": True, "expansion_factor": 2},
    "one branch, bilinear": {"squared_attn": True, "bilinear": True, "expansion_factor": 1},
    "one branch raw, squared": {"squared_attn": True, "bilinear_attn": False, "squared_mlp": True},
    "one branch, relu2": {"squared_attn": True, "expansion_factor": 2},
    "differential, gated": {"bilinear_attn": True, "bilinear": True, "gated": True, "expansion_factor": 1},
}
ATTENTION_ONLY = {
    "batch norm": {"norm_type": "layernorm"},
    "constant": {"norm_type": "tok0_batch", "use_bias_qk": True},
}
SIZES = {"vocab_size": 23, "n_layer": 3, "n_head": 2, "n_embd": 16}
FLAT = {"vocab_size": 23, "n_ctx": 32, "d_model": 16, "n_head": 2, "n_layers": 2, "attn_scale": 0.7}


pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def ids():
    return torch.randint(23, (2, 9), generator=torch.Generator().manual_seed(1))


def assert_close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# -- the authors' own values ------------------------------------------------------------------------------------------


def compare(folder, expected, overrides):
    expected = load_file(folder / expected)
    model = bilens.load(folder, overrides=overrides)
    (logits, loss), cache = model.run_with_cache(expected.pop("input_ids").long(), return_type="both")
    got = {**cache, "logits": logits, "loss": loss[None]}
    assert len(expected) >= 5
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        assert (got[name] - value).abs().max() <= 1e-5, name


@pytest.mark.parametrize("name", FOLDERS)
def test_model_computes_what_the_authors_code_computes(name):
    if not (folder := FIXTURES / name).is_dir():
        pytest.skip(f"the authors' files are not here: {folder}")
    compare(folder, "expected.safetensors", {} if name.startswith("attn-only") else {"rotary_dtype": "float32"})
    for kind, overrides in OTHERS.items():
        if (folder / f"expected_{kind}.safetensors").is_file():
            compare(folder, f"expected_{kind}.safetensors", overrides)
            if kind == "bf16_tables":
                compare(folder, f"expected_{kind}.safetensors", {})


def test_every_folder_is_tested():
    if not FIXTURES.is_dir():
        pytest.skip(f"the authors' files are not here: {FIXTURES}")
    assert {folder.name for folder in FIXTURES.iterdir() if folder.is_dir()} == set(FOLDERS)


# -- plain sums, written down anew ------------------------------------------------------------------------------------


def random_state(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith(("_var", "energy")):
            state[name] = noise.abs() + 0.5
        else:
            state[name] = noise / math.sqrt(shape[-1] if len(shape) > 1 else 1)
    return state


def gpt_shapes(config):
    d, V = config["n_embd"], config["vocab_size"]
    paired = config.get("bilinear_attn", False)
    m = config.get("expansion_factor", 4) * d if config.get("bilinear") else 4 * d
    shapes = {"transformer.wte.weight": (V, d), "lm_head.weight": (V, d)}
    for i in range(config["n_layer"]):
        at = f"transformer.h.{i}."
        shapes |= {at + "lambdas": (2,), at + "attn.lamb": ()}
        sides = ("q", "k", "v", "proj", *(("q2", "k2") if paired else ()))
        shapes |= {f"{at}attn.c_{side}.weight": (d, d) for side in sides}
        if paired and not config.get("squared_attn"):
            shapes[at + "attn.bilinear_lamb"] = ()
        if config.get("bilinear"):
            shapes |= {at + "mlp.Left.weight": (m, d), at + "mlp.Right.weight": (m, d)}
            shapes |= {at + "mlp.Down.weight": (d, m), at + "mlp.Down_bias": (d,)}
        else:
            shapes |= {at + "mlp.c_fc.weight": (m, d), at + "mlp.c_proj.weight": (d, m), at + "mlp.bias": (d,)}
    return shapes


def flat_shapes(config):
    d, V = config["d_model"], config["vocab_size"]
    shapes = {"embed.weight": (V, d), "unembed.weight": (V, d)}
    layered = config["norm_type"] == "layernorm"
    shapes |= {"final_norm.weight": (d,), "final_norm.bias": (d,)} if layered else {}
    shapes |= {} if layered else {"final_norm.running_mean_energy": (1,)}
    for i in range(config["n_layers"]):
        shapes |= {f"layers.{i}.{side}.weight": (d, d) for side in ("q1", "k1", "q2", "k2", "v", "o")}
        for side in ("q1", "k1", "q2", "k2"):
            if "use_bias_qk" in config:
                shapes[f"layers.{i}.{side}.bias"] = (d,)
            else:
                parts = ("weight", "bias", "running_mean", "running_var")
                shapes |= {f"layers.{i}.bn_{side}.{part}": (d,) for part in parts}
    return shapes


def write(folder, config, state):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if "n_embd" in config:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        (folder / "checkpoints").mkdir(exist_ok=True)
        torch.save(state, folder / "checkpoints" / "step_00000007.pt")
    return folder


@pytest.fixture(params=FAMILIES)
def gpt(request, tmp_path):
    """Config and float32 weights of a random model of a family, and the folder that holds them."""
    config = SIZES | FAMILIES[request.param] | {"step": 3}
    state = random_state(gpt_shapes(config))
    return config, state, write(tmp_path / "gpt", config, state)


@pytest.fixture(params=ATTENTION_ONLY)
def flat(request, tmp_path):
    config = FLAT | ATTENTION_ONLY[request.param]
    state = random_state(flat_shapes(config))
    tracked = {f"layers.0.bn_{side}.num_batches_tracked": torch.tensor(5) for side in ("q1", "k1", "q2", "k2")}
    return config, state, write(tmp_path / "flat", config, state | ({} if "use_bias_qk" in config else tracked))


def norm(x, eps=2.0**-23):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def turn(x, rounded, against=True):
    """Turn `[batch, seq, head, d_head]` pair by pair, position by position."""
    half, out = x.shape[-1] // 2, torch.empty_like(x)
    for t in range(x.shape[1]):
        for j in range(half):
            dtype = torch.float32 if rounded else torch.float64
            angle = torch.tensor(float(t), dtype=dtype) * (1 / 10000 ** (torch.tensor(2 * j / (2 * half), dtype=dtype)))
            cos, sin = angle.cos(), angle.sin()
            if rounded:
                cos, sin = cos.bfloat16().double(), sin.bfloat16().double()
            sin = sin if against else -sin
            a, b = x[:, t, :, j], x[:, t, :, j + half]
            out[:, t, :, j], out[:, t, :, j + half] = a * cos + b * sin, b * cos - a * sin
    return out


def scores(q, k):
    return torch.einsum("bqhe,bkhe->bhqk", q, k)


def gpt_reference(config, state, ids, rounded, normalize=None):
    """Compute logits and some activations as the description says, in float64."""
    w = {name: tensor.double() for name, tensor in state.items()}
    H, D = config["n_head"], config["n_embd"] // config["n_head"]
    squared, paired = config.get("squared_attn", False), config.get("bilinear_attn", False)
    normalize = squared and "bilinear_attn" not in config if normalize is None else normalize
    seen, heads = {}, lambda x: x.unflatten(-1, (H, D))
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    x0 = x = norm(w["transformer.wte.weight"][ids])
    first = None
    for i in range(config["n_layer"]):
        at, see = f"transformer.h.{i}.", f"blocks.{i}."
        x = w[at + "lambdas"][0] * x + w[at + "lambdas"][1] * x0
        seen[see + "hook_resid_pre"], n = x, norm(x)
        read = {
            side: heads(n @ w[f"{at}attn.c_{side}.weight"].T) for side in ("q", "k", *(("q2", "k2") if paired else ()))
        }
        rot = {side: turn(norm(value), rounded) for side, value in read.items()}
        seen |= {f"{see}attn.hook_{side}": value for side, value in read.items()}
        seen |= {f"{see}attn.hook_rot_{side}": value for side, value in rot.items()}
        own = heads(n @ w[at + "attn.c_v.weight"].T)
        first = own if first is None else first
        v = (1 - w[at + "attn.lamb"]) * own + w[at + "attn.lamb"] * first
        s = scores(rot["q"], rot["k"])
        soft = lambda s: s.masked_fill(~causal, -torch.inf).softmax(-1)  # noqa: E731
        if squared and paired:
            P = (s / D) * (scores(rot["q2"], rot["k2"]) / D) * causal
        elif squared and normalize:
            r = s**2 / D * causal
            P = r / (r.sum(-1, keepdim=True) + 1e-8)
        elif squared:
            P = (s / D) ** 2 * causal
        elif paired:
            P = soft(s / D) - w[at + "attn.bilinear_lamb"] * soft(scores(rot["q2"], rot["k2"]) / D)
        else:
            P = soft(s / D**0.5)
        z = torch.einsum("bhqk,bkhe->bqhe", P, v)
        out = z.flatten(2) @ w[at + "attn.c_proj.weight"].T
        seen |= {see + "attn.hook_v_own": own, see + "attn.hook_v": v, see + "attn.hook_pattern": P}
        seen |= {see + "attn.hook_z": z, see + "hook_attn_out": out}
        x = x + out
        h = norm(x)
        if config.get("bilinear"):
            left, right = h @ w[at + "mlp.Left.weight"].T, h @ w[at + "mlp.Right.weight"].T
            left = left * left.sigmoid() if config.get("gated") else left
            y = (left * right) @ w[at + "mlp.Down.weight"].T + w[at + "mlp.Down_bias"]
        else:
            c = h @ w[at + "mlp.c_fc.weight"].T
            c = c if config.get("squared_mlp") else c.clamp(min=0)
            y = c**2 @ w[at + "mlp.c_proj.weight"].T + w[at + "mlp.bias"]
        seen |= {see + "hook_resid_mid": x, see + "hook_mlp_in": h, see + "hook_mlp_out": y}
        x = x + y
        seen[see + "hook_resid_post"] = x
    before = norm(x) @ w["lm_head.weight"].T
    return 30 * (before / 30).tanh(), seen | {"unembed_out_before_cap": before, "hook_embed_normalized": x0}


def flat_reference(config, state, ids, lerp):
    w = {name: tensor.double() for name, tensor in state.items()}
    H, D = config["n_head"], config["d_model"] // config["n_head"]
    x, seen = w["embed.weight"][ids], {}
    for i in range(config["n_layers"]):
        read = {}
        for side in ("q1", "k1", "q2", "k2"):
            y, at = x @ w[f"layers.{i}.{side}.weight"].T, f"layers.{i}.bn_{side}."
            if "use_bias_qk" in config:
                y = y + w[f"layers.{i}.{side}.bias"]
            else:
                y = (y - w[at + "running_mean"]) / (w[at + "running_var"] + 1e-5).sqrt() * w[at + "weight"] + w[
                    at + "bias"
                ]
            read[side] = y.unflatten(-1, (H, D))
        q1, k1, q2, k2 = (turn(value, False, against=False) for value in read.values())
        P = (scores(q1, k1) * scores(q2, k2) / D**2).tril()
        z = torch.einsum("bhqk,bkhe->bqhe", P, (x @ w[f"layers.{i}.v.weight"].T).unflatten(-1, (H, D)))
        o = z.flatten(2) @ w[f"layers.{i}.o.weight"].T
        out = config["attn_scale"] * (o - x if lerp else o)
        seen |= {
            f"blocks.{i}.hook_resid_pre": x,
            f"blocks.{i}.attn.hook_q2": read["q2"],
            f"blocks.{i}.hook_attn_out": out,
        }
        seen |= {f"blocks.{i}.attn.hook_pattern": P, f"blocks.{i}.hook_resid_post": x + out}
        x = x + out
    if config["norm_type"] == "layernorm":
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = x * w["final_norm.weight"] + w["final_norm.bias"]
    else:
        x = x / (w["final_norm.running_mean_energy"] + 1e-6).sqrt()
    return x @ w["unembed.weight"].T, seen | {"ln_final.hook_out": x}


@pytest.mark.parametrize("rounded", [False, True])
def test_a_family_computes_what_the_description_says(gpt, ids, rounded):
    config, state, folder = gpt
    model = bilens.load(folder, dtype=torch.float64, overrides={} if rounded else {"rotary_dtype": "float32"})
    expected, seen = gpt_reference(config, state, ids, rounded)
    (logits, loss), cache = model.run_with_cache(ids, return_type="both")
    assert_close(logits, expected)
    assert_close(loss, cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    for name, value in seen.items():
        assert_close(cache[name], value)


@pytest.mark.parametrize("normalize", [True, False])
def test_rows_are_divided_or_not_as_a_user_says(tmp_path, ids, normalize):
    config = SIZES | FAMILIES["one branch, bilinear"]
    state = random_state(gpt_shapes(config))
    overrides = {"normalize_pattern": normalize, "rotary_dtype": "float32"}
    model = bilens.load(write(tmp_path / "gpt", config, state), dtype=torch.float64, overrides=overrides)
    assert_close(model(ids), gpt_reference(config, state, ids, False, normalize)[0])


@pytest.mark.parametrize("lerp", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_attention_alone_computes_what_the_description_says(flat, ids, lerp, nested):
    config, state, folder = flat
    if nested:
        (folder / "config.json").write_text(json.dumps({"model": config, "seed": 1}))
    model = bilens.load(folder, dtype=torch.float64, overrides={"residual": "lerp"} if lerp else {})
    expected, seen = flat_reference(config, state, ids, lerp)
    logits, cache = model.run_with_cache(ids)
    assert_close(logits, expected)
    for name, value in seen.items():
        assert_close(cache[name], value)


# -- what every hooked model does -------------------------------------------------------------------------------------


@pytest.fixture(params=[*FAMILIES, *ATTENTION_ONLY])
def model(request, tmp_path):
    """Each family in float64."""
    return load_family(tmp_path, request.param)


def load_family(folder, family, dtype=torch.float64):
    config = SIZES | FAMILIES[family] if family in FAMILIES else FLAT | ATTENTION_ONLY[family]
    shapes = gpt_shapes(config) if family in FAMILIES else flat_shapes(config)
    return bilens.load(write(folder / "model", config, random_state(shapes)), dtype=dtype)


@pytest.fixture
def gpt_model(gpt):
    return bilens.load(gpt[2], dtype=torch.float64)


def noise(activation, hook):
    return activation + 0.3 * torch.randn(activation.shape, generator=torch.Generator().manual_seed(0)).to(activation)


def test_every_hook_point_is_live_and_looking_changes_nothing(gpt_model, ids):
    plain = gpt_model(ids)
    seen, cache = gpt_model.run_with_cache(ids)
    assert_close(seen, plain)
    assert set(cache.keys()) == set(gpt_model.hook_dict)
    rows = gpt_model.cfg.attention.normalize  # what scales a whole row then drops out
    for name in gpt_model.hook_dict:
        if rows and name.endswith("q_norm.hook_scale"):
            continue
        assert (gpt_model.run_with_hooks(ids, fwd_hooks=[(name, noise)]) - plain).abs().max() > 1e-7, name


def test_every_hook_point_of_attention_alone_is_live(flat, ids):
    model = bilens.load(flat[2], dtype=torch.float64)
    plain, cache = model.run_with_cache(ids)
    assert set(cache.keys()) == set(model.hook_dict)
    for name in model.hook_dict:
        assert (model.run_with_hooks(ids, fwd_hooks=[(name, noise)]) - plain).abs().max() > 1e-7, name
    with pytest.raises(TypeError, match="attention only"):
        model.blocks[0].mlp.tensor()
    assert model.cfg.attn_only
    model.hook_table()


HOOKED = [None, "hook_embed_normalized", "blocks.0.attn.hook_v_own", "blocks.1.hook_attn_out", "unembed_out_before_cap"]


@pytest.mark.parametrize("hook", HOOKED)
def test_generation_with_a_cache_is_generation_without(gpt_model, ids, hook):
    def larger(x, hook):
        assert x.shape[:2] >= ids.shape
        return 1.3 * x

    hooks = [] if hook is None else [(hook, larger)]
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :4] = False
    made = [
        gpt_model.generate(
            ids, 8, temperature=2.0, attention_mask=mask, fwd_hooks=hooks, use_past_kv_cache=cached,
            generator=torch.Generator().manual_seed(0),
        )
        for cached in (True, False)
    ]  # fmt: skip
    assert torch.equal(*made)


def test_padding_changes_nothing(model, ids):
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :3], mask[1, 7:] = False, False
    padded = model(ids, attention_mask=mask)
    assert_close(padded[0, 3:], model(ids[:1, 3:])[0])
    assert_close(padded[1, :7], model(ids[1:, :7])[0])


def test_a_run_may_start_in_the_middle(gpt_model, ids):
    logits, cache = gpt_model.run_with_cache(ids)
    for layer in (1, 2, -1):
        left = gpt_model(ids, stop_at_layer=layer)
        assert_close(left, cache[f"blocks.{layer % 3 - 1}.hook_resid_post"])
        assert_close(gpt_model(left, start_at_layer=layer, tokens=ids), logits)
        with pytest.raises(ValueError, match=r"tokens must be given with start_at_layer"):
            gpt_model(left, start_at_layer=layer)
    assert_close(gpt_model(cache["hook_embed_normalized"], start_at_layer=0), logits)
    assert_close(gpt_model(cache["blocks.2.hook_resid_post"], start_at_layer=3), logits)


def test_quadratic_layers_are_tensors_and_others_say_what_they_are(gpt, gpt_model, ids):
    config, mlp = gpt[0], gpt_model.blocks[1].mlp
    if config.get("squared_mlp") or (config.get("bilinear") and not config.get("gated")):
        _, cache = gpt_model.run_with_cache(ids)
        assert_close(mlp.tensor().apply(cache["blocks.1.hook_mlp_in"]), cache["blocks.1.hook_mlp_out"])
    else:
        with pytest.raises(TypeError, match=r"gated with activation 'silu'|plain with activation 'relu2'"):
            mlp.tensor()


def test_sources_of_a_stream_that_blocks_scale_sum_to_it(gpt_model, ids):
    _, cache = gpt_model.run_with_cache(ids)
    found = sources(gpt_model, ids, 2)
    assert_close(found.values.sum(1), cache["blocks.2.hook_resid_mid"].flatten(0, 1))
    for ask in (cache.decompose_resid, cache.get_full_resid_decomposition):
        with pytest.raises(ValueError, match="is not the sum of what was added"):
            ask()


def test_bigrams_are_the_model_without_attention_and_other_layers(tmp_path, ids):
    model = load_family(tmp_path, "two branches, bilinear")
    off = [(f"blocks.{i}.hook_attn_out", lambda x, hook: 0 * x) for i in range(3)]
    off += [(f"blocks.{i}.hook_mlp_out", lambda x, hook: 0 * x) for i in (0, 2)]
    assert_close(
        model.run_with_hooks(ids, fwd_hooks=off), bigram_scores(model, ids.flatten(), 1).unflatten(0, ids.shape)
    )


def test_virtual_tokens_are_what_enters_the_first_layer(tmp_path, ids):
    model = load_family(tmp_path, "two branches, bilinear")
    _, cache = model.run_with_cache(ids)
    virtual = virtual_tokens(model, torch.eye(16, dtype=torch.float64))
    assert_close(virtual.tensor.apply(virtual_input(model, ids)), cache["blocks.0.hook_mlp_out"][:, -1])


def test_directions_of_logits_are_those_of_the_last_norm(flat, ids):
    model = bilens.load(flat[2], dtype=torch.float64)
    logits, cache = model.run_with_cache(ids)
    resid, rms = cache["blocks.1.hook_resid_post"], cache["ln_final.hook_scale"]
    constant = logits - resid @ logit_directions(model).T / rms
    assert (constant - constant[0, 0]).abs().max() < 1e-12 * logits.abs().max()
    factor, shift = model.ln_final.linear(resid)
    assert_close(factor * resid + shift, cache["ln_final.hook_out"])


# -- settings, and what is kept ---------------------------------------------------------------------------------------


def assert_same(model, other):
    assert other.cfg == model.cfg
    state, other_state = model.state_dict(), other.state_dict()
    assert state.keys() == other_state.keys()
    assert all(torch.equal(weight, other_state[name]) for name, weight in state.items())


def test_what_was_loaded_is_saved_and_loaded_again(model, tmp_path):
    bilens.save(model, tmp_path / "again")
    assert_same(model, bilens.load(tmp_path / "again"))
    model.source = {}
    bilens.save(model, tmp_path / "anew")
    assert_same(model, bilens.load(tmp_path / "anew"))


SETTINGS = [
    ("one branch, bilinear", {"normalize_pattern": False}),
    ("one branch raw, squared", {"normalize_pattern": True}),
    ("softmax, bilinear", {"rotary_dtype": "float32", "n_ctx": 64}),
]


@pytest.mark.parametrize(("family", "overrides"), SETTINGS)
def test_settings_are_kept(tmp_path, family, overrides):
    config = SIZES | FAMILIES[family]
    folder = write(tmp_path / "a", config, random_state(gpt_shapes(config)))
    model, plain = bilens.load(folder, overrides=overrides), bilens.load(folder)
    assert model.cfg != plain.cfg
    assert model.source == plain.source == config
    bilens.save(model, tmp_path / "b")
    assert_same(model, bilens.load(tmp_path / "b"))
    assert json.loads((tmp_path / "b" / "config.json").read_text()).items() >= overrides.items()


def test_settings_of_nested_configs_are_kept(tmp_path):
    config = FLAT | ATTENTION_ONLY["constant"]
    folder = write(
        tmp_path / "a", {"model": config, "data": {"tokenizer": "some/one"}}, random_state(flat_shapes(config))
    )
    model = bilens.load(folder, overrides={"residual": "lerp"})
    bilens.save(model, tmp_path / "b")
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (written["model"]["residual"], written["data"]) == ("lerp", {"tokenizer": "some/one"})
    assert bilens.load(tmp_path / "b").cfg == model.cfg != bilens.load(folder).cfg


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"rotary": "float32"}, ValueError, "one of rotary_dtype, normalize_pattern, n_ctx .* got 'rotary'"),
        (
            {"rotary_dtype": "float16"},
            CheckpointError,
            "rotary_dtype must be one of 'bfloat16', 'float32', got 'float16'",
        ),
        (
            {"normalize_pattern": True},
            CheckpointError,
            "normalize_pattern must be absent.* softmax attention, got True",
        ),
        ({"n_ctx": 0}, CheckpointError, "n_ctx must be a positive integer, got 0"),
    ],
)
def test_settings_that_do_not_exist_are_refused(tmp_path, overrides, error, message):
    config = SIZES | FAMILIES["softmax, bilinear"]
    with pytest.raises(error, match=message):
        bilens.load(write(tmp_path / "a", config, random_state(gpt_shapes(config))), overrides=overrides)


def test_other_formats_have_no_settings_and_no_checkpoints():
    with pytest.raises(ValueError, match=r"a key must be absent .* got 'residual'"):
        bilens.load("bilens-mini", overrides={"residual": "lerp"})
    with pytest.raises(ValueError, match="checkpoint must be None"):
        bilens.load("bilens-mini", checkpoint="step.pt")


# -- tokenizers -------------------------------------------------------------------------------------------------------


def test_a_model_without_a_tokenizer_says_which_it_needs(gpt, flat):
    with pytest.raises(ValueError, match="its own is 'openai-community/gpt2'"):
        bilens.load(gpt[2]).to_tokens("a")
    with pytest.raises(ValueError, match=r"GPT-2's modulo 23, .* cannot be decoded"):
        bilens.load(flat[2]).to_string(torch.tensor([1, 2]))


def test_a_tokenizer_may_be_given(tmp_path, tiny_tokenizer, ids):
    config = SIZES | FAMILIES["softmax, bilinear"] | {"vocab_size": tiny_tokenizer.get_vocab_size()}
    folder = write(tmp_path / "a", config, random_state(gpt_shapes(config)))
    tiny_tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = bilens.load(folder, tokenizer=tmp_path / "tokenizer.json")
    assert model.to_string(model.to_tokens("the cat")[0]) == "the cat"  # no BOS: the models were trained without
