"""Path expansion: the groups sum to the model's logits, and each group is what switching its parts off measures."""

from pathlib import Path

import pytest
import torch

import bilens
from bilens.circuits.bigrams import bigram_scores, bigrams, contrast
from bilens.circuits.paths import GROUPS, expand
from bilens.circuits.sources import attribute_sources
from bilens.circuits.targets import Target
from bilens.circuits.virtual import virtual_input, virtual_tokens
from bilens.report import plots

PUBLISHED = Path(__file__).parents[1] / "../shared/fixtures/published-format"
VARIANTS = {
    "bilinear": {},
    "one head": {"n_heads": 1},
    "biases": {"mlp_bias": (True, True)},
    "bias in": {"mlp_bias": (True, False)},
    "gain": {"norm": "rms_gain"},
    "gain, shift and biases": {"norm": "rms_gain_shift", "mlp_bias": (True, True), "attn_scale": 1.0},
    "no norm": {"norm": "none"},
    "no norm, bias out": {"norm": "none", "mlp_bias": (False, True)},
    "bilinear attention": {"attention": "bilinear"},
    "bilinear attention, shift": {"attention": "bilinear", "norm": "rms_gain_shift"},
}
LLAMA = {
    "attention biases": {"attn_bias": (True, True), "mlp_bias": (True, True), "norm": "rms_gain_shift"},
    "grouped, tied, windowed": {"n_key_value_heads": 1, "tied": True, "window": 3, "norm": "rms_gain", "eps": 1e-5},
}
TEXT, TEXTS = "the big dog sat", ["the big dog sat on the mat", "once", "a cat ran, and saw"]


@pytest.fixture(params=VARIANTS)
def model(request, make_model):
    return make_model(n_layers=1, **VARIANTS[request.param])


@pytest.fixture
def hard(make_model):
    """A model with everything that could go wrong at once."""
    return make_model(n_layers=1, **VARIANTS["gain, shift and biases"])


def logits_of(model, texts):
    """Return the model's logits at every token but BOS, text by text."""
    return torch.cat([model(text)[0, 1:] for text in texts])


