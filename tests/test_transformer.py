"""The hooked transformer: every hook shows what it says, padding and caches change nothing, hooks never stay behind."""

import gc
import itertools
import re
import weakref

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, relu, silu

from bilens import AttentionConfig, BilinearConfig, BilinearTransformer, MLPConfig, NormConfig
from bilens.models.hooks import HOOK_MEANINGS

VARIANTS = {
    "bilinear": {},
    "biases": {"mlp_bias": (True, True)},
    "gain and shift": {"norm": "rms_gain_shift", "mlp_bias": (True, False)},
    "no norm": {"norm": "none", "attn_scale": 1.0},
    "gated": {"mlp": "gated", "act": "silu", "norm": "rms_gain"},
    "plain": {"mlp": "plain", "act": "relu", "mlp_bias": (False, True)},
    "bilinear attention": {"attention": "bilinear"},
}
TEXTS = ["Once upon a time", "the cat", "the big dog sat on the little mat.", ""]


@pytest.fixture(params=VARIANTS)
def model(request, make_model):
    return make_model(**VARIANTS[request.param])


@pytest.fixture
def plain(make_model):
    """One model for what does not depend on the variant."""
    return make_model()


@pytest.fixture
def tokens(plain):
    return plain.to_tokens("the big dog sat on the mat")


def assert_close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **({"rtol": 1e-9, "atol": 1e-9} | tolerance))


def hookless(model):
    return model.context_level == 0 and not any(point.has_hooks() for point in model.hook_points())


def noise(model, seed=0):
    """Return a hook that adds the same noise whenever an activation has the same shape."""

    def hook(activation, hook):
        generator = torch.Generator().manual_seed(seed)
        return activation + 0.3 * torch.randn(activation.shape, generator=generator, dtype=activation.dtype)

    return hook


# -- hooks show and replace what they name ----------------------------------------------------------------------------


def test_residual_stream_is_the_sum_of_what_is_added(model, tokens):
    logits, cache = model.run_with_cache(tokens)
    assert_close(cache["hook_embed"], model.W_E[tokens])
    for layer in range(model.cfg.n_layers):
        pre, mid, post = (cache[f"blocks.{layer}.hook_resid_{where}"] for where in ("pre", "mid", "post"))
        before = cache["hook_embed"] if layer == 0 else cache[f"blocks.{layer - 1}.hook_resid_post"]
        assert torch.equal(pre, before)
        assert_close(mid, pre + cache[f"blocks.{layer}.hook_attn_out"])
        assert_close(post, mid + cache[f"blocks.{layer}.hook_mlp_out"])
        assert_close(
            model.blocks[layer].mlp(cache[f"blocks.{layer}.hook_mlp_in"]), cache[f"blocks.{layer}.hook_mlp_out"]
        )
    assert_close(logits, model.ln_final(post) @ model.W_U)


def test_heads_sum_to_the_attention_output(model, tokens):
    _, cache = model.run_with_cache(tokens)
    for layer in range(model.cfg.n_layers):
        at = f"blocks.{layer}.attn.hook_"
        written = torch.einsum("bqhe,hem->bqhm", cache[at + "z"], model.W_O[layer])
        assert_close(cache[at + "result"], written)
        assert_close(written.sum(2), cache[f"blocks.{layer}.hook_attn_out"])
        assert_close(torch.einsum("bhqk,bkhe->bqhe", cache[at + "pattern"], cache[at + "v"]), cache[at + "z"])


def test_queries_keys_and_values_are_read_by_the_weights(model, tokens):
    cfg = model.cfg
    _, cache = model.run_with_cache(tokens)
    for name, W in (("q", model.W_Q), ("k", model.W_K), ("v", model.W_V)):
        assert W.shape == (cfg.n_layers, cfg.n_heads, cfg.d_model, cfg.d_head)
        for layer, block in enumerate(model.blocks):
            x = block.ln1(cache[f"blocks.{layer}.hook_resid_pre"])
            assert_close(torch.einsum("bsm,hme->bshe", x, W[layer]), cache[f"blocks.{layer}.attn.hook_{name}"])
    assert model.W_O.shape == (cfg.n_layers, cfg.n_heads, cfg.d_head, cfg.d_model)
    assert model.W_E.shape == model.W_U.T.shape == (cfg.d_vocab, cfg.d_model)


