"""Similarities against Monte Carlo, dense cubes and the symmetries that leave a layer the same function."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bilens
from bilens import BilinearTensor, eigen
from bilens.report import tensorplots
from bilens.tensor import comparison


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(out=4, hidden=7, inp=5, bias=False, seed=0):
    shapes = [(out, hidden), (hidden, inp), (hidden, inp), *([(hidden,), (hidden,), (out,)] if bias else [])]
    return BilinearTensor.from_weights(*(random(*shape, seed=seed * 10 + i) for i, shape in enumerate(shapes)))


def gaussian(inp=5, seed=3):
    """A second moment and a mean that inputs can have."""
    root, mean = random(inp, inp, seed=seed) / 2, random(inp, seed=seed + 1) / 2
    return root @ root.T + mean.outer(mean), mean


def samples(second_moment, mean, n=400_000, seed=7):
    root = torch.linalg.cholesky(second_moment - mean.outer(mean))
    return random(n, len(mean), seed=seed) @ root.T + mean


def close(actual, expected, tol=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=tol, atol=tol)


def by_quadrature(A, B, second_moment, mean):
    """`E[A(x)·B(x)]` exactly, by Gauss-Hermite quadrature of three nodes per coordinate, enough for degree four."""
    nodes = torch.tensor([-(3**0.5), 0, 3**0.5], dtype=torch.float64)
    weights = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)
    grid = torch.cartesian_prod(*[nodes] * len(mean))
    weight = torch.cartesian_prod(*[weights] * len(mean)).prod(1)
    x = grid @ torch.linalg.cholesky(second_moment - mean.outer(mean)).T + mean
    return weight @ (A.apply(x) * B.apply(x)).sum(1)


# -- the inner product ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biases", [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("centred", [True, False])
def test_inner_product_is_the_mean_over_gaussian_inputs(biases, centred):
    A, B = layer(bias=biases[0]), layer(hidden=6, bias=biases[1], seed=1)
    S, mean = gaussian()
    if centred:
        S, mean = S - mean.outer(mean), None
    zero = torch.zeros(5, dtype=torch.float64)
    close(bilens.gaussian_inner(A, B, S, mean), by_quadrature(A, B, S, zero if mean is None else mean))


def test_default_is_the_standard_gaussian_and_a_mean_alone_moves_it():
    A, B = layer(bias=True), layer(seed=1)
    one, mean = torch.eye(5, dtype=torch.float64), random(5, seed=4)
    close(bilens.gaussian_inner(A, B), by_quadrature(A, B, one, 0 * mean))
    close(bilens.gaussian_inner(A, B, mean=mean), by_quadrature(A, B, one + mean.outer(mean), mean))


def test_inner_product_is_met_by_monte_carlo():
    A, B = layer(bias=True), layer(bias=True, seed=1)
    S, mean = gaussian()
    x = samples(S, mean)
    products = (A.apply(x) * B.apply(x)).sum(1)
    error = float(products.std()) / len(x) ** 0.5
    assert abs(float(bilens.gaussian_inner(A, B, S, mean) - products.mean())) < 4 * error
    assert error < 0.01 * float(products.abs().mean())


def test_without_biases_it_is_the_frobenius_product_and_the_traces():
    A, B = layer(), layer(seed=1)
    traces = [one.dense().diagonal(dim1=1, dim2=2).sum(1) for one in (A, B)]
    close(bilens.gaussian_inner(A, B), 2 * A.inner(B) + traces[0] @ traces[1])


def test_many_hidden_units_are_taken_a_few_at_a_time(monkeypatch):
    A, B = layer(hidden=50), layer(hidden=40, seed=1)
    whole = bilens.gaussian_inner(A, B)
    monkeypatch.setattr(comparison, "_ROWS", 7)
    close(bilens.gaussian_inner(A, B), whole)


# -- similarity -------------------------------------------------------------------------------------------------------


def permuted(B, g):
    order = torch.randperm(B.hidden, generator=g)
    return BilinearTensor(B.down[:, order], B.left[order], B.right[order], B.constant)


def rescaled(B, g):
    a, b = torch.randn(2, B.hidden, generator=g, dtype=torch.float64) * 2
    return BilinearTensor(B.down / (a * b), B.left * a[:, None], B.right * b[:, None], B.constant)


def swapped(B, g):
    swap = (torch.rand(B.hidden, generator=g) < 0.5)[:, None]
    return BilinearTensor(B.down, B.left.where(swap, B.right), B.right.where(swap, B.left), B.constant)


def louder(B, g):
    return BilinearTensor(B.down * 3, B.left, B.right, B.constant)


def split(B, g):
    """One hidden unit written as two that add up to it."""
    part = torch.randn(B.down.shape, generator=g, dtype=torch.float64)
    left, right = torch.cat((B.left, B.left)), torch.cat((B.right, B.right))
    return BilinearTensor(torch.cat((part, B.down - part), 1), left, right, B.constant)


SAME = (permuted, rescaled, swapped, louder, split)


@given(seed=st.integers(0, 10**6), bias=st.booleans(), changes=st.lists(st.sampled_from(SAME), min_size=1, max_size=4))
def test_the_same_function_in_other_weights_is_the_same(seed, bias, changes):
    A, other = layer(bias=bias, seed=seed), layer(bias=bias, seed=seed + 1)
    B, g = A, torch.Generator().manual_seed(seed)
    for change in changes:
        B = change(B, g)
    S, mean = gaussian(seed=seed)
    for moments in ((), (S, mean)):
        close(bilens.similarity(A, B, *moments), 1, 1e-8)
        close(bilens.similarity(B, other, *moments), bilens.similarity(A, other, *moments), 1e-8)
    close(bilens.frobenius_similarity(A, B), 1, 1e-8)


def test_similarity_is_signed_bounded_and_blind_to_a_rotation_of_both_outputs():
    A, B = layer(), layer(seed=1)
    minus = BilinearTensor(-A.down, A.left, A.right)
    close(bilens.similarity(A, minus), -1)
    value = bilens.similarity(A, B)
    assert -1 < float(value) < 1
    R = torch.linalg.qr(random(4, 4, seed=8)).Q
    close(bilens.similarity(A.project(out=R), B.project(out=R)), value)
    assert abs(float(bilens.similarity(A.project(out=R), B) - value)) > 0.01


def test_inputs_in_another_basis_are_the_same_with_their_second_moment_in_it():
    A, B = layer(), layer(seed=1)
    S, _ = gaussian()
    D = random(5, 5, seed=6)  # x = z D, so that E[x xᵀ] = Dᵀ E[z zᵀ] D
    close(bilens.similarity(A.project(inp=D), B.project(inp=D), S), bilens.similarity(A, B, D.T @ S @ D))


def test_directions_that_do_not_occur_do_not_count():
    A = layer()
    left, right = (torch.nn.functional.pad(random(3, 1, seed=seed), (4, 0)) for seed in (3, 4))
    added = BilinearTensor(random(4, 3, seed=2), left, right)  # reads the last input only
    B = BilinearTensor(
        torch.cat((A.down, added.down), 1), torch.cat((A.left, added.left)), torch.cat((A.right, added.right))
    )
    S = torch.diag(torch.tensor([1.0, 2, 3, 4, 0], dtype=torch.float64))
    close(bilens.similarity(A, B, S), 1)
    assert float(bilens.similarity(A, B)) < 0.999


def test_a_bias_matters_as_much_as_the_inputs_let_it():
    A = layer(bias=True)
    B = BilinearTensor(A.down, torch.cat((A.left[:, :-1], 0 * A.left[:, -1:]), 1), A.right, constant=True)
    without = BilinearTensor(layer().down, layer().left, layer().right)
    closeness = [
        float(bilens.similarity(A, B, size**2 * torch.eye(5, dtype=torch.float64))) for size in (0.1, 1.0, 10.0, 1000.0)
    ]
    assert closeness[-1] == pytest.approx(1, abs=1e-5)
    assert closeness[0] < closeness[2] < closeness[3]
    assert float(bilens.similarity(A, without, 1e8 * torch.eye(5, dtype=torch.float64))) == pytest.approx(1, abs=1e-6)


def test_float32_weights_are_compared_in_float64():
    A, B = layer(hidden=30).to(torch.float32), layer(hidden=30, seed=1).to(torch.float32)
    found = bilens.similarity(A, B)
    assert found.dtype == torch.float64
    close(found, bilens.similarity(A.to(torch.float64), B.to(torch.float64)))
    assert abs(float(bilens.similarity(A, A)) - 1) < 1e-14


def test_matrix_holds_every_pair():
    layers = [layer(seed=seed, hidden=5 + seed, bias=seed == 1) for seed in range(3)]
    S, mean = gaussian()
    matrix = bilens.similarity_matrix(layers, S, mean)
    for i, A in enumerate(layers):
        for j, B in enumerate(layers):
            close(matrix[i, j], bilens.similarity(A, B, S, mean))
    close(matrix.diagonal(), torch.ones(3))


# -- the others -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_frobenius_similarity_is_that_of_the_cubes(bias):
    A, B = layer(bias=bias), layer(bias=bias, seed=1)
    a, b = A.dense().flatten(), B.dense().flatten()
    close(bilens.frobenius_similarity(A, B), float(a @ b / a.norm() / b.norm()))


def test_frobenius_similarity_of_a_layer_with_and_one_without_biases():
    A, B = layer(bias=True), layer(seed=1)
    a, b = A.dense(), torch.nn.functional.pad(B.dense(), (0, 1, 0, 1))
    close(bilens.frobenius_similarity(A, B), float((a * b).sum() / a.norm() / b.norm()))


def test_quadratic_forms_are_compared_as_their_matrices():
    A, B = layer(), layer(seed=1)
    u = random(3, 4, seed=5)
    P, Q = A.matrix(u), B.matrix(u)
    expected = (P * Q).sum((1, 2)) / P.flatten(1).norm(dim=1) / Q.flatten(1).norm(dim=1)
    close(bilens.quadratic_form_similarity(eigen(A, u), eigen(B, u)), expected)
    close(bilens.quadratic_form_similarity(eigen(A, u[0]), eigen(B, u))[0], expected[0])
    close(bilens.quadratic_form_similarity(eigen(A, u), eigen(A, u)), torch.ones(3))
    cut = [eigen(one, u[0], k=2) for one in (A, B)]
    P, Q = (vectors.T * values @ vectors for values, vectors in cut)
    close(bilens.quadratic_form_similarity(*cut), float((P * Q).sum() / P.norm() / Q.norm()))


def test_the_figure_shows_every_pair_and_checks_the_names():
    matrix = bilens.similarity_matrix([layer(seed=seed) for seed in range(3)])
    figure = tensorplots.similarity(matrix, ["a", "b", "c"])
    assert [list(row) for row in figure.data[0].z] == [[float(f"{x:.4g}") for x in row] for row in matrix.tolist()]
    assert (figure.data[0].zmin, figure.data[0].zmax) == (-1, 1)
    with pytest.raises(ValueError, match="labels must name each of the 3 layers, got 2"):
        tensorplots.similarity(matrix, ["a", "b"])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_raw_arrays_of_somebody_elses_checkpoint_go_through_all_of_the_algebra(dtype):
    sizes = [(4, 10), (10, 5), (10, 5)]
    arrays = [np.random.default_rng(i).normal(size=size).astype(dtype) for i, size in enumerate(sizes)]
    B = bilens.BilinearTensor(*map(torch.from_numpy, arrays))
    x = torch.from_numpy(np.random.default_rng(3).normal(size=(3, 5)).astype(dtype))
    y = torch.from_numpy((x.numpy() @ arrays[1].T * (x.numpy() @ arrays[2].T)) @ arrays[0].T)
    U = torch.eye(4).to(y)
    terms = bilens.cp(B, 10, generator=torch.Generator().manual_seed(0))
    again = [bilens.recompose(eigen(B, U), U), bilens.recompose(bilens.hosvd(B, 4)), bilens.recompose(terms)]
    for one in [*again, terms.squares()]:
        torch.testing.assert_close(one.apply(x), y, rtol=1e-3, atol=1e-3)
        assert float(bilens.similarity(B, one)) > 1 - 1e-6
        assert float(bilens.frobenius_similarity(B, one)) > 1 - 1e-6
    spaces = bilens.eigenspaces(eigen(B, U[0]), gap=1e-3)
    assert sum(space.dim for space in spaces) == 5
    assert 1 <= float(bilens.participation_ratio(eigen(B, U[0]).values)) <= 5
    assert bilens.top_interactions(B, 3).value.shape == (3,)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_errors_name_the_argument():
    A, eye = layer(), torch.eye(5).double()
    zero = BilinearTensor(A.down * 0, A.left, A.right)
    for compare in (bilens.similarity, bilens.gaussian_inner, bilens.frobenius_similarity):
        with pytest.raises(ValueError, match="B must have 4 outputs and 5 inputs, as A has, got 4 and 6"):
            compare(A, layer(inp=6))
    with pytest.raises(ValueError, match="tensors must not be zero on the inputs, but number 1"):
        bilens.similarity(A, zero)
    with pytest.raises(ValueError, match="B must not be zero, got norm 0"):
        bilens.frobenius_similarity(A, zero)
    with pytest.raises(ValueError, match="tensors must hold at least one layer, got none"):
        bilens.similarity_matrix([])
    with pytest.raises(ValueError, match=r"second_moment must be finite and have shape \[5, 5\], got \[6, 6\]"):
        bilens.similarity(A, A, torch.eye(6))
    with pytest.raises(ValueError, match="second_moment must be finite"):
        bilens.similarity(A, A, eye * math.nan)
    with pytest.raises(ValueError, match=r"second_moment must be symmetric, got entries that differ by 0\.5"):
        bilens.similarity(A, A, eye + torch.nn.functional.pad(torch.tensor([[0.5]]), (1, 3, 0, 4)))
    with pytest.raises(ValueError, match="must be positive semidefinite, got an eigenvalue -1"):
        bilens.similarity(A, A, -eye)
    with pytest.raises(ValueError, match="must be positive semidefinite, got an eigenvalue -4"):
        bilens.similarity(A, A, eye, mean=torch.ones(5))
    with pytest.raises(ValueError, match=r"mean must be finite and have shape \[5\], got \[4\]"):
        bilens.similarity(A, A, mean=torch.ones(4))
    a = eigen(A, torch.ones(4).double())
    with pytest.raises(ValueError, match="b must have vectors of width 5, as a has, got 6"):
        bilens.quadratic_form_similarity(a, eigen(layer(inp=6), torch.ones(4).double()))
    with pytest.raises(ValueError, match="b must have a non-zero eigenvalue"):
        bilens.quadratic_form_similarity(a, eigen(zero, torch.ones(4).double()))
