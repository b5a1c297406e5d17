"""A layer between two SAEs: what it accepts, what it keeps, how it names, in every dtype and on every device."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from test_circuits import random_sae

import bilens
from bilens import circuits
from bilens.circuits import Circuit, FeatureLayer, Protocol, couplings, edits, layer
from bilens.circuits.discovery import Discovery
from bilens.circuits.groups import Group
from bilens.models.files import fingerprint
from bilens.models.windows import Windows
from bilens.saes import collect

HOOKS = {"inp": "blocks.1.hook_mlp_in", "out": "blocks.1.hook_mlp_out"}
TEXTS = ["the cat sat on the mat", "a dog", "once upon a time the big dog ran and the cat saw", "a little cat ran"] * 10


def saes(**options):
    return {side: random_sae(hook, seed=seed, **options) for seed, (side, hook) in enumerate(HOOKS.items())}


@pytest.fixture
def lens(make_model):
    return FeatureLayer(make_model(), 1, **saes(k=24))


def generator():
    return torch.Generator().manual_seed(0)


# -- what it accepts --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_saes_that_do_not_fit_are_refused_however_the_layer_is_made(make_model):
    model, good = make_model(), saes()
    with pytest.raises(ValueError, match="layer must lie between 0 and 1, got 2"):
        FeatureLayer(model, 2, **good)
    with pytest.raises(ValueError, match="must read 16 dimensions"):
        FeatureLayer(model, 1, good["inp"], random_sae(HOOKS["out"], d_in=8))
    with pytest.raises(ValueError, match=r"out, the SAE at blocks\.1\.hook_mlp_out, must be one that was fitted"):
        FeatureLayer(model, 1, good["inp"], good["inp"])
    good["out"].cfg.metadata.settings = {"model": "another"}
    with pytest.raises(ValueError, match="other weights"):
        FeatureLayer(model, 1, **good)
    good["out"].cfg.metadata.settings = {"model": fingerprint(model)}
    FeatureLayer(model, 1, **good)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_works_in_every_dtype_and_leaves_the_passed_saes_alone(make_model, dtype):
    passed = {side: sae.float() for side, sae in saes(k=24).items()}
    before = {side: {name: value.clone() for name, value in sae.state_dict().items()} for side, sae in passed.items()}
    lens = FeatureLayer(make_model(dtype=dtype), 1, **passed)
    wide = torch.promote_types(dtype, torch.float32)
    assert {lens.tensor.down.dtype, lens.readers.dtype, lens.writers.dtype, lens.inp.dtype} == {wide}
    for side, sae in passed.items():
        assert (getattr(lens, side) is sae) == (wide == torch.float32)
        assert all(torch.equal(value, before[side][name]) for name, value in sae.state_dict().items())
        assert sae.W_dec.dtype == sae.dtype == torch.float32
    assert circuits.outliers(lens).values.isfinite().all()
    assert circuits.search(lens, generator=generator(), n=1, tail=False).score.isfinite().all()
    assert circuits.predict(lens, 3, TEXTS).predicted.dtype == wide
    left, right = (Group(role, torch.tensor(some), torch.ones(2)) for role, some in (("a", [1, 2]), ("b", [4, 5])))
    coupling = circuits.couple(
        lens, left, right, {"x": torch.ones(16, dtype=dtype)}, generator=generator(), null=["features"], n=9
    )
    tested = circuits.test_coupling(lens, coupling, TEXTS, generator=generator(), n_controls=2)
    assert tested.effect.kl.isfinite().all()
    protocol = Protocol(n_bootstrap=3, n_pairs=2, n_directions=1, prompts=["the"], words=(["cat"], ["dog"]))
    assert (
        circuits.test(lens, _often(lens), TEXTS, protocol, generator=generator())
        .edits["pair"]
        .effect.kl.isfinite()
        .all()
    )


def _often(lens):
    """The pair that is active together most often."""
    z = (lens.at_positions(Windows.of(lens.model, TEXTS), lambda x, y: lens.codes(x)) != 0).double()
    left, right = divmod(int((z.T @ z).triu(1).argmax()), z.shape[1])
    return Circuit(1, 7, left, right)


def test_saes_go_where_the_model_is(make_model):
    lens = FeatureLayer(make_model().to("meta"), 1, **saes())
    assert {lens.tensor.down.device.type, lens.readers.device.type, lens.inp.b_dec.device.type} == {"meta"}
    assert lens.coefficients(3).shape == (40, 40)


def test_it_survives_pickling(lens):
    lens.eigen(3)
    again = pickle.loads(pickle.dumps(lens))
    torch.testing.assert_close(again.coefficients(3), lens.coefficients(3), rtol=0, atol=0)
    assert torch.equal(circuits.predict(again, 3, TEXTS).actual, circuits.predict(lens, 3, TEXTS).actual)


# -- what it keeps ----------------------------------------------------------------------------------------------------


@pytest.fixture
def decomposed(monkeypatch):
    """The readers whose matrices are decomposed."""
    seen = []

    def counting(B, u, k=None):
        seen.append(u)
        return bilens.eigen(B, u, k)

    monkeypatch.setattr(layer, "eigen", counting)
    return seen


def test_a_matrix_that_is_reported_and_tested_is_decomposed_once(lens, decomposed):
    circuits.test(lens, _often(lens), TEXTS, Protocol(n_bootstrap=2, n_pairs=1, n_directions=1), generator=generator())
    circuits.predict_all(lens, [7], TEXTS)
    found, expected = lens.eigen(7, 3), bilens.eigen(lens.tensor, lens.readers[7], 3)
    assert len(decomposed) == 1
    for name in ("values", "vectors", "residual"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def test_only_the_latest_matrices_are_kept(lens, decomposed):
    for feature in [*range(40), 39, 8]:
        lens.eigen(feature, 1)
    assert len(decomposed) == 40
    lens.eigen(7, 1)
    assert len(decomposed) == 41


def test_projected_is_the_layer_from_features_to_features(lens):
    assert lens.projected.shape == (40, 40, 40)
    torch.testing.assert_close(lens.projected.matrix(torch.eye(40).double()[5]), lens.coefficients(5))


# -- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_no_feature_is_counted_from_the_end(lens):
    tokens = lens.model.to_tokens(TEXTS[0])
    for ask in (
        lambda: lens.name("inp", -1),
        lambda: lens.name("out", [3, -1]),
        lambda: lens.coefficients(-1),
        lambda: lens.eigen(-1),
        lambda: circuits.pairs(lens, -1),
        lambda: circuits.predict(lens, -1, TEXTS),
        lambda: circuits.remove(lens, -1, 3, tokens),
        lambda: circuits.remove(lens, 3, -1, tokens),
        lambda: edits.without_feature(lens, -1).__enter__(),
        lambda: edits.without_pair(lens, 2, -1).__enter__(),
        lambda: edits.without_eigenvector(lens, -1).__enter__(),
        lambda: edits.steer(lens, -1, 1.0).__enter__(),
        lambda: circuits.remove_pair(lens, Circuit(1, -1, 2, 3)),
    ):
        with pytest.raises(ValueError, match=r"must lie between 0 and 39 .*got -1"):
            ask()
    with pytest.raises(ValueError, match="side must be 'inp' or 'out', got 'in'"):
        lens.name("in", 3)
    with pytest.raises(ValueError, match="k must lie between 1 and 16, got 17"):
        lens.eigen(3, 17)


def test_a_feature_has_one_name_that_of_its_card(make_model):
    model, dictionaries = make_model(mlp_bias=(True, True)), saes()
    rows = [{"text": text, "label": "cat" if "cat" in text else "dog"} for text in TEXTS]
    hooks = {HOOKS[side]: sae for side, sae in dictionaries.items()}
    made = collect(model, hooks, rows, label="label")
    lens = FeatureLayer(model, 1, **dictionaries, inp_cards=made[HOOKS["inp"]], out_cards=made[HOOKS["out"]])
    names = [lens.name("inp", feature) for feature in range(40)]
    assert names == [made[HOOKS["inp"]][feature].name for feature in range(40)]
    assert any(name.startswith(("cat: ", "dog: ")) for name in names)
    assert lens.name("out", [3, 8], [1.0, -2.0]) == made[HOOKS["out"]].name([3, 8], [1.0, -2.0])
    assert lens.name("inp", 40) == "(constant)"
    bare = FeatureLayer(model, 1, **dictionaries)
    assert bare.name("out", 3) == bilens.saes.name_from_weights(bare.model, bare.out, [3])


# -- text -------------------------------------------------------------------------------------------------------------


def test_predictions_are_in_the_order_of_the_texts_whatever_their_lengths(lens):
    features = [3, 17]
    together = circuits.predict_all(lens, features, TEXTS)
    each = [circuits.predict_all(lens, features, [text]) for text in TEXTS[:4]]
    for i, found in enumerate(together):
        n = len(found.actual) // 10
        for name in ("actual", "predicted"):
            alone = torch.cat([getattr(one[i], name) for one in each])
            torch.testing.assert_close(getattr(found, name)[:n], alone)
            torch.testing.assert_close(getattr(found, name)[-n:], alone)
        assert found.actual.any()


def test_long_corpora_run_in_batches_without_padding(lens, monkeypatch):
    seen, run = [], lens.model.run_with_cache
    monkeypatch.setattr(
        lens.model, "run_with_cache", lambda tokens, **options: seen.append(tokens.shape) or run(tokens, **options)
    )
    circuits.predict(lens, 3, ["a"] * 100 + ["the cat sat on the mat"] * 4)
    assert all(rows <= 32 for rows, _ in seen)
    assert sum(rows * width for rows, width in seen) < 100 * 2 + 32 * 8


# -- spectra and records ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [(False, False), (True, True)], ids=["no bias", "biases"])
def test_the_ratio_of_outliers_is_the_score_of_the_search(make_model, bias):
    lens = FeatureLayer(make_model(mlp_bias=bias), 1, **saes())
    ranking = circuits.outliers(lens)
    found = circuits.search(lens, ["outlier"], generator=generator(), n=1, tail=False)
    torch.testing.assert_close(found.score[ranking.feature, 0], ranking.ratio)


def test_records_are_compared_by_identity_and_say_what_json_can_hold(lens):
    left, right = Group("a", torch.tensor([1, 2]), torch.ones(2)), Group("b", torch.tensor([4, 5]), torch.ones(2))
    found = circuits.search(lens, generator=generator(), n=40, tail=False)
    found = replace(found, found=(Discovery(3, "and", 2.5, 0.01, 0.02, (left, right)),))
    coupling = circuits.couple(lens, left, right, generator=generator(), null=["features"], n=9)
    tested = circuits.test(
        lens, _often(lens), TEXTS, Protocol(n_bootstrap=2, n_pairs=1, n_directions=1), generator=generator()
    )
    few = circuits.predict(lens, 3, ["a"])
    records = [circuits.outliers(lens), few, circuits.predict(lens, 3, TEXTS), found, found.found[0], coupling, tested]
    records += [circuits.test_coupling(lens, coupling, TEXTS, generator=generator(), n_controls=2), tested.low_rank]
    records += [couplings.NegationCouplings((coupling,), torch.ones(1))]
    for one in records:
        assert (one == one, one == records[0]) == (True, one is records[0])
        assert json.loads(json.dumps(one.to_dict(), allow_nan=False)) == one.to_dict()
    told = {"pearson_active": None, "pearson": None, "n_active": few.n_active, "n_positions": 1, "factor": "measured"}
    assert few.to_dict() == told
    assert tested.to_dict()["correlation"] == tested.edits["pair"].correlation
    assert found.to_dict()["found"][0]["groups"][1] == {"role": "b", "features": [4, 5], "weights": [1.0, 1.0]}
