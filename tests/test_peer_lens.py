"""What transformer_lens tests of hooks, cache, patching and generation, asked of a model here, in our own words.

What of its tests does not apply, and why:

- loading by its names, and the tests that compare with its models' stored outputs: `bilens.load` reads checkpoints,
  tests of which compare with the authors' own code and with transformers;
- positional embeddings (standard, shortformer, ALiBi): all models here are rotary;
- `hook_q_input`, `hook_k_input`, `hook_v_input`, `hook_attn_in`: no copies of the stream are made (`LEFT_OUT` says so);
- keys and values kept by the caller (`past_kv_cache`): `generate` keeps them, and is tested against running without;
- state-space layers of `TransformerBridge` (`ssm_layers`, `compute_ssm_*`), mixtures of experts, encoders, ALiBi,
  4-bit weights, several devices, `refactor_factored_attn_matrices`, `center_writing_weights`: no model here has them;
- `cache_all`, `cache_some`: it has deprecated them; they are inherited.
"""

import logging
from functools import partial

import pytest
import torch
from transformer_lens import ActivationCache, patching, utilities

TOKENS = torch.tensor([[1, 5, 7, 6, 9]])
CORRUPTED = torch.tensor([[1, 5, 8, 6, 9]])
STATE_SPACE = {"compute_ssm_effective_attention", "compute_ssm_state", "ssm_layers"}
N_LAYERS, N_HEADS, SEQ = 2, 2, 5


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(norm="rms_gain", mlp_bias=(True, True))


@pytest.fixture(scope="module")
def grouped(make_model):
    return make_model(d_model=32, n_heads=4, n_key_value_heads=2)


@pytest.fixture(autouse=True)
def clean(request):
    yield
    if "model" in request.fixturenames:
        request.getfixturevalue("model").reset_hooks(including_permanent=True)


def count(model):
    return sum(len(point.fwd_hooks) for point in model.hook_points())


class Counter:
    def __init__(self):
        self.calls = 0

    def __call__(self, value, hook):
        self.calls += 1


# -- hooks ------------------------------------------------------------------------------------------------------------


def test_a_hook_attaches_and_leaves(model):
    seen = Counter()
    model.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", seen)])
    assert (seen.calls, count(model)) == (1, 0)
    model.add_hook("hook_embed", seen)
    model(TOKENS)
    assert (seen.calls, count(model)) == (2, 1)
    model.remove_all_hook_fns()
    model(TOKENS)
    assert (seen.calls, count(model)) == (2, 0)


def test_a_permanent_hook_stays_until_it_is_asked_to_go(model):
    seen = Counter()
    model.add_perma_hook("hook_embed", seen)
    model.reset_hooks()
    model.run_with_hooks(TOKENS, fwd_hooks=[])
    assert (seen.calls, count(model)) == (1, 1)
    model.remove_all_hook_fns(including_permanent=True)
    assert count(model) == 0


def test_nested_contexts_remove_their_own_hooks(model):
    outer, inner = Counter(), Counter()
    with model.hooks(fwd_hooks=[("hook_embed", outer)]):
        with model.hooks(fwd_hooks=[("hook_embed", inner)]):
            model(TOKENS)
        model(TOKENS)
        assert (outer.calls, inner.calls, count(model)) == (2, 1, 1)
        model.run_with_cache(TOKENS)
        assert (outer.calls, count(model)) == (3, 1)
    assert (count(model), model.context_level) == (0, 0)


def test_a_context_removes_only_what_it_added(model):
    before, within, added = Counter(), Counter(), Counter()
    model.add_hook("hook_embed", before)
    with model.hooks(fwd_hooks=[("hook_embed", within)]):
        model.add_hook("hook_embed", added)
        model(TOKENS)
    model(TOKENS)
    assert (before.calls, within.calls, added.calls) == (2, 1, 2)


def test_hooks_that_are_to_stay_stay(model):
    seen = Counter()
    with model.hooks(fwd_hooks=[("hook_embed", seen)], reset_hooks_end=False):
        pass
    assert count(model) == 1
    model.reset_hooks()
    assert count(model) == 0