def test_norm_is_the_ratio_times_gain_plus_shift(model, tokens):
    if model.cfg.norm is None:
        assert not any("ln" in name for name in model.hook_dict)
        return
    _, cache = model.run_with_cache(tokens)
    reads = {"ln_final": "blocks.1.hook_resid_post", "blocks.1.ln1": "blocks.1.hook_resid_pre"}
    for name, source in (reads | {"blocks.1.ln2": "blocks.1.hook_resid_mid"}).items():
        x, norm = cache[source], model.get_submodule(name)
        assert_close(cache[f"{name}.hook_scale"], (x.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt())
        assert_close(cache[f"{name}.hook_normalized"], x / cache[f"{name}.hook_scale"])
        gain = 1 if norm.weight is None else norm.weight
        shift = 0 if norm.bias is None else norm.bias
        assert_close(norm(x), cache[f"{name}.hook_normalized"] * gain + shift)
    mlp_in = model.blocks[1].ln2(cache["blocks.1.hook_resid_mid"])
    assert_close(cache["blocks.1.hook_mlp_in"], mlp_in)


def test_hidden_units_are_what_the_mlp_computes(model, tokens):
    _, cache = model.run_with_cache(tokens)
    mlp, at = model.blocks[1].mlp, "blocks.1.mlp.hook_"
    act = {"silu": silu, "relu": relu, None: lambda x: x}[model.cfg.mlp.act]
    biases = [0, 0] if mlp.w.bias is None else [*mlp.w.bias.chunk(2)]
    x = cache["blocks.1.hook_mlp_in"]
    if model.cfg.mlp.kind == "plain":
        assert_close(cache[at + "pre"], x @ mlp.W_in + biases[0])
        assert_close(cache[at + "post"], act(cache[at + "pre"]))
    else:
        assert_close(cache[at + "pre"], x @ mlp.W_gate + biases[0])
        assert_close(cache[at + "pre_linear"], x @ mlp.W_in + biases[1])
        assert_close(cache[at + "post"], act(cache[at + "pre"]) * cache[at + "pre_linear"])
    assert_close(cache["blocks.1.hook_mlp_out"], cache[at + "post"] @ mlp.W_out + mlp.b_out)


def test_every_hook_point_is_live(model, tokens):
    plain = model(tokens)
    for name in model.hook_dict:
        assert (model.run_with_hooks(tokens, fwd_hooks=[(name, noise(model))]) - plain).abs().max() > 1e-6, name


def test_looking_changes_nothing(model, tokens):
    fused = model(tokens)
    explicit, _ = model.run_with_cache(tokens, names_filter=lambda name: "pattern" in name or "scores" in name)
    by_head, _ = model.run_with_cache(tokens, names_filter=lambda name: "result" in name)
    everything, _ = model.run_with_cache(tokens)
    for looked_at in (explicit, by_head, everything):
        assert_close(looked_at, fused, rtol=1e-10, atol=1e-10)


def test_pattern_is_causal_and_softmax_sums_to_one(model, tokens):
    _, cache = model.run_with_cache(tokens)
    pattern, scores = cache["pattern", 1], cache["attn_scores", 1]
    assert (pattern.triu(1) == 0).all()
    if model.cfg.attention.kind == "softmax":
        assert_close(pattern, scores.softmax(-1))
        q, k = cache["blocks.1.attn.hook_rot_q"], cache["blocks.1.attn.hook_rot_k"]
        below = torch.ones_like(scores, dtype=torch.bool).tril()
        assert_close(scores[below], (torch.einsum("bqhe,bkhe->bhqk", q, k) / model.cfg.d_head**0.5)[below])
        assert (scores[~below] == -torch.inf).all()
    else:
        assert_close(pattern, scores.tril())


def test_positions_are_relative(make_model):
    model = make_model(n_layers=1)
    x = torch.randn(1, 1, model.cfg.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, cache = model.run_with_cache(x.expand(1, 6, -1), start_at_layer=0)
    scores = cache["attn_scores", 0][0, 0]
    for distance in range(4):
        diagonal = scores.diagonal(-distance)
        assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert scores.diagonal(0)[0] != scores.diagonal(-1)[0]


def test_later_tokens_do_not_matter(model, tokens):
    other = tokens.clone()
    other[:, 4:] = (other[:, 4:] + 7) % model.cfg.d_vocab
    assert_close(model(other)[:, :4], model(tokens)[:, :4])
    assert (model(other)[:, 4:] - model(tokens)[:, 4:]).abs().max() > 1e-3


def test_training_mode_computes_the_same(model, tokens):
    evaluated = model(tokens)
    assert torch.equal(model.train()(tokens), evaluated)


def test_shapes_are_those_of_the_hook_table(model, tokens):
    cfg = model.cfg
    batch, seq = tokens.shape
    sizes = {"batch": batch, "seq": seq, "query": seq, "key": seq, "1": 1, "d_model": cfg.d_model}
    sizes |= {"head": cfg.n_heads, "d_head": cfg.d_head, "hidden": cfg.d_hidden}
    _, cache = model.run_with_cache(tokens)
    assert set(cache.keys()) == set(model.hook_dict)
    for name, activation in cache.items():
        axes, _ = HOOK_MEANINGS[re.sub(r"blocks\.\d+\.", "", name)]
        assert list(activation.shape) == [sizes[axis] for axis in axes.split()], name


def test_hook_table_lists_every_hook_point(model, capsys):
    model.hook_table()
    listed = set(re.findall(r"^ +(\S+)", capsys.readouterr().out, flags=re.MULTILINE))
    expected = {re.sub(r"blocks\.\d+", "blocks.{i}", name) for name in model.hook_dict}
    assert {name for name in listed if "hook_" in name} == expected


def test_doubling_the_input_of_a_bilinear_mlp_quadruples_the_output(plain):
    x = torch.randn(5, plain.cfg.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mlp = plain.blocks[0].mlp
    assert_close(mlp(2 * x), 4 * mlp(x))
    assert_close(mlp(-x), mlp(x))


@pytest.mark.parametrize("variant", ["bilinear", "biases"])
def test_the_tensor_of_a_layer_is_what_the_model_runs(make_model, variant, tokens):
    model = make_model(**VARIANTS[variant])
    _, cache = model.run_with_cache(tokens)
    for layer, block in enumerate(model.blocks):
        assert_close(block.mlp.tensor().apply(cache[f"blocks.{layer}.hook_mlp_in"]), cache["mlp_out", layer])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_run_all_the_way(make_model, dtype):
    model, exact = make_model(dtype=dtype), make_model()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    logits, cache = model.run_with_cache("the cat sat")
    assert {logits.dtype} | {value.dtype for value in cache.values()} == {dtype}
    error = (logits.double() - exact("the cat sat")).abs().max() / logits.abs().max()
    assert error < {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 0.1}[dtype]


# -- padding ----------------------------------------------------------------------------------------------------------


def padded(lengths, side, vocab, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (len(lengths), max(lengths)), generator=generator)
    index = torch.arange(max(lengths))
    length = torch.tensor(lengths)[:, None]
    return tokens, index < length if side == "right" else index >= max(lengths) - length


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_the_row_alone(model, side):
    tokens, mask = padded([3, 7, 5, 1], side, model.cfg.d_vocab)
    (logits, loss), cache = model.run_with_cache(tokens, "both", attention_mask=mask)
    per_token = model(tokens, "loss", attention_mask=mask, loss_per_token=True)
    losses = []
    for row, kept in enumerate(mask):
        alone = tokens[row, kept][None]
        expected_logits, expected = model.run_with_cache(alone)
        assert_close(logits[row, kept], expected_logits[0])
        for name in ("blocks.1.hook_resid_post", "blocks.0.attn.hook_rot_k", "blocks.1.attn.hook_z"):
            assert_close(cache[name][row, kept], expected[name][0])
        if kept.sum() > 1:
            losses.append(model(alone, "loss", loss_per_token=True)[0])
            assert_close(per_token[row][kept[1:] & kept[:-1]], losses[-1])
    assert_close(loss, torch.cat(losses).mean())
    assert_close(per_token.sum(), torch.cat(losses).sum())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_makes_no_nan(model, side):
    tokens, mask = padded([3, 7, 5, 1], side, model.cfg.d_vocab)
    for path in ("looked at", "fused"):
        kept = None if path == "looked at" else (lambda name: "scores" not in name and "pattern" not in name)
        logits, cache = model.run_with_cache(tokens, attention_mask=mask, names_filter=kept)
        assert logits.isfinite().all()
        for name, activation in cache.items():
            assert not activation.isnan().any(), name
            assert activation.isfinite().all() or name.endswith("scores"), name


def test_padding_does_not_reach_gradients(model):
    tokens, mask = padded([3, 6], "left", model.cfg.d_vocab)
    model(tokens, "loss", attention_mask=mask).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_under_the_mask_does_not_matter(model, side):
    tokens, mask = padded([3, 7, 5], side, model.cfg.d_vocab)
    other = torch.where(mask, tokens, (tokens + 11) % model.cfg.d_vocab)
    assert_close(model(tokens, attention_mask=mask)[mask], model(other, attention_mask=mask)[mask])


def test_a_list_of_texts_is_each_text_alone(model):
    texts = TEXTS[:3]
    logits, loss = model(texts, "both")
    alone = [model(text, "both") for text in texts]
    for row, (expected, _) in zip(logits, alone, strict=True):
        assert_close(row[: expected.shape[1]], expected[0])
    counts = torch.tensor([float(expected.shape[1] - 1) for expected, _ in alone])
    assert_close(loss, (torch.stack([one for _, one in alone]) * counts).sum() / counts.sum())


def test_a_mask_of_ones_is_no_mask(model, tokens):
    for mask in (torch.ones_like(tokens), torch.ones_like(tokens).bool()):
        assert torch.equal(model(tokens, attention_mask=mask), model(tokens))


def test_an_integer_mask_is_a_boolean_mask(plain):
    tokens, mask = padded([3, 5], "left", plain.cfg.d_vocab)
    assert torch.equal(plain(tokens, attention_mask=mask.long()), plain(tokens, attention_mask=mask))


def test_loss_is_the_cross_entropy_of_the_next_token(model, tokens):
    logits, loss = model(tokens, "both")
    logprobs = logits[0, :-1].log_softmax(-1)
    by_hand = -torch.stack([logprobs[i, token] for i, token in enumerate(tokens[0, 1:])])
    assert_close(loss, by_hand.mean())
    assert_close(loss, cross_entropy(logits[0, :-1], tokens[0, 1:]))
    assert_close(model(tokens, "loss"), loss)
    per_token = model(tokens, "loss", loss_per_token=True)
    assert per_token.shape == (1, tokens.shape[1] - 1)
    assert_close(per_token[0], by_hand)
    assert model(tokens, None) is None


# -- generation -------------------------------------------------------------------------------------------------------


def generate_by_hand(model, texts, steps, fwd_hooks=()):
    """Greedy generation, straight from `forward`: the whole padded batch again for each token."""
    tokens = model.to_tokens(texts, padding_side="left")
    lengths = [model.to_tokens(text).shape[1] for text in texts]
    mask = torch.arange(tokens.shape[1]) >= tokens.shape[1] - torch.tensor(lengths)[:, None]
    prompt, prompt_mask = tokens, mask
    with model.hooks(fwd_hooks=fwd_hooks):
        for _ in range(steps):
            chosen = model(tokens, attention_mask=mask)[:, -1].argmax(-1, keepdim=True)
            tokens, mask = torch.cat((tokens, chosen), 1), torch.cat((mask, torch.ones_like(chosen).bool()), 1)
    return prompt, prompt_mask, tokens


def test_greedy_generation_is_the_forward_pass_repeated(model):
    prompt, mask, expected = generate_by_hand(model, TEXTS, steps=6)
    for cached in (True, False):
        found = model.generate(
            prompt, 6, temperature=0, attention_mask=mask, stop_at_eos=False, use_past_kv_cache=cached
        )
        assert torch.equal(found, expected)


def test_each_text_of_a_batch_is_generated_as_alone(model):
    together = model.generate(TEXTS, 6, temperature=0)
    assert together == [model.generate(text, 6, temperature=0) for text in TEXTS]


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.7, 5), (2.0, 1000)])
@pytest.mark.parametrize("variant", ["biases", "bilinear attention"])
def test_sampling_is_the_same_with_and_without_cache(make_model, variant, temperature, top_k):
    model = make_model(**VARIANTS[variant])
    found = [
        model.generate(
            TEXTS,
            8,
            temperature=temperature,
            top_k=top_k,
            use_past_kv_cache=cached,
            generator=torch.Generator().manual_seed(seed),
        )
        for cached, seed in ((True, 0), (False, 0), (True, 1))
    ]
    assert found[0] == found[1]
    assert found[0] != found[2]


