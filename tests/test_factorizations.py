"""HOSVD and CP against dense decompositions by numpy and tensorly, and against what was planted."""

import math

import numpy as np
import pytest
import tensorly
import torch
from tensorly.decomposition import parafac, partial_tucker

import bilens
from bilens import BilinearTensor, cp, eigen, hosvd, recompose
from bilens.report import tensorplots

TENSORS = {"tall": (9, 14, 5, False), "biased": (4, 6, 7, True), "many outputs": (30, 8, 4, False)}


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(out=5, hidden=9, inp=6, bias=False, seed=0):
    shapes = [(out, hidden), (hidden, inp), (hidden, inp), *([(hidden,), (hidden,), (out,)] if bias else [])]
    return BilinearTensor.from_weights(*(random(*shape, seed=seed * 10 + i) for i, shape in enumerate(shapes)))


def planted(out, inp, rank, squares=False, seed=0):
    """A layer of known terms, and the same layer written with `out · inp` hidden units that show none of them."""
    down, left, right = random(out, rank, seed=seed), random(rank, inp, seed=seed + 1), random(rank, inp, seed=seed + 2)
    terms = BilinearTensor(down, left, left if squares else right)
    U = random(out, out, seed=seed + 3)
    return terms, recompose(eigen(terms, U), U)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def close(actual, expected, atol=1e-9):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


# -- HOSVD ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TENSORS)
def test_hosvd_is_the_svd_of_the_dense_unfolding(name):
    B = layer(*TENSORS[name])
    dense = B.dense()
    rank = min(B.out, 4)
    U, S, V = np.linalg.svd(dense.flatten(1).numpy(), full_matrices=False)
    found = hosvd(B, rank)
    close(found.singular, torch.tensor(S[:rank]), 1e-6)
    close(found.directions.abs(), torch.tensor(U[:, :rank].T).abs(), 1e-6)
    signs = (found.directions * torch.tensor(U[:, :rank].T)).sum(1).sign()
    matrices = torch.tensor(V[:rank]).reshape(rank, B.inp, B.inp) * (signs * torch.tensor(S[:rank]))[:, None, None]
    close(found.matrices(), matrices, 1e-6)
    spectrum = torch.zeros(B.out, dtype=torch.float64)
    spectrum[: len(S)] = torch.tensor(S)
    close(found.spectrum, spectrum, 1e-6)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("rank", [1, 3])
def test_hosvd_agrees_with_tensorly(name, rank):
    B = layer(*TENSORS[name])
    (core, factors), _ = partial_tucker(B.dense().numpy(), rank=[rank], modes=[0])
    expected = tensorly.tenalg.mode_dot(core, factors[0], 0)
    found = hosvd(B, rank)
    assert relative_error(recompose(found).dense(), torch.tensor(expected)) < 1e-6
    projector = torch.tensor(factors[0] @ factors[0].T)
    close(found.directions.T @ found.directions, projector, 1e-6)


def test_hosvd_holds_orthogonal_matrices_whose_norm_is_the_singular_value():
    B = layer()
    found = hosvd(B, 5)
    flat = found.matrices().flatten(1)
    close(flat @ flat.T, torch.diag(found.singular**2))
    close(found.directions @ found.directions.T, torch.eye(5, dtype=torch.float64))
    assert (found.directions.gather(1, found.directions.abs().argmax(1, keepdim=True)) > 0).all()
    values, vectors = found.eigen()
    direct = eigen(B, found.directions)
    close(values, direct.values)
    close(vectors, direct.vectors)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_truncation_error_is_measured_and_no_other_directions_do_better(rank):
    B = layer()
    found = hosvd(B, rank)
    assert relative_error(recompose(found).dense(), B.dense()) == pytest.approx(found.error, abs=1e-9)
    for seed in range(20):
        U = torch.linalg.qr(random(B.out, rank, seed=seed)).Q
        assert relative_error(torch.einsum("op,pij->oij", U @ U.T, B.dense()), B.dense()) > found.error


