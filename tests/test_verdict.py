"""Verdicts and what flips them: the readout by hand, planted products found, edits over layers, controls that match."""

import json
from itertools import product

import pytest
import torch
from test_circuits import random_sae

from bilens.circuits import FeatureLayer, Readout, candidates, edits, minimal_pairs, negating, turning, verdict
from bilens.circuits.groups import Group
from bilens.circuits.singles import singles
from bilens.circuits.statements import MinimalPair, halves

READOUT = Readout(" ran on", ("cat", "dog"), ("mat",))
WORDS = {1: ("big", "saw", "time"), -1: ("little", "once", "sat")}


def layers_of(model, d_sae):
    return {
        layer: FeatureLayer(
            model,
            layer,
            random_sae(f"blocks.{layer}.hook_mlp_in", d_sae=d_sae, k=20, seed=layer),
            random_sae(f"blocks.{layer}.hook_mlp_out", seed=7 + layer),
        )
        for layer in (0, 1)
    }


@pytest.fixture
def lenses(make_model):
    return layers_of(make_model(mlp_bias=(True, True)), 60)


@pytest.fixture
def pairs():
    return [
        MinimalPair(f"{frame} {word}", f"{frame} upon {word}", word, polarity, "upon", frame)
        for frame in ("the cat", "a dog", "the mat", "a cat and dog")
        for polarity, words in WORDS.items()
        for word in words
    ]


def generator():
    return torch.Generator().manual_seed(0)


def odds_by_hand(model, statement):
    logits = model(model.to_tokens(statement + READOUT.prompt))[0, -1]
    p = logits.softmax(-1)
    ids = [model.to_single_token(word) for word in ("cat", "dog", "mat")]
    return ((p[ids[0]] + p[ids[1]]) / p[ids[2]]).log()


def test_the_log_odds_are_those_of_the_next_token_after_the_prompt(lenses):
    model, statements = lenses[0].model, ["the big dog", "a mat", "once upon a time the cat"]
    found = verdict.behaviour(model, statements, READOUT)
    torch.testing.assert_close(found.log_odds, torch.stack([odds_by_hand(model, one) for one in statements]))
    best = model(model.to_tokens("a mat ran on"))[0, -1].argmax().item()
    assert found.to_dict()[1] == {
        "statement": "a mat",
        "log_odds": found.log_odds[1].item(),
        "word": model.label(best),
    }


def test_the_direction_is_good_less_bad_through_the_final_gain(make_model):
    model = make_model(norm="rms_gain")
    with torch.no_grad():
        model.ln_final.weight.copy_(torch.linspace(0.5, 2, 16))
    cat, dog, mat = (model.W_U[:, model.to_single_token(word)] for word in ("cat", "dog", "mat"))
    expected = ((cat + dog) / 2 - mat) * model.ln_final.weight
    torch.testing.assert_close(verdict.verdict_direction(model, READOUT), expected)


def test_the_readout_comes_from_the_models_card(tmp_path):
    assert Readout.of(tmp_path) == Readout()
    said = {"prompt": " is it ?", "words": ["yes", "rather", "so", "no", "never"]}
    (tmp_path / "training.json").write_text(json.dumps({"readout": said}))
    assert Readout.of(tmp_path) == Readout(" is it ?", ("yes", "rather"), ("no", "never"))
    with pytest.raises(ValueError, match="bad must not be empty"):
        Readout(bad=())


def test_positions_of_word_prompt_and_readout(lenses):
    model = lenses[0].model
    asked = verdict.Asked.of(model, ["the big dog sat", "a mat"], READOUT, ["dog", "cat"])
    assert asked.windows.tokens[0].tolist() == model.to_tokens("the big dog sat ran on")[0].tolist()
    assert asked.word.tolist() == [3, -1]  # BOS is 0; no cat in the second
    assert asked.last.tolist() == [6, 4]
    assert asked.prompt[1].nonzero()[:, 0].tolist() == [3, 4]
    assert asked.statement[1].nonzero()[:, 0].tolist() == [1, 2]


def test_a_long_statement_loses_its_beginning(lenses):
    model = lenses[0].model
    asked = verdict.Asked.of(model, ["cat " * 40 + "dog"], READOUT, ["dog"])
    assert asked.windows.tokens.shape[1] == model.cfg.n_ctx
    assert asked.windows.tokens[0, asked.word[0]].item() == model.to_single_token("dog")
    assert asked.windows.tokens[0, 0].item() == model.bos_id


def test_a_pair_flips_if_both_sides_are_right():
    pair = [MinimalPair("a", "b", "w", polarity, "not", "f") for polarity in (1, 1, -1, -1)]
    found = verdict.flips(pair, torch.tensor([2.0, 2.0, -1.0, 1.0]), torch.tensor([-1.0, 1.0, 3.0, 3.0]))
    assert (found.good, found.bad, found.all) == (0.5, 0.5, 0.5)
    assert (found.plain, found.negated) == (0.75, 0.75)
    assert (found.n_good, found.n_bad) == (2, 2)


