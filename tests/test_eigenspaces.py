"""Eigenspaces against planted degeneracies, effective ranks against spectra whose rank is known."""

import math

import pytest
import torch

from bilens import BilinearTensor, eigen, eigenspaces
from bilens.report import tensorplots
from bilens.tensor import spectra
from bilens.tensor.decompositions import Eigen

RANKS = (spectra.participation_ratio, spectra.entropy_rank, spectra.l1l2_rank)


def rotation(n=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q


def layer_of(Q):
    """A layer with one output, whose interaction matrix is Q."""
    values, vectors = torch.linalg.eigh(Q)
    return BilinearTensor(values[None], vectors.T, vectors.T)


def decompose(Q, k=None):
    return eigen(layer_of(Q), torch.ones(1, dtype=torch.float64), k)


def planted(seed=0):
    """3 twice, -3 (as strong, far apart), 1 three times within 1e-3, 0; none of them near where printing rounds."""
    values = torch.tensor([3, 3, -3, 1, 1 + 3e-4, 1 - 6e-4, 0], dtype=torch.float64)
    V = rotation(seed=seed)
    return values, V, V * values @ V.T


def test_projectors_are_those_of_the_planted_spaces():
    values, V, Q = planted()
    spaces = eigenspaces(decompose(Q), gap=0.1)
    assert sorted(space.dim for space in spaces[:2]) == [1, 2]
    assert [space.dim for space in spaces[2:]] == [3, 1]
    for space in spaces:
        columns = V[:, (values - space.values.mean()).abs() < 0.1]
        torch.testing.assert_close(space.projector, columns @ columns.T, rtol=0, atol=1e-9)
        assert space.complete
    assert [space.separation for space in spaces[2:]] == pytest.approx([0.9994, 0.9994], abs=1e-9)
    total = sum(space.projector for space in spaces)
    torch.testing.assert_close(total, torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_small_gap_takes_apart_what_differs_and_a_large_one_leaves_one_space():
    _, _, Q = planted()
    assert sorted(space.dim for space in eigenspaces(decompose(Q), gap=1e-5)) == [1, 1, 1, 1, 1, 2]
    (everything,) = eigenspaces(decompose(Q), gap=100.0)
    assert everything.dim == 7
    assert everything.separation == math.inf


@pytest.mark.parametrize("seed", range(5))
def test_vectors_turn_under_a_change_but_the_space_stays_within_its_bound(seed):
    _, _, Q = planted(seed)
    E = torch.randn(7, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    E = 0.02 * (E + E.T) / torch.linalg.matrix_norm(E + E.T, 2)
    before, after = (next(s for s in eigenspaces(decompose(M), gap=0.1) if s.dim == 3) for M in (Q, Q + E))
    sine = (1 - before.cosines(after)[-1] ** 2).clamp(min=0).sqrt()
    assert sine <= 0.02 / (before.separation - 0.02)
    assert sine < 0.05
    assert (before.vectors * after.vectors).sum(1).abs().min() < 0.9


def test_a_cut_decomposition_says_what_it_cannot_know():
    _, _, Q = planted()
    spaces = eigenspaces(decompose(Q, k=4), gap=0.1)  # 3, 3, -3, and one of the three near 1
    assert [space.complete for space in spaces] == [True, True, False]
    assert spaces[-1].separation == 0
    assert all(abs(space.separation - (2 - 3e-4)) < 1e-9 for space in spaces[:2])
    assert "perhaps incomplete" in repr(spaces[-1])


@pytest.mark.parametrize("rank", RANKS)
def test_ranks_count_equal_eigenvalues_and_ignore_scale_sign_and_zeros(rank):
    values = torch.tensor([2.0, -2, 2, 0, 0])
    torch.testing.assert_close(rank(values), torch.tensor(3.0))
    torch.testing.assert_close(rank(-1e25 * values), torch.tensor(3.0))
    torch.testing.assert_close(rank(torch.stack((values, torch.eye(5)[0]))), torch.tensor([3.0, 1.0]))


def test_ranks_are_their_formulas_and_in_order():
    x = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    p = x.abs() / x.abs().sum()
    expected = ((x**2).sum() ** 2 / (x**4).sum(), torch.exp(-(p * p.log()).sum()), 1 / (p**2).sum())
    got = [rank(x) for rank in RANKS]
    torch.testing.assert_close(got, list(expected))
    assert 1 < got[0] < got[2] < got[1] < 40


@pytest.mark.usefixtures("unchecked")
def test_errors_name_the_argument():
    found = decompose(planted()[2])
    with pytest.raises(ValueError, match=r"eigen must be of one output direction, values \[k\], got \[1, 7\]"):
        eigenspaces(Eigen(found.values[None], found.vectors[None]), 0.1)
    for gap in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"gap must be positive and finite, got {gap}"):
            eigenspaces(found, gap)
    with pytest.raises(ValueError, match="other must lie in 7 dimensions, got 3"):
        eigenspaces(found, 0.1)[0].cosines(spectra.Eigenspace(torch.ones(1), torch.eye(3)[:1], 1.0, True))
    for rank in RANKS:
        with pytest.raises(ValueError, match="values must not all be zero"):
            rank(torch.zeros(3))
        with pytest.raises(ValueError, match="values must be finite"):
            rank(torch.tensor([1.0, math.nan]))
        with pytest.raises(ValueError, match=r"at least one, got shape \[0\]"):
            rank(torch.zeros(0))


def test_repr_shows_the_span():
    first, second, third, last = eigenspaces(decompose(planted()[2]), 0.1)
    assert repr(third) == "Eigenspace(dim=3, λ=+0.999 to +1, separation=0.999)"
    assert {repr(first), repr(second)} == {
        "Eigenspace(dim=2, λ=+3 to +3, separation=2)",
        "Eigenspace(dim=1, λ=-3, separation=3)",
    }
    assert last.dim == 1


def test_the_figure_marks_each_effective_rank_on_the_spectrum():
    values = torch.tensor([2.0, -2, 0.5])
    figure = tensorplots.effective_ranks(values)
    assert list(figure.data[0].y) == [2, 2, 0.5]
    marked = [line.x0 for line in figure.layout.shapes]
    assert marked == pytest.approx([float(rank(values)) for rank in RANKS])
    names = [note.text.rsplit(" ", 1)[0] for note in figure.layout.annotations]
    assert names == ["participation ratio", "entropy", "L1/L2"]
