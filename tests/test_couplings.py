"""Two groups that act together: the statistic by brute force, planted couplings, null models, the running model."""

import pytest
import torch
from test_circuits import random_sae

from bilens import circuits
from bilens.circuits import FeatureLayer, couplings, edits
from bilens.circuits.groups import Group

TEXTS = ["the cat sat on the mat", "once upon a time the big dog ran and the cat saw", "a little dog ran on"] * 3


@pytest.fixture(params=[(False, False), (True, True)], ids=["no bias", "biases"])
def lens(request, make_model):
    model = make_model(mlp_bias=request.param)
    inp = random_sae("blocks.1.hook_mlp_in", d_sae=60, k=20)
    return FeatureLayer(model, 1, inp, random_sae("blocks.1.hook_mlp_out", seed=1))


@pytest.fixture
def groups():
    left = Group("left", torch.tensor([3, 8, 21, 40]), torch.ones(4))
    right = Group("right", torch.tensor([5, 11, 30, 31, 52]), torch.tensor([1.0, -1.0, 0.5, 2.0, -0.5]))
    return left, right


def generator():
    return torch.Generator().manual_seed(0)


def test_the_value_is_the_weighted_mean_interaction(lens, groups):
    left, right = groups
    found = couplings.couple(lens, left, right, generator=generator(), n=50)
    for feature in (0, 17):
        Q = lens.coefficients(feature)[left.features][:, right.features]
        mean = (Q * right.weights.to(Q)).sum() / (len(left.features) * right.weights.abs().sum())
        assert found.value[feature].item() == pytest.approx(mean.item(), rel=1e-6)  # weights are float32


def plant(lens, left, right, direction, strength):
    """Give the layer's tensor a coupling of the groups on a direction."""
    B = lens.tensor
    pad = B.left.new_zeros(1, B.inp)
    one, other = pad.clone(), pad.clone()
    one[0, :16] = left.weights.double() @ lens.writers[left.features]
    other[0, :16] = right.weights.double() @ lens.writers[right.features]
    down = torch.cat((B.down, strength * direction[:, None]), 1)
    planted = FeatureLayer(lens.model, lens.layer, lens.inp, lens.out)
    planted.__dict__["tensor"] = type(B)(down, torch.cat((B.left, one)), torch.cat((B.right, other)), B.constant)
    return planted


def test_a_planted_coupling_is_found_with_its_sign_and_others_are_not(lens, groups):
    directions = torch.randn(6, 16, generator=generator(), dtype=torch.float64)
    directions = torch.linalg.qr(directions.T).Q.T
    named = {f"direction {i}": direction for i, direction in enumerate(directions)}
    planted = plant(lens, *groups, directions[2], -20.0)
    found = couplings.couple(planted, *groups, named, generator=generator(), n=2000)
    assert int(found.p.argmin()) == 2
    assert found.p[2] < 0.05  # the random features of the null model overlap with the groups: 60 in 16 dimensions
    assert found.value[2] < 0
    assert found.z[2] < -1.5
    assert "direction 2" in repr(found)


@pytest.mark.parametrize("null", couplings.COUPLING_NULLS)
def test_p_values_are_uniform_without_a_coupling(lens, groups, null):
    directions = torch.randn(200, 16, generator=generator(), dtype=torch.float64)
    draw, p = torch.Generator().manual_seed(3), []
    for one in directions:  # fresh random groups each time
        order = torch.randperm(60, generator=draw)
        left = Group("left", order[:8], torch.ones(8))
        right = Group("right", order[8:20], torch.randn(12, generator=draw))
        p.append(couplings.couple(lens, left, right, {"x": one}, generator=draw, null=(null,), n=99).p)
    p = torch.cat(p)
    assert 0.05 <= (p <= 0.1).double().mean() <= 0.16
    assert 0.38 <= (p <= 0.5).double().mean() <= 0.62


def test_without_pairs_takes_every_product_of_two_groups_out(lens):
    left, right = [3, 8], [5, 11, 30]
    tokens = lens.model.to_tokens(TEXTS[1])

    def mlp_out():
        _, cache = lens.model.run_with_cache(tokens, names_filter=lens.hook_out)
        return cache[lens.hook_out]

    before = mlp_out()
    with edits.without_pairs(lens, left, right):
        after = mlp_out()
    _, cache = lens.model.run_with_cache(tokens, names_filter=lens.hook_in)
    z = lens.inp.encode(cache[lens.hook_in])
    gone = sum(2 * (z[..., i] * z[..., j])[..., None] * edits.interaction(lens, i, j) for i in left for j in right)
    torch.testing.assert_close(before - after, gone)
    assert gone.abs().max() > 0
    assert torch.equal(mlp_out(), before)


