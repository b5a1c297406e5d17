"""transformer_lens' names: each is there with its meaning, or says what to use in its place; torch's own hooks too."""

import copy
import threading
import warnings

import pytest
import torch
from torch import nn

from bilens import BilinearConfig, BilinearTransformer
from bilens.models import lensconfig, lensnames

TOKENS = torch.tensor([[1, 5, 7, 6, 9]])


@pytest.fixture(scope="module")
def peer():
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sizes = {"n_layers": 1, "d_model": 8, "n_ctx": 8, "d_head": 4, "d_vocab": 9}
        cfg = HookedTransformerConfig(**sizes, act_fn="relu", normalization_type="RMS")
        return HookedTransformer(cfg)


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(attn_bias=(True, True), mlp_bias=(True, True), norm="rms_gain")


def public(thing):
    return {name for name in dir(thing) if not name.startswith("_")}


def same(one, other):
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


# -- which names there are --------------------------------------------------------------------------------------------


def test_every_name_of_transformer_lens_is_there_or_says_what_to_use(peer, model):
    names = public(peer) - public(nn.Module())
    missing = {name for name in names if not hasattr(model, name)}
    assert missing == set(lensnames.LEFT_OUT) & names
    assert set(lensnames.LEFT_OUT) <= names
    print(f"{len(names)} names, {len(names - missing)} here, {len(missing)} left out")


@pytest.mark.parametrize("owner", [BilinearTransformer, "model"])
def test_a_name_that_is_left_out_says_what_to_use(owner, model):
    owner = model if owner == "model" else owner
    for name, instead in lensnames.LEFT_OUT.items():
        with pytest.raises(AttributeError) as caught:
            getattr(owner, name)
        assert instead in str(caught.value)
    with pytest.raises(AttributeError, match=r"has no attribute 'lod'$"):
        owner.lod  # noqa: B018


def test_every_name_of_the_config_is_there_or_says_what_to_use(peer, model):
    names = public(peer.cfg)
    missing = {name for name in names if not hasattr(model.cfg, name)}
    assert missing == set(lensconfig.LEFT_OUT) & names
    assert set(lensconfig.LEFT_OUT) <= names
    with pytest.raises(AttributeError, match=r"transformer_lens has: cfg\.attention\.rope"):
        model.cfg.yarn_factor  # noqa: B018
    assert "yarn_factor" not in public(BilinearConfig)
    print(f"{len(names)} names of cfg, {len(names - missing)} here, {len(missing)} left out")