def exactly(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# -- sums -------------------------------------------------------------------------------------------------------------


def test_the_groups_sum_to_the_logits(model):
    found = expand(model, TEXTS)
    expected = logits_of(model, TEXTS)
    exactly(sum(found.logits(group) for group in GROUPS), expected)
    exactly(found.logits(), expected)
    assert found.miss < 1e-13


@pytest.mark.parametrize("variant", [*VARIANTS, *LLAMA])
@pytest.mark.parametrize("n_layers", [1, 3])
def test_the_last_layer_of_any_model(make_model, variant, n_layers):
    model = make_model(n_layers=n_layers, **(VARIANTS | LLAMA)[variant])
    for layer in (None, n_layers - 1):
        exactly(expand(model, TEXTS, layer).logits(), logits_of(model, TEXTS))


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_float32_the_sum_misses_by_the_models_rounding(make_model, variant):
    model = make_model(n_layers=1, dtype=torch.float32, **VARIANTS[variant])
    found, expected = expand(model, TEXTS), logits_of(model, TEXTS).double()
    assert (found.logits() - expected).abs().max() < 1e-5 * expected.abs().max()
    assert found.miss < 1e-5


def test_positions_and_tokens(hard):
    exactly(expand(hard, TEXTS, position=0).logits(), torch.stack([hard(text)[0, 0] for text in TEXTS]))
    tokens = torch.tensor([5, 3])
    exactly(expand(hard, TEXT, position=-1).logits(tokens=tokens), hard(TEXT)[:, -1, tokens])
    exactly(expand(hard, hard.to_tokens(TEXT)).logits(), hard(TEXT)[0, 1:])


def test_given_patterns_are_the_ones_expanded(model):
    """Attention to the first token only, put there by a hook."""

    def first(pattern, hook):
        return torch.zeros_like(pattern).index_fill_(-1, torch.tensor(0), 1)

    hooks = [("blocks.0.attn.hook_pattern", first)]
    with model.hooks(hooks):
        found = expand(model, TEXT)
    exactly(found.logits(), model.run_with_hooks(TEXT, fwd_hooks=hooks)[0, 1:])
    assert not torch.allclose(found.logits(), expand(model, TEXT).logits())


# -- each group -------------------------------------------------------------------------------------------------------


def frozen(cache, name):
    return (name, lambda value, hook: cache[name])


def test_each_group_is_what_the_model_gives_for_its_parts(make_model):
    """With the norms' scales held, the two factors of the MLP are fed with one part each."""
    model = make_model(n_layers=1)
    found = expand(model, TEXT)
    _, cache = model.run_with_cache(TEXT)
    sides = {"direct": cache["hook_embed"], "head": cache["blocks.0.hook_attn_out"]}
    mlp, scale = model.blocks[0].mlp, cache["blocks.0.ln2.hook_scale"]
    held = frozen(cache, "ln_final.hook_scale")
    for left, one in sides.items():
        alone = model.run_with_hooks(TEXT, fwd_hooks=[("blocks.0.hook_resid_post", lambda v, hook, one=one: one), held])
        exactly(found.logits(left), alone[0, 1:])
        for right, other in sides.items():
            feed = [
                ("blocks.0.mlp.hook_pre", lambda v, hook, one=one: one / scale @ mlp.left.T),
                ("blocks.0.mlp.hook_pre_linear", lambda v, hook, other=other: other / scale @ mlp.right.T),
                ("blocks.0.hook_resid_post", lambda v, hook: v - cache["blocks.0.hook_resid_mid"]),
                held,
            ]
            exactly(found.logits(f"{left} × {right}"), model.run_with_hooks(TEXT, fwd_hooks=feed)[0, 1:])
    exactly(found.logits("bias"), torch.zeros_like(alone[0, 1:]))


def test_without_attention_only_direct_paths_and_biases_are_left(hard):
    silent = [("blocks.0.hook_attn_out", lambda value, hook: 0 * value)]
    hard.blocks[0].attn.o.weight.data.zero_()
    found = expand(hard, TEXT)
    direct = sum(found.logits(group) for group in ("direct", "direct × direct", "bias"))
    exactly(direct, hard.run_with_hooks(TEXT, fwd_hooks=silent)[0, 1:])
    assert found.logits("head × direct").abs().max() == 0


def test_an_output_bias_of_attention_is_a_bias(make_model):
    """Held norms, and neither embedding nor heads: what is left of the model is its biases."""
    model = make_model(n_layers=1, **LLAMA["attention biases"])
    found = expand(model, TEXT)
    _, cache = model.run_with_cache(TEXT)
    held = [frozen(cache, name) for name in ("blocks.0.ln2.hook_scale", "ln_final.hook_scale")]
    only = ("blocks.0.hook_resid_mid", lambda value, hook: model.blocks[0].attn.b_O.expand_as(value))
    exactly(found.logits("bias"), model.run_with_hooks(TEXT, fwd_hooks=[only, *held])[0, 1:] + crossed(found, model))


def crossed(found, model):
    """Return the paths with a bias in one factor and a part in the other, which the biases alone do not have."""
    total = torch.stack([found.table(token).sum((1, 2)) for token in range(model.cfg.d_vocab)], 1)
    kept = torch.stack([found.table(token)[:, 1:, 1:].sum((1, 2)) for token in range(model.cfg.d_vocab)], 1)
    alone = torch.stack([found.table(token)[:, 0, 0] for token in range(model.cfg.d_vocab)], 1)
    return total - kept - alone


def test_the_table_splits_a_logit_by_parts(model):
    found, token = expand(model, TEXTS), model.to_single_token("cat")
    table, tokens = found.table(token), torch.tensor([token])
    assert found.names == ("direct", *(f"head 0.{head}" for head in range(model.cfg.n_heads)))
    exactly(table[:, 1, 1], found.logits("direct × direct", tokens)[:, 0])
    exactly(table[:, 2:, 1].sum(1), found.logits("head × direct", tokens)[:, 0])
    exactly(table[:, 1, 2:].sum(1), found.logits("direct × head", tokens)[:, 0])
    exactly(table[:, 2:, 2:].sum((1, 2)), found.logits("head × head", tokens)[:, 0])
    biased = table[:, 0].sum(1) + table[:, 1:, 0].sum(1) + (found.shift @ found.W_U)[token]
    exactly(biased, found.logits("bias", tokens)[:, 0])


def test_the_table_symmetrised_is_the_attribution_to_sources(hard):
    found = expand(hard, TEXTS).table(7)
    sourced = attribute_sources(hard, TEXTS, 0, Target.token(hard, 7)).table
    exactly(found.triu() + found.tril(-1).mT, sourced)


def test_shares_are_covariances_with_the_logits(hard):
    found = expand(hard, TEXTS)
    logits = torch.stack([found.logits(group) for group in GROUPS])
    logits = logits - logits.mean(2, keepdim=True)  # over the vocabulary
    logits = logits - logits.mean(1, keepdim=True)  # over positions
    total = logits.sum(0)
    expected = (logits * total).sum((1, 2)) / total.square().sum()
    shares = found.shares()
    assert list(shares) == list(GROUPS)
    exactly(torch.tensor(list(shares.values()), dtype=torch.float64), expected)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-12)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs the published fixtures in ../shared")
