"""Interventions: what the weights predict is what the running model does, and afterwards the model is as before."""

import copy
from dataclasses import replace

import pytest
import torch
from test_circuits import random_sae

import bilens.models.checkpoints as checkpoints
from bilens import circuits
from bilens.circuits import Circuit, FeatureLayer, Protocol, controls, edits, effects, removal, steering
from bilens.circuits.textstages import text_stages
from bilens.models.windows import Windows, observe
from bilens.tensor import resuming
from bilens.tensor.keeping import Pace

TEXTS = [
    "the cat sat on the mat.",
    "once upon a time the dog ran",
    "the big dog saw a little cat and ran!",
    "a cat",
] * 5
LAYER = 0


def make_lens(model):
    hooks = f"blocks.{LAYER}.hook_mlp_in", f"blocks.{LAYER}.hook_mlp_out"
    return FeatureLayer(model, LAYER, *(random_sae(hook, k=24, seed=seed) for seed, hook in enumerate(hooks)))


@pytest.fixture(params=[(False, False), (True, True)], ids=["no bias", "biases"])
def lens(request, make_model):
    return make_lens(make_model(mlp_bias=request.param))


@pytest.fixture
def circuit(lens):
    """The pair of input features that are active together most often, and the output feature they drive most."""
    x = inputs_and_outputs(lens)[0].flatten(0, 1)
    active = (lens.inp.encode(x) != 0).double()
    together = (active.T @ active).triu(1)
    left, right = (int(i) for i in torch.unravel_index(together.argmax(), together.shape))
    feature = (lens.readers @ edits.interaction(lens, left, right)).abs().argmax()
    return Circuit(LAYER, int(feature), left, right)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def inputs_and_outputs(lens):
    """What enters and leaves the MLP, `[row, seq, d_model]`, under whatever hooks there are."""
    found = observe(lens.model, Windows.of(lens.model, TEXTS), [lens.hook_in, lens.hook_out])
    return found[lens.hook_in], found[lens.hook_out]


def at_positions(lens, texts):
    """The same at every position of text, `[position, d_model]`."""
    both = lens.at_positions(Windows.of(lens.model, texts), lambda x, y: torch.stack((x, y), 1))
    return both.unbind(1)


def extended(lens, x):
    return torch.cat((x, torch.ones_like(x[..., :1])), -1) if lens.tensor.constant else x


# -- edits ------------------------------------------------------------------------------------------------------------


def test_an_input_feature_goes_and_the_error_stays(lens, circuit):
    x, _ = inputs_and_outputs(lens)
    z = lens.inp.encode(x)
    with edits.without_feature(lens, circuit.left):
        x_after, y_after = inputs_and_outputs(lens)
    torch.testing.assert_close(x_after, x - z[..., [circuit.left]] * lens.writers[circuit.left])
    torch.testing.assert_close(y_after, lens.tensor.apply(x_after))
    kept = lens.inp.decode(z) - z[..., [circuit.left]] * lens.writers[circuit.left]
    torch.testing.assert_close(x_after - kept, x - lens.inp.decode(z))


def test_without_a_pair_either_feature_alone_acts_as_before(lens, circuit):
    x, y = inputs_and_outputs(lens)
    i, j = circuit.left, circuit.right
    z, d = lens.inp.encode(x), lens.writers
    with edits.without_pair(lens, i, j):
        x_after, y_after = inputs_and_outputs(lens)
    torch.testing.assert_close(x_after, x)
    one, other = z[..., [i]] * d[i], z[..., [j]] * d[j]
    f = lens.tensor.apply
    mixed = f(x) - f(x - one) - f(x - other) + f(x - one - other)  # the second difference is the pair's term
    torch.testing.assert_close(y_after, y - mixed)
    assert mixed.abs().max() > 1e-2


def test_the_interaction_is_the_dense_tensor_applied_to_both(lens):
    d = extended(lens, lens.writers)
    if lens.tensor.constant:
        d[:, -1] = 0
    expected = torch.einsum("oij, i, j -> o", lens.tensor.dense(), d[3], d[8])
    torch.testing.assert_close(edits.interaction(lens, 3, 8), expected)


