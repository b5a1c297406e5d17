"""A base made of features, and the ends of spectra, against dense matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_interactions import brute_force, in_pieces, integer_tensor, integers, listed

from bilens import BilinearTensor, top_interactions
from bilens.tensor import frames, scaled
from bilens.tensor.budget import Plan
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


# -- a ranking in such a basis ----------------------------------------------------------------------------------------


def writers(kind, g):
    """Return twelve integer writers of width 5, of a kind that a base could go wrong with."""
    D = integers(g, 12, 5)
    if kind == "few":
        return D[:3]
    if kind == "of low rank":
        return integers(g, 12, 2, high=1) @ integers(g, 2, 5, high=1)
    if kind == "repeated":
        return D[[0, 1, 0, 2, 3, 3, 4, 0, 5, 6, 2, 7]] * integers(g, 12, 1).sign()  # zero, or of either sign
    if kind == "next to nothing":  # of which what is new lies below what a rank is told by
        return torch.cat((D[:8] * torch.tensor([1.0, 1, 0, 0, 0]), D[8:] * 2.0**-50))
    return D


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    k=st.sampled_from([1, 20, 10**4]),  # of all of them, each is held against its bound
    kind=st.sampled_from(["any", "few", "of low rank", "repeated", "next to nothing"]),
    steep=st.sampled_from([0.5, 2.0, 8.0, 1e9]),
    exponent=st.sampled_from([-100, 0, 100]),
    memory=st.sampled_from([64, 1 << 30]),
)
def test_a_ranking_in_a_base_of_features_is_that_of_brute_force(seed, k, kind, steep, exponent, memory):
    g = torch.Generator().manual_seed(seed)
    B, inp = integer_tensor(g, inp=5), writers(kind, g)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaled, "_ENOUGH", 1)
        patch.setattr(frames, "_STEEP", steep)
        patch.setattr(Plan, "of", in_pieces(g))
        scale = 2.0**exponent
        found = top_interactions(
            BilinearTensor(B.down, B.left * scale, B.right * scale),
            k,
            inp=inp * scale,
            screen=torch.float32,
            per_output=4,
            features=1,
            memory=memory,
        )
    expected = brute_force(B, inp=inp)
    unit = 2.0 ** (4 * exponent)
    assert [(value / unit, *at) for value, *at in listed(found)] == expected[:k]
    each = [pair for o in range(3) for pair in [p for p in expected if p[1] == o][:4]]
    assert [(value / unit, *at) for value, *at in listed(found.per_output)] == each
    largest = torch.zeros(3, len(inp), dtype=torch.float64)
    for value, o, *pair in expected:
        largest[o, pair] = largest[o, pair].clamp(min=abs(value))
    chosen = largest.gather(1, found.features)[:, 0]
    assert torch.equal(chosen, found.per_output.value[::4].abs() / unit)


def test_what_is_lost_in_projecting_is_part_of_the_bound():
    """Factors that are orthogonal to all writers leave nothing but rounding, of float64 in the base and elsewhere."""
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=g).double()).Q
    left, right, inp = (torch.randn(n, 8, generator=g).double() for n in (20, 20, 30))
    B = BilinearTensor(torch.randn(4, 20, generator=g).double(), left @ basis[:8], right @ basis[:8])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaled, "_ENOUGH", 1)
        found = top_interactions(B, 10**4, inp=inp @ basis[8:], screen=torch.float32)
    assert len(found) == 4 * 30 * 31 // 2
    assert found.certificate.error <= found.certificate.bound


def test_what_a_base_cannot_hold_is_ranked_without_one():
    D = torch.eye(4).double()[[0, 1, 2, 3, 0]]
    D[3] *= 2.0**-60
    assert Frame.of(D).residual(D)[0][3] >= 2.0**-60
    B = BilinearTensor(torch.ones(1, 4), torch.eye(4), torch.eye(4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaled, "_ENOUGH", 1)
        assert scaled.Scaled.of(B, None, D, torch.float32).n_base == 0
        assert scaled.Scaled.of(B, None, D[[0, 1, 2, 4]], torch.float32).n_base == 3
