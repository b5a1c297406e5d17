"""Spectra of many interaction matrices: residuals, feature bases, and rankings, against the dense matrices."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilens import BilinearTensor, eigen
from bilens.tensor import decompositions, matrices, precision
from bilens.tensor.decompositions import Eigen, spectrum_in_basis
from bilens.tensor.matrices import Matrices
from bilens.tensor.outputs import top_outputs
from bilens.tensor.schatten import Screen


def tensor(seed=0, out=5, hidden=9, inp=6, bias=False, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = [(out, hidden), (hidden, inp), (hidden, inp), *([(hidden,), (hidden,), (out,)] if bias else [])]
    parts = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    return BilinearTensor.from_weights(*(part.to(dtype) for part in parts))


def rows(n, width, seed=1, dtype=torch.float64):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense_values(B, u):
    return torch.linalg.eigvalsh(B.to(torch.float64).matrix(u.double()))


def scores(B, readers, by):
    strongest = dense_values(B, readers).abs().sort(dim=1, descending=True).values
    if by == "frobenius":
        return strongest.norm(dim=1)
    return strongest[:, 0] if by == "spectral" else strongest[:, :2].sum(1)


@pytest.fixture(params=[torch.bfloat16, torch.float32])
def screen(request, monkeypatch):
    rates = {dtype: float(dtype == request.param) for dtype in precision.SCREENS}
    monkeypatch.setattr(precision, "product_rates", lambda device: rates)
    return request.param


# -- eigen ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_an_exact_eigenvalue_lies_within_the_residual(dtype, bias):
    B, u = tensor(inp=12, bias=bias, dtype=dtype), rows(40, 5, dtype=dtype)
    found = eigen(B, u)
    distance = (found.values.double()[..., None] - dense_values(B, u)[:, None]).abs().amin(-1)
    assert found.residual.shape == found.values.shape
    assert (distance <= found.residual + 1e-13).all()
    assert found.residual.max() < (1e-12 if dtype == torch.float64 else 1e-4)


def test_many_directions_in_chunks_with_and_without_the_cube(monkeypatch):
    B, u = tensor(inp=70, hidden=20), rows(33, 5)
    whole = eigen(B, u, k=3)
    monkeypatch.setattr(decompositions, "MATRIX_BYTES", 1)
    monkeypatch.setattr(matrices, "CUBE_BYTES", 0)
    one_by_one = eigen(B, u, k=3)
    torch.testing.assert_close(whole.values, one_by_one.values)
    torch.testing.assert_close(whole.vectors, one_by_one.vectors)


def test_eigen_unpacks_into_a_pair():
    B, u = tensor(), rows(2, 5)
    values, vectors = found = eigen(B, u)
    assert values is found.values
    assert vectors is found.vectors
    assert Eigen(values, vectors).residual is None


def test_eigen_keeps_its_residual():
    found = eigen(tensor(), rows(2, 5))
    assert copy.copy(found).residual is found.residual
    assert found._replace(values=-found.values).residual is found.residual
    assert found._replace(values=-found.values, residual=None).residual is None
    first = found[:2]
    assert (len(found), len(first)) == (6, 2)
    assert torch.equal(first.values, found.values[:, :2])
    assert torch.equal(first.vectors, found.vectors[:, :2])
    assert torch.equal(first.residual, found.residual[:, :2])
    value, vector = found[1]
    assert torch.equal(value, found.values[:, 1])
    assert torch.equal(vector, found.vectors[:, 1])
    assert Eigen(*found)[1:].residual is None


def test_eigen_can_be_differentiated():
    B, u = tensor(), rows(7, 5).requires_grad_()
    eigen(B, u, k=1).values.sum().backward()
    vectors = eigen(B, u.detach(), k=1).vectors[:, 0]
    torch.testing.assert_close(u.grad, B.apply(vectors))


def test_progress_is_shown_on_demand(capsys):
    eigen(tensor(), rows(4, 5), progress=True)
    assert "4/4" in capsys.readouterr().err


# -- spectrum in a basis ----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 15), rank=st.integers(1, 6), bias=st.booleans(), seed=st.integers(0, 99))
def test_spectrum_is_that_of_the_dense_matrix_of_the_features(n, rank, bias, seed):
    B, rank = tensor(seed, bias=bias), min(n, rank)
    D, u = rows(n, rank, seed) @ rows(rank, 6, seed + 1), rows(3, 5, seed + 2)
    found = spectrum_in_basis(B, u, D)
    Q = B.project(inp=D).matrix(u)
    exact = torch.linalg.eigvalsh(Q)
    n, rank = n + bias, rank + bias
    assert found.vectors.shape == (3, rank, n)
    padded = torch.cat((found.values, found.values.new_zeros(3, n - rank)), 1).sort().values
    torch.testing.assert_close(padded, exact, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(Q @ found.vectors.mT, found.vectors.mT * found.values[:, None], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found.vectors @ found.vectors.mT, torch.eye(rank).double().expand(3, -1, -1))
    distance = (found.values[..., None] - exact[:, None]).abs().amin(-1)
    assert (distance <= found.residual + 1e-11).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_repeated_and_zero_writers_add_no_rank(dtype):
    B = tensor(dtype=dtype)
    D = rows(3, 6, dtype=dtype)
    D = torch.cat((D, D, torch.zeros_like(D), -D))
    found = spectrum_in_basis(B, rows(1, 5, dtype=dtype)[0], D)
    assert found.values.shape == (3,)
    exact = torch.linalg.eigvalsh(
        D.double() @ B.to(torch.float64).matrix(rows(1, 5, dtype=dtype)[0].double()) @ D.double().T
    )
    distance = (found.values.double()[:, None] - exact).abs().amin(-1)
    assert (distance <= found.residual + 1e-12).all()
    with pytest.raises(ValueError, match="the rank of writers, 3, got 4"):
        spectrum_in_basis(B, rows(1, 5, dtype=dtype), D, k=4)


def test_wrong_bases():
    B = tensor()
    with pytest.raises(ValueError, match=r"writers must have shape \[n, 6\], got \[2, 5\]"):
        spectrum_in_basis(B, rows(1, 5), rows(2, 5))
    with pytest.raises(ValueError, match="at least one row that is not zero"):
        spectrum_in_basis(B, rows(1, 5), torch.zeros(2, 6).double())
    with pytest.raises(ValueError, match="writers must be finite"):
        spectrum_in_basis(B, rows(1, 5), rows(2, 6) / 0)
    with pytest.raises(ValueError, match="readers must have 5 entries"):
        spectrum_in_basis(B, rows(1, 4), rows(2, 6))


# -- ranking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["spectral", "frobenius", "top2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_top_outputs_are_those_of_brute_force(screen, by, dtype, bias):
    B, readers = tensor(inp=40, hidden=30, bias=bias, dtype=dtype), rows(60, 5, dtype=dtype)
    found, exact = top_outputs(B, readers, 7, by), scores(B, readers, by)
    assert found.out.tolist() == exact.argsort(descending=True)[:7].tolist()
    assert found.score.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.score.double(), exact[found.out], rtol=2e-5, atol=0)
    if by == "frobenius":
        assert found.values is None
        assert found.decomposed == 0
    else:
        values = dense_values(B, readers)[found.out]
        values = values.gather(1, values.abs().argsort(dim=1, descending=True)[:, :2])
        torch.testing.assert_close(found.values.double(), values, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    by=st.sampled_from(["spectral", "top2"]),
    k=st.integers(1, 12),
    hidden=st.sampled_from([1, 2, 9]),
    inp=st.sampled_from([1, 2, 33]),
    bias=st.booleans(),
    scale=st.sampled_from([1e-12, 1.0, 1e9]),
    seed=st.integers(0, 99),
)
def test_ties_by_index_with_zero_and_repeated_readers(by, k, hidden, inp, bias, scale, seed):
    B = tensor(seed, hidden=hidden, inp=inp, bias=bias)
    readers = rows(4, 5, seed) * scale
    readers = torch.cat((readers, torch.zeros_like(readers), readers))
    found, alone = top_outputs(B, readers, k, by), scores(B, readers[:4], by)
    exact = torch.cat((alone, torch.zeros(4).double(), alone))
    assert found.out.tolist() == exact.argsort(descending=True, stable=True)[:k].tolist()
    torch.testing.assert_close(found.score, exact[found.out], rtol=1e-9, atol=1e-12 * scale)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("cube", [0, 2**29])
def test_bounds_hold_at_every_squaring(screen, cube, exact, monkeypatch):
    monkeypatch.setattr(matrices, "CUBE_BYTES", cube)
    B, readers = tensor(hidden=20, inp=48, dtype=torch.float32), rows(16, 5, dtype=torch.float32)
    gram = matrices.output_gram(B)
    frobenius = matrices.frobenius(gram, readers)
    these = Matrices(B, len(readers))
    assert (these.blocks is None) == (cube == 0)
    bounds = Screen(these, gram)
    bounds.start(readers, frobenius, exact)
    values = dense_values(B, readers).abs()
    for p in (4, 8, 16, 32, 64):
        bound, of = bounds.square()
        norm = values.pow(p).sum(1).pow(1 / p)
        assert of == p
        assert (bound >= norm).all()
        assert (bound <= norm * (1.1 if screen == torch.bfloat16 else 1.001)).all()


@pytest.mark.parametrize("by", ["spectral", "top2"])
def test_few_are_decomposed_where_some_stand_out(screen, by):
    B, readers = tensor(out=24, hidden=64, inp=32, dtype=torch.float32), rows(400, 24, dtype=torch.float32)
    readers[::100] *= 4
    found = top_outputs(B, readers, 4, by)
    assert sorted(found.out.tolist()) == [0, 100, 200, 300]
    assert found.decomposed < 40
    assert repr(found).startswith(f"TopOutputs(4 features, {found.decomposed} decomposed; first: #{found.out[0]} ")


def test_all_of_them():
    B, readers = tensor(), rows(9, 5)
    found = top_outputs(B, readers, 9)
    assert found.out.tolist() == scores(B, readers, "spectral").argsort(descending=True).tolist()
    assert found.decomposed == 9


def test_what_top_outputs_refuses():
    B, readers = tensor(), rows(4, 5)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"number of readers, 4, got {k}"):
            top_outputs(B, readers, k)
    with pytest.raises(ValueError, match="by must be 'spectral', 'frobenius' or 'top2', got 'nuclear'"):
        top_outputs.__wrapped__(B, readers, 2, "nuclear")
    with pytest.raises(ValueError, match=r"readers must have 5 entries .*\[4, 3\]"):
        top_outputs(B, readers[:, :3], 2)
    with pytest.raises(ValueError, match="readers must be finite, got 20 entries"):
        top_outputs(B, readers / 0, 2)