@pytest.mark.parametrize("index", [0, 2])
def test_an_eigenvector_is_taken_out_of_its_feature_alone(lens, index):
    x, y = inputs_and_outputs(lens)
    top = lens.eigen(5)
    with edits.without_eigenvector(lens, 5, index):
        _, y_after = inputs_and_outputs(lens)
    reader = lens.readers[5]
    share = top.values[index] * (extended(lens, x) @ top.vectors[index]).pow(2)
    torch.testing.assert_close((y - y_after) @ reader, share)
    orthogonal = lens.readers[6] - (lens.readers[6] @ reader) / (reader @ reader) * reader
    torch.testing.assert_close((y - y_after) @ orthogonal, torch.zeros_like(share))


@pytest.mark.parametrize("side", ["inp", "out"])
def test_steering_adds_the_decoder_direction(lens, side):
    x, y = inputs_and_outputs(lens)
    with edits.steer(lens, 4, -1.5, side):
        after = inputs_and_outputs(lens)
    if side == "inp":
        torch.testing.assert_close(after[0], x - 1.5 * lens.inp.W_dec[4])
    else:
        torch.testing.assert_close(after[1], y - 1.5 * lens.out.W_dec[4])


def all_edits(lens, circuit, where=None):
    return {
        "feature": edits.without_feature(lens, circuit.left, where),
        "pair": edits.without_pair(lens, circuit.left, circuit.right, where),
        "eigenvector": edits.without_eigenvector(lens, circuit.feature, 0, where),
        "steer in": edits.steer(lens, 1, 2.0, "inp", where),
        "steer out": edits.steer(lens, 1, 2.0, "out", where),
    }


@pytest.mark.parametrize("name", ["feature", "pair", "eigenvector", "steer in", "steer out"])
def test_the_model_is_bit_identical_afterwards_also_after_an_exception(lens, circuit, name):
    tokens = lens.model.to_tokens(TEXTS[2])
    before, weights = lens.model(tokens), {k: v.clone() for k, v in lens.model.state_dict().items()}

    def fail_halfway():
        with all_edits(lens, circuit)[name] as model:
            assert not torch.equal(model(tokens), before)
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway()
    assert torch.equal(lens.model(tokens), before)
    assert all(torch.equal(value, weights[key]) for key, value in lens.model.state_dict().items())
    assert not any(point.has_hooks() for point in lens.model.hook_points())


@pytest.mark.parametrize("name", ["feature", "pair", "eigenvector", "steer in", "steer out"])
def test_an_edit_can_be_confined_to_some_positions(lens, circuit, name):
    rows = Windows.of(lens.model, TEXTS)
    where = rows.counts & (torch.arange(rows.tokens.shape[1]) % 2 == 0)
    _, y = inputs_and_outputs(lens)
    with all_edits(lens, circuit)[name]:
        _, everywhere = inputs_and_outputs(lens)
    with all_edits(lens, circuit, where)[name]:
        _, there = inputs_and_outputs(lens)
    assert torch.equal(there[~where], y[~where])
    torch.testing.assert_close(there[where], everywhere[where])


def test_edits_nest_and_work_in_generation(lens, circuit):
    with edits.steer(lens, 1, 3.0), edits.without_pair(lens, circuit.left, circuit.right) as model:
        cached = model.generate("the cat", 5, temperature=0)
        assert cached == model.generate("the cat", 5, temperature=0, use_past_kv_cache=False)


# -- weights without the pair -----------------------------------------------------------------------------------------