def test_names_mean_the_same_on_the_same_shape(peer):
    from transformer_lens import HookedTransformerConfig

    given = {"n_layers": 2, "d_model": 16, "n_ctx": 32, "d_head": 8, "d_vocab": 74, "d_mlp": 24, "act_fn": "silu"}
    given |= {"normalization_type": "RMS", "eps": 1e-8, "gated_mlp": True, "positional_embedding_type": "rotary"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = HookedTransformerConfig(**given, uses_rms_norm=True, use_attn_result=True, use_hook_mlp_in=True)
    from conftest import tiny_config

    ours = tiny_config(norm="rms_gain", mlp="gated", act="silu", attn_scale=0.5)
    unlike = {"device", "dtype", "original_architecture", "seed"}
    for name in public(theirs) - unlike:
        value = getattr(theirs, name)
        if not callable(value) and name not in lensconfig.LEFT_OUT:
            assert getattr(ours, name) == value, name
    assert ours.attn_scale == 8**0.5


# -- what they mean ---------------------------------------------------------------------------------------------------


def test_stacked_weights_are_what_the_layers_compute(model):
    _, cache = model.run_with_cache(TOKENS)
    for layer in range(2):
        x = cache["mlp_in", layer] if ("mlp_in", layer) in cache.cache_dict else cache[f"blocks.{layer}.hook_mlp_in"]
        left = x @ model.W_gate[layer] + model.b_gate[layer]
        right = x @ model.W_in[layer] + model.b_in[layer]
        same((left * right) @ model.W_out[layer] + model.b_out[layer], cache["mlp_out", layer])
        read = model.blocks[layer].ln1(cache["resid_pre", layer])
        for name in "QKV":
            heads = torch.einsum("bsd,hde->bshe", read, getattr(model, f"W_{name}")[layer])
            same(heads + getattr(model, f"b_{name}")[layer], cache[name.lower(), layer])
        written = torch.einsum("bshe,hed->bsd", cache["z", layer], model.W_O[layer])
        same(written + model.b_O[layer], cache["attn_out", layer])
    assert not model.b_U.any()


@pytest.mark.parametrize("mlp", ["plain", "squared"])
def test_one_sided_mlps_have_no_gate(make_model, mlp):
    model = make_model(mlp=mlp, act="relu" if mlp == "plain" else None)
    assert model.W_gate is model.b_gate is None
    assert model.W_in.shape == (2, 16, 24)
    assert not model.b_in.any()


def test_a_model_without_mlps_says_so(make_model):
    from dataclasses import replace

    model = BilinearTransformer(replace(make_model().cfg, mlp=None))
    assert not hasattr(model, "W_in")
    with pytest.raises(AttributeError, match="W_in is of MLPs, and this model has attention only"):
        model.W_in  # noqa: B018


def test_circuits_of_heads(model):
    same(model.QK.AB, model.W_Q @ model.W_K.mT)
    same(model.OV.AB, model.W_V @ model.W_O)
    ov, qk = model.OV.AB[0, 1], model.QK.AB[1, 0]
    right = {"Q": qk, "K": qk.T, "V": model.OV.AB[1, 0]}
    for mode, other in right.items():
        scores = model.all_composition_scores(mode)
        same(scores[0, 1, 1, 0], (ov @ other).norm() / (ov.norm() * other.norm()))
        assert not scores[1].any()
        assert not scores[:, :, 0].any()
    with pytest.raises(ValueError, match="mode must be 'Q', 'K' or 'V'"):
        model.all_composition_scores("q")
    assert model.all_head_labels() == ["L0H0", "L0H1", "L1H0", "L1H1"]
    assert model.n_params_total == sum(p.numel() for p in model.parameters())
    matrices = ("attn.qkv.weight", "attn.o.weight", "mlp.w.weight", "mlp.p.weight")
    assert model.cfg.n_params == sum(p.numel() for name, p in model.named_parameters() if name.endswith(matrices))


def test_small_questions(model):
    assert model.to_single_str_token(model.to_single_token("cat")) == "cat"
    text = "the cat saw the cat"
    for asked in (text, model.to_tokens(text), model.to_tokens(text)[0]):
        assert (model.get_token_position("cat", asked), model.get_token_position("cat", asked, "last")) == (2, 5)
    with pytest.raises(ValueError, match="single_token must occur in the input"):
        model.get_token_position("dog", text)


def test_loss_and_start_of_the_stream(model):
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    for per_token in (False, True):
        how = {"attention_mask": mask, "loss_per_token": per_token}
        same(model.loss_fn(model(TOKENS, attention_mask=mask), TOKENS, mask, per_token), model(TOKENS, "loss", **how))
    same(model.loss_fn(model(TOKENS), TOKENS), model(TOKENS, "loss"))
    stream, tokens, nothing, masked = model.input_to_embed(["the cat", "the big cat sat"], padding_side="left")
    assert nothing is None
    assert torch.equal(model.stream_start(tokens), stream)
    same(model(stream, start_at_layer=0, attention_mask=masked), model(tokens, attention_mask=masked))


def test_switches(model):
    for name in ("set_use_attn_result", "set_use_hook_mlp_in"):
        getattr(model, name)(True)
    for name in ("set_use_split_qkv_input", "set_use_attn_in"):
        getattr(model, name)(False)
        with pytest.raises(ValueError, match=f"{name[4:]} must be False"):
            getattr(model, name)(True)


def test_the_config_says_where_the_model_is(make_model):
    model = make_model()
    assert (model.cfg.device, model.cfg.dtype) == ("cpu", torch.float64)
    half = copy.deepcopy(model).half()
    assert half.cfg.dtype == torch.float16
    assert half.cfg == model.cfg
    half.load_state_dict(model.state_dict(), assign=True)
    assert half.cfg.dtype == torch.float64
    with torch.device("meta"):
        assert BilinearTransformer(model.cfg).cfg.device == "meta"


def test_scores_are_divided_by_the_scale(make_model):
    model = make_model(score_scale=0.7, attention="softmax")
    _, cache = model.run_with_cache(TOKENS)
    scores = torch.einsum("bqhd,bkhd->bhqk", cache["rot_q", 0], cache["rot_k", 0]) / model.cfg.attn_scale
    seen = cache["attn_scores", 0]
    same(seen[seen.isfinite()], scores[seen.isfinite()])


# -- torch's own hooks, threads, graphs -------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["softmax", "bilinear"])
def test_torchs_own_hooks_fire_at_every_point(make_model, attention):
    model, seen = make_model(attention=attention), {}
    with torch.no_grad():
        plain = model(TOKENS)
    _, cache = model.run_with_cache(TOKENS)
    for name, point in model.hook_dict.items():
        handle = point.register_forward_hook(lambda _, args, out, name=name: seen.__setitem__(name, out.detach()))
        model(TOKENS)
        handle.remove()
        before = point.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(f"{name} pre", None))
        model(TOKENS)
        before.remove()
        torch.testing.assert_close(seen[name], cache[name])
        assert f"{name} pre" in seen
        point.register_full_backward_hook(lambda _, given, out, name=name: seen.__setitem__(f"{name} back", None))
    model(TOKENS, "loss").backward()
    assert {f"{name} back" for name in model.hook_dict} <= set(seen)
    edited = model.blocks[0].attn.hook_pattern.register_forward_hook(lambda _, args, out: 0 * out)
    assert not torch.allclose(model(TOKENS), plain)
    edited.remove()