def test_a_predicate_on_names_hooks_each(model):
    seen = Counter()
    model.run_with_hooks(TOKENS, fwd_hooks=[(lambda name: name.endswith("hook_q"), seen)])
    assert seen.calls == N_LAYERS


def test_a_hook_put_first_runs_first(model):
    order = []
    model.add_hook("hook_embed", lambda value, hook: order.append("second"))
    model.add_hook("hook_embed", lambda value, hook: order.append("first"), prepend=True)
    model(TOKENS)
    assert order == ["first", "second"]


def test_hooks_know_their_point_and_keep_what_they_are_given(model):
    def keep(value, hook):
        hook.ctx["value"] = value
        assert (hook.name, hook.layer()) == ("blocks.1.hook_mlp_out", 1)

    model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_mlp_out", keep)])
    point = model.hook_dict["blocks.1.hook_mlp_out"]
    assert "value" in point.ctx
    model.reset_hooks(clear_contexts=True)
    assert not point.ctx


def test_gradients_pass_hooks_and_hooks_change_them(model):
    seen = []
    with model.hooks(bwd_hooks=[("blocks.0.hook_mlp_out", lambda grad, hook: seen.append(grad.abs().max()))]):
        model(TOKENS, return_type="loss").backward()
    stopped = [("blocks.1.hook_resid_post", lambda grad, hook: (torch.zeros_like(grad),))]
    kept = model.blocks[0].mlp.p.weight.grad.clone()
    model.zero_grad()
    with model.hooks(bwd_hooks=stopped):
        model(TOKENS, return_type="loss").backward()
    assert seen[0] > 0
    assert kept.any()
    assert not model.blocks[0].mlp.p.weight.grad.any()
    model.zero_grad()


def test_attached_hooks_are_listed(model):
    model.add_hook("hook_embed", Counter())
    model.add_hook("blocks.0.hook_mlp_out", Counter(), dir="bwd")
    assert {name: len(handles) for name, handles in model.list_hooks().items()} == {
        "hook_embed": 1,
        "blocks.0.hook_mlp_out": 1,
    }
    assert set(model.list_hooks(dir="fwd")) == {"hook_embed"}


def test_caching_hooks_that_one_adds_oneself(model):
    cache = model.add_caching_hooks(["hook_embed", "blocks.0.hook_mlp_out"])
    model(TOKENS)
    assert set(cache) == {"hook_embed", "blocks.0.hook_mlp_out"}
    model.reset_hooks()
    cache, fwd, bwd = model.get_caching_hooks(lambda name: name.endswith("hook_z"), incl_bwd=True)
    with model.hooks(fwd, bwd):
        model(TOKENS, return_type="loss").backward()
    assert set(cache) == {f"blocks.{layer}.attn.hook_z{end}" for layer in range(2) for end in ("", "_grad")}
    model.zero_grad()


def test_short_names_are_found(model):
    _, cache = model.run_with_cache(TOKENS)
    for short, name in {
        ("q", 1): "blocks.1.attn.hook_q",
        ("post", 0): "blocks.0.mlp.hook_post",
        ("pre", 0, "mlp"): "blocks.0.mlp.hook_pre",
        ("scale", 1, "ln1"): "blocks.1.ln1.hook_scale",
        ("normalized",): "ln_final.hook_normalized",
        ("resid_post", -1): "blocks.1.hook_resid_post",
        ("pattern", 0): "blocks.0.attn.hook_pattern",
        ("embed",): "hook_embed",
    }.items():
        assert cache[short if len(short) > 1 else short[0]] is cache[name]
        if -1 not in short:
            assert utilities.get_act_name(*short) == name


# -- the cache --------------------------------------------------------------------------------------------------------