def test_removing_a_pair_is_the_smallest_change_of_the_tensor(lens, circuit):
    edited = circuits.remove_pair(lens, circuit)
    old, new = lens.tensor, edited.blocks[LAYER].mlp.tensor().detach()
    change = (new.dense() - old.dense())[:, :16, :16]
    d, reader = lens.writers, lens.readers[circuit.feature]
    one, other = d[circuit.left], d[circuit.right]
    coefficient = torch.einsum("oij, o, i, j ->", old.dense()[:, :16, :16], reader, one, other)
    after = torch.einsum("oij, o, i, j ->", new.dense()[:, :16, :16], reader, one, other)
    assert abs(after) < 1e-12 < 1e-3 < abs(coefficient)
    constraint = torch.einsum("o, i, j -> oij", reader, one, other)
    constraint = (constraint + constraint.mT) / 2
    least = torch.linalg.lstsq(constraint.reshape(1, -1), -coefficient.reshape(1, 1)).solution  # of minimal norm
    torch.testing.assert_close(change, least.reshape(change.shape))
    dense = new.dense()
    if old.constant:
        torch.testing.assert_close(dense[:, -1], old.dense()[:, -1])


def test_only_the_one_layer_changes_and_the_original_stays(lens, circuit):
    weights = {name: value.clone() for name, value in lens.model.state_dict().items()}
    edited = circuits.remove_pair(lens, circuit)
    assert all(torch.equal(value, weights[name]) for name, value in lens.model.state_dict().items())
    x = torch.randn(20, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    other = 1 - LAYER
    torch.testing.assert_close(edited.blocks[other].mlp(x), lens.model.blocks[other].mlp(x), rtol=1e-14, atol=1e-14)
    change = edited.blocks[LAYER].mlp(x) - lens.model.blocks[LAYER].mlp(x)
    reader = lens.readers[circuit.feature]
    torch.testing.assert_close(change, change @ reader[:, None] * reader / (reader @ reader))
    assert not edited.training
    assert (edited.cfg.d_hidden, lens.model.cfg.d_hidden) == (25, 24)


def test_the_copy_has_no_hooks(lens, circuit):
    with edits.steer(lens, 1, 3.0):
        inside = circuits.remove_pair(lens, circuit)
    tokens = lens.model.to_tokens(TEXTS[0])
    assert torch.equal(inside(tokens), circuits.remove_pair(lens, circuit)(tokens))


def test_what_other_output_features_feel_is_bounded(lens, circuit):
    edited = circuits.remove_pair(lens, circuit)
    x, y = inputs_and_outputs(lens)
    _, after = inputs_and_outputs(replace(lens, model=edited))
    change = (after - y) @ lens.readers.T
    reader, d = lens.readers[circuit.feature], lens.writers[[circuit.left, circuit.right]]
    squared = (d.pow(2).sum(1).prod() + (d[0] @ d[1]) ** 2) / 2
    excess = reader @ edits.interaction(lens, circuit.left, circuit.right) / (reader @ reader * squared)
    torch.testing.assert_close(change, -excess * (x @ d.T).prod(-1, keepdim=True) * (lens.readers @ reader))
    bound = removal.removal_bound(lens, circuit)
    assert (change.abs() / x.pow(2).sum(-1, keepdim=True) <= bound * (1 + 1e-9)).all()
    worst = torch.nn.functional.normalize(d, dim=1)
    worst = worst[0] + torch.sign(worst[0] @ worst[1]) * worst[1]  # where the bound is met
    change = edited.blocks[LAYER].mlp(worst) - lens.model.blocks[LAYER].mlp(worst)
    torch.testing.assert_close((lens.readers @ change).abs(), bound * worst.pow(2).sum())


def test_a_model_without_a_pair_is_saved_and_loaded(lens, circuit, tmp_path):
    edited = circuits.remove_pair(lens, circuit)
    checkpoints.save(edited, tmp_path)
    loaded = checkpoints.load(tmp_path)
    assert loaded.cfg == edited.cfg
    tokens = edited.to_tokens(TEXTS[0])
    assert torch.equal(loaded(tokens), edited(tokens))
    with torch.no_grad():
        _, cache = edited.run_with_cache(tokens)
    assert cache[f"blocks.{LAYER}.mlp.hook_post"].shape[-1] == 25


# -- the test of a circuit --------------------------------------------------------------------------------------------


@pytest.fixture
def found(lens, circuit, generator):
    return circuits.test(
        lens, circuit, TEXTS, Protocol(n_bootstrap=50, n_pairs=30, n_directions=4), generator=generator
    )


@pytest.mark.parametrize("stage", ["text", "directions-pair", "pairs-rescaled"])
def test_a_killed_test_goes_on(found, lens, circuit, generator, monkeypatch, tmp_path, stage):
    generator.manual_seed(0)
    protocol, save = Protocol(n_bootstrap=50, n_pairs=30, n_directions=4), resuming._Kept.save
    monkeypatch.setattr(Pace, "due", lambda self: True)

    def die(self, done, rows):
        save(self, done, rows)
        if self.path.stem == stage:
            raise KeyboardInterrupt

    monkeypatch.setattr(resuming._Kept, "save", die)
    with pytest.raises(KeyboardInterrupt):
        circuits.test(lens, circuit, TEXTS, protocol, generator=generator, checkpoint=tmp_path)
    monkeypatch.setattr(resuming._Kept, "save", save)
    again = circuits.test(lens, circuit, TEXTS, protocol, generator=generator.manual_seed(0), checkpoint=tmp_path)
    assert again.to_dict() == found.to_dict()
    for name, edit in found.edits.items():
        assert all(torch.equal(*both) for both in zip(edit.directions, again.edits[name].directions, strict=True))
    assert all(torch.equal(*both) for both in zip(found.matched.rescaled, again.matched.rescaled, strict=True))
    with pytest.raises(ValueError, match=r"checkpoint must be of this call, but .*text\.safetensors"):
        circuits.test(lens, circuit, TEXTS[1:], protocol, generator=generator.manual_seed(0), checkpoint=tmp_path)


def test_what_no_weight_tells_makes_another_state(make_model, tmp_path):
    """Weights are known whatever their dtype, and the norm's `eps` and a TopK SAE's `k` are in none of them."""
    half = make_model(dtype=torch.bfloat16)
    lenses = [make_lens(half), make_lens(copy.deepcopy(half).float()), make_lens(copy.deepcopy(half).float())]
    lenses[2].inp.cfg.k -= 1
    other = make_model(dtype=torch.float32, eps=1e-3)
    other.load_state_dict(lenses[1].model.state_dict())
    lenses.append(make_lens(other))
    windows = Windows.of(half, TEXTS)
    states = [text_stages(lens, windows, tmp_path, False, ()).fingerprint for lens in lenses]
    assert len(set(states)) == len(lenses)
    assert text_stages(lenses[0], windows, tmp_path, False, ()).fingerprint == states[0]


def test_predicted_equals_measured_for_every_edit(found):
    assert found.edits.keys() == {"left", "right", "pair", "eigenvector"}
    for edit in found.edits.values():
        torch.testing.assert_close(edit.predicted, edit.measured)
        assert edit.correlation == pytest.approx(1)
        assert edit.error < 1e-10
        assert edit.measured.abs().max() > 1e-3
        assert len(edit.measured) == found.n_pair == found.n_pair_all


@pytest.mark.parametrize("texts", [TEXTS, *([text] for text in TEXTS[:3])], ids=["all", "first", "second", "third"])
def test_effects_are_those_of_a_run_under_the_edit(lens, circuit, generator, texts):
    found = circuits.test(lens, circuit, texts, Protocol(n_bootstrap=2, n_pairs=1, n_directions=1), generator=generator)
    rows = Windows.of(lens.model, texts)
    x = observe(lens.model, rows, [lens.hook_in])[lens.hook_in]
    where = (lens.inp.encode(x)[..., [circuit.left, circuit.right]] != 0).all(-1) & rows.counts
    before = lens.model(rows.tokens, attention_mask=rows.attend)
    with edits.without_pair(lens, circuit.left, circuit.right, where) as model:
        after, loss = model(rows.tokens, "both", attention_mask=rows.attend, loss_per_token=True)
    effect = found.edits["pair"].effect
    old, new = (logits[where].log_softmax(-1) for logits in (before, after))
    torch.testing.assert_close(effect.kl[0], (old.exp() * (old - new)).sum(-1).mean())
    torch.testing.assert_close(effect.logits[0], (after - before)[where].norm(dim=1).mean())
    known = where[:, :-1] & rows.attend[:, 1:]
    clean = lens.model(rows.tokens, "loss", attention_mask=rows.attend, loss_per_token=True)
    torch.testing.assert_close(effect.loss[0], (loss - clean)[known].mean(), equal_nan=True)


def test_controls_by_their_change_of_the_output_equal_controls_run_as_edits(lens, circuit, found):
    """The matched pairs go by a short cut; one of them is run as a circuit of its own at the same positions."""
    rows = Windows.of(lens.model, TEXTS)
    x, _ = inputs_and_outputs(lens)
    where = (lens.inp.encode(x)[..., [circuit.left, circuit.right]] != 0).all(-1) & rows.counts
    before = lens.model(rows.tokens, attention_mask=rows.attend)[where]
    left, right = found.matched.left[0].item(), found.matched.right[0].item()
    with edits.without_pair(lens, left, right, where) as model:
        after = model(rows.tokens, attention_mask=rows.attend)[where]
    torch.testing.assert_close(found.matched.effects.logits[0], (after - before).norm(dim=1).mean())
    z = lens.inp.encode(x)[where]
    rms = [(z[:, i] * z[:, j]).pow(2).mean().sqrt() for i, j in ((left, right), (circuit.left, circuit.right))]
    torch.testing.assert_close(found.matched.scale[0], rms[0] / rms[1])
    assert (found.matched.scale.log().abs().diff() >= 0).all()
    torch.testing.assert_close(found.matched.rescaled.pre, found.matched.effects.pre / found.matched.scale)
    assert set(found.percentile_rescaled) == set(found.percentile)
    assert len(found.matched.left) == 30
    pairs = {*zip(found.matched.left.tolist(), found.matched.right.tolist(), strict=True)}
    assert len(pairs) == 30
    assert {(circuit.left, circuit.right), (circuit.right, circuit.left)}.isdisjoint(pairs)


def test_low_rank_scores_are_those_of_the_plain_formulas(lens, circuit, found):
    x, y = at_positions(lens, TEXTS)
    actual = lens.out.encode(y)[:, circuit.feature]
    active = actual != 0
    assert (found.low_rank.n_active, found.low_rank.n_positions) == (int(active.sum()), len(actual))
    for index, k in enumerate(found.low_rank.k):
        top = lens.eigen(circuit.feature, k)
        predicted = (extended(lens, x) @ top.vectors.T).pow(2) @ top.values
        both = torch.stack((predicted[active], actual[active]))
        expected = torch.corrcoef(both)[0, 1], 1 - (both[1] - both[0]).var() / both[1].var()
        torch.testing.assert_close(found.low_rank.pearson_active.value[index], expected[0])
        torch.testing.assert_close(found.low_rank.r2.value[index], expected[1])
        whole = torch.corrcoef(torch.stack((predicted, actual)))[0, 1]
        torch.testing.assert_close(found.low_rank.pearson.value[index], whole)
    low, value, high = (found.low_rank.pearson[i] for i in (1, 0, 2))
    assert (low <= value + 1e-9).all()
    assert (value <= high + 1e-9).all()


def test_the_same_generator_gives_the_same_record_and_few_active_positions_give_nan(lens, circuit):
    def run(**options):
        generator = torch.Generator().manual_seed(3)
        options = {"n_bootstrap": 20, "n_pairs": 5, "n_directions": 2, **options}
        return circuits.test(lens, circuit, TEXTS, Protocol(**options), generator=generator)

    one, other = run(), run()
    torch.testing.assert_close(one.low_rank.pearson.low, other.low_rank.pearson.low, rtol=0, atol=0)
    assert torch.equal(one.matched.left, other.matched.left)
    few = run(min_active=10_000)
    for estimate in (few.low_rank.pearson_active, few.low_rank.pearson, few.low_rank.r2):
        assert all(part.isnan().all() for part in estimate)
    assert few.edits["pair"].correlation != few.edits["pair"].correlation
    assert run(max_windows=2).n_windows == 2


def test_intervals_are_those_of_resampled_texts(lens, circuit):
    texts = [*TEXTS, "the cat ran on " * 20]  # the last one takes several windows
    options = {"n_bootstrap": 40, "n_pairs": 1, "n_directions": 1, "confidence": 0.8, "min_active": 3, "ks": (2,)}
    found = circuits.test(
        lens, circuit, texts, Protocol(**options), generator=torch.Generator().manual_seed(5)
    ).low_rank
    assert found.n_texts == len(texts)
    each = []
    top = lens.eigen(circuit.feature, 2)
    for text in texts:
        x, y = at_positions(lens, [text])
        predicted = (extended(lens, x) @ top.vectors.T).pow(2) @ top.values
        each.append(torch.stack((lens.out.encode(y)[:, circuit.feature], predicted)))
    drawn = torch.randint(len(texts), (40, len(texts)), generator=torch.Generator().manual_seed(5))
    resampled = [torch.corrcoef(torch.cat([each[i] for i in sample.tolist()], 1))[0, 1] for sample in drawn]
    expected = torch.stack(resampled).quantile(torch.tensor([0.1, 0.9]).double())
    torch.testing.assert_close(torch.cat((found.pearson.low, found.pearson.high)), expected)


def test_random_directions_are_as_large_as_the_edit(lens, circuit, generator):
    windows = Windows.of(lens.model, TEXTS)
    base = effects.Baseline.run(lens, lens.readers[circuit.feature], windows, windows.counts, 5)
    units = steering.unit_directions(3, 16, generator)
    change = torch.randn(base.x.shape, generator=generator, dtype=torch.float64)
    for unit, one in zip(units, controls.random_changes(base, None, change, units), strict=True):
        torch.testing.assert_close(one, change.norm(dim=1, keepdim=True) * unit)
    for unit, one in zip(units, controls.random_changes(base, circuit.right, change, units), strict=True):
        size = base.z[:, [circuit.right]].abs() * lens.writers[circuit.right].norm()
        after = lens.tensor.apply(base.x - size * unit)
        torch.testing.assert_close(one, after - base.y)


@torch.no_grad()
def test_a_planted_pair_beats_its_matched_pairs(lens, generator):
    """A layer that computes little but (d_i·x)(d_j·x) along a reader: removal costs more than that of other pairs."""
    i, j = 3, 8
    mlp = lens.model.blocks[LAYER].mlp
    mlp.p.weight.mul_(0.01)
    mlp.w.weight[0], mlp.w.weight[24] = lens.writers[i], lens.writers[j]
    mlp.p.weight[:, 0] = 3 * lens.readers[7]
    found = circuits.test(
        lens, Circuit(LAYER, 7, i, j), TEXTS, Protocol(n_bootstrap=10, n_pairs=100), generator=generator
    )
    assert found.percentile["pre"] > 90
    assert found.percentile["kl"] > 90
    assert found.low_rank.pearson.value[1] > 0.5
    edited = circuits.remove_pair(lens, found.circuit)
    norms = [model.blocks[LAYER].mlp.tensor().detach().norm() for model in (edited, lens.model)]
    assert norms[0] < norms[1]


# -- steering ---------------------------------------------------------------------------------------------------------


def test_steering_along_an_unembedding_difference_moves_the_log_odds(lens, generator):
    model = lens.model
    with torch.no_grad():
        towards = model.W_U[:, model.to_single_token("cat")] - model.W_U[:, model.to_single_token("dog")]
        lens.out.W_dec[2] = towards / towards.norm()
    found = steering.steering(
        lens, 2, ["the", "the big"], (["cat"], ["dog"]), [-5.0, 5.0], generator=generator, n_directions=5
    )
    assert found.log_odds[0] < found.before < found.log_odds[1]
    assert found.controls.shape == (5, 2)
    with edits.steer(lens, 2, 5.0, where=torch.tensor([[False, True]])):
        first = model("the")[0, -1].log_softmax(-1)
    with edits.steer(lens, 2, 5.0, where=torch.tensor([[False, True, True]])):
        second = model("the big")[0, -1].log_softmax(-1)
    cat, dog = (model.to_single_token(word) for word in ("cat", "dog"))
    expected = (first[cat] - first[dog] + second[cat] - second[dog]) / 2
    assert found.log_odds[1].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_test_steers_in_multiples_of_the_mean_activation(lens, circuit, generator):
    _, y = at_positions(lens, TEXTS)
    actual = lens.out.encode(y)[:, circuit.feature]
    words = ["cat", "mat"], ["dog"]
    protocol = Protocol(n_bootstrap=5, n_pairs=2, n_directions=2, prompts=["the"], words=words, multiples=(1.0, 2.0))
    found = circuits.test(lens, circuit, TEXTS, protocol, generator=generator)
    mean = actual[actual != 0].mean().item()
    assert found.steering.amounts == pytest.approx((mean, 2 * mean))
    parts = (found, found.low_rank, found.edits["pair"], found.matched, found.steering)
    assert all("\n" not in repr(part) and len(repr(part)) < 250 for part in parts)
    assert set(found.edits["left"].percentile) == {"pre", "kl", "logits", "loss"}


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_errors_name_the_argument(lens, circuit, generator, make_model):
    def check(match, c=circuit, texts=TEXTS, which=lens, error=ValueError, **options):
        with pytest.raises(error, match=match):
            circuits.test(which, c, texts, Protocol(**options), generator=generator)

    check("feature must lie between 0 and 39 .layer 0 has 40 output features.*got 40", Circuit(LAYER, 40, 1, 2))
    check("right must lie between 0 and 39 .layer 0 has 40 input features.*got 77", Circuit(LAYER, 1, 1, 77))
    check("circuit must be one of layer 0.*got one of 1", Circuit(1, 1, 1, 2))
    check("texts must hold at least one text", texts=[""])
    check("texts must hold at least one text", texts=[])
    check("texts must be a list", texts="the cat")
    check("texts must hold at least one token", texts=torch.full((2, 1), lens.model.bos_id))
    check("prompts and words go together", prompts=["the"])
    check("not a single token", prompts=["the"], words=(["running"], ["cat"]))
    check("prompts must each have 1 to 31 tokens", prompts=["the " * 40], words=(["dog"], ["cat"]))
    check("prompts must each have .* got number 1: ''", prompts=["the", ""], words=(["dog"], ["cat"]))
    check("max_windows must be at least 1, got 0", max_windows=0)
    check("ks must lie between 1 and", ks=(0, 1))
    check("ks must lie between 1 and", ks=(64,))
    gated = make_lens(make_model(mlp="gated", act="silu"))
    check("only a bilinear MLP is a third-order tensor", which=gated, error=TypeError)
    with pytest.raises(TypeError, match="only a bilinear MLP"):
        circuits.remove_pair(gated, circuit)
    with pytest.raises(ValueError, match="two different input features, got 3 twice"):
        Circuit(LAYER, 1, 3, 3)
    with (
        pytest.raises(ValueError, match="different input features, got 3 twice"),
        edits.without_pair(lens, 3, 3),
    ):
        pass
    with pytest.raises(ValueError, match="has 40 input features"), edits.steer(lens, 40, 1.0, "inp"):
        pass
    with pytest.raises(ValueError, match="side must be"), edits.steer(lens, 1, 1.0, "up"):
        pass
    with (
        pytest.raises(ValueError, match="index must lie between 0 and"),
        edits.without_eigenvector(lens, 1, 99),
    ):
        pass
    wrong = torch.ones(1, 3, dtype=torch.bool)
    with edits.steer(lens, 1, 1.0, where=wrong) as model, pytest.raises(ValueError, match="where must have"):
        model("the")


def test_a_pair_that_is_never_active_is_an_error(lens, generator):
    with torch.no_grad():
        lens.inp.b_enc[3] = -100
    with pytest.raises(ValueError, match="input features 3 and 8 are both active, none of"):
        circuits.test(lens, Circuit(LAYER, 1, 3, 8), TEXTS, generator=generator)
