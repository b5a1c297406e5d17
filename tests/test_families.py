"""Every hook point of today's families sees what transformers' own classes compute there."""

import sys

import pytest
import torch
from families import build

import bilens
from bilens.models.hooks import HOOK_MEANINGS

transformers = pytest.importorskip("transformers")
KINDS = (
    *("tinyllama", "biases", "qwen2 with some windows", "qwen3", "olmo2", "olmo2 tied", "gemma2", "gemma3"),
    *("gemma3 local", "nanochat", "bilinear gemma3"),
)
NORMS = {  # our norms in a block by those of transformers, where they stand before, after, or on both sides
    "before": {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"},
    "after": {"ln1_post": "post_attention_layernorm", "ln2_post": "post_feedforward_layernorm"},
    "both": {"ln1": "input_layernorm", "ln1_post": "post_attention_layernorm"}
    | {"ln2": "pre_feedforward_layernorm", "ln2_post": "post_feedforward_layernorm"},
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """Transformers' model, with the attention that shows its scores, and ours."""
    original = build(transformers, request.param)
    original.set_attn_implementation("eager")
    folder = tmp_path_factory.mktemp("families")
    original.save_pretrained(folder)
    return original, bilens.load(folder)


@pytest.fixture
def ids():
    return torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(1))


class Record:
    """One run of transformers' model: what enters and leaves each module, and what attention shows in each layer."""

    def __init__(self, original, ids, monkeypatch):
        self.entered, self.left, self.attended, self.scores = {}, {}, [], []
        code = sys.modules[type(original).__module__]
        eager, softmax = code.eager_attention_forward, torch.nn.functional.softmax

        def attend(module, query, key, value, *args, **kwargs):
            out = eager(module, query, key, value, *args, **kwargs)
            self.attended.append((query, key, value, out[1]))
            return out

        monkeypatch.setattr(code, "eager_attention_forward", attend)
        monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, **how: self.scores.append(x) or softmax(x, **how))
        watches = [
            module.register_forward_hook(lambda *call, name=name: self.note(name, *call), with_kwargs=True)
            for name, module in original.named_modules()
        ]
        self.logits = original(ids).logits
        for watch in watches:
            watch.remove()

    def note(self, name, module, args, kwargs, out):
        self.entered[name] = args[0] if args else kwargs.get("hidden_states")
        self.left[name] = out[0] if isinstance(out, tuple) else out


def expected_in_block(original, record, layer, place):
    """Yield hook points of a block and what transformers computes there."""
    at, config = f"model.layers.{layer}", original.config
    entered, left = (lambda name: record.entered[f"{at}.{name}"]), (lambda name: record.left[f"{at}.{name}"])
    n_heads, shared = config.num_attention_heads, config.num_key_value_heads
    query, key, value, pattern = record.attended[layer]
    gate, down = ("gate_proj", "down_proj") if f"{at}.mlp.gate_proj" in record.left else ("fc1", "fc2")
    attn_out = left("self_attn" if place == "before" else "post_attention_layernorm")
    yield "hook_resid_pre", record.entered[at]
    yield "attn.hook_q", left("self_attn.q_proj").unflatten(-1, (n_heads, -1))
    yield "attn.hook_k", left("self_attn.k_proj").unflatten(-1, (shared, -1))
    for name, shown in (("rot_q", query), ("rot_k", key), ("v", value)):
        yield f"attn.hook_{name}", shown.transpose(1, 2)
    yield "attn.hook_attn_scores", record.scores[layer]
    yield "attn.hook_pattern", pattern
    yield "attn.hook_z", entered("self_attn.o_proj").unflatten(-1, (n_heads, -1))
    yield "hook_attn_out", attn_out
    yield "hook_resid_mid", record.entered[at] + attn_out
    yield "hook_mlp_in", entered("mlp")
    yield "mlp.hook_pre", left(f"mlp.{gate}")
    if gate == "gate_proj":
        yield "mlp.hook_pre_linear", left("mlp.up_proj")
    yield "mlp.hook_post", entered(f"mlp.{down}")
    yield "hook_mlp_out", left("mlp" if place == "before" else "post_feedforward_layernorm")
    yield "hook_resid_post", record.left[at]