METHODS = {
    "__getitem__": lambda c: c["resid_post", 1].shape == (1, SEQ, 16),
    "__len__": lambda c: len(c) == len(c.model.hook_dict),
    "__iter__": lambda c: set(c) == set(c.model.hook_dict),
    "__repr__": lambda c: "ActivationCache" in repr(c),
    "keys": lambda c: list(c.keys()) == list(c),
    "values": lambda c: all(map(torch.is_tensor, c.values())),
    "items": lambda c: dict(c.items()).keys() == set(c),
    "to": lambda c: c.to("cpu")["hook_embed"].device.type == "cpu",
    "toggle_autodiff": lambda c: c.toggle_autodiff(False) is None,
    "remove_batch_dim": lambda c: c.remove_batch_dim()["hook_embed"].shape == (SEQ, 16),
    "apply_slice_to_batch_dim": lambda c: c.apply_slice_to_batch_dim(0)["hook_embed"].shape == (SEQ, 16),
    "accumulated_resid": lambda c: len(c.accumulated_resid(incl_mid=True)) == 2 * N_LAYERS + 1,
    "decompose_resid": lambda c: len(c.decompose_resid()) == 2 * N_LAYERS + 1,
    "logit_attrs": lambda c: c.logit_attrs(c.decompose_resid(), "cat", "dog").shape == (5, 1, SEQ),
    "compute_head_results": lambda c: c.compute_head_results() is None,
    "stack_head_results": lambda c: c.stack_head_results(return_labels=True)[1] == c.model.all_head_labels(),
    "stack_activation": lambda c: c.stack_activation("z").shape == (N_LAYERS, 1, SEQ, N_HEADS, 8),
    "get_neuron_results": lambda c: c.get_neuron_results(1, [0, 3], -1).shape == (1, 2, 16),
    "stack_neuron_results": lambda c: len(c.stack_neuron_results(2, neuron_slice=(0, 6))) == 12,
    "apply_ln_to_stack": lambda c: c.apply_ln_to_stack(c.decompose_resid(), -1).shape == (5, 1, SEQ, 16),
    "get_full_resid_decomposition": lambda c: len(c.get_full_resid_decomposition(expand_neurons=False)) == 8,
}


def test_every_method_of_the_cache_is_tried():
    public = {name for name in vars(ActivationCache) if not name.startswith("_")}
    assert public | {name for name in METHODS if name.startswith("__")} == set(METHODS) | STATE_SPACE
    print(f"{len(METHODS)} methods of ActivationCache, {len(STATE_SPACE)} of state-space layers left out")


@pytest.mark.parametrize("method", METHODS)
def test_a_method_of_the_cache(model, method, caplog):
    caplog.set_level(logging.ERROR)
    _, cache = model.run_with_cache(TOKENS)
    with torch.enable_grad():  # `toggle_autodiff` switches it for everybody
        assert METHODS[method](cache)


def test_what_a_run_keeps_is_asked_for(model):
    _, cache = model.run_with_cache(TOKENS, names_filter=["hook_embed"], remove_batch_dim=True)
    assert {name: value.shape for name, value in cache.items()} == {"hook_embed": (SEQ, 16)}
    _, plain = model.run_with_cache(TOKENS, return_cache_object=False)
    assert isinstance(plain, dict)
    _, cache = model.run_with_cache(TOKENS, pos_slice=(1, 3))
    for name, shape in (("hook_embed", (1, 2, 16)), ("blocks.0.attn.hook_z", (1, 2, 2, 8))):
        assert cache[name].shape == shape
    _, cache = model.run_with_cache(TOKENS, stop_at_layer=1)
    assert not any(name.startswith("blocks.1") for name in cache)


# -- patching ---------------------------------------------------------------------------------------------------------

AXES = {"layer": N_LAYERS, "pos": SEQ, "head_index": N_HEADS, "head": N_HEADS, "src_pos": SEQ, "dest_pos": SEQ}
EVERY = {
    "get_act_patch_attn_head_all_pos_every": (5, N_LAYERS, N_HEADS),
    "get_act_patch_attn_head_by_pos_every": (5, N_LAYERS, SEQ, N_HEADS),
    "get_act_patch_block_every": (3, N_LAYERS, SEQ),
}
GETTERS = sorted(name for name in vars(patching) if name.startswith("get_act_patch"))
SETTERS = sorted(name for name in vars(patching) if name.endswith("_patch_setter"))


