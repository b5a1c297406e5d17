"""Heads: forms of scores and maps of values equal the module; the terms of scores sum to what the model computes."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from sae_lens import TopKSAE, TopKSAEConfig
from safetensors.torch import load_file

import bilens
from bilens import NormConfig
from bilens.circuits import top_attention, top_writing, why_attend
from bilens.models.attention import ROW_EPS, QKNormConfig
from bilens.models.rotary import Rope

GAIN = NormConfig(gain=True)
VARIANTS = {
    "softmax": {},
    "grouped, biases, gain": {
        "n_key_value_heads": 1, "attn_bias": (True, True), "norm": "rms_gain_shift", "n_heads": 4,
    },
    "window, yarn": {"window": 3, "rope": Rope(kind="yarn", factor=4.0, original_ctx=8, turns=(1.0, 4.0), gain=1.2)},
    "query-key norm": {"qk_norm": QKNormConfig("head", GAIN), "n_key_value_heads": 1},
    "full query-key norm": {"qk_norm": QKNormConfig("full", GAIN), "n_key_value_heads": 1, "norm": "none"},
    "LayerNorm of queries": {"qk_norm": QKNormConfig("head", NormConfig(gain=True, shift=True, kind="layer"))},
    "two branches": {"attention": "bilinear", "norm": "none", "attn_bias": ("qk", False)},
    "two normed branches": {
        "attention": "bilinear", "qk_norm": QKNormConfig(), "value_residual": True, "score_scale": 0.1,
        "rope": Rope(reverse=True, tables="bfloat16"),
    },
    "squared": {"attention": "squared"},
    "normalised rows": {"attention": "squared", "normalize": True, "qk_norm": QKNormConfig()},
    "differential": {"attention": "differential", "norm": "rms_gain"},
}  # fmt: skip
TEXTS = ["the big dog sat on the mat", "once", "a cat ran, and saw"]


@pytest.fixture(params=VARIANTS)
def model(request, make_model):
    return make_model(**VARIANTS[request.param])


def random_sae(hook, k=6, seed=0, dtype="float64", d_in=16):
    generator = torch.Generator().manual_seed(seed)
    sae = TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=40, k=k, dtype=dtype))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    sae.cfg.metadata.hook_name = hook
    return sae


def hooks_of(model, layer=1):
    """The hook points whose SAEs serve: without a norm there is one."""
    names = ["hook_resid_pre"] if model.cfg.norm is None else ["hook_resid_pre", "ln1.hook_normalized"]
    return [f"blocks.{layer}.{name}" for name in names]


def exactly(actual, expected, precision=1e-10):
    torch.testing.assert_close(actual, expected, rtol=precision, atol=precision)


def scores_of(model, layer, tokens):
    """What the running model reads off: each branch's scores, `[branch, batch, head, query, key]`."""
    attn = model.blocks[layer].attn
    names = ("rot_q", "rot_k", "rot_q2", "rot_k2")[: 2 * attn.branches]
    _, cache = model.run_with_cache(tokens)
    seen = [cache[f"blocks.{layer}.attn.hook_{name}"] for name in names]
    seen = [one.repeat_interleave(model.cfg.n_heads // one.shape[2], 2) for one in seen]
    some = [torch.einsum("bqhd,bkhd->bhqk", q, k) for q, k in zip(seen[::2], seen[1::2], strict=True)]
    return attn.config.factor * torch.stack(some), cache


# -- forms and maps ---------------------------------------------------------------------------------------------------


def reads(model, cache, layer):
    """What attention reads, and what queries and keys are divided by, of each branch."""
    block = model.blocks[layer]
    x = block.ln1(cache[f"blocks.{layer}.hook_resid_pre"])
    return x, [[side.divisor(x) for side in block.attn.projections(b)] for b in range(block.attn.branches)]


@pytest.mark.parametrize("layer", [0, 1])
def test_a_heads_form_gives_its_scores(model, layer):
    tokens, attn = model.to_tokens(TEXTS[0]), model.blocks[layer].attn
    if attn.projections()[0].shift() is not None:
        with pytest.raises(ValueError, match="must have no shift for score_tensor"):
            attn.score_tensor(0)
        return
    scores, cache = scores_of(model, layer, tokens)
    x, divisors = reads(model, cache, layer)
    rounded = attn.config.rope.tables == "bfloat16"
    for branch in range(attn.branches):
        for head in range(model.cfg.n_heads):
            for query, key in ((3, 0),) if rounded else ((3, 0), (4, 4), (6, 2), (5, 4)):
                form = attn.score_tensor(head, query - key, branch)
                over = divisors[branch][0][0, query, head] * divisors[branch][1][0, key, head]
                exactly(form.apply(x[0, query], x[0, key]) / over, scores[branch, 0, head, query, key])
    exactly(attn.score_tensor(0, None).dense(), attn.score_tensor(0, 0).dense() / attn.config.rope.gain**2)


def test_the_forms_make_the_scores_that_attention_multiplies(make_model):
    for kind in ("bilinear", "squared"):
        model = make_model(attention=kind, norm="none")
        tokens, attn = model.to_tokens(TEXTS[0]), model.blocks[1].attn
        _, cache = model.run_with_cache(tokens)
        x = cache["blocks.1.hook_resid_pre"][0]
        forms = [attn.score_tensor(1, 2, branch) for branch in ((0, 1) if kind == "bilinear" else (0, 0))]
        product = forms[0].apply(x[5], x[3]) * forms[1].apply(x[5], x[3])
        exactly(product, cache["blocks.1.attn.hook_attn_scores"][0, 1, 5, 3])


@pytest.mark.parametrize("layer", [0, 1])
def test_a_heads_map_gives_what_it_writes(model, layer):
    block, first = model.blocks[layer], model.blocks[0]
    _, cache = model.run_with_cache(model.to_tokens(TEXTS[0]))
    x, x0 = (model.blocks[i].ln1(cache[f"blocks.{i}.hook_resid_pre"])[0] for i in (layer, 0))
    pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0]
    for head in range(model.cfg.n_heads):
        written = block.attn.ov(head).apply(x)
        if model.cfg.attention.value_residual:
            written = written + block.attn.ov(head, first.attn).apply(x0)
        exactly(pattern[head] @ written, cache[f"blocks.{layer}.attn.hook_result"][0, :, head])


def test_heads_that_are_not_there_are_refused(make_model):
    attn = make_model(attention="bilinear").blocks[0].attn
    with pytest.raises(ValueError, match="head must lie between 0 and 1, got 2"):
        attn.score_tensor(2)
    with pytest.raises(ValueError, match="head must lie between 0 and 1, got -1"):
        attn.ov(-1)
    with pytest.raises(ValueError, match="branch must lie between 0 and 1, got 2"):
        attn.score_tensor(0, branch=2)
    with pytest.raises(ValueError, match="distance must not be negative"):
        attn.score_tensor(0, -1)
    with pytest.raises(ValueError, match="first must be None"):
        attn.ov(0, attn)


# -- why a head attends -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
def test_the_terms_sum_to_every_score(model, layer):
    for hook in hooks_of(model, layer):
        found = why_attend(model, TEXTS, layer, inp=random_sae(hook))
        tokens, mask = model.encode(TEXTS, True, "right", False)
        names = [f"blocks.{layer}.attn.hook_{name}" for name in ("attn_scores", "rot_q")]
        _, cache = model.run_with_cache(tokens, attention_mask=mask, names_filter=names)
        seen = cache[names[0]][found.row, :, found.query.position, found.key.position]
        exactly(found.total, seen)
        exactly(found.scores, found.measured)
        exactly(sum(found.sums.values()), found.scores)
        assert found.miss.max() < 1e-12
        near = found.query.position - found.key.position < (model.cfg.attention.window or 99)
        assert near.all()
        if model.cfg.attention.window is None:
            lengths = mask.sum(1)
            assert len(found.row) == (lengths * (lengths + 1) // 2).sum()


def test_second_scores_of_a_difference(make_model):
    model = make_model(attention="differential")
    found = why_attend(model, TEXTS[0], 1, inp=random_sae("blocks.1.hook_resid_pre"))
    _, cache = model.run_with_cache(model.to_tokens(TEXTS[0]))
    for branch, name in enumerate(("hook_attn_scores", "hook_attn_scores2")):
        seen = cache[f"blocks.1.attn.{name}"][0, :, found.query.position, found.key.position]
        exactly(found.scores[branch], seen.T)


def test_a_term_is_what_an_intervention_measures(make_model):
    """With the roots held, a pair's term is the mixed difference of the score: both, less either, plus none."""
    model = make_model(attention="bilinear", qk_norm=QKNormConfig("head", GAIN))
    sae = random_sae("blocks.1.hook_resid_pre")
    found = why_attend(model, TEXTS[0], 1, 1, 5, 2, inp=sae)
    term = found.top(1)[0]
    _, cache = model.run_with_cache(model.to_tokens(TEXTS[0]))
    attn, norm = model.blocks[1].attn, model.blocks[1].ln1
    resid = cache["blocks.1.hook_resid_pre"][0]
    z = sae.encode(resid)
    x = norm(resid)
    query, key = (z[at, f] * sae.W_dec[f] / norm.rms(resid[at]) for at, f in zip((5, 2), term.features, strict=True))
    form = attn.score_tensor(1, 3, term.branch)
    sides = attn.projections(term.branch)
    over = sides[0].divisor(x[5])[1] * sides[1].divisor(x[2])[1]
    exactly(torch.tensor(term.value, dtype=torch.float64), (form.apply(query, key) / over).detach())
    mixed = sum((-1) ** (i + j) * form.apply(x[5] - i * query, x[2] - j * key) for i in (0, 1) for j in (0, 1))
    exactly(torch.tensor(term.value, dtype=torch.float64), (mixed / over).detach())


def test_what_is_asked_for_is_what_is_found(make_model):
    model, sae = make_model(n_heads=4), random_sae("blocks.1.hook_resid_pre")
    every = why_attend(model, TEXTS[:1], 1, inp=sae)
    one = why_attend(model, TEXTS[:1], 1, 2, -1, 3, inp=sae)
    assert one.terms.shape[:3] == (1, 1, 1)
    n = int(((every.query.position == 7) & (every.key.position == 3)).nonzero())
    exactly(one.total[0, 0], every.total[n, 2])
    several = why_attend(model, TEXTS[:1], 1, [3, 0], [4, 7], [4, 0], inp=sae)
    assert several.heads == (3, 0)
    exactly(several.total[0], every.total[(every.query.position == 4) & (every.key.position == 4)][0, [3, 0]])
    assert several.query.position.tolist() == [4, 7]
    assert several.key.position.tolist() == [4, 0]


def test_the_strongest_terms_come_first_with_their_words(make_model):
    model = make_model()
    found = why_attend(model, TEXTS, 1, inp=random_sae("blocks.1.hook_resid_pre"), label="f{}".format)
    top = found.top(20)
    sizes = [abs(term.value) for term in top]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == pytest.approx(found.pairs.abs().max().item())
    first = top[0]
    assert first.labels == tuple(f"f{i}" for i in first.features)
    words = model.to_str_tokens(TEXTS[first.row])
    assert first.words == (words[first.query], words[first.key])
    assert f"head {first.head}: f{first.features[0]} at {first.query}" in repr(found)
    with pytest.raises(ValueError, match="k must be at least 1"):
        found.top(0)


def test_in_float32_the_sum_misses_by_the_models_rounding(make_model):
    for variant in VARIANTS.values():
        model = make_model(dtype=torch.float32, **variant)
        found = why_attend(model, TEXTS, 1, inp=random_sae("blocks.1.hook_resid_pre", dtype="float32"))
        assert found.miss.max() < 1e-5
        assert found.terms.dtype == torch.float64


def test_a_silent_dictionary_leaves_everything_to_error_and_bias(make_model):
    model, sae = make_model(), random_sae("blocks.1.hook_resid_pre")
    sae.b_enc.data.fill_(-100)
    found = why_attend(model, TEXTS[0], 1, inp=sae)
    assert found.pairs.numel() == 0
    assert found.top() == []
    exactly(found.scores, found.measured)


def test_bad_questions_are_refused(make_model):
    model, sae = make_model(window=3), random_sae("blocks.1.hook_resid_pre")
    with pytest.raises(ValueError, match=r"inp must be an SAE at blocks\.0\.hook_resid_pre or blocks\.0\.ln1"):
        why_attend(model, TEXTS, 0, inp=sae)
    with pytest.raises(ValueError, match="layer must lie between 0 and 1, got 2"):
        why_attend(model, TEXTS, 2, inp=sae)
    with pytest.raises(ValueError, match="head must lie between 0 and 1, got 2"):
        why_attend(model, TEXTS, 1, [0, 2], inp=sae)
    with pytest.raises(ValueError, match="query and key go together, got only query"):
        why_attend(model, TEXTS, 1, query=1, inp=sae)
    with pytest.raises(ValueError, match="query and key must be as many, got 2 and 1"):
        why_attend(model, TEXTS, 1, query=[1, 2], key=1, inp=sae)
    with pytest.raises(ValueError, match="query must lie between -8 and 7 in text 0, got 8"):
        why_attend(model, TEXTS[0], 1, query=8, key=1, inp=sae)
    with pytest.raises(ValueError, match="that its query attends to, got query 1 and key 2 in text 0"):
        why_attend(model, TEXTS[0], 1, query=1, key=2, inp=sae)
    with pytest.raises(ValueError, match="that its query attends to, got query 6 and key 3"):
        why_attend(model, TEXTS[0], 1, query=6, key=3, inp=sae)


# -- ranking ----------------------------------------------------------------------------------------------------------


def listed(found):
    return list(
        zip(found.value.tolist(), *(part.tolist() for part in (found.out, found.left, found.right)), strict=True)
    )


def brute_force(tables):
    """Every (value, head, left, right) of dense tables, in the promised order."""
    rows = [
        (table[i, j].item(), head, i, j)
        for head, table in enumerate(tables)
        for i in range(table.shape[0])
        for j in range(table.shape[1])
    ]
    return sorted(rows, key=lambda row: (-abs(row[0]), *row[1:]))


def agree(found, expected):
    assert [tuple(row[1:]) for row in listed(found)] == [tuple(row[1:]) for row in expected]
    exactly(found.value, torch.tensor([row[0] for row in expected], dtype=torch.float64))


def score_tables(model, layer, query, key, distance, branches):
    """Scores of features written at query and key, by the running module's own weights and rotation, `[head, i, j]`."""
    attn, product = model.blocks[layer].attn, 1.0
    for branch in branches:
        forms = [attn.score_tensor(head, distance, branch).without_constant() for head in range(model.cfg.n_heads)]
        product = product * torch.stack([query @ form.dense() @ key.T for form in forms])
    return product.detach()


@pytest.mark.parametrize("distance", [None, 0, 3])
@pytest.mark.parametrize("kind", ["softmax", "bilinear", "squared"])
def test_the_strongest_pairs_are_those_of_brute_force(make_model, kind, distance):
    model = make_model(attention=kind, norm="rms_gain", attn_bias=(True, False), n_heads=4)
    gain, branches = model.blocks[1].ln1.weight, {"softmax": [0], "bilinear": [0, 1], "squared": [0, 0]}[kind]
    for hook in hooks_of(model):
        sae, other = random_sae(hook), random_sae(hook, seed=1)
        query, key = (one.W_dec * gain for one in (sae, other))
        expected = brute_force(score_tables(model, 1, query, key, distance, branches))
        found = top_attention(model, 1, 30, sae, other, distance=distance)
        agree(found, expected[:30])
        assert found.certificate.screened == len(expected) == 4 * 40 * 40
        of_one = [(value, 2, i, j) for value, head, i, j in expected if head == 2]
        agree(top_attention(model, 1, 30, sae, other, head=2, distance=distance), of_one[:30])
    last = brute_force(score_tables(model, 1, query, query, distance, branches[-1:]))
    agree(top_attention(model, 1, 5, sae, distance=distance, branch=branches[-1]), last[:5])


def test_a_coefficient_is_what_a_term_has(make_model):
    """A term is the ranked coefficient times both activations, over all that the norms divide by."""
    model = make_model(attention="bilinear", norm="rms_gain", qk_norm=QKNormConfig("head", GAIN))
    sae = random_sae("blocks.1.hook_resid_pre", k=3)
    found = why_attend(model, TEXTS[0], 1, 0, 5, 2, inp=sae)
    _, cache = model.run_with_cache(model.to_tokens(TEXTS[0]))
    scale = cache["blocks.1.ln1.hook_scale"][0, :, 0]
    for branch in (0, 1):
        ranked = top_attention(model, 1, 1600, sae, head=0, distance=3, branch=branch)
        coefficient = {(i, j): value for value, _, i, j in listed(ranked)}
        over = found.query.divisor[branch, 0, 0] * found.key.divisor[branch, 0, 0] * scale[5] * scale[2]
        for a, i in enumerate(found.query.features[0].tolist()):
            for b, j in enumerate(found.key.features[0].tolist()):
                expected = coefficient[i, j] * found.query.activations[0, a] * found.key.activations[0, b] / over
                exactly(found.pairs[branch, 0, 0, a, b], expected)


def test_tokens_are_features_too(make_model):
    model = make_model(norm="none")
    found = top_attention(model, 0, 3, model.W_E, head=1, distance=2)
    _, _, query, key = listed(found)[0]
    tokens = torch.tensor([[key, 7, query]])
    _, cache = model.run_with_cache(tokens)
    exactly(cache["blocks.0.attn.hook_attn_scores"][0, 1, 2, 0], found.value[0])


def test_cosines_are_those_of_the_head(make_model):
    model, sae = make_model(), random_sae("blocks.1.hook_resid_pre")
    found = top_attention(model, 1, 20, sae, cosine=True, distance=1)
    assert found.value.abs().max() <= 1
    form = model.blocks[1].attn.score_tensor(int(found.out[0]), 1).project(sae.W_dec, sae.W_dec)
    query, key = form.query[:, found.left[0]], form.key[:, found.right[0]]
    exactly(torch.nn.functional.cosine_similarity(query, key, 0).detach(), found.value[0])


@pytest.mark.parametrize("variant", ["softmax", "two normed branches"])
def test_the_strongest_writing_is_that_of_brute_force(make_model, variant):
    model = make_model(**VARIANTS[variant])
    inp, out = random_sae("blocks.0.hook_resid_pre"), random_sae("blocks.1.hook_resid_mid", seed=1)
    tables = [inp.W_dec @ model.blocks[0].attn.ov(head).dense().T @ out.W_enc for head in range(model.cfg.n_heads)]
    expected = brute_force([table.detach() for table in tables])
    agree(top_writing(model, 0, 25, inp, out), expected[:25])
    agree(top_writing(model, 0, 4, inp, out, head=1), [row for row in expected if row[1] == 1][:4])
    logits = [inp.W_dec @ model.blocks[0].attn.ov(head).dense().T @ model.W_U for head in range(model.cfg.n_heads)]
    agree(top_writing(model, 0, 9, inp, model.W_U.T), brute_force([table.detach() for table in logits])[:9])


def test_bad_rankings_are_refused(make_model, unchecked):
    model, sae = make_model(attention="differential"), random_sae("blocks.1.hook_resid_pre")
    with pytest.raises(ValueError, match="branch must be 0 or 1 for differential attention"):
        top_attention(model, 1, 5, sae)
    with pytest.raises(ValueError, match=r"key must be an SAE at blocks\.1\.hook_resid_pre"):
        top_attention(model, 1, 5, sae, random_sae("blocks.0.hook_resid_pre"), branch=1)
    with pytest.raises(ValueError, match=r"query must have shape \[n, 16\] \(d_model\), got \[3, 5\]"):
        top_attention(model, 1, 5, torch.zeros(3, 5), branch=1)
    with pytest.raises(ValueError, match="head must lie between 0 and 1, got 7"):
        top_attention(model, 1, 5, sae, head=7, branch=0)
    with pytest.raises(ValueError, match=r"out must be an SAE at blocks\.1\.hook_attn_out or"):
        top_writing(model, 1, 5, sae, random_sae("blocks.1.hook_mlp_in"))
    with pytest.raises(ValueError, match="layer must lie between 0 and 1, got 5"):
        top_writing(model, 5, 5, sae, sae)


# -- the authors' models ----------------------------------------------------------------------------------------------


FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures" / "elriggs-format"
FOLDERS = (
    *("attn-only-batchnorm", "attn-only-tok0", "bilinear", "bilinear-sqrd-attn-one-branch", "differential-attn"),
    *("bilinear-sqrd-attn-one-branch-raw", "bilinear-sqrd-attn-two-branch", "relu2", "sqrd-attn-one-branch"),
    *("squared-mlp", "swiglu", "swiglu-sqrd-attn-two-branch"),
)
TABLES = {"expected": "float32", "expected_bf16_tables": "bfloat16", "expected_lerp": None}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_terms_sum_to_every_score_of_the_authors_models(name, tmp_path, monkeypatch):
    if not (FIXTURES / name).is_dir():
        pytest.skip(f"the authors' files are not here: {FIXTURES / name}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))  # beside which copies are written
    for file, tables in TABLES.items():
        if not (FIXTURES / name / f"{file}.safetensors").is_file():
            continue
        overrides = {} if name.startswith("attn-only") else {"rotary_dtype": tables}
        overrides = {"residual": "lerp"} if tables is None else overrides
        model, seen = (
            bilens.load(FIXTURES / name, overrides=overrides),
            load_file(FIXTURES / name / f"{file}.safetensors"),
        )
        ids = seen["input_ids"].long()
        for layer in range(model.cfg.n_layers):
            hook = f"blocks.{layer}.hook_resid_pre"
            narrow = why_attend(model, ids, layer, inp=random_sae(hook, dtype="float32", d_in=model.cfg.d_model))
            assert narrow.miss.max() < 1e-5
            assert relative(narrow) < 1e-5
            compare_with_authors(model, narrow, seen, layer)
        model = model.double()
        for layer in range(model.cfg.n_layers):
            sae = random_sae(f"blocks.{layer}.hook_resid_pre", d_in=model.cfg.d_model)
            wide = why_attend(model, ids, layer, inp=sae)
            assert wide.miss.max() < 1e-12
            assert relative(wide) < 1e-12


def relative(found):
    """How far the sums are from the running model, relative to the head's largest score."""
    return ((found.scores - found.measured).abs() / found.measured.abs().amax(1, keepdim=True)).max()


def compare_with_authors(model, found, seen, layer):
    """Scores, and the pattern that they make, where the authors' values are known; to 1e-5 of the head's largest."""
    attn, start, n = model.blocks[layer].attn, f"blocks.{layer}.attn.hook", seen["input_ids"].shape[1]
    tables = torch.zeros(attn.branches, 2, model.cfg.n_heads, n, n, dtype=torch.float64)
    tables[:, found.row, :, found.query.position, found.key.position] = found.scores.transpose(0, 1)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    for branch, table in enumerate(tables):
        names = [f"{start}_rot_{side}{2 if branch else ''}" for side in ("q", "k")]
        if all(name in seen for name in names):
            at = torch.einsum("bqhd,bkhd->bhqk", *(seen[name].double() for name in names)) * attn.config.factor
            assert ((table - at * causal).abs().amax((0, 2, 3)) / at.abs().amax((0, 2, 3))).max() < 1e-5
    if f"{start}_pattern" in seen:
        soft = tables.masked_fill(~causal, -torch.inf).softmax(-1)
        made = {"softmax": soft[0], "squared": tables[0].square(), "bilinear": tables.prod(0)}
        if attn.config.kind == "differential":
            made["differential"] = soft[0] - attn.lamb2.double() * soft[1]
        made = made[attn.config.kind]
        made = made / (made.sum(-1, keepdim=True) + ROW_EPS) if attn.config.normalize else made
        at = seen[f"{start}_pattern"].double()
        assert ((made - at).abs().amax((0, 2, 3)) / at.abs().amax((0, 2, 3))).max() < 1e-5