def in_a_thread(run):
    caught = []

    def target():
        try:
            run()
        except RuntimeError as error:
            caught.append(str(error))

    thread = threading.Thread(target=target, name="the other")
    thread.start()
    thread.join()
    return caught


def test_a_model_that_one_thread_has_hooked_is_refused_to_another(make_model):
    model = make_model()
    hook = [("blocks.0.hook_mlp_out", lambda value, hook: 0 * value)]
    plain = model(TOKENS)
    with model.hooks(fwd_hooks=hook):
        for run in (
            lambda: model(TOKENS),
            lambda: model.run_with_hooks(TOKENS, fwd_hooks=hook),
            lambda: model.run_with_cache(TOKENS),
        ):
            assert "thread 'the other' needs its own copy" in in_a_thread(run)[0]
        model.run_with_cache(TOKENS)  # the same thread may
    with model.saes():
        assert "inside hooks, saes," in in_a_thread(lambda: model(TOKENS))[0]
        model.run_with_saes(TOKENS)
    assert not in_a_thread(lambda: model.run_with_saes(TOKENS))
    assert not in_a_thread(lambda: model.run_with_hooks(TOKENS, fwd_hooks=hook))
    assert torch.equal(model(TOKENS), plain)


def test_blocks_of_hooks_end_in_any_order_and_no_copy_has_them(make_model):
    model = make_model()
    hook = [("blocks.0.hook_mlp_out", lambda value, hook: 0 * value)]
    plain, options = model(TOKENS), {"max_new_tokens": 2, "max_tokens_per_yield": 1, "stop_at_eos": False}
    first, second = (model.generate_stream(TOKENS[:1, :2], **options, fwd_hooks=hook) for _ in range(2))
    for stream in (first, second, first, first, second, second):  # the first ends before the second
        next(stream, None)
    assert (model.context_level, model.hooking) == (0, None)
    assert torch.equal(model(TOKENS), plain)
    with model.hooks(fwd_hooks=hook):
        made = copy.deepcopy(model)
        assert not in_a_thread(lambda: made(TOKENS))
        assert torch.equal(made(TOKENS), plain)
        assert not torch.equal(model(TOKENS), plain)
    stream = model.generate_stream(TOKENS[:1, :2], **options)
    next(stream)
    assert not in_a_thread(lambda: model.run_with_hooks(TOKENS, fwd_hooks=hook))  # without hooks it has none hooked
    stream.close()