@pytest.mark.parametrize("bias", [False, True])
def test_all_directions_give_the_layer_back(bias):
    B = layer(bias=bias)
    found = hosvd(B, B.out)
    again, x = recompose(found), random(7, 6, seed=9)
    assert found.error == 0
    assert again.constant == bias
    close(again.apply(x), B.apply(x))


def test_a_layer_of_few_directions_is_seen_to_be_one():
    B = layer().project(out=random(20, 2, seed=1) @ random(2, 5, seed=2))
    found = hosvd(B, 20)
    assert (found.singular > 1e-6 * found.singular[0]).sum() == 2
    assert hosvd(B, 2).error < 1e-7


# -- CP ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("out", "inp", "rank"), [(5, 6, 3), (8, 10, 6)])
def test_planted_products_are_found_though_no_hidden_unit_shows_them(out, inp, rank):
    terms, B = planted(out, inp, rank)
    assert B.hidden > 2 * rank
    found = cp(B, rank, generator=generator(), starts=6)
    assert found.cosine > 1 - 1e-12
    assert relative_error(recompose(found).dense(), B.dense()) < 1e-6
    for truth in terms.left, terms.right:  # a term's two vectors are determined up to their order
        cosines = torch.cat((found.tensor.left, found.tensor.right)) @ torch.nn.functional.normalize(truth).T
        close(cosines.abs().amax(0), torch.ones(rank, dtype=torch.float64), 1e-6)
    weights = terms.down.norm(dim=0) * terms.left.norm(dim=1) * terms.right.norm(dim=1)
    close(found.weights, weights.sort(descending=True).values, 1e-5)


@pytest.mark.parametrize(("out", "inp", "rank"), [(5, 6, 3), (8, 10, 6)])
def test_planted_squares_are_those_that_tensorly_finds(out, inp, rank):
    _, B = planted(out, inp, rank, squares=True)
    found = cp(B, rank, generator=generator(), terms="squares", starts=6)
    dense = B.dense()
    weights, factors = parafac(dense.numpy(), rank, n_iter_max=5000, tol=1e-15, random_state=0, init="svd")
    theirs = tensorly.cp_to_tensor((weights, factors))
    assert relative_error(torch.tensor(theirs), dense) < 1e-6
    assert relative_error(recompose(found).dense(), torch.tensor(theirs)) < 1e-6
    for ours, factor in zip((found.tensor.down.T, found.tensor.left, found.tensor.right), factors, strict=True):
        cosines = torch.nn.functional.normalize(ours) @ torch.nn.functional.normalize(torch.tensor(factor).T).T
        close(cosines.abs().amax(1), torch.ones(rank, dtype=torch.float64), 1e-6)


def test_products_are_what_tensorly_finds_with_twice_as_many_terms():
    terms, B = planted(4, 5, 2, seed=3)
    theirs = tensorly.cp_to_tensor(parafac(B.dense().numpy(), 4, n_iter_max=20000, tol=1e-15, random_state=0))
    found = cp(B, 2, generator=generator(), starts=6)
    assert relative_error(torch.tensor(theirs), terms.dense()) < 1e-6
    assert relative_error(found.tensor.dense(), torch.tensor(theirs)) < 1e-6


@pytest.mark.parametrize("terms", ["products", "squares"])
@pytest.mark.parametrize("bias", [False, True])
def test_cosine_is_that_of_the_cubes_and_the_scale_is_best(terms, bias):
    B = layer(hidden=20, bias=bias)
    found = cp(B, 4, generator=generator(), terms=terms)
    ours, dense = found.tensor.dense(), B.dense()
    assert found.cosine == pytest.approx(
        float((ours * dense).sum() / ours.norm() / dense.norm()), abs=1e-7
    )  # terms may cancel
    assert found.error == pytest.approx(relative_error(ours, dense), abs=1e-6)
    assert found.converged
    assert found.history.diff().min() > -1e-9
    assert found.tensor.constant == bias
    assert 0 < found.cosine < 1