def test_the_running_model_does_what_the_weights_say(lens, groups):
    direction = torch.randn(16, generator=generator(), dtype=torch.float64)
    found = couplings.couple(lens, *groups, {"a direction": direction}, generator=generator(), n=20)
    test = couplings.test_coupling(lens, found, TEXTS, generator=generator(), n_controls=7, max_windows=9)
    assert test.correlation > 0.5
    assert test.n_all == len(test.measured) > 10
    assert len(test.controls.kl) == len(test.rescaled.kl) == 7
    assert (test.effect.kl > 0).all()
    left, right = (group.features.tolist() for group in groups)
    with edits.without_pairs(lens, left, right):
        edited = lens.model(TEXTS[1], "loss")
    assert edited != lens.model(TEXTS[1], "loss")
    assert 0 <= test.percentile["kl"] <= 100
    assert "predicted and measured correlate" in repr(test)


def test_the_state_of_another_direction_is_refused(lens, groups, tmp_path):
    one, other = torch.randn(2, 16, generator=generator(), dtype=torch.float64)
    options = {"n_controls": 2, "max_windows": 2, "checkpoint": tmp_path}
    for direction in (one, one, other):
        found = couplings.couple(lens, *groups, {"a direction": direction}, generator=generator(), n=20)
        if direction is other:
            with pytest.raises(ValueError, match="checkpoint must be of this call"):
                couplings.test_coupling(lens, found, TEXTS, generator=generator(), **options)
        else:
            couplings.test_coupling(lens, found, TEXTS, generator=generator(), **options)


def test_controls_at_equal_strength_change_the_output_as_much(lens, groups):
    direction = torch.eye(16, dtype=torch.float64)[0]
    found = couplings.couple(lens, *groups, {"first": direction}, generator=generator(), n=20)
    test = couplings.test_coupling(lens, found, TEXTS, generator=generator(), n_controls=3)
    torch.testing.assert_close(test.rescaled.pre * test.scale, test.controls.pre.to(test.scale))


def test_the_embedded_model_flips_sentiment_in_its_last_layer():
    import bilens

    model = bilens.load("bilens-mini")
    lenses = {i: FeatureLayer.load(model, i) for i in (0, 3)}
    found = circuits.negation_couplings(lenses, generator=generator(), n=2000)
    assert found.q[1] < 0.01
    assert found.layers[1].value[0] < 0
    assert found.q[0] > 0.05
    assert "layer 3" in repr(found)


@pytest.mark.usefixtures("unchecked")
def test_errors_name_the_argument(lens, groups):
    left, right = groups
    options = {"generator": generator(), "n": 10}
    with pytest.raises(ValueError, match=r"got \[3\] in both"):
        couplings.couple(lens, left, Group("right", torch.tensor([3]), torch.ones(1)), **options)
    with pytest.raises(ValueError, match="left must hold at least one"):
        couplings.couple(lens, Group("left", torch.tensor([], dtype=torch.int64), torch.ones(0)), right, **options)
    with pytest.raises(ValueError, match="right must hold input features between 0 and 59"):
        couplings.couple(lens, left, Group("right", torch.tensor([60]), torch.ones(1)), **options)
    with pytest.raises(ValueError, match="right must have weights that differ"):
        couplings.couple(lens, left, Group("right", torch.tensor([1, 2]), torch.ones(2)), **options)
    with pytest.raises(ValueError, match="null must be among"):
        couplings.couple(lens, left, right, null=("readers",), **options)
    with pytest.raises(ValueError, match="outputs must hold at least one direction"):
        couplings.couple(lens, left, right, {}, **options)
    with pytest.raises(ValueError, match="lenses must have feature cards"):
        couplings.negation_couplings({1: lens}, generator=generator())
    found = couplings.couple(lens, left, right, **options)
    with pytest.raises(ValueError, match="output must lie between 0 and 39"):
        couplings.test_coupling(lens, found, TEXTS, generator=generator(), output=40)
    other = couplings.Coupling(0, *groups, ("x",), torch.ones(1, 16), *(torch.ones(1),) * 3, 1)
    with pytest.raises(ValueError, match="coupling must be one of layer 1"):
        couplings.test_coupling(lens, other, TEXTS, generator=generator())
    for one, other in (([3], [3]), (torch.tensor([1, 3]), torch.tensor([3, 5]))):
        with (
            pytest.raises(ValueError, match="must be different input features, got 3 twice"),
            edits.without_pairs(lens, one, other),
        ):
            pass
