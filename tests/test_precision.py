"""What to compute and to screen in."""

import pytest
import torch

from bilens.tensor import precision

CPU = torch.device("cpu")


@pytest.fixture
def seconds(monkeypatch):
    """Let products take what a function of side, dtype and device says, and be measured anew."""

    def take(of):
        monkeypatch.setattr(precision, "_seconds", of)

    precision.product_rates.cache_clear()
    yield take
    precision.product_rates.cache_clear()


@pytest.mark.parametrize("faster", precision.SCREENS)
def test_the_faster_wins(seconds, faster):
    seconds(lambda side, dtype, device: 0.01 if dtype == faster else 0.02)
    assert precision.screen_dtype(CPU) == faster
    assert precision.product_rates(CPU)[faster] == pytest.approx(2 * 256**3 / 0.01)


def test_a_fast_device_is_given_a_larger_product(seconds):
    seconds(lambda side, dtype, device: side * 0.6e-6)
    assert precision.product_rates(CPU)[torch.float32] == pytest.approx(2 * 2048**2 / 0.6e-6)


def test_a_dtype_that_is_emulated_is_measured_on_a_small_product_alone(seconds):
    asked = []

    def counted(side, dtype, device):
        asked.append((side, dtype))
        return side**3 * (1e-12 if dtype == torch.float32 else 1e-10)

    seconds(counted)
    assert precision.product_rates(CPU) == pytest.approx({torch.float32: 2e12, torch.bfloat16: 2e10})
    assert {side for side, dtype in asked if dtype == torch.bfloat16} == {256}


def test_a_device_is_measured_once():
    rates = precision.product_rates(CPU)
    assert precision.product_rates(CPU) is rates
    assert set(rates) == set(precision.SCREENS)
    assert all(rate > 1e6 for rate in rates.values())


@pytest.mark.parametrize(
    ("dtype", "working"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_nothing_is_computed_below_float32(dtype, working):
    assert precision.working_dtype(dtype) == working
