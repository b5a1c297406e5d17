"""`eigen` against torch's own decomposition of the dense matrix."""

import pytest
import torch

from bilens import BilinearTensor, eigen


def tensor(seed=0, out=3, hidden=7, inp=6, bias=False):
    g = torch.Generator().manual_seed(seed)
    shapes = [(out, hidden), (hidden, inp), (hidden, inp), *([(hidden,), (hidden,), (out,)] if bias else [])]
    return BilinearTensor.from_weights(*(torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes))


def direction(B, *n, seed=1):
    return torch.randn(*n, B.out, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("hidden", [1, 2, 7])
def test_spectrum_is_that_of_the_dense_matrix(hidden, bias):
    B = tensor(hidden=hidden, bias=bias)
    u = direction(B)
    dense = torch.einsum("o,oij->ij", u, B.dense())
    values, vectors = eigen(B, u)
    assert_close(values.sort().values, torch.linalg.eigh(dense).eigenvalues)
    assert_close(dense @ vectors.T, vectors.T * values)
    assert values.abs().diff().max() <= 0


@pytest.mark.parametrize("bias", [False, True])
def test_output_is_the_sum_of_squares(bias):
    B = tensor(bias=bias)
    u, x = direction(B), torch.randn(5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values, vectors = eigen(B, u)
    z = torch.cat((x, x.new_ones(5, 1)), -1) if bias else x
    assert_close(((z @ vectors.T) ** 2) @ values, B.apply(x) @ u)


def test_vectors_are_orthonormal_rows_with_positive_largest_entry():
    B = tensor()
    for vectors in eigen(B, direction(B, 8)).vectors:
        assert_close(vectors @ vectors.T, torch.eye(6, dtype=torch.float64))
        assert (vectors.gather(1, vectors.abs().argmax(1, keepdim=True)) > 0).all()


def test_k_keeps_the_strongest_of_either_sign():
    left = torch.eye(4, dtype=torch.float64)
    B = BilinearTensor(torch.tensor([[1.0, -4.0, 3.0, -2.0]]).double(), left, left)
    values, vectors = eigen(B, torch.ones(1).double(), k=3)
    assert values.tolist() == [-4, 3, -2]
    assert vectors.argmax(1).tolist() == [1, 2, 3]
    assert vectors.shape == (3, 4)


def test_a_batch_is_each_direction_in_turn():
    B = tensor()
    u = direction(B, 2, 5)
    values, vectors = eigen(B, u, k=4)
    assert values.shape == (2, 5, 4)
    assert vectors.shape == (2, 5, 4, 6)
    alone = eigen(B, u[1, 3], k=4)
    assert_close(values[1, 3], alone.values)
    assert_close(vectors[1, 3], alone.vectors)


def test_one_triangle_of_the_unsymmetrised_matrix_has_another_spectrum():
    B = tensor()
    u = direction(B)
    one_sided = torch.einsum("h,hi,hj->ij", u @ B.down, B.left, B.right)
    lower_triangle_only = torch.linalg.eigvalsh(one_sided)
    values = eigen(B, u).values.sort().values
    assert_close(values, torch.linalg.eigvalsh((one_sided + one_sided.T) / 2))
    assert (values - lower_triangle_only).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    B = tensor().to(dtype)
    u = direction(B).to(dtype)
    values, vectors = eigen(B, u)
    exact = eigen(B.to(torch.float64), u.double())
    assert values.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close(values.double(), exact.values, rtol=1e-4, atol=1e-4)


def test_repr_shows_sizes_and_the_strongest():
    left = torch.eye(2)
    B = BilinearTensor(torch.tensor([[1.0, -4.0]]), left, left)
    assert repr(eigen(B, torch.ones(3, 1))) == "Eigen(values=[3, 2], vectors=[3, 2, 2]; first: -4, +1 ...)"


@pytest.mark.parametrize("k", [0, -1, 7])
def test_k_out_of_range(k):
    B = tensor()
    with pytest.raises(ValueError, match=f"k must lie between 1 and inp=6, got {k}"):
        eigen(B, direction(B), k)


def test_direction_of_another_width_and_none_at_all():
    B = tensor()
    with pytest.raises(ValueError, match=r"u must have 3 entries .*\[4\]"):
        eigen(B, torch.ones(4).double())
    with pytest.raises(ValueError, match="u must hold at least one direction"):
        eigen(B, torch.ones(0, 3).double())