def set_position(position):
    """Return a hook that overwrites one absolute position: wrong if it ever sees part of the sequence."""

    def hook(activation, hook):
        activation = activation.clone()
        activation[:, position] = 0.7
        return activation

    return hook


def attend_to_first(pattern, hook):
    return torch.zeros_like(pattern).index_fill(-1, torch.tensor([2]), 0.5) + pattern / 2


HOOKED = [
    "hook_embed",
    *(f"blocks.{layer}.{name}" for layer in (0, 1) for name in ("hook_resid_pre", "attn.hook_v", "hook_mlp_out")),
    "blocks.0.attn.hook_rot_k",
    "blocks.1.attn.hook_z",
    "blocks.1.hook_resid_post",
    "ln_final.hook_normalized",
]


@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("variant", ["bilinear", "bilinear attention"])
def test_generation_under_interventions_at_absolute_positions(make_model, name, variant):
    model = make_model(**VARIANTS[variant])
    # the last position that is there at the first step: a step that saw less would fail, or hook another token
    hooks = [(name, set_position(model.to_tokens(TEXTS[2]).shape[1] - 1))]
    prompt, mask, expected = generate_by_hand(model, TEXTS, 5, hooks)
    found = model.generate(prompt, 5, temperature=0, attention_mask=mask, stop_at_eos=False, fwd_hooks=hooks)
    assert torch.equal(found, expected)
    assert hookless(model)


