"""Attribution: the terms sum to what the model computes, and each of them is what an intervention measures."""

import itertools
import json
from pathlib import Path

import jsonschema
import pytest
import torch
from sae_lens import TopKSAE, TopKSAEConfig

import bilens
from bilens import saes
from bilens.circuits.attribution import attribute
from bilens.circuits.sources import attribute_sources, sources
from bilens.circuits.targets import Target
from bilens.circuits.traces import trace, trace_pair
from bilens.models.logits import logit_direction
from bilens.report.graph import graph, write_graph

SCHEMA = json.loads((Path(__file__).parent / "attribution_graph_schema.json").read_text())
VARIANTS = {
    "bilinear": {},
    "biases": {"mlp_bias": (True, True)},
    "gain": {"norm": "rms_gain", "attn_scale": 1.0},
    "gain, shift and biases": {"norm": "rms_gain_shift", "mlp_bias": (True, True), "attn_scale": 1.0},
    "no norm": {"norm": "none", "mlp_bias": (False, True)},
    "bilinear attention": {"attention": "bilinear"},
}
POINTS = ["hook_mlp_in", "hook_resid_mid"]
TEXT, TEXTS = "the big dog sat", ["the big dog sat on the mat", "once", "a cat ran, and saw"]


def random_sae(hook, k=6, seed=0, scope=False, d_in=16, dtype="float64", **cfg):
    generator = torch.Generator().manual_seed(seed)
    made = (saes.ScopeSAE, saes.ScopeSAEConfig) if scope else (TopKSAE, TopKSAEConfig)
    sae = made[0](made[1](d_in=d_in, d_sae=40, k=k, dtype=dtype, **cfg))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / d_in**0.5)
    sae.cfg.metadata.hook_name = hook
    return sae


@pytest.fixture(params=VARIANTS)
def model(request, make_model):
    return make_model(**VARIANTS[request.param])


@pytest.fixture
def hard(make_model):
    """A model with everything that could go wrong at once."""
    return make_model(**VARIANTS["gain, shift and biases"])


@pytest.fixture(params=POINTS)
def inp(request):
    return random_sae(f"blocks.1.{request.param}")


@pytest.fixture
def out():
    return random_sae("blocks.1.hook_mlp_out", seed=1)


def targets(model, out):
    direction = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return {"feature": {"feature": 7, "out": out}, "token": {"token": "cat"}, "direction": {"direction": direction}}


def as_target(model, options):
    """The target that `attribute` makes of its options."""
    if "feature" in options:
        return Target.feature(options["out"], options["feature"])
    return Target.token(model, options["token"]) if "token" in options else Target.direction(options["direction"])