def metric(logits):
    return logits[0, -1, 7] - logits[0, -1, 5]


def test_how_many_patching_functions_there_are():
    print(f"{len(GETTERS)} getters, {len(SETTERS)} setters, generic_activation_patch, make_df_from_ranges")
    used = {getattr(patching, name).keywords["patch_setter"].__name__ for name in GETTERS if name not in EVERY}
    assert used == set(SETTERS)


@pytest.mark.parametrize("name", GETTERS)
@torch.no_grad()
def test_a_patch_of_everything_that_differs_restores_the_clean_run(model, name):
    clean, cache = model.run_with_cache(TOKENS)
    same, own = model.run_with_cache(CORRUPTED)
    get = getattr(patching, name)
    found = get(model, CORRUPTED, cache, metric)
    shape = EVERY.get(name)
    if shape is None:
        given = get.keywords
        names = given.get("index_axis_names")
        shape = tuple(AXES[axis] for axis in names)
    assert found.shape == shape
    unpatched = get(model, CORRUPTED, own, metric)
    torch.testing.assert_close(unpatched, torch.full(shape, metric(same).item(), dtype=unpatched.dtype))
    assert (found - unpatched).abs().max() > 1e-6
    if name == "get_act_patch_resid_pre":  # before the first block, the token that differs is all there is
        torch.testing.assert_close(found[0, 2].double(), metric(clean), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["k", "v", "q"])
@torch.no_grad()
def test_patching_knows_heads_that_share_keys(grouped, name):
    _, cache = grouped.run_with_cache(TOKENS)
    get = getattr(patching, f"get_act_patch_attn_head_{name}_all_pos")
    found = get(grouped, CORRUPTED, cache, metric)
    assert found.shape == (N_LAYERS, 4 if name == "q" else 2)


@torch.no_grad()
def test_patching_by_a_table(model):
    _, cache = model.run_with_cache(TOKENS)
    asked = patching.make_df_from_ranges([N_LAYERS, SEQ], ["layer", "pos"])
    one = patching.generic_activation_patch(
        model, CORRUPTED, cache, metric, patching.layer_pos_patch_setter, "mlp_out", index_df=asked
    )
    other = patching.get_act_patch_mlp_out(model, CORRUPTED, cache, metric)
    assert torch.equal(one.view_as(other), other)
    found, table = patching.get_act_patch_mlp_out(model, CORRUPTED, cache, metric, return_index_df=True)
    assert torch.equal(found, other)
    assert table.equals(asked)


# -- generation and losses --------------------------------------------------------------------------------------------


def test_generation_with_and_without_kept_keys_is_the_same(model):
    ask = partial(model.generate, TOKENS, max_new_tokens=6, temperature=0)
    assert torch.equal(ask(use_past_kv_cache=True), ask(use_past_kv_cache=False))
    assert torch.equal(ask()[:, :SEQ], TOKENS)


def test_generation_does_not_depend_on_the_others_in_a_batch(model):
    texts = ["the cat", "the big dog sat on"]
    together = model.generate(texts, max_new_tokens=4, temperature=0, stop_at_eos=False)
    assert together == [model.generate(text, max_new_tokens=4, temperature=0, stop_at_eos=False) for text in texts]


def test_return_types(model):
    logits, loss = model(TOKENS, return_type="both")
    assert torch.equal(model(TOKENS, return_type="logits"), logits)
    assert torch.equal(model(TOKENS, return_type="loss"), loss)
    assert model(TOKENS, return_type=None) is None
    each = model(TOKENS, return_type="loss", loss_per_token=True)
    torch.testing.assert_close(each.mean(), loss)
    torch.testing.assert_close(-logits.log_softmax(-1)[0, 1, 7], each[0, 1])


def test_layers_can_be_run_in_two_parts(model):
    half = model(TOKENS, stop_at_layer=1)
    torch.testing.assert_close(model(half, start_at_layer=1), model(TOKENS))
    torch.testing.assert_close(model(TOKENS, stop_at_layer=-1), half)