@pytest.mark.parametrize("layer", [0, 1])
def test_generation_under_pattern_hooks(model, layer):
    hooks = [(f"blocks.{layer}.attn.hook_pattern", attend_to_first)]
    prompt, mask, expected = generate_by_hand(model, TEXTS, 5, hooks)
    found = model.generate(prompt, 5, temperature=0, attention_mask=mask, stop_at_eos=False, fwd_hooks=hooks)
    assert torch.equal(found, expected)


def test_interventions_on_generation_have_an_effect(plain):
    flip = [("blocks.1.hook_resid_post", lambda resid, hook: -resid)]
    unhooked = plain.generate("the cat", 6, temperature=0, stop_at_eos=False)
    assert plain.generate("the cat", 6, temperature=0, stop_at_eos=False, fwd_hooks=flip) != unhooked
    with plain.hooks(flip):
        outside = plain.generate("the cat", 6, temperature=0, stop_at_eos=False)
    assert outside == plain.generate("the cat", 6, temperature=0, stop_at_eos=False, fwd_hooks=flip)


@pytest.mark.parametrize("name", ["hook_embed", "blocks.1.hook_mlp_in", "ln_final.hook_scale"])
def test_a_hook_sees_the_whole_sequence_at_every_step(plain, name):
    seen = []
    plain.generate(TEXTS[:2], 4, stop_at_eos=False, fwd_hooks=[(name, lambda x, hook: seen.append(tuple(x.shape[:2])))])
    length = plain.to_tokens(TEXTS[:2]).shape[1]
    assert seen == [(2, length + step) for step in range(4)]


@pytest.mark.parametrize(
    ("hooks", "expected"),
    [((), [[5, 1, 1], [5, 1, 1]]), ((("blocks.1.hook_mlp_out", lambda x, hook: None),), [[5, 1, 1], [5, 6, 7]])],
)
def test_only_new_tokens_run_below_the_first_hook(plain, hooks, expected, monkeypatch):
    widths = [[], []]
    for block, seen in zip(plain.blocks, widths, strict=True):

        def watched(x, *args, run=block.forward, seen=seen):
            seen.append(x.shape[1])
            return run(x, *args)

        monkeypatch.setattr(block, "forward", watched)
    plain.generate(torch.tensor([[1, 5, 6, 7, 8]]), 3, stop_at_eos=False, fwd_hooks=hooks)
    assert widths == expected


def towards(model, wanted):
    """Return a hook on what the unembedding reads: row r gets the token `wanted[r](step)`."""
    step = itertools.count()

    def hook(normalized, hook):
        now = next(step)
        directions = torch.linalg.pinv(model.W_U).T @ one_hot(
            torch.tensor([token(now) for token in wanted]), model.cfg.d_vocab
        ).T.to(model.W_U)
        normalized = normalized.clone()
        normalized[:, -1] = directions.T
        return normalized

    return [("ln_final.hook_normalized", hook)]


def test_a_finished_text_gets_only_eos_and_the_others_go_on(make_model, tiny_tokenizer):
    model = make_model(d_model=128)  # wider than the vocabulary, so that every token can be asked for
    eos, cat, dog = (tiny_tokenizer.token_to_id(token) for token in ("[EOS]", "cat", "dog"))
    wanted = [lambda step: eos if step == 1 else cat, lambda step: eos if step == 3 else dog]
    prompt = torch.tensor([[1, 5], [1, 6]])
    found = model.generate(prompt, 10, temperature=0, fwd_hooks=towards(model, wanted))
    assert found[:, 2:].tolist() == [[cat, eos, eos, eos], [dog, dog, dog, eos]]
    found = model.generate(prompt, 5, temperature=0, fwd_hooks=towards(model, wanted), stop_at_eos=False)
    assert found[:, 2:].tolist() == [[cat, eos, cat, cat, cat], [dog, dog, dog, eos, dog]]
    texts = model.generate(["the", "a"], 10, temperature=0, fwd_hooks=towards(model, wanted))
    assert texts == ["the cat", "a dog dog dog"]


def test_what_goes_in_comes_out(plain):
    tokens = plain.to_tokens("the cat")
    assert plain.generate("The  CAT", 0) == "the cat"
    assert plain.generate(["the cat", "a dog"], 0) == ["the cat", "a dog"]
    assert torch.equal(plain.generate(tokens, 0), tokens)
    assert torch.equal(plain.generate(tokens, 3, stop_at_eos=False)[:, : tokens.shape[1]], tokens)
    assert plain.generate(tokens[0], 3, stop_at_eos=False).shape == (1, tokens.shape[1] + 3)
    assert plain.generate("", 3, temperature=0) == plain.generate("[BOS]", 3, temperature=0)


def test_top_k_of_one_is_greedy_and_zero_temperature_ignores_the_generator(plain):
    greedy = plain.generate(TEXTS, 8, temperature=0)
    assert plain.generate(TEXTS, 8, top_k=1, generator=torch.Generator().manual_seed(3)) == greedy