@pytest.mark.parametrize("terms", ["products", "squares"])
def test_no_output_of_a_term_could_be_better_and_the_inputs_are_stationary(terms):
    B = layer(hidden=20)
    found = cp(B, 3, generator=generator(), terms=terms, tol=0.0)
    T = found.tensor
    factors = [factor.clone().requires_grad_() for factor in (T.down, T.left, T.right)]
    fitted = BilinearTensor(*factors)
    error = B.inner(B) - 2 * B.inner(fitted) + fitted.inner(fitted)
    gradients = torch.autograd.grad(error, factors)
    if terms == "squares":  # left and right move together
        gradients = (gradients[0], gradients[1] + gradients[2])
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-5 * float(B.inner(B))


def test_more_terms_fit_better_and_as_many_as_the_layer_has_fit_exactly():
    B = layer(hidden=6)
    cosines = [cp(B, rank, generator=generator(), starts=2).cosine for rank in (1, 2, 4, 6)]
    assert cosines == sorted(cosines)
    assert cosines[-1] > 1 - 1e-12
    assert cp(B, 12, generator=generator(), terms="squares").cosine > 1 - 1e-12


def test_the_best_start_is_kept():
    B = layer(hidden=20, seed=4)
    several = cp(B, 4, generator=generator(), starts=5).cosine
    g = generator()
    assert several >= cp(B, 4, generator=g).cosine
    assert several == pytest.approx(cp(B, 4, generator=generator(), starts=5).cosine, abs=1e-12)


def test_of_orthogonal_hidden_units_those_are_kept_whose_symmetric_part_is_largest():
    e = torch.eye(9, dtype=torch.float64)
    down = torch.cat((1.1 * e[:, :3], e[:, 3:6]), 1)
    B = BilinearTensor(down, torch.cat((e[:3], e[6:])), torch.cat((e[3:6], e[6:])))  # x_i x_j, then x_i²
    found = cp(B, 3, generator=generator())
    assert found.cosine**2 == pytest.approx(3 / (3 + 3 * 1.1**2 / 2), abs=1e-9)
    close(found.tensor.left.abs().sum(0), e[6:].sum(0), 1e-2)  # a and b may part a little: a b = c² - δ²


@pytest.mark.parametrize("bias", [False, True])
def test_products_are_differences_of_squares(bias):
    B = layer(hidden=12, bias=bias)
    found = cp(B, 3, generator=generator())
    squares = found.squares()
    assert torch.equal(squares.left, squares.right)
    assert squares.hidden == 6
    close(squares.dense(), found.tensor.dense())
    x = random(5, 6, seed=8)
    close(squares.apply(x), found.tensor.apply(x))
    assert cp(B, 3, generator=generator(), terms="squares").squares().hidden == 3