@pytest.mark.parametrize(
    "name", ["bilinear", "bias", "no-norm", "unscaled-attn", "bilinear-attn", "2024-06", "2024-05"]
)
def test_every_published_generation_expands_exactly(name):
    model = bilens.load(PUBLISHED / name).double()
    tokens = torch.randint(3, model.cfg.d_vocab, (3, 9), generator=torch.Generator().manual_seed(0))
    exactly(expand(model, tokens).logits(), model(tokens).flatten(0, 1))  # no tokenizer, no BOS


def test_the_embedded_models_last_layer():
    model = bilens.load("bilens-mini")
    text = "once upon a time there was a little girl. she liked to swim, but the acting was not good."
    found, expected = expand(model, text), model(text)[0, 1:].double()
    assert (found.logits() - expected).abs().max() < 1e-5 * expected.abs().max()


# -- virtual tokens ---------------------------------------------------------------------------------------------------


def test_virtual_tokens_give_what_the_mlp_writes(model):
    virtual, z = virtual_tokens(model), virtual_input(model, TEXTS)
    scale = 1.0
    if model.cfg.norm is not None:
        scale = torch.cat([model.run_with_cache(text)[1]["ln_final.hook_scale"][:, -1] for text in TEXTS])
    through = sum(expand(model, TEXTS, position=-1).written[2:])
    gain = getattr(model.ln_final, "weight", None)
    exactly(virtual.tensor.apply(z) / scale, (through / scale * (1 if gain is None else gain)) @ model.W_U)
    shift = getattr(model.blocks[0].ln2, "bias", None)
    entering = z @ virtual.writers + (0 if shift is None else shift)
    exactly(entering, torch.cat([model.run_with_cache(t)[1]["blocks.0.hook_mlp_in"][:, -1] for t in TEXTS]))


def test_virtual_tokens_have_names_and_neighbours(hard):
    virtual = virtual_tokens(hard, out=torch.eye(16, dtype=torch.float64)[:2])
    dog, n_vocab = hard.to_single_token("dog"), hard.cfg.d_vocab
    assert virtual.tensor.shape == (2, 3 * n_vocab + 3, 3 * n_vocab + 3)  # two heads' shifts, and the constant
    assert virtual.name(virtual.index("head 0.1", dog)) == "head 0.1 of 'dog'"
    assert virtual.name(3 * n_vocab + 1) == "head 0.1 of the norm's shift"
    assert virtual.name(3 * n_vocab + 2) == "constant"
    assert virtual.index("embedding", dog) == dog
    (name, cosine), *rest = virtual.nearest(-virtual.writers[n_vocab + dog], k=4)
    assert (name, len(rest)) == ("head 0.0 of 'dog'", 3)
    assert cosine == pytest.approx(-1)


def test_some_tokens_are_columns_of_all(hard):
    ids = torch.tensor([hard.to_single_token(word) for word in ("dog", "cat", "mat")])
    direction = contrast(hard, "dog", ["cat", "mat"])[None]
    some, whole = virtual_tokens(hard, direction, ids), virtual_tokens(hard, direction)
    n_vocab = hard.cfg.d_vocab
    columns = torch.cat([*(leg * n_vocab + ids for leg in range(3)), 3 * n_vocab + torch.arange(3)])
    exactly(some.tensor.left, whole.tensor.left[:, columns])
    assert [some.name(i) for i in range(12)] == [whole.name(i) for i in columns.tolist()]
    assert some.index("head 0.1", ids[1].item()) == 7
    pairs = bilens.top_interactions(some.tensor, 1)
    matrix = whole.tensor.matrix(torch.ones(1, dtype=torch.float64))[columns][:, columns]
    both = matrix + matrix.triu(1) - matrix.tril(-1)
    assert pairs.value.abs().item() == pytest.approx(both.abs().max().item())


# -- bigrams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
def test_bigrams_are_the_model_without_attention_and_other_layers(make_model, layer):
    model = make_model(**VARIANTS["gain, shift and biases"])
    off = [(f"blocks.{i}.hook_attn_out", lambda value, hook: 0 * value) for i in (0, 1)]
    off.append((f"blocks.{1 - layer}.hook_mlp_out", lambda value, hook: 0 * value))
    tokens = model.to_tokens(TEXT)
    exactly(bigram_scores(model, tokens[0], layer), model.run_with_hooks(tokens, fwd_hooks=off)[0])


