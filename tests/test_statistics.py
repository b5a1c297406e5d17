"""Statistics, against scipy and by their meaning."""

import math

import pytest
import scipy.stats
import torch

from bilens.tensor.statistics import pearson


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pearson_is_scipys_of_the_same_numbers(dtype):
    a, b = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = scipy.stats.pearsonr(a.double(), b.double()).statistic
    assert pearson(a, b) == pytest.approx(expected, abs=1e-12)
    assert pearson(a, 2 * a) == pytest.approx(1)
    assert pearson(a, -a) == pytest.approx(-1)


def test_pearson_needs_pairs():
    a = torch.tensor([1.0, 2.0, 4.0])
    assert pearson(a, a) == pytest.approx(1)
    assert math.isnan(pearson(a, a, least=4))
    assert math.isnan(pearson(a[:2], a[:2]))
    assert pearson(a[:2], a[:2], least=2) == pytest.approx(1)
    assert math.isnan(pearson(a[:0], a[:0], least=0))
    assert math.isnan(pearson(a[:1], a[:1], least=0))


def test_pearson_takes_no_rounding_for_variance():
    a, constant = torch.arange(10.0), torch.full((10,), 0.1)
    assert math.isnan(pearson(a, constant))
    assert math.isnan(pearson(constant, a))
