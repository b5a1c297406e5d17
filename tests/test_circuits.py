"""Circuits: what is read off the weights, and what the running model says to it."""

import pytest
import torch
from sae_lens import TopKSAE, TopKSAEConfig

import bilens
from bilens import circuits
from bilens.circuits import FeatureLayer
from bilens.models.windows import Windows, observe


def random_sae(hook, d_in=16, d_sae=40, k=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sae = TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=d_sae, k=k)).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / d_in**0.5)
    sae.cfg.metadata.hook_name = hook
    return sae


@pytest.fixture(params=[(False, False), (True, True)], ids=["no bias", "biases"])
def lens(request, make_model):
    model = make_model(mlp_bias=request.param)
    return FeatureLayer(model, 1, random_sae("blocks.1.hook_mlp_in"), random_sae("blocks.1.hook_mlp_out", seed=1))


@pytest.fixture
def tokens(lens):
    tokens = torch.randint(3, lens.model.cfg.d_vocab, (6, 9), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = lens.model.bos_id
    return tokens


def interaction_matrix(lens, feature):
    """Q in the basis of the input features, without the constant leg."""
    matrix = lens.tensor.matrix(lens.readers[feature])[:16, :16]
    return lens.writers @ matrix @ lens.writers.T


def test_pairs_are_the_largest_coefficients_of_the_feature(lens):
    found = circuits.pairs(lens, 7, k=5)
    assert found.out.tolist() == [7] * 5
    matrix = interaction_matrix(lens, 7)
    for _, i, j, value in zip(*(part.tolist() for part in found), strict=True):
        if max(i, j) < len(lens.writers):
            assert value == pytest.approx((1 if i == j else 2) * matrix[i, j].item())
    best = (2 * matrix - torch.diag(matrix.diagonal())).triu().abs().max()
    assert found.value[0].abs() >= best * (1 - 1e-12)


def test_the_strongest_outliers_are_those_of_all(lens):
    few, full = circuits.outliers(lens, k=5), circuits.outliers(lens)
    assert few.feature.tolist() == full.feature[:5].tolist()
    torch.testing.assert_close(few.ratio, full.ratio[:5])
    assert len(circuits.outliers(lens, k=10_000).feature) == len(full.feature)
    with pytest.raises(ValueError, match="k must be None with by='ratio', got 3"):
        circuits.outliers(lens, "ratio", k=3)
    found = circuits.search(lens, ["outlier"], generator=torch.Generator().manual_seed(0), n=1, tail=False)
    for name in ("feature", "values", "bulk"):
        torch.testing.assert_close(getattr(circuits.outliers(lens, k=5, found=found), name), getattr(few, name))
    other = circuits.search(lens, ["and"], generator=torch.Generator().manual_seed(0), n=1, tail=False)
    with pytest.raises(ValueError, match="found must be a search for outliers among 40 output features"):
        circuits.outliers(lens, found=other)


@pytest.mark.parametrize("by", ["strength", "ratio"])
def test_outliers_rank_by_the_two_strongest_eigenvalues(lens, by):
    found = circuits.outliers(lens, by)
    assert (getattr(found, by).diff() <= 0).all()
    assert sorted(found.feature.tolist()) == list(range(40))
    values = torch.linalg.eigvalsh(lens.tensor.without_constant().matrix(lens.readers[found.feature[0]]))
    values = values[values.abs().argsort(descending=True)]
    torch.testing.assert_close(found.values[0], values[:2])
    torch.testing.assert_close(found.bulk[0], 2 * values[2:].pow(2).mean().sqrt())


def test_all_eigenvectors_predict_the_preactivation_exactly(lens, tokens):
    found = circuits.predict(lens, 3, tokens, k=lens.tensor.inp)
    y = lens.at_positions(Windows.of(lens.model, tokens), lambda x, y: y)
    torch.testing.assert_close(found.predicted, y @ lens.readers[3])
    assert found.n_active == (lens.out.encode(y)[:, 3] != 0).sum()
    active = found.actual != 0
    expected = torch.corrcoef(torch.stack((found.predicted[active], found.actual[active])))[0, 1].item()
    assert found.pearson_active == pytest.approx(expected)


def test_a_removal_is_predicted_exactly_and_measured_by_running_the_model(lens, tokens):
    z = lens.codes(observe(lens.model, Windows.of(lens.model, tokens), [lens.hook_in])[lens.hook_in])
    inp = int(z[:, -1].mean(0).argmax())
    found = circuits.remove(lens, inp, 5, tokens)
    torch.testing.assert_close(found.predicted, found.measured)
    assert (found.before - found.measured).abs().max() > 1e-3
    silent = int(z[:, -1].abs().sum(0).argmin())
    nothing = circuits.remove(lens, silent, 5, tokens)
    unchanged = z[:, -1, silent] == 0
    torch.testing.assert_close(nothing.before[unchanged], nothing.measured[unchanged])
    assert not any(point.has_hooks() for point in lens.model.hook_points())


@pytest.mark.usefixtures("unchecked")
def test_errors_name_the_argument(lens):
    with pytest.raises(ValueError, match="by must be"):
        circuits.outliers(lens, "size")
    with pytest.raises(ValueError, match="layer must lie between 0 and 1"):
        FeatureLayer.load(lens.model, 2)


def test_what_lives_in_other_modules_is_found_here():
    assert circuits.search is bilens.circuits.discovery.search
    assert circuits.test is bilens.circuits.trial.test
    assert circuits.remove_pair is bilens.circuits.removal.remove_pair
    with pytest.raises(AttributeError, match=r"No bilens\.circuits attribute serch"):
        circuits.serch  # noqa: B018