def exactly(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# -- sums -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["feature", "token", "direction"])
def test_the_terms_sum_to_what_the_model_computes(model, inp, out, kind):
    found = attribute(model, TEXTS, 1, inp=inp, **targets(model, out)[kind])
    exactly(found.total, found.pre_activation)
    named = found.pairs.sum((1, 2)) + (found.feature_bias + found.feature_error).sum(1)
    exactly(named + found.error + found.error_bias + found.bias, found.total)
    assert found.miss.max() < 1e-12


@pytest.mark.parametrize("rescale", [False, True])
def test_the_pre_activation_is_the_encoders(model, inp, rescale):
    out = random_sae("blocks.1.hook_mlp_out", k=40, seed=1, rescale_acts_by_decoder_norm=rescale)
    _, cache = model.run_with_cache(TEXT)
    encoded = out.encode(cache["blocks.1.hook_mlp_out"][0, 1:])
    for feature in (0, 7, 39):
        found = attribute(model, TEXT, 1, feature, inp=inp, out=out)
        exactly(found.pre_activation.relu(), encoded[:, feature])


@pytest.mark.parametrize("layer", [0, 1])
def test_a_token_is_the_direct_path_to_its_logit(model, layer):
    inp = random_sae(f"blocks.{layer}.hook_resid_mid")
    found = attribute(model, TEXT, layer, token="cat", inp=inp)
    logits, cache = model.run_with_cache(TEXT)
    mlp_out = cache[f"blocks.{layer}.hook_mlp_out"]
    without = [("blocks.1.hook_resid_post", lambda value, hook: value - mlp_out)]
    if model.cfg.norm is not None:
        scale = cache["ln_final.hook_scale"]
        without.append(("ln_final.hook_scale", lambda value, hook: scale))
    change = logits - model.run_with_hooks(TEXT, fwd_hooks=without)
    exactly(found.pre_activation, change[0, 1:, model.to_single_token("cat")])
    ratio = mlp_out[0, 1:] @ logit_direction(model, "cat") / found.pre_activation
    exactly(ratio, torch.ones_like(ratio) if model.cfg.norm is None else cache["ln_final.hook_scale"][0, 1:, 0])


@pytest.mark.parametrize("scope", [False, True])
def test_any_number_and_sign_of_active_features(hard, out, scope):
    inp = random_sae("blocks.1.hook_resid_mid", k=30, scope=scope)
    found = attribute(hard, TEXTS, 1, 7, inp=inp, out=out)
    _, cache = hard.run_with_cache(TEXT)
    alone = attribute(hard, TEXT, 1, 7, inp=inp, out=out)
    z = inp.encode(cache["blocks.1.hook_resid_mid"][0, 1:])
    for n, (features, values) in enumerate(zip(alone.features, alone.activations, strict=True)):
        assert features[features >= 0].tolist() == z[n].nonzero().flatten().tolist()
        exactly(values[features >= 0], z[n][z[n] != 0])
        assert (values[features < 0] == 0).all()
    assert (z < 0).any() == scope
    assert (alone.features == -1).any() != scope  # with a ReLU there are fewer than k
    exactly(found.total, found.pre_activation)
    assert not found.pairs.tril(-1).any()


def test_a_silent_dictionary_leaves_everything_to_error_and_bias(hard, out):
    inp = random_sae("blocks.1.hook_mlp_in")
    inp.b_enc.data.fill_(-100)
    found = attribute(hard, TEXT, 1, 7, inp=inp, out=out)
    assert found.pairs.shape == (4, 0, 0)
    assert found.top() == []
    exactly(found.error + found.error_bias + found.bias, found.pre_activation)


@pytest.mark.parametrize("point", POINTS)
def test_in_float32_the_sum_misses_by_the_models_rounding(make_model, point):
    inp = random_sae(f"blocks.1.{point}", dtype="float32")
    out = random_sae("blocks.1.hook_mlp_out", dtype="float32")
    model = make_model(dtype=torch.float32, **VARIANTS["gain, shift and biases"])
    for kind in ("feature", "token"):
        found = attribute(model, TEXTS, 1, inp=inp, **targets(model, out)[kind])
        assert found.table.dtype == torch.float64
        assert 0 < found.miss.max() < 1e-6


def test_texts_together_give_what_each_gives_alone(hard, inp, out):
    together = attribute(hard, TEXTS, 1, 7, inp=inp, out=out)
    last = attribute(hard, TEXTS, 1, 7, inp=inp, out=out, position=-1)
    for row, text in enumerate(TEXTS):
        alone = attribute(hard, text, 1, 7, inp=inp, out=out)
        mine = together.places.row == row
        exactly(together.table[mine], alone.table)
        exactly(last.table[row], alone.table[-1])
        words = hard.to_str_tokens(text)
        assert together.places.position[mine].tolist() == list(range(1, len(words)))
        assert together.places.words[row] == tuple(words)
    ids = attribute(hard, hard.to_tokens(TEXTS[0])[0], 1, 7, inp=inp, out=out, position=2)
    exactly(ids.table[0], together.table[1])


def test_more_texts_than_run_at_a_time(hard, inp, out):
    once = attribute(hard, TEXTS, 1, 7, inp=inp, out=out)
    many = attribute(hard, TEXTS * 24, 1, 7, inp=inp, out=out)  # 72 texts, 336 positions
    assert len(many.table) == 24 * len(once.table) > 256
    exactly(many.table, once.table.repeat(24, 1, 1))
    exactly(many.total, many.pre_activation)
    assert torch.equal(many.features, once.features.repeat(24, 1))
    assert many.places.row.tolist() == sorted(many.places.row.tolist())


# -- every edge is what an intervention measures ----------------------------------------------------------------------


def run_with(model, hook, values, position, scale=None):
    """Put each of `values` at one position of a hook point, the norm's scale held; return the MLP's output there."""
    tokens = model.to_tokens(TEXT).expand(len(values), -1)

    def put(value, hook):
        value = value.clone()
        value[:, position] = values
        return value

    hooks = [(hook, put)]
    if scale is not None:
        hooks.append(("blocks.1.ln2.hook_scale", lambda value, hook: scale.expand_as(value)))
    with model.hooks(fwd_hooks=hooks):
        return model.run_with_cache(tokens, names_filter="blocks.1.hook_mlp_out")[1]["blocks.1.hook_mlp_out"][
            :, position
        ]


def edges_by_intervention(model, hook, base, parts, read, position):
    """Measure every term by running the model with no part, each part alone, and each two of them."""
    _, cache = model.run_with_cache(TEXT)
    scale = None if hook.endswith("mlp_in") or model.cfg.norm is None else cache["blocks.1.ln2.hook_scale"]
    n = len(parts)
    sets = [(), *((i,) for i in range(n)), *itertools.combinations(range(n), 2)]
    values = torch.stack([base + sum((parts[i] for i in chosen), torch.zeros_like(base)) for chosen in sets])
    got = dict(zip(sets, read(run_with(model, hook, values, position, scale)), strict=True))
    twice = read(run_with(model, hook, base + 2 * parts, position, scale))  # tells the square from the linear term
    table = torch.zeros(n + 1, n + 1, dtype=base.dtype)
    table[0, 0] = got[()]
    for i in range(n):
        both = got[(i,)] - got[()]
        table[i + 1, i + 1] = (twice[i] - got[()] - 2 * both) / 2
        table[0, i + 1] = both - table[i + 1, i + 1]
    for i, j in itertools.combinations(range(n), 2):
        table[i + 1, j + 1] = got[(i, j)] - got[(i,)] - got[(j,)] + got[()]
    return table


def test_every_term_is_what_an_intervention_measures(model, inp, out):
    found = attribute(model, TEXT, 1, 7, inp=inp, out=out, position=3)
    hook = inp.cfg.metadata.hook_name
    x = model.run_with_cache(TEXT)[1][hook][0, 3]
    written = found.activations[0, :, None] * saes.writers(inp)[found.features[0]]
    error = x - written.sum(0) - inp.b_dec.detach()
    measured = edges_by_intervention(
        model, hook, inp.b_dec.detach(), torch.cat((error[None], written)),
        lambda y: y @ saes.readers(out)[7] + saes.offsets(out)[7], 3,
    )  # fmt: skip
    exactly(found.table[0], measured)


def test_removing_a_feature_removes_its_terms(model, inp, out):
    found = attribute(model, TEXT, 1, 7, inp=inp, out=out, position=3)
    hook = inp.cfg.metadata.hook_name
    _, cache = model.run_with_cache(TEXT)
    scale = None if hook.endswith("mlp_in") or model.cfg.norm is None else cache["blocks.1.ln2.hook_scale"]
    written = found.activations[0, :, None] * saes.writers(inp)[found.features[0]]
    y = run_with(model, hook, cache[hook][0, 3] - written, 3, scale)
    pairs = found.pairs[0]
    terms = pairs.sum(0) + pairs.sum(1) - pairs.diagonal() + found.feature_bias[0] + found.feature_error[0]
    exactly(found.pre_activation - (y @ saes.readers(out)[7] + saes.offsets(out)[7]), terms)
    assert terms.abs().min() > 1e-4


def test_coefficients_are_those_of_the_ranking(hard, out):
    inp = random_sae("blocks.1.hook_mlp_in")
    found = attribute(hard, TEXT, 1, 7, inp=inp, out=out, position=-1)
    tensor = hard.blocks[1].mlp.tensor().detach()
    every = bilens.top_interactions(tensor, 41**2, out=saes.readers(out)[7, None], inp=saes.writers(inp))
    ranked = {(i, j): value for _, i, j, value in zip(*(part.tolist() for part in every), strict=True)}
    features, z = found.features[0].tolist(), found.activations[0]
    for i, j in itertools.combinations_with_replacement(range(len(features)), 2):
        assert (found.pairs[0, i, j] / (z[i] * z[j])).item() == pytest.approx(ranked[features[i], features[j]])


# -- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
def test_sources_sum_to_the_residual_stream_and_to_what_enters(model, layer):
    found = sources(model, TEXT, layer)
    _, cache = model.run_with_cache(TEXT)
    exactly(found.values.sum(1), cache[f"blocks.{layer}.hook_resid_mid"][0, 1:])
    exactly(found.entering.sum(1) + found.shift, cache[f"blocks.{layer}.hook_mlp_in"][0, 1:])
    heads = [f"head {i}.{j}" for i in range(layer + 1) for j in range(2)]
    assert found.names == ("embedding", *heads[:2], *(("MLP 0", *heads[2:]) if layer else ()))
    head = found.names.index(f"head {layer}.1")
    exactly(found.values[:, head], model.run_with_cache(TEXT)[1][f"blocks.{layer}.attn.hook_result"][0, 1:, 1])


@pytest.mark.parametrize("kind", ["feature", "token", "direction"])
def test_pairs_of_sources_sum_to_what_the_model_computes(model, out, kind):
    found = attribute_sources(model, TEXTS, 1, as_target(model, targets(model, out)[kind]))
    exactly(found.total, found.pre_activation)
    exactly(found.pairs.sum((1, 2)) + found.source_bias.sum(1) + found.bias, found.total)
    exactly(found.pre_activation, attribute(model, TEXTS, 1, inp=random_sae("blocks.1.hook_mlp_in"),
                                            **targets(model, out)[kind]).pre_activation)  # fmt: skip


def test_every_pair_of_sources_is_what_an_intervention_measures(model, out):
    found = attribute_sources(model, TEXT, 1, Target.feature(out, 7), 3)
    parts = sources(model, TEXT, 1, 3).values[0]
    hook, zero = "blocks.1.hook_resid_mid", parts.new_zeros(16)
    read = lambda y: y @ saes.readers(out)[7] + saes.offsets(out)[7]  # noqa: E731
    exactly(found.table[0], edges_by_intervention(model, hook, zero, parts, read, 3))


def test_silencing_a_head_removes_its_terms(model, out):
    found = attribute_sources(model, TEXT, 1, Target.feature(out, 7))
    _, cache = model.run_with_cache(TEXT)

    def silence(value, hook):
        value = value.clone()
        value[:, :, 1] = 0
        return value

    hooks = [("blocks.1.attn.hook_z", silence)]
    if model.cfg.norm is not None:
        hooks.append(("blocks.1.ln2.hook_scale", lambda value, hook: cache["blocks.1.ln2.hook_scale"]))
    with model.hooks(fwd_hooks=hooks):
        y = model.run_with_cache(TEXT)[1]["blocks.1.hook_mlp_out"][0, 1:]
    head = found.names.index("head 1.1") + 1
    terms = found.table[:, head].sum(1) + found.table[:, :, head].sum(1) - found.table[:, head, head]
    exactly(found.pre_activation - (y @ saes.readers(out)[7] + saes.offsets(out)[7]), terms)


def test_features_are_traced_to_their_sources(model, inp, out):
    found = attribute(model, TEXTS, 1, 7, inp=inp, out=out)
    traced = trace(sources(model, TEXTS, 1), inp, found.features)
    exactly(traced.pre_activation, found.activations)
    every = trace(sources(model, TEXTS, 1), inp, range(40))
    active = found.features[2]
    exactly(every.values[2, active], traced.values[2])
    pairs = found.pairs[2]
    for i, j in ((0, 3), (3, 0), (2, 2)):
        table = trace_pair(found, traced, active[i].item(), active[j].item(), 2)
        exactly(table.sum(), pairs[min(i, j), max(i, j)])
        exactly(table.sum(1) * traced.pre_activation[2, i], pairs[min(i, j), max(i, j)] * torch.cat(
            (traced.bias[2, i, None], traced.values[2, i])))  # fmt: skip


def test_features_that_are_not_there_come_from_nowhere(hard, out):
    inp = random_sae("blocks.1.hook_resid_mid", k=30)
    found = attribute(hard, TEXTS, 1, 7, inp=inp, out=out)
    traced = trace(sources(hard, TEXTS, 1), inp, found.features)
    assert (found.features == -1).any()
    exactly(traced.pre_activation, found.activations)


# -- reading the result -----------------------------------------------------------------------------------------------


def test_top_lists_the_strongest_pairs(hard, inp, out):
    found = attribute(hard, TEXTS, 1, 7, inp=inp, out=out, label="feature {}".format)
    top = found.top(5)
    values = found.pairs.flatten()
    assert [abs(term.value) for term in top] == values.abs().topk(5).values.tolist()
    for term in top:
        n = ((found.places.row == term.row) & (found.places.position == term.position)).nonzero().item()
        i, j = (found.features[n].tolist().index(feature) for feature in (term.left, term.right))
        assert found.pairs[n, i, j].item() == term.value
        assert term.labels == (f"feature {term.left}", f"feature {term.right}")
        assert term.word == hard.to_str_tokens(TEXTS)[term.row][term.position]
    assert len(found.top(10**6)) == (values != 0).sum()
    assert repr(top[0]) in repr(found)
    assert "\n" not in repr(found) + repr(sources(hard, TEXT, 1))
    assert " × MLP 0 at " in repr(attribute_sources(hard, TEXT, 1, Target.feature(out, 7)).top(1)[0])


def drawn(hard, inp, tmp_path, target):
    found = attribute(hard, TEXTS, 1, inp=inp, **target)
    traced = trace(sources(hard, TEXTS, 1), inp, found.features)
    write_graph(found, tmp_path / "dog.json", traced=traced, pairs=9)
    made = json.loads((tmp_path / "dog.json").read_text())
    assert made == graph(found, traced=traced, pairs=9, slug="dog")
    return made, found


@pytest.mark.parametrize("kind", ["feature", "token", "direction"])
def test_the_graph_keeps_to_the_published_schema(hard, inp, out, tmp_path, kind):
    made, _ = drawn(hard, inp, tmp_path, targets(hard, out)[kind])
    jsonschema.validate(made, SCHEMA)
    ids = [node["node_id"] for node in made["nodes"]]
    assert len(set(ids)) == len(ids)
    assert len({(n["layer"], n["feature"], n["ctx_idx"]) for n in made["nodes"]}) == len(ids)  # what viewers key by
    assert len({node["jsNodeId"] for node in made["nodes"]}) == len(ids)
    assert {link[end] for link in made["links"] for end in ("source", "target")} == set(ids)
    assert set(made["qParams"]["pinnedIds"]) <= set(ids)
    assert len(made["qParams"]["pinnedIds"]) == 7
    rows = {node["node_id"]: -1 if node["layer"] == "E" else int(node["layer"]) for node in made["nodes"]}
    assert all(rows[link["source"]] <= rows[link["target"]] for link in made["links"])
    assert made["metadata"]["prompt_tokens"] == hard.to_str_tokens(TEXTS[0])
    assert made["metadata"]["prompt"] == "[BOS] the big dog sat on the mat"
    assert all(0 <= node["influence"] <= 1 for node in made["nodes"])
    assert [node["feature_type"] for node in made["nodes"]].count("logit") == (7 if kind == "token" else 0)


def test_a_token_has_the_probability_that_the_model_gives_it(hard, inp, out, tmp_path):
    made, _ = drawn(hard, inp, tmp_path, targets(hard, out)["token"])
    logits = [node for node in made["nodes"] if node["feature_type"] == "logit"]
    with torch.no_grad():
        chance = hard(TEXTS[0])[0].double().softmax(-1)
    for node in logits:
        expected = chance[node["ctx_idx"], node["feature"]].item()
        assert node["token_prob"] == pytest.approx(expected, rel=1e-9)
        assert node["clerp"] == f'Output "{hard.labels([node["feature"]])[0]}" (p={expected:.3f})'


def test_graphs_of_a_folder_are_listed_once_each(hard, inp, out, tmp_path):
    made, found = drawn(hard, inp, tmp_path, targets(hard, out)["direction"])
    for name in ("cat", "dog"):
        write_graph(found, tmp_path / f"{name}.json")
    listed = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert [one["slug"] for one in listed] == ["cat", "dog"]
    assert listed[1] == made["metadata"]
    (tmp_path / "graph-metadata.json").write_text('{"graphs": 3}')
    with pytest.raises(ValueError, match=r"graph-metadata\.json must hold a list of graphs, got 3"):
        write_graph(found, tmp_path / "cat.json")


def test_what_goes_into_a_node_of_the_graph_is_its_value(hard, inp, out, tmp_path):
    made, found = drawn(hard, inp, tmp_path, {"feature": 7, "out": out})
    into = {node["node_id"]: 0.0 for node in made["nodes"]}
    for link in made["links"]:
        into[link["target"]] += link["weight"]
    for node in made["nodes"]:
        n, kind = node["ctx_idx"] - 1, node["feature_type"]
        if node["layer"] == "7":
            assert into[node["node_id"]] == pytest.approx(found.total[n].item())
        elif kind == "feature pair" and node["feature"] >= 0:
            out_weight = [link["weight"] for link in made["links"] if link["source"] == node["node_id"]]
            assert out_weight == [pytest.approx(into[node["node_id"]])] == [pytest.approx(node["activation"])]
        elif kind == "cross layer transcoder":
            assert into[node["node_id"]] == pytest.approx(node["activation"])
    weight = dict.fromkeys(into, 0.0)
    for link in made["links"]:
        weight[link["source"]] += abs(link["weight"])
    strongest = min((node for node in made["nodes"] if node["influence"]), key=lambda node: node["influence"])
    assert weight[strongest["node_id"]] == max(weight.values())
    assert strongest["influence"] == pytest.approx(max(weight.values()) / sum(weight.values()))


def test_a_model_without_a_tokenizer_takes_ids(make_model, inp, out):
    model = make_model(tokenizer=None)
    found = attribute(model, torch.tensor([[1, 3, 4]]), 1, 7, inp=inp, out=out)
    exactly(found.total, found.pre_activation)
    assert found.places.words == (("1", "3", "4"),)
    assert graph(found)["metadata"]["prompt"] == "1 3 4"


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"feature": 40}, "feature must lie between 0 and 39, got 40"),
        ({"feature": -1}, "feature must lie between 0 and 39, got -1"),
        ({"layer": 2}, "layer must lie between 0 and 1, got 2"),
        ({"layer": 0}, r"out must be an SAE at blocks.0.hook_mlp_out .*got 'blocks.1.hook_mlp_out'"),
        (
            {"inp": "out"},
            r"inp must be an SAE at blocks.1.hook_mlp_in or .*hook_resid_mid or .*, got 'blocks.1.hook_mlp_out'",
        ),
        ({"inp": None}, "inp must be an SAE .* got None"),
        ({"out": "inp"}, "out must be an SAE at blocks.1.hook_mlp_out"),
        ({"inp": 12}, r"inp must read 16 dimensions \(d_model\), got an SAE with d_in=12"),
        (
            {"inp": "folded"},
            "inp must say how it reads its input, got normalize_activations='expected_average_only_in'",
        ),
        ({"out": None}, "out goes with feature, got no out"),
        ({"feature": None}, "give one of feature, direction and token, got none"),
        ({"token": "cat"}, "give one of feature, direction and token, got feature and token"),
        ({"feature": None, "token": "cat"}, "out goes with feature, got out without a feature"),
        ({"feature": None, "out": None, "token": 10**6}, "token must be an id from 0 to"),
        ({"feature": None, "out": None, "token": "cat dog"}, "'cat dog' is not a single token"),
        ({"feature": None, "out": None, "direction": torch.ones(3)}, r"direction must have shape \[16\]"),
        ({"text": ""}, "texts must hold at least one text that is not empty, got 1 empty ones"),
        ({"text": ["the cat", " "]}, "text must hold a token besides BOS, got ' ' as text 1"),
        ({"text": []}, "texts must hold at least one text .*got none"),
        ({"text": torch.zeros(0, dtype=torch.long)}, "texts must hold at least one token id"),
        ({"text": ["once", "cat " * 32]}, "text must fit the context of 32 tokens, got more of them as text 1"),
        ({"text": torch.tensor([1])}, "texts must hold at least one token besides BOS and padding, got none"),
        ({"position": 5}, "position must lie between -5 and 4 in text 0, got 5"),
        ({"position": -6}, "position must lie between -5 and 4 in text 0, got -6"),
        ({"text": ["the cat sat", "once"], "position": 3}, "position must lie between -2 and 1 in text 1, got 3"),
    ],
    ids=str,
)
def test_errors_name_the_argument(hard, out, changes, says):
    inp = random_sae("blocks.1.hook_mlp_in")
    special = {
        "inp": {None: random_sae(None), "out": out, 12: random_sae("blocks.1.hook_mlp_in", d_in=12)},
        "out": {"inp": inp, None: None},
    }
    scheme = {"normalize_activations": "expected_average_only_in"}
    special["inp"]["folded"] = random_sae("blocks.1.hook_mlp_in", **scheme)
    arguments = {"text": TEXT, "layer": 1, "feature": 7, "inp": inp, "out": out}
    arguments |= {name: special[name][one] if name in special else one for name, one in changes.items()}
    with pytest.raises(ValueError, match=says):
        attribute(hard, **arguments)