def test_without_norms_bigrams_are_the_published_diagonal(make_model):
    model = make_model(n_layers=1, norm="none")
    e, mlp = model.W_E[7], model.blocks[0].mlp
    expected = torch.stack([e @ mlp.tensor().matrix(u) @ e + u @ e for u in model.W_U.T])
    exactly(bigram_scores(model, torch.tensor([7]))[0], expected)
    found = bigrams(model, "cat", k=3)
    scores = bigram_scores(model, torch.tensor([model.to_single_token("cat")]))[0]
    assert [one.score for one in found] == scores.topk(3).values.tolist()
    assert model.to_single_token(found[0].token) == scores.argmax()


def test_a_contrast_is_a_difference_of_logits(hard):
    direction = contrast(hard, "cat", ["dog", "mat"])
    stream = torch.randn(4, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hard.ln_final.bias.data.zero_()
    cat, dog, mat = hard.unembed(hard.ln_final(stream))[:, [hard.to_single_token(t) for t in ("cat", "dog", "mat")]].T
    exactly(stream @ direction / (stream.square().mean(1) + 1e-8).sqrt(), cat - (dog + mat) / 2)


# -- errors and figures -----------------------------------------------------------------------------------------------


def test_what_does_not_expand_is_refused_by_name(make_model):
    with pytest.raises(
        ValueError, match=r"layer must be the last one, 1: .* its paths do not sum to the logits; got 0"
    ):
        expand(make_model(), TEXT, layer=0)
    with pytest.raises(ValueError, match="model must have no attention biases"):
        virtual_tokens(make_model(n_layers=1, **LLAMA["attention biases"]))
    gated = make_model(n_layers=1, mlp="gated", act="silu")
    for use in (expand, virtual_tokens, bigrams):
        with pytest.raises(TypeError, match=r"only a bilinear MLP .* this one is gated"):
            use(gated) if use is virtual_tokens else use(gated, "cat")


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named(hard):
    found, virtual = expand(hard, TEXT), virtual_tokens(hard)
    for use, says in (
        (lambda: found.logits("mlp"), "group must be one of direct, head, .* got 'mlp'"),
        (lambda: found.table(-1), "token must lie between 0 and"),
        (lambda: expand(hard, "dog").shares(), "at least two positions, got 1"),
        (lambda: expand(hard, ""), "texts must hold at least one text that is not empty"),
        (lambda: expand(hard, TEXT, position=9), "position must lie between -5 and 4 in text 0, got 9"),
        (lambda: virtual.index("head 1.0", 3), "leg must be one of embedding, head 0.0, head 0.1, got 'head 1.0'"),
        (lambda: virtual.index("embedding", 10**6), "token must be the id of one of these 74 tokens, got 1000000"),
        (lambda: virtual.name(225), "index must lie between 0 and 224, got 225"),
        (lambda: virtual_tokens(hard, tokens=torch.tensor([-1])), "tokens must hold ids from 0 to 73, got"),
        (lambda: virtual_tokens(hard, torch.zeros(2, 3)), r"out must have shape \[n, 16\], got \[2, 3\]"),
        (lambda: virtual.nearest(torch.zeros(3)), r"direction must have shape \[16\], got \[3\]"),
        (lambda: bigram_scores(hard, torch.tensor([10**6])), "tokens must hold ids from 0 to"),
        (lambda: bigrams(hard, "cat", layer=1), "layer must lie between 0 and 0, got 1"),
        (lambda: bigrams(hard, "cat", k=0), "k must be at least 1, got 0"),
        (lambda: bigrams(hard, "cat dog"), "'cat dog' is not a single token"),
        (lambda: contrast(hard, "cat", []), "others must hold at least one token"),
        (lambda: plots.path_table(found.table(3)[0], ["direct"], "cat"), "table must have a row for the bias and"),
    ):
        with pytest.raises(ValueError, match=says):
            use()


def test_reprs_and_figures(hard):
    found = expand(hard, TEXT)
    assert repr(found).startswith("Paths(layer 0, 4 positions, 2 heads, sum within ")
    assert repr(virtual_tokens(hard)).startswith("VirtualTokens(74 tokens in 3 legs; BilinearTensor(out=74, inp=225")
    assert list(plots.path_shares(found.shares()).data[0].x) == list(GROUPS)
    figure = plots.path_table(found.table(3).mean(0), found.names, "cat")
    assert list(figure.data[0].x) == ["bias", "direct", "head 0.0", "head 0.1"]
    predicted = bigrams(hard, "cat", k=3)
    assert list(plots.bigrams("cat", predicted).data[0].y) == [one.score for one in predicted]