def test_generation_fills_the_context_and_no_more(plain):
    tokens = plain.to_tokens("the cat")
    room = plain.cfg.n_ctx - tokens.shape[1]
    assert plain.generate(tokens, room, stop_at_eos=False).shape == (1, plain.cfg.n_ctx)
    with pytest.raises(ValueError, match=f"max_new_tokens={room + 1} .* ask for at most {room}"):
        plain.generate(tokens, room + 1)


# -- hooks never stay behind ------------------------------------------------------------------------------------------


class BoomError(Exception):
    pass


def boom(activation, hook):
    raise BoomError


@pytest.mark.parametrize(
    "run",
    [
        lambda model, hooks: model.run_with_hooks("the cat", fwd_hooks=hooks),
        lambda model, hooks: model.generate("the cat", 3, fwd_hooks=hooks),
        lambda model, hooks: model.generate("the cat", 3, fwd_hooks=hooks, use_past_kv_cache=False),
    ],
)
def test_hooks_are_removed_after_an_exception_in_a_hook(plain, run):
    before = plain("the cat")
    with pytest.raises(BoomError):
        run(plain, [("hook_embed", lambda x, hook: x * 2), ("blocks.1.hook_mlp_out", boom)])
    assert hookless(plain)
    assert torch.equal(plain("the cat"), before)


def test_hooks_are_removed_after_an_exception_in_the_block(plain):
    with pytest.raises(BoomError), plain.hooks([("hook_embed", lambda x, hook: x * 2)]):  # noqa: PT012
        assert not hookless(plain)
        raise BoomError
    assert hookless(plain)


@pytest.mark.parametrize("bad", [torch.tensor([[10**6]]), torch.ones(1, 40, dtype=torch.long)])
def test_hooks_are_removed_after_a_failed_run_with_cache(plain, bad):
    with pytest.raises(ValueError, match="input"):
        plain.run_with_cache(bad)
    assert hookless(plain)


def test_hooks_are_removed_after_a_run(plain, tokens):
    plain.run_with_cache(tokens)
    plain.run_with_cache(tokens, "loss", incl_bwd=True)
    plain.generate(tokens, 2, fwd_hooks=[("hook_embed", lambda x, hook: x)])
    assert hookless(plain)


def test_hooks_that_were_there_stay(plain, tokens):
    plain.add_hook("blocks.0.hook_mlp_out", lambda x, hook: x * 0)
    ablated = plain(tokens)
    _, cache = plain.run_with_cache(tokens)
    plain.generate(tokens, 2, fwd_hooks=[("hook_embed", lambda x, hook: x)])
    assert (cache["mlp_out", 0] == 0).all()
    assert torch.equal(plain(tokens), ablated)
    plain.reset_hooks()
    assert not torch.equal(plain(tokens), ablated)
    assert hookless(plain)


def test_no_hook_is_added_if_one_of_them_has_no_place(plain):
    with pytest.raises(ValueError, match=r"no hook point is named 'blocks.0.hook_mlp_ou'"):
        plain.run_with_hooks("a", fwd_hooks=[("hook_embed", boom), ("blocks.0.hook_mlp_ou", boom)])
    assert hookless(plain)


def test_hooks_may_be_any_iterable_and_names_a_predicate(plain, tokens):
    expected = plain.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{i}.hook_mlp_out", noise(plain)) for i in (0, 1)])
    lazily = ((f"blocks.{i}.hook_mlp_out", noise(plain)) for i in (0, 1))
    with plain.hooks(lazily):
        assert torch.equal(plain(tokens), expected)
    with plain.hooks([(lambda name: name.endswith("mlp_out"), noise(plain))]):
        assert torch.equal(plain(tokens), expected)
    assert not torch.equal(plain(tokens), expected)


def test_deleting_a_model_frees_it(make_model):
    model = make_model()
    loss, cache = model.run_with_cache("the cat", "loss", incl_bwd=True)
    model.generate("the cat", 2, fwd_hooks=[("hook_embed", lambda x, hook: x)])
    gone = weakref.ref(model), weakref.ref(model.blocks[0].mlp.w.weight)
    del model, loss, cache
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_gradients_flow_and_no_switch_is_left_behind(plain, tokens):
    plain(tokens, "loss").backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in plain.parameters())
    tracked = []
    watch = [("blocks.1.hook_mlp_out", lambda x, hook: tracked.append(x.requires_grad))]
    plain.generate(tokens, 2, stop_at_eos=False, fwd_hooks=watch)
    assert tracked == [False, False]
    assert torch.is_grad_enabled()


# -- the cache --------------------------------------------------------------------------------------------------------

SELECTED = ["blocks.0.hook_mlp_out", "blocks.1.attn.hook_result"]


@pytest.mark.parametrize(
    ("names_filter", "expected"),
    [
        (SELECTED[0], SELECTED[:1]),
        (SELECTED, SELECTED),
        (tuple(SELECTED), SELECTED),
        ([], []),
        (lambda name: name.endswith("hook_scale"), ["blocks.0.ln1.hook_scale", "blocks.0.ln2.hook_scale"]),
    ],
    ids=["str", "list", "tuple", "empty", "predicate"],
)
def test_names_filter(make_model, tokens, names_filter, expected):
    model = make_model()
    _, everything = model.run_with_cache(tokens)
    logits, cache = model.run_with_cache(tokens, names_filter=names_filter)
    if callable(names_filter):
        expected = [*expected, "blocks.1.ln1.hook_scale", "blocks.1.ln2.hook_scale", "ln_final.hook_scale"]
    assert set(cache.keys()) == set(expected)
    assert_close(logits, model(tokens))
    for name in expected:
        assert_close(cache[name], everything[name])