@pytest.mark.usefixtures("unchecked")
def test_other_errors_name_the_argument(make_model, hard, out):
    inp = random_sae("blocks.1.hook_mlp_in")
    with pytest.raises(TypeError, match=r"only a bilinear MLP .* this one is gated"):
        attribute(make_model(mlp="gated", act="silu"), TEXT, 1, 7, inp=inp, out=out)
    with pytest.raises(ValueError, match="layer must lie between 0 and 1, got -1"):
        sources(hard, TEXT, -1)
    found, came = attribute(hard, TEXT, 1, 7, inp=inp, out=out), sources(hard, TEXT, 1)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        found.top(0)
    with pytest.raises(ValueError, match=r"features must hold ids from 0 to 39 .*got 40"):
        trace(came, inp, [3, 40])
    with pytest.raises(ValueError, match=r"inp must be an SAE at blocks.1.hook_mlp_in"):
        trace(came, out, [3])
    with pytest.raises(ValueError, match=r"traced must be a trace of attribution.features"):
        graph(found, traced=trace(came, inp, [3]))
    silent = next(i for i in range(40) if i not in found.features[0])
    with pytest.raises(ValueError, match=f"right must be a feature that is active at 0, got {silent}"):
        trace_pair(found, trace(came, inp, found.features), found.features[0, 0].item(), silent)
    with pytest.raises(ValueError, match="row must be a text of the attribution, from 0 to 0, got 1"):
        graph(found, row=1)
    with pytest.raises(ValueError, match="pairs must not be negative, got -1"):
        graph(found, pairs=-1)


