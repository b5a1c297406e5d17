"""A base made of features, and the ends of spectra, against dense matrices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilens.tensor.extremes import two_strongest
from bilens.tensor.frames import Frame


def symmetric(n, d, seed=0, dtype=torch.float64):
    M = torch.randn(n, d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (M + M.mT).to(dtype)


@given(n=st.integers(1, 40), d=st.integers(1, 12), seed=st.integers(0, 10**6), plain=st.booleans(), few=st.booleans())
def test_the_largest_coefficients_are_those_of_the_dense_matrix(n, d, seed, plain, few):
    D = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    D[n // 2] = D[0]  # the same feature twice
    frame, M = Frame.plain(D) if plain else Frame.of(D), symmetric(9, d, seed)
    largest, own = frame.largest(frame.base @ M @ frame.base.T, 9 * n * (2 if few else 100))
    Q = D @ M @ D.T
    torch.testing.assert_close(own, Q.diagonal(dim1=1, dim2=2))
    Q.diagonal(dim1=1, dim2=2).div_(2)
    torch.testing.assert_close(largest, Q.abs().amax(2))


def test_writers_are_sums_of_a_base_chosen_among_them():
    D = torch.randn(40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frame = Frame.of(D)
    assert frame.n_base == len(frame.base) == 8
    assert torch.equal(frame.base, D[frame.order[:8]])
    torch.testing.assert_close(frame.rest @ frame.base, D[frame.order[8:]])
    assert sorted(frame.order.tolist()) == list(range(40))


def test_the_two_features_of_a_pair_tie():
    D = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    frame, M = Frame.of(D), symmetric(5, 8, dtype=torch.float32)
    inner = frame.base @ M @ frame.base.T
    largest, _ = frame.largest(inner + inner.mT, 1 << 20)
    pair = largest.topk(2, dim=1).values
    assert torch.equal(pair[:, 0], pair[:, 1])


@pytest.mark.parametrize("writers", [torch.zeros(5, 3), torch.cat((1e-3 * torch.eye(3), torch.ones(1, 3)))[[3, 0]]])
def test_writers_of_low_rank_have_a_small_base(writers):
    frame = Frame.of(writers.double())
    full = torch.cat((torch.eye(frame.n_base), frame.rest)) if frame.n_base else frame.rest
    torch.testing.assert_close(full.double() @ frame.base.double(), writers.double()[frame.order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [2, 3, 4, 33])
def test_the_ends_of_a_spectrum_are_those_of_the_whole(d, dtype):
    M = symmetric(6, d, dtype=dtype)
    M[1], M[2] = M[1] @ M[1], -M[2] @ M[2]  # all of one sign
    M[3] = 0
    M[4] = torch.outer(M[5, 0], M[5, 0]) - torch.outer(M[5, 1], M[5, 1])  # nothing beside the two
    values, others = two_strongest(M)
    whole = torch.linalg.eigvalsh(M.double())
    whole = whole.gather(1, whole.abs().argsort(dim=1, descending=True, stable=True))
    scale, close = whole[:, :1].abs().clamp(min=1), max(1e-11, 20 * torch.finfo(dtype).eps)
    torch.testing.assert_close(values.double() / scale, whole[:, :2] / scale, rtol=0, atol=close)
    if d > 2:
        mean = whole[:, 2:].square().mean(1)
        torch.testing.assert_close(
            others.double().sqrt() / scale[:, 0],
            mean.sqrt() / scale[:, 0],
            rtol=0,
            atol=20 * torch.finfo(dtype).eps ** 0.5,
        )