@pytest.mark.parametrize("names_filter", ["blocks.0.hook_mpl_out", ["hook_embed", "blocks.0.hook_mpl_out"]])
def test_an_unknown_name_gets_a_suggestion(plain, names_filter):
    with pytest.raises(ValueError, match=r"'blocks.0.hook_mpl_out'; did you mean blocks.0.hook_mlp_out or "):
        plain.run_with_cache("a", names_filter=names_filter)
    with pytest.raises(ValueError, match=r"'nonsense'; model.hook_table\(\) lists them"):
        plain.add_hook("nonsense", boom)
    assert hookless(plain)


def test_cache_forms(plain, tokens):
    _, cache = plain.run_with_cache(tokens)
    _, as_dict = plain.run_with_cache(tokens, return_cache_object=False)
    _, alone = plain.run_with_cache(tokens, remove_batch_dim=True)
    assert type(as_dict) is dict
    for name in plain.hook_dict:
        assert torch.equal(as_dict[name], cache[name])
        assert torch.equal(alone[name], cache[name][0])
    assert torch.equal(alone.accumulated_resid(), cache.accumulated_resid()[:, 0])
    _, sliced = plain.run_with_cache(tokens, pos_slice=-1)
    assert torch.equal(sliced["mlp_out", 1], cache["mlp_out", 1][:, -1:])


def test_backward_cache_holds_the_gradients(plain, tokens):
    loss, cache = plain.run_with_cache(tokens, "loss", incl_bwd=True)
    step, name = 1e-6, "blocks.1.hook_mlp_out"
    gradient = cache[f"{name}_grad"]
    nudged = plain.run_with_hooks(
        tokens, return_type="logits", fwd_hooks=[(name, lambda x, hook: x + step * gradient / gradient.norm())]
    )
    rise = cross_entropy(nudged[0, :-1], tokens[0, 1:]) - cross_entropy(plain(tokens)[0, :-1], tokens[0, 1:])
    torch.testing.assert_close(rise / step, gradient.norm(), rtol=1e-3, atol=1e-3)
    assert loss.ndim == 0


@pytest.mark.parametrize("layer", [0, 1, 2, -1, -2])
def test_stop_and_start_meet(model, layer):
    tokens, mask = padded([3, 6], "left", model.cfg.d_vocab)
    logits, cache = model.run_with_cache(tokens, attention_mask=mask)
    stopped, partial = model.run_with_cache(tokens, attention_mask=mask, stop_at_layer=layer)
    ran = layer % model.cfg.n_layers if layer != model.cfg.n_layers else layer
    before = "hook_embed" if ran == 0 else f"blocks.{ran - 1}.hook_resid_post"
    assert_close(stopped, cache[before])
    reached = ("hook_embed", *(f"blocks.{i}." for i in range(ran)))
    assert set(partial.keys()) == {name for name in model.hook_dict if name.startswith(reached)}
    assert_close(model(stopped, attention_mask=mask, start_at_layer=layer), logits)
    loss = model(stopped, "loss", attention_mask=mask, start_at_layer=layer, tokens=tokens)
    assert_close(loss, model(tokens, "loss", attention_mask=mask))


def test_start_and_stop_run_the_blocks_between(make_model, tokens):
    model = make_model(n_layers=4)
    _, cache = model.run_with_cache(tokens)
    middle = model(cache["resid_pre", 1], start_at_layer=1, stop_at_layer=3)
    assert_close(middle, cache["resid_pre", 3])
    assert_close(model(cache["resid_pre", 1], start_at_layer=-3, stop_at_layer=-1), cache["resid_pre", 3])


# -- transformer_lens' ActivationCache works on it --------------------------------------------------------------------


def test_accumulated_resid(model, tokens):
    _, cache = model.run_with_cache(tokens)
    stack, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]
    streams = [("resid_pre", 0), ("resid_mid", 0), ("resid_pre", 1), ("resid_mid", 1), ("resid_post", 1)]
    assert torch.equal(stack, torch.stack([cache[stream] for stream in streams]))
    normalised = cache.accumulated_resid(apply_ln=True)
    assert_close(normalised[-1], model.ln_final(stack[-1]))


def test_components_sum_to_the_residual_stream(model, tokens):
    _, cache = model.run_with_cache(tokens)
    final = cache["resid_post", 1]
    assert_close(cache.decompose_resid().sum(0), final)
    assert_close(cache.decompose_resid(layer=1).sum(0), cache["resid_pre", 1])
    assert_close(cache.decompose_resid(layer=1, mlp_input=True).sum(0), cache["resid_mid", 1])
    heads = cache.stack_head_results()
    assert heads.shape == (4, *final.shape)
    assert_close(heads.sum(0), cache["attn_out", 0] + cache["attn_out", 1])
    for expand in (True, False):
        parts, labels = cache.get_full_resid_decomposition(expand_neurons=expand, return_labels=True)
        assert len(parts) == len(labels)
        assert_close(parts.sum(0), final)


def test_neurons_are_columns_of_the_down_projection(model, tokens):
    _, cache = model.run_with_cache(tokens)
    neurons = cache.get_neuron_results(1)
    assert_close(neurons.sum(-2) + model.blocks[1].mlp.b_out, cache["mlp_out", 1])


@pytest.mark.parametrize("variant", ["bilinear", "biases", "no norm", "bilinear attention", "plain"])
def test_logit_attributions_sum_to_the_logits(make_model, tokens, variant):
    model = make_model(**VARIANTS[variant])
    logits, cache = model.run_with_cache(tokens)
    dog, cat = model.to_single_token("dog"), model.to_single_token("cat")
    parts = cache.decompose_resid()
    assert_close(cache.logit_attrs(parts, "dog").sum(0), logits[..., dog])
    assert_close(cache.logit_attrs(parts, dog, cat).sum(0), logits[..., dog] - logits[..., cat])
    assert_close(cache.logit_attrs(parts, tokens).sum(0), logits.gather(-1, tokens[..., None])[..., 0])