def test_the_built_in_pairs_are_balanced_and_their_halves_share_nothing():
    built_in = minimal_pairs()
    assert sum(pair.polarity for pair in built_in) == 0
    assert len({pair.negated for pair in built_in}) == len(built_in)
    assert {pair.negator for pair in built_in} >= {"not", "never"}
    one, other = halves(built_in)
    assert len(one) >= 40 <= len(other)
    for name in ("word", "frame"):
        assert not {getattr(pair, name) for pair in one} & {getattr(pair, name) for pair in other}
    assert all(pair.word in pair.plain and pair.word in pair.negated for pair in built_in)


def test_halves_without_bad_words_are_refused():
    with pytest.raises(ValueError, match="good and bad words"):
        halves([pair for pair in minimal_pairs() if pair.polarity > 0])


def test_p_of_a_single_pair_is_its_rank_among_all_pairs(lenses):
    lens = lenses[1]
    left = Group("left", torch.tensor([3, 8]), torch.ones(2))
    right = Group("right", torch.tensor([5, 11, 30]), torch.tensor([1.0, -1.0, 0.5]))
    direction = torch.randn(16, generator=generator(), dtype=torch.float64)
    found = singles(lens, left, right, {"x": direction})
    Q = lens.writers @ lens.tensor.without_constant().matrix(direction) @ lens.writers.T
    off = ~torch.eye(60, dtype=torch.bool)
    own = torch.stack([Q[i, off[i]].pow(2).mean().sqrt() for i in range(60)])
    tables = {"p": Q, "p_own": Q / own[:, None] / own}
    torch.testing.assert_close(found.value[..., 0], Q[left.features][:, right.features])
    for (a, i), (b, j) in product(enumerate(left.features), enumerate(right.features)):
        for name, table in tables.items():
            above = int((table[off].abs() >= table[i, j].abs()).sum())
            p = (1 + above) / (1 + 60 * 59) / 2
            wanted = -right.weights[b] * table[i, j] > 0
            assert getattr(found, name)[a, b, 0].item() == pytest.approx(p if wanted else 1 - p, rel=1e-3)


def test_p_values_of_random_pairs_are_uniform(lenses):
    directions = torch.randn(40, 16, generator=generator(), dtype=torch.float64)
    order = torch.randperm(60, generator=generator())
    left = Group("left", order[:10], torch.ones(10))
    right = Group("right", order[10:30], torch.randn(20, generator=generator()))
    found = singles(lenses[1], left, right, {f"{i}": one for i, one in enumerate(directions)})
    for p in (found.p, found.p_own):
        assert 0.07 <= (p <= 0.1).double().mean() <= 0.13
        assert 0.45 <= (p <= 0.5).double().mean() <= 0.55


def test_without_products_edits_all_layers_at_once(lenses):
    model, tokens = lenses[0].model, lenses[0].model.to_tokens("once upon a time the big dog ran")
    groups = {0: ([3, 8], [5, 11]), 1: ([2], [4, 9, 30])}
    where = torch.zeros_like(tokens, dtype=torch.bool)
    where[:, 3:6] = True
    before = model(tokens)
    with edits.without_products(lenses, groups, where, {0: 1.0, 1: 0.5}):
        both = model(tokens)
    with edits.without_pairs(lenses[0], *groups[0], where), edits.without_pairs(lenses[1], *groups[1], where, 0.5):
        expected = model(tokens)
    torch.testing.assert_close(both, expected)
    with edits.without_pairs(lenses[0], *groups[0], where):
        one = model(tokens)
    assert not torch.allclose(both, one)
    torch.testing.assert_close(both[:, :3], before[:, :3])
    assert torch.equal(model(tokens), before)
    with (
        pytest.raises(ValueError, match=r"layers \[0, 1\], got \[2\]"),
        edits.without_products(lenses, {2: ([1], [2])}),
    ):
        pass


def test_gradients_are_what_a_small_push_does(lenses, pairs):
    model, some = lenses[0].model, pairs[:3]
    asked = verdict.ask_pairs(model, some, READOUT)
    found = negating.verdict_gradients(lenses, asked, READOUT)
    assert not found[1, "word"].any()  # after the last attention nothing gets from the word to the readout
    direction = torch.randn(16, generator=generator(), dtype=torch.float64)
    for layer, place in ((0, "word"), (1, "readout")):
        at = {"word": asked.word, "readout": asked.last}[place]
        where = torch.zeros_like(asked.prompt)
        where[torch.arange(len(asked)), at] = True
        moved = []
        for step in (1e-5, -1e-5):
            with edits.push(model, lenses[layer].hook_out, step * direction, where):
                resid = model(asked.windows.tokens, attention_mask=asked.windows.attend)
            last = resid[torch.arange(len(asked)), asked.last]
            moved.append(verdict.log_odds(model, last, READOUT).mean())
        slope = (moved[0] - moved[1]) / 2e-5
        torch.testing.assert_close(found[layer, place] @ direction, slope, rtol=1e-5, atol=1e-8)


