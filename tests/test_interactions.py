"""`top_interactions` against brute force over every output feature and every pair."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilens import BilinearTensor, interactions, top_interactions


def integers(g, *shape, high=2):
    return torch.randint(-high, high + 1, shape, generator=g).double()


def integer_tensor(g, out=3, hidden=4, inp=4, constant=False, high=1):
    down, left, right = integers(g, out, hidden, high=high), integers(g, hidden, inp), integers(g, hidden, inp)
    return BilinearTensor(down, left, right, constant)


def brute_force(B, out=None, inp=None):
    """Every (value, out, left, right) with left <= right, in the promised order, read off the dense cube."""
    Q = B.dense().double()
    if out is not None:
        Q = torch.einsum("po,oij->pij", out.double(), Q)
    if inp is not None:
        legs = torch.block_diag(inp.double(), torch.ones(1, 1).double()) if B.constant else inp.double()
        Q = torch.einsum("oij,ai,bj->oab", Q, legs, legs)
    n = Q.shape[-1]
    pairs = [
        (Q[o, i, j].item() * (1 if i == j else 2), o, i, j)
        for o in range(len(Q))
        for i in range(n)
        for j in range(i, n)
    ]
    return sorted(pairs, key=lambda pair: (-abs(pair[0]), *pair[1:]))


def listed(found):
    return list(zip(found.value.tolist(), *(part.tolist() for part in found[:3]), strict=True))


@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 70),
    constant=st.booleans(),
    read=st.booleans(),
    written=st.booleans(),
    at_once=st.integers(1, 4),
)
def test_exact_order_with_ties(seed, k, constant, read, written, at_once):
    g = torch.Generator().manual_seed(seed)
    B = integer_tensor(g, constant=constant)
    out = integers(g, 5, 3, high=1) if read else None
    inp = integers(g, 3, 4 - constant, high=1) if written else None
    n_in = 4 if inp is None else 3 + constant
    before, interactions.BLOCK_BYTES = interactions.BLOCK_BYTES, at_once * n_in**2 * 8
    try:
        found = top_interactions(B, k, out, inp)
    finally:
        interactions.BLOCK_BYTES = before
    assert listed(found) == brute_force(B, out, inp)[:k]


def test_values_sum_to_the_output():
    g = torch.Generator().manual_seed(0)
    B = BilinearTensor(*(torch.randn(shape, generator=g).double() for shape in ((3, 5), (5, 4), (5, 4))))
    z = torch.randn(4, generator=g).double()
    found = top_interactions(B, 10**6)
    assert len(found.value) == 3 * 10
    y = torch.zeros(3).double().index_add(0, found.out, found.value * z[found.left] * z[found.right])
    torch.testing.assert_close(y, B.apply(z))


def test_duplicate_and_zero_features_keep_their_places():
    g = torch.Generator().manual_seed(3)
    B = integer_tensor(g, high=2)
    out = integers(g, 3, 3)[[0, 1, 0, 2, 1]]
    inp = torch.cat((integers(g, 2, 4), torch.zeros(2, 4).double(), integers(g, 1, 4)))[[0, 1, 2, 3, 4, 0]]
    expected = brute_force(B, out, inp)
    assert sum(value == 0 for value, *_ in expected) > 20
    for k in (1, 7, len(expected) - 30, len(expected)):
        assert listed(top_interactions(B, k, out, inp)) == expected[:k]


@pytest.mark.parametrize("k", [1, 3, 29, 30, 31, 10**6])
def test_k_up_to_and_beyond_all_pairs(k):
    B = integer_tensor(torch.Generator().manual_seed(0))
    assert listed(top_interactions(B, k)) == brute_force(B)[:k]


@pytest.mark.parametrize("block_bytes", [1, 200, 300, 1000, 1 << 20])
def test_block_size_does_not_matter(monkeypatch, block_bytes):
    g = torch.Generator().manual_seed(1)
    B = BilinearTensor(*(torch.randn(shape, generator=g).double() for shape in ((9, 6), (6, 5), (6, 5))))
    whole = top_interactions(B, 20)
    monkeypatch.setattr(interactions, "BLOCK_BYTES", block_bytes)
    for one, other in zip(top_interactions(B, 20), whole, strict=True):
        assert torch.equal(one, other)


def test_many_ties_across_blocks_go_to_the_first(monkeypatch):
    one = torch.ones(6, 1).double(), torch.ones(1, 3).double(), torch.ones(1, 3).double()
    monkeypatch.setattr(interactions, "BLOCK_BYTES", 1)
    found = top_interactions(BilinearTensor(*one), 4)
    assert listed(found) == [(2, 0, 0, 1), (2, 0, 0, 2), (2, 0, 1, 2), (2, 1, 0, 1)]


@pytest.mark.parametrize("written", [True, False])
def test_the_last_index_is_the_constant(written):
    g = torch.Generator().manual_seed(0)
    down, left, right = torch.eye(2).double(), integers(g, 2, 3), integers(g, 2, 3)
    B = BilinearTensor.from_weights(down, left, right, out_bias=torch.tensor([100.0, 0.0]).double())
    n_in = 5 if written else 3
    found = top_interactions(B, 1, inp=integers(g, 5, 3, high=1) if written else None)
    assert listed(found) == [(100, 0, n_in, n_in)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    g = torch.Generator().manual_seed(0)
    B, out, inp = integer_tensor(g), integers(g, 4, 3), integers(g, 5, 4)
    found = top_interactions(B.to(dtype), 25, out.to(dtype), inp.to(dtype))
    assert found.value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert listed(found) == brute_force(B, out, inp)[:25]  # small integers are exact in every dtype


def test_float32_on_real_numbers():
    g = torch.Generator().manual_seed(0)
    B = BilinearTensor(*(torch.randn(shape, generator=g) for shape in ((6, 9), (9, 7), (9, 7))))
    found = top_interactions(B, 30)
    exact = {tuple(pair): value for value, *pair in brute_force(B)}
    torch.testing.assert_close(
        found.value.double().abs(), torch.tensor([abs(value) for value, *_ in brute_force(B)[:30]]).double()
    )
    for value, *pair in listed(found):
        assert value == pytest.approx(exact[tuple(pair)], rel=1e-4)


def test_no_features_no_pairs():
    B = integer_tensor(torch.Generator().manual_seed(0))
    assert repr(top_interactions(B, 3, out=torch.zeros(0, 3).double())) == "Interactions(0 pairs)"
    assert repr(top_interactions(B, 3, inp=torch.zeros(0, 4).double())) == "Interactions(0 pairs)"


def test_repr_shows_the_strongest():
    eye = torch.eye(2)
    B = BilinearTensor(torch.tensor([[1.0, -4.0]]), eye, eye)
    assert repr(top_interactions(B, 2)) == "Interactions(2 pairs; first: 1 × 1 → 0: -4)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"k": -2}, "k must be at least 1, got -2"),
        ({"k": 1, "out": torch.ones(2, 4)}, r"out must have shape \[n_out, 3\], got \[2, 4\]"),
        ({"k": 1, "inp": torch.ones(2, 3)}, r"inp must have shape \[n_in, 4\], got \[2, 3\]"),
        ({"k": 1, "out": torch.full((2, 3), torch.nan)}, "must be finite"),
        ({"k": 1, "inp": torch.full((2, 4), torch.inf)}, "must be finite"),
    ],
)
def test_errors_name_the_argument(unchecked, arguments, message):
    B = integer_tensor(torch.Generator().manual_seed(0)).to(torch.float32)
    with pytest.raises(ValueError, match=message):
        top_interactions(B, **arguments)


def test_one_nan_among_many_is_refused_rather_than_dropped():
    B = integer_tensor(torch.Generator().manual_seed(0), out=5)
    B.down[3, 1] = torch.nan
    with pytest.raises(ValueError, match="B, out and inp must be finite, but some interactions are NaN or infinite"):
        top_interactions(B, 2)