@pytest.mark.parametrize(("layer", "mlp_input"), [(0, False), (1, False), (1, True), (2, False)])
def test_apply_ln_to_stack_uses_the_cached_scale(plain, tokens, layer, mlp_input):
    _, cache = plain.run_with_cache(tokens)
    stack = cache.decompose_resid(layer, mlp_input=mlp_input)
    name = "ln_final" if layer == 2 else f"blocks.{layer}.ln{1 + mlp_input}"
    normalised = cache.apply_ln_to_stack(stack, layer, mlp_input=mlp_input)
    assert_close(normalised.sum(0), cache[f"{name}.hook_normalized"])


def test_token_directions_are_columns_of_the_unembedding(plain):
    cat, dog = plain.to_single_token("cat"), plain.to_single_token("dog")
    both = plain.W_U[:, [cat, dog]].T
    for tokens in (["cat", "dog"], [cat, dog], torch.tensor([cat, dog])):
        assert torch.equal(plain.tokens_to_residual_directions(tokens), both)
    for token in ("cat", cat, torch.tensor(cat)):
        assert torch.equal(plain.tokens_to_residual_directions(token), both[0])


def test_accumulated_bias(model):
    biases = [block.mlp.b_out for block in model.blocks]
    for layer in range(3):
        assert_close(model.accumulated_bias(layer), sum(biases[:layer], torch.zeros_like(biases[0])))
    assert (model.accumulated_bias(2, include_mlp_biases=False) == 0).all()


# -- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the cat", ["[BOS]", "the", "cat"]),
        ("The CAT", ["[BOS]", "the", "cat"]),
        ("thé cat", ["[BOS]", "the", "cat"]),
        ("[BOS] the cat", ["[BOS]", "the", "cat"]),
        ("[BOS][BOS] cat", ["[BOS]", "[BOS]", "cat"]),
        ("the [EOS]", ["[BOS]", "the", "[EOS]"]),
        ("cats.", ["[BOS]", "cat", "##s", "."]),
        ("the 猫 cat", ["[BOS]", "the", "[UNK]", "cat"]),
        ("🐈", ["[BOS]", "[UNK]"]),
        ("", ["[BOS]"]),
        ("  \n ", ["[BOS]"]),
    ],
)
def test_text_to_tokens(plain, tiny_tokenizer, text, expected):
    assert plain.to_str_tokens(text) == expected
    assert plain.to_tokens(text).tolist() == [[tiny_tokenizer.token_to_id(token) for token in expected]]
    assert plain.to_str_tokens(text) == plain.to_str_tokens(plain.to_tokens(text))
    assert torch.equal(plain(text), plain(plain.to_tokens(text)))


def test_without_bos(plain):
    assert plain.to_str_tokens("the cat", prepend_bos=False) == ["the", "cat"]
    assert plain("the cat", prepend_bos=False).shape[1] == 2
    with pytest.raises(ValueError, match="prepend_bos is False"):
        plain.to_tokens("", prepend_bos=False)


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_are_padded_with_eos(plain, side):
    tokens = plain.to_tokens(["the", "the big cat"], padding_side=side)
    assert plain.to_string(tokens[1]) == "[BOS] the big cat"
    padding, row = [plain.eos_id] * 2, plain.to_tokens("the")[0].tolist()
    assert tokens[0].tolist() == (row + padding if side == "right" else padding + row)


def test_tokens_to_text(plain, tiny_tokenizer):
    tokens = plain.to_tokens(["the cats sat.", "a dog"])
    assert plain.to_string(tokens[0]) == "[BOS] the cats sat."
    assert plain.to_string(tokens) == ["[BOS] the cats sat.", "[BOS] a dog [EOS] [EOS] [EOS]"]
    cat = tiny_tokenizer.token_to_id("cat")
    assert plain.to_string(cat) == plain.to_string([cat]) == plain.to_string(torch.tensor(cat)) == "cat"
    assert plain.to_str_tokens(tokens)[1] == ["[BOS]", "a", "dog", "[EOS]", "[EOS]", "[EOS]"]
    assert plain.to_str_tokens(["the cat", "a"]) == [["[BOS]", "the", "cat"], ["[BOS]", "a"]]
    assert plain.to_str_tokens([cat, cat]) == ["cat", "cat"]


def test_single_tokens(plain, tiny_tokenizer):
    assert plain.to_single_token("Cat") == tiny_tokenizer.token_to_id("cat")
    for text, pieces in (("cats", r"\['cat', '##s'\]"), ("猫", r"\['\[UNK\]'\]"), ("", r"\[\]")):
        with pytest.raises(ValueError, match=f"'{text}' is not a single token: the tokenizer makes it {pieces}"):
            plain.to_single_token(text)


def test_a_text_longer_than_the_context(plain):
    text = "the cat " * 20
    with pytest.raises(ValueError, match=r"text 1 has 41 tokens \(BOS included\), more than the context of 32"):
        plain(["a", text])
    cut = plain.to_tokens(text, truncate=True)
    assert cut.shape == (1, 32)
    assert plain(cut).shape == (1, 32, plain.cfg.d_vocab)
    assert plain.to_tokens("the " * 31).shape == (1, 32)  # BOS and 31 words just fit


def test_without_a_tokenizer_token_ids_still_work(make_model):
    model = make_model(tokenizer=None)
    tokens = torch.tensor([[1, 5, 6]])
    assert model(tokens).shape == (1, 3, model.cfg.d_vocab)
    assert model.generate(tokens, 4).shape == (1, 7)
    for call in (lambda: model("the"), lambda: model.to_tokens("the"), lambda: model.to_string(3)):
        with pytest.raises(ValueError, match="this model has no tokenizer"):
            call()


# -- errors -----------------------------------------------------------------------------------------------------------