def test_terms_are_unit_rows_in_order_of_weight():
    found = cp(layer(hidden=20), 5, generator=generator())
    assert (found.weights.diff() <= 0).all()
    for factor in (found.tensor.left, found.tensor.right):
        close(factor.norm(dim=1), torch.ones(5, dtype=torch.float64))
        assert (factor.gather(1, factor.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_computed_in_float32(dtype):
    B = layer(hidden=20).to(dtype)
    exact = B.to(torch.float64)
    for terms in ("products", "squares"):
        found = cp(B, 4, generator=generator(), terms=terms)
        assert found.tensor.down.dtype == torch.float32
        inner = exact.inner(found.tensor.to(torch.float64)) / exact.norm() / found.tensor.to(torch.float64).norm()
        assert found.cosine == pytest.approx(float(inner), abs=1e-9)
    parts = hosvd(B, 3)
    assert parts.directions.dtype == torch.float32
    close(parts.singular, hosvd(exact, 3).singular, 1e-6)


# -- recompose --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n", [5, 8])
def test_eigenvectors_of_directions_that_span_the_outputs_give_the_layer_back(n, bias):
    B = layer(bias=bias)
    U, x = random(n, 5, seed=4), random(7, 6, seed=5)
    again = recompose(eigen(B, U), U, constant=bias)
    close(again.apply(x), B.apply(x))
    close(again.dense(), B.dense())


def test_few_eigenvectors_of_a_hosvd_are_a_layer_too():
    B = layer()
    found = hosvd(B, 2)
    values, vectors = found.eigen(k=3)
    matrices = torch.einsum("rk,rki,rkj->rij", values, vectors, vectors)
    expected = torch.einsum("ro,rij->oij", found.directions, matrices)
    close(recompose(found.eigen(k=3), found.directions).dense(), expected)


# -- figures ----------------------------------------------------------------------------------------------------------


def test_the_figure_of_a_hosvd_shows_its_singular_values_and_matrices():
    found = hosvd(layer(), 3)
    figure = tensorplots.hosvd(found, n_matrices=2)
    bars, *matrices = figure.data
    assert list(bars.y) == [float(f"{value:.4g}") for value in found.spectrum.tolist()]
    assert len(matrices) == 2
    for trace, matrix in zip(matrices, found.matrices(), strict=False):
        close(torch.tensor(trace.z).double(), matrix, 1e-3)
    with pytest.raises(ValueError, match="n_matrices must lie between 1 and the rank, 3, got 4"):
        tensorplots.hosvd(found, n_matrices=4)


def test_the_figure_of_cosines_has_a_point_per_rank():
    fits = [cp(layer(hidden=20), rank, generator=generator()) for rank in (1, 2, 4)]
    figure = tensorplots.cp_cosines(fits)
    assert list(figure.data[0].x) == [1, 2, 4]
    assert list(figure.data[0].y) == [float(f"{fit.cosine:.4g}") for fit in fits]
    with pytest.raises(ValueError, match="fits must hold at least one CP, got none"):
        tensorplots.cp_cosines([])


# -- errors and looks -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_errors_name_the_argument():
    B = layer()
    for rank in (0, -1, 6):
        with pytest.raises(ValueError, match=f"rank must lie between 1 and out=5, got {rank}"):
            hosvd(B, rank)
    with pytest.raises(ValueError, match="rank must lie between 1 and hidden=9, got 10"):
        cp(B, 10, generator=generator())
    with pytest.raises(ValueError, match="rank must lie between 1 and 2 hidden=18, got 19"):
        cp(B, 19, generator=generator(), terms="squares")
    with pytest.raises(ValueError, match="terms must be 'products' or 'squares', got 'cubes'"):
        cp(B, 2, generator=generator(), terms="cubes")
    for option in ("starts", "steps"):
        with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
            cp(B, 2, generator=generator(), **{option: 0})
    with pytest.raises(ValueError, match=r"tol must lie between 0 and 1, got 1\.0"):
        cp(B, 2, generator=generator(), tol=1.0)
    broken = BilinearTensor(B.down, B.left * math.nan, B.right)
    zero = BilinearTensor(B.down * 0, B.left, B.right)
    for factorise in (lambda B: hosvd(B, 2), lambda B: cp(B, 2, generator=generator())):
        with pytest.raises(ValueError, match=r"B\.left must be finite"):
            factorise(broken)
        with pytest.raises(ValueError, match="B must not be zero"):
            factorise(zero)
    with pytest.raises(ValueError, match=r"directions must have shape \[n, out\] .*\[2, 6\], got none"):
        recompose(eigen(B, torch.eye(5)[:2].double()))
    with pytest.raises(ValueError, match=r"directions must have shape .* got \[3, 5\]"):
        recompose(eigen(B, torch.eye(5)[:2].double()), torch.eye(5)[:3].double())
    with pytest.raises(ValueError, match="directions and constant must be left out for HOSVD"):
        recompose(hosvd(B, 2), torch.eye(5).double())


def test_reprs_show_sizes_and_the_result():
    B = layer()
    assert repr(hosvd(B, 2)).startswith("HOSVD(rank=2 of 5, error=0.")
    assert repr(bilens.cp(B, 2, generator=generator())).startswith("CP(rank=2, cosine=0.")
    assert "not converged after 1 steps" in repr(bilens.cp(B, 2, generator=generator(), steps=1))