def test_sources_need_no_bilinear_layer(make_model):
    model = make_model(mlp="gated", act="silu")
    found = sources(model, TEXT, 1)
    exactly(found.values.sum(1), model.run_with_cache(TEXT)[1]["blocks.1.hook_resid_mid"][0, 1:])


# -- published formats ------------------------------------------------------------------------------------------------

PUBLISHED = Path(__file__).parents[1] / "../shared/fixtures/published-format"
GENERATIONS = ["bilinear", "bias", "no-norm", "unscaled-attn", "bilinear-attn", "2024-06", "2024-05"]


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs the published fixtures in ../shared")
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("name", GENERATIONS)
def test_every_published_generation_is_attributed_exactly(name, point):
    model = bilens.load(PUBLISHED / name).double()
    tokens = torch.randint(3, model.cfg.d_vocab, (3, 9), generator=torch.Generator().manual_seed(0))
    layer, d_in = model.cfg.n_layers - 1, model.cfg.d_model
    inp, out = (random_sae(f"blocks.{layer}.{one}", d_in=d_in) for one in (point, "hook_mlp_out"))
    for target in ({"feature": 3, "out": out}, {"token": 5}):
        assert attribute(model, tokens, layer, inp=inp, **target).miss.max() < 1e-12
        assert attribute_sources(model, tokens, layer, as_target(model, target)).miss.max() < 1e-12


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs the published fixtures in ../shared")
@pytest.mark.parametrize("names", [("1-mlp-in-x4-k5", "1-mlp-out-x4-k5"), ("0-resid-mid-x2-k9-v1", "0-mlp-out-x2-k60")])
def test_published_dictionaries_are_attributed_exactly(names):
    model = bilens.load(PUBLISHED / "bilinear")
    inp, out = (saes.load_scope(PUBLISHED / "bilinear-scope", name) for name in names)
    tokens = torch.randint(3, model.cfg.d_vocab, (3, 9), generator=torch.Generator().manual_seed(0))
    assert attribute(model, tokens, int(names[0][0]), 17, inp=inp, out=out).miss.max() < 1e-6


# -- the embedded model -----------------------------------------------------------------------------------------------

REVIEW = "the acting was not good, but i really liked the story. once upon a time there was a movie about a dog."


def test_the_embedded_model_is_attributed_exactly():
    model = bilens.load("bilens-mini")
    for layer in range(model.cfg.n_layers):
        inp, out = (bilens.saes.load("bilens-mini", f"blocks.{layer}.hook_mlp_{end}") for end in ("in", "out"))
        for target in ({"feature": 11, "out": out}, {"token": "bad"}):
            found = attribute(model, [REVIEW, "it was boring"], layer, inp=inp, **target)
            assert found.miss.max() < 1e-5
            assert attribute_sources(model, REVIEW, layer, as_target(model, target)).miss.max() < 1e-5
    traced = trace(sources(model, [REVIEW, "it was boring"], layer), inp, found.features)
    torch.testing.assert_close(traced.pre_activation, found.activations, rtol=1e-4, atol=1e-5)
    jsonschema.validate(graph(found, traced=traced, row=1), SCHEMA)