def norms(original, model):
    """Yield our norms and those of transformers; nanochat's of queries and keys come after the rotation."""
    pairs = [("ln_final", "model.norm")]
    for layer in range(model.cfg.n_layers):
        names = dict(NORMS[model.cfg.norm.place])
        if model.cfg.attention.qk_norm is not None and original.config.model_type != "nanochat":
            names |= {f"attn.{part}_norm": f"self_attn.{part}_norm" for part in "qk"}
        pairs += [(f"blocks.{layer}.{ours}", f"model.layers.{layer}.{theirs}") for ours, theirs in names.items()]
    return pairs


def difference(got, expected):
    """Return the greatest difference, relative to the largest value if that is above 1."""
    seen = torch.isfinite(got)  # scores: transformers masks by the lowest number, we by -inf
    assert got.shape == expected.shape
    assert (expected[~seen] < -1e30).all()
    return (got - expected)[seen].abs().max() / expected[seen].abs().max().clamp(min=1)


@torch.no_grad()
def test_every_hook_sees_what_transformers_computes(pair, ids, monkeypatch):
    original, model = pair
    record = Record(original, ids, monkeypatch)
    logits, cache = model.run_with_cache(ids)
    assert difference(logits, record.logits) <= 1e-5
    assert difference(cache["hook_embed"], record.left["model.embed_tokens"]) <= 1e-5
    seen = {"hook_embed"}
    for layer in range(model.cfg.n_layers):
        for name, shown in expected_in_block(original, record, layer, model.cfg.norm.place):
            seen.add(f"blocks.{layer}.{name}")
            assert difference(cache[f"blocks.{layer}.{name}"], shown) <= 1e-5, f"blocks.{layer}.{name}"
        block, at = model.blocks[layer], f"blocks.{layer}.attn.hook_result"
        out = record.left[f"model.layers.{layer}.self_attn"]
        assert difference(cache[at].sum(2) + block.attn.b_O, out) <= 1e-5
        seen.add(at)
    for ours, theirs in norms(original, model):
        norm = model.get_submodule(ours)
        ratio, scale = (cache[f"{ours}.hook_{name}"] for name in ("normalized", "scale"))
        shown = [side[theirs].reshape(ratio.shape) for side in (record.entered, record.left)]
        if ours.endswith("_norm") and original.config.model_type == "gemma3_text":
            shown = [side[theirs].transpose(1, 2) for side in (record.entered, record.left)]
        assert difference(ratio * scale, shown[0]) <= 1e-5, ours
        assert difference(norm.affine(ratio)[0] * ratio, shown[1]) <= 1e-5, ours
        seen |= {f"{ours}.hook_normalized", f"{ours}.hook_scale"}
        if ours.endswith("_norm"):
            name = ours.replace("_norm", "_normalized").replace("attn.", "attn.hook_")
            assert difference(cache[name].reshape(shown[1].shape), shown[1]) <= 1e-5
            seen.add(name)
    rest = {name for name in cache if name not in seen}
    if original.config.model_type == "nanochat":  # the norm of the embeddings is that of the end, called once more
        assert difference(cache["hook_embed_normalized"], record.entered["model.layers.0"]) <= 1e-5
        rest = {name for name in rest if "embed" not in name and "_norm" not in name}
    if model.cfg.unembed.cap is not None:
        assert difference(cache["unembed_out_before_cap"], record.left["lm_head"]) <= 1e-5
    assert rest <= {"unembed_out_before_cap"}


def test_every_hook_point_is_in_the_table(pair):
    _, model = pair
    names = {name.split(".", 2)[2] if name.startswith("blocks.") else name for name in model.hook_dict}
    assert names <= set(HOOK_MEANINGS)