def test_candidates_tell_what_they_are_for_and_weights_do_not_matter(lenses, pairs):
    chosen = candidates.candidates(lenses, pairs, READOUT, tells=0.05)
    assert [(one.layer, one.place) for one in chosen] == [(0, "word"), (0, "readout"), (1, "word"), (1, "readout")]
    one = chosen[2]
    assert bool(one)
    assert not {*one.negators.features.tolist()} & {*one.sentiment.features.tolist()}
    lens, model = lenses[1], lenses[1].model
    asked = verdict.ask_pairs(model, pairs, READOUT)
    _, cache = model.run_with_cache(asked.windows.tokens, attention_mask=asked.windows.attend)
    z = lens.codes(cache[lens.hook_in][torch.arange(len(asked)), asked.word])
    feature = one.negators.features[0]
    plain, negated = z[:, feature].split(len(pairs))
    for polarity in (1, -1):
        which = torch.tensor([pair.polarity == polarity for pair in pairs])
        a, b = negated[which][:, None], plain[which][None]
        share = ((a > b).double() + (a == b).double() / 2).mean()
        assert share - 0.5 >= one.negators.weights[0] - 1e-6


def test_controls_are_as_many_other_features_and_can_be_as_strong(lenses, pairs):
    model = lenses[0].model
    seen = candidates.Seen.of(lenses, verdict.ask_pairs(model, pairs, READOUT))
    products = [turning.Products(1, "readout", (1, 2, 3), (4, 5)), turning.Products(0, "word", (6,), (7, 8))]
    control = turning.matched_products(lenses, products, seen, generator())
    for one, other in zip(products, control, strict=True):
        assert (len(one.left), len(one.right)) == (len(other.left), len(other.right))
        assert not {*one.left, *one.right} & {*other.left, *other.right}
        assert len({*other.left, *other.right}) == len(other.left) + len(other.right)
    scaled = turning.at_strength(lenses, control, products, seen)
    for one, other in zip(products, scaled, strict=True):
        z = lenses[one.layer].codes(seen.x[one.layer][seen.around[one.place]])
        a = edits.product(lenses[one.layer], z, one.left, one.right).norm()
        b = other.scale * edits.product(lenses[one.layer], z, other.left, other.right).norm()
        torch.testing.assert_close(a, b)


def test_the_search_and_the_test_together(make_model, pairs):
    lenses = layers_of(make_model(), 400)
    options = {"readout": READOUT, "generator": generator(), "n_controls": 3, "n_null": 50, "tells": 0.1}
    found = negating.negation(lenses, pairs, sentences=["the big dog", "a mat"], **options)
    assert found.search.n_tested >= len(found.search.pairs) > 0
    assert [one.p for one in found.search.pairs] == sorted(one.p for one in found.search.pairs)
    assert found.search.pairs[0].q <= 1
    assert len(found.test.controls) == len(found.test.matched) == 3
    record = json.loads(json.dumps(found.to_dict()))
    assert record["test"]["pairs"] == len(found.test.measured) == len(halves(pairs)[1])
    assert record["readout"] == {"prompt": " ran on", "good": ["cat", "dog"], "bad": ["mat"]}
    assert {one["place"] for one in record["search"]["groups"]} <= {"word", "readout"}
    assert "single pairs" in repr(found)


def test_the_direct_path_predicts_the_last_layers_share(lenses, pairs):
    """With products of the last layer alone, before the final norm the change of the residual is the prediction."""
    model = lenses[1].model
    asked = verdict.ask_pairs(model, pairs, READOUT)
    products = [turning.Products(1, "readout", tuple(range(0, 40, 2)), tuple(range(1, 40, 2)))]
    seen = candidates.Seen.of(lenses, asked)
    found = turning.predicted_change(lenses, products, seen, READOUT)
    direction = verdict.verdict_direction(model, READOUT)

    def read():
        resid = model(asked.windows.tokens, attention_mask=asked.windows.attend, stop_at_layer=2)
        return resid[torch.arange(len(asked)), asked.last] @ direction

    before = read()
    with turning.edit_of(lenses, products)(asked):
        after = read()
    torch.testing.assert_close(found, after - before)
    assert found.abs().max() > 0


def test_layers_of_two_models_are_refused(lenses, make_model, pairs):
    other = FeatureLayer(make_model(), 1, random_sae("blocks.1.hook_mlp_in"), random_sae("blocks.1.hook_mlp_out"))
    with pytest.raises(ValueError, match="one model, got 2"):
        negating.negation({0: lenses[0], 1: other}, pairs, generator=generator())