ONE = torch.tensor([[1, 5, 6]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model(torch.tensor([[1, 1000]])), r"token ids from 0 to \d+, got 1000"),
        (lambda model: model(torch.tensor([[1, -1]])), r"token ids from 0 to \d+, got -1"),
        (lambda model: model(torch.ones(1, 33, dtype=torch.long)), "33 tokens, more than the context of 32"),
        (lambda model: model(torch.ones(1, 0, dtype=torch.long)), r"at least one token, got shape \(1, 0\)"),
        (lambda model: model([]), "at least one text, got an empty list"),
        (
            lambda model: model(ONE, attention_mask=torch.ones(1, 4)),
            r"attention_mask must have .*\(1, 3\), got \(1, 4\)",
        ),
        (lambda model: model("the", attention_mask=torch.ones(1, 2)), "attention_mask goes with token ids"),
        (lambda model: model(ONE[:, :1], "loss"), "at least two tokens"),
        (lambda model: model(ONE, "loss", attention_mask=torch.tensor([[0, 0, 1]])), "the attention_mask leaves none"),
        (lambda model: model(ONE, stop_at_layer=3), "stop_at_layer must lie between -2 and 2 .* got 3"),
        (lambda model: model(ONE, stop_at_layer=-3), "stop_at_layer must lie between -2 and 2 .* got -3"),
        (lambda model: model(torch.zeros(1, 2, 16), start_at_layer=3), "start_at_layer must lie between"),
        (lambda model: model("the", start_at_layer=1), "start_at_layer takes a residual stream .*, got str"),
        (
            lambda model: model(torch.zeros(1, 2, 16).double(), "loss", start_at_layer=1),
            "needs token ids: .* as tokens=",
        ),
        (lambda model: model.to_tokens("the", padding_side="middle"), "padding_side .* got 'middle'"),
        (lambda model: model.generate("the", temperature=-1.0), "temperature must be 0 .* got -1.0"),
        (lambda model: model.generate("the", top_k=0), "top_k must be at least 1 or None, got 0"),
        (lambda model: model.generate("the", -1), "max_new_tokens must not be negative, got -1"),
        (lambda model: model.generate("the", 31), "max_new_tokens=31 .* ask for at most 30"),
        (
            lambda model: model.generate(ONE, 2, attention_mask=torch.tensor([[1, 1, 0]])),
            "attention_mask must pad on the left",
        ),
    ],
)
def test_errors_name_the_argument(plain, unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call(plain)
    assert hookless(plain)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: BilinearConfig(0, 16, 8, 9, AttentionConfig(2, 8), MLPConfig(8)),
            "n_layers must be at least 1, got 0",
        ),
        (
            lambda: AttentionConfig.of_width(16, 3),
            "d_model must be an even multiple of n_heads .* d_model=16, n_heads=3",
        ),
        (lambda: AttentionConfig.of_width(16, 16), "d_model=16, n_heads=16"),
        (lambda: AttentionConfig.of_width(16, 0), "n_heads must be at least 1, got 0"),
        (lambda: AttentionConfig(0, 8), "n_heads must be at least 1, got 0"),
        (lambda: AttentionConfig(2, 5), r"d_head must be even \(rotary embedding rotates pairs\), got 5"),
        (
            lambda: AttentionConfig(2, 8, "cosine"),
            "kind must be one of softmax, bilinear, squared, differential for attention, got 'cosine'",
        ),
        (lambda: AttentionConfig(2, 8, window=0), "window must be at least 1 or None, got 0"),
        (lambda: AttentionConfig(4, 8, n_key_value_heads=0), "n_key_value_heads must be at least 1, got 0"),
        (lambda: AttentionConfig(4, 8, n_key_value_heads=3), "must divide n_heads=4, got n_key_value_heads=3"),
        (lambda: AttentionConfig(4, 8, "bilinear", n_key_value_heads=2), "for bilinear attention, got n_key_value_h"),
        (lambda: MLPConfig(0), "d_hidden must be at least 1, got 0"),
        (lambda: MLPConfig(8, "cubic"), "kind must be one of bilinear, squared, gated, plain for an MLP, got 'cubic'"),
        (lambda: MLPConfig(8, act="relu"), "act must be None for a bilinear MLP"),
        (lambda: MLPConfig(8, "gated"), "act must be None for a bilinear MLP"),
        (lambda: MLPConfig(8, "gated", "tanh"), "act must be one of relu, .* for a gated MLP, got 'tanh'"),
        (lambda: NormConfig(-1.0), "eps must not be negative, got -1.0"),
        (lambda: NormConfig(float("nan")), "eps must not be negative, got nan"),
    ],
)
def test_a_config_that_makes_no_model(unchecked, make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_two_ways_to_say_a_shape_are_one():
    assert AttentionConfig(2, 8, n_key_value_heads=2) == AttentionConfig.of_width(16, 2)


def test_a_config_answers_to_the_names_of_transformer_lens(plain):
    cfg = plain.cfg
    names = ("n_layers", "d_model", "n_ctx", "d_vocab", "n_heads", "d_head", "d_hidden", "d_mlp")
    assert [getattr(cfg, name) for name in names] == [2, 16, 32, len(plain.W_E), 2, 8, 24, 24]
    names = ("act_fn", "normalization_type", "eps", "attn_only", "positional_embedding_type", "device")
    assert [getattr(cfg, name) for name in names] == [None, "RMSPre", 1e-8, False, "rotary", "cpu"]
    cfg = BilinearConfig(1, 8, 8, 9, AttentionConfig(2, 4), MLPConfig(8, "gated", "silu"), norm=None)
    assert (cfg.act_fn, cfg.normalization_type, cfg.eps) == ("silu", None, None)


def test_a_new_model_is_a_plain_module():
    model = BilinearTransformer(BilinearConfig(1, 8, 8, 9, AttentionConfig(2, 4), MLPConfig(8)))
    assert isinstance(model(torch.tensor([[1, 2]])), Tensor)
    assert sorted(dict(model.named_parameters())) == [
        "blocks.0.attn.o.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.mlp.p.weight",
        "blocks.0.mlp.w.weight",
        "embed.weight",
        "unembed.weight",
    ]
