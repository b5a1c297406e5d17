"""Boolean toys: the matrices known in advance are those of the logic table, and trained weights show them."""

import pytest
import torch

from bilens import BilinearTensor, eigen
from bilens.tensor import toys
from bilens.tensor.toys import Gate, Toy

BITS = ("and", "or", "xor")
ALL = tuple(toys.GATES)


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def of(ops, n=4, **kind):
    """Every operation on a pair of its own, and mixtures of the first ones on the others."""
    pairs = [(i, j) for i in range(n) for j in range(i)]
    return Toy([Gate(op, *pair) for op, pair in zip(ops, pairs, strict=False)], n, **kind)


KINDS = [
    of([*BITS, {"and": 2, "xor": -1}]),
    of([*ALL, {"nor": 0.5, "xor": 3}], n=5, bias=True),
    of(["xor", "xnor", {"xor": 1, "xnor": -2}], encoding="signs"),
    of([*ALL, {"or": 0.5, "nand": 3}], n=5, encoding="signs", bias=True),
]


@pytest.mark.parametrize("toy", KINDS, ids=lambda toy: f"{toy.encoding}, bias={toy.bias}")
def test_matrices_give_the_truth_table(toy):
    x, Q = toy.inputs(torch.float64), toy.matrices(torch.float64)
    z = torch.cat((x, x.new_ones(len(x), 1)), 1) if toy.bias else x
    close(torch.einsum("ri,gij,rj->rg", z, Q, z), toy.outputs(x))
    close(toy.canonical(Q), Q)


@pytest.mark.parametrize("toy", KINDS, ids=lambda toy: f"{toy.encoding}, bias={toy.bias}")
def test_canonical_form_is_the_same_exactly_for_matrices_that_agree_on_the_table(toy):
    inp = toy.n_inputs + toy.bias
    x = toy.inputs(torch.float64)
    z = torch.cat((x, x.new_ones(len(x), 1)), 1) if toy.bias else x
    products = torch.einsum("ri,rj->rij", z, z).flatten(1)
    same = torch.linalg.svd(products).Vh[torch.linalg.matrix_rank(products) :]  # forms that vanish on the table
    Q = torch.randn(inp, inp, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for change in same:
        close(toy.canonical(Q + change.reshape(inp, inp)), toy.canonical(Q))
    close(torch.einsum("ri,ij,rj->r", z, toy.canonical(Q), z), torch.einsum("ri,ij,rj->r", z, Q, z))


@pytest.mark.parametrize("toy", KINDS, ids=lambda toy: f"{toy.encoding}, bias={toy.bias}")
def test_trained_weights_show_the_matrices(toy):
    B = toys.train(toy, generator=torch.Generator().manual_seed(0))
    close(B.apply(toy.inputs()), toy.outputs(toy.inputs()), atol=0.02)
    close(toy.canonical(B.dense()), toy.matrices(), atol=0.02)


def test_xor_of_signs_is_two_eigenvectors_of_opposite_sign():
    toy = Toy([Gate("xor", 0, 2)], 3, encoding="signs")
    B = toys.train(toy, generator=torch.Generator().manual_seed(0))
    assert eigen(B, torch.ones(1), k=2).values.prod() < -0.1
    values, vectors = torch.linalg.eigh(toy.canonical(B.dense())[0])
    close(values, torch.tensor([-0.5, 0, 0.5]), atol=0.02)
    close(vectors[:, [0, 2]].abs(), torch.tensor([[0.5, 0, 0.5]] * 2).T.sqrt(), atol=0.05)
    assert vectors[[0, 2], 2].prod() < 0 < vectors[[0, 2], 0].prod()  # differing inputs for it, equal ones against


def test_xor_of_bits_is_one_square_and_and_is_an_off_diagonal_pair():
    toy = Toy([Gate("xor", 0, 1), Gate("and", 0, 1)], 2)
    B = toys.train(toy, generator=torch.Generator().manual_seed(1))
    values, _ = eigen(B, torch.eye(2))
    close(values.sort(1).values, torch.tensor([[0, 2.0], [-0.5, 0.5]]), 0.02)
    close(B.dense(), torch.tensor([[[1, -1], [-1, 1]], [[0, 0.5], [0.5, 0]]]), atol=0.02)


def test_a_mixture_is_read_by_projecting_gates():
    gates = Toy([Gate("xor", 0, 1), Gate("and", 0, 1)], 2)
    mixed = Toy([Gate({"xor": 1, "and": 1}, 0, 1), Gate("or", 0, 1)], 2).matrices()
    eye = torch.eye(2)
    B = BilinearTensor(gates.matrices().flatten(1), eye.repeat_interleave(2, 0), eye.repeat(2, 1))
    close(B.project(out=torch.ones(1, 2)).dense()[0], mixed[0])
    close(mixed[0], mixed[1])  # xor or and: or


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: of(["xor"], encoding="words"), "encoding must be 'bits' or 'signs', got 'words'"),
        (lambda: Toy([Gate("but", 0, 1)], 2), "op must be one of and, or, xor, nand, nor, xnor, got 'but'"),
        (lambda: Toy([Gate({}, 0, 1)], 2), "op must be one of .* got 'none'"),
        (lambda: Toy([Gate("and", 0, 2)], 2), r"two different inputs from 0 to 1, got \(0, 2\)"),
        (lambda: Toy([Gate("and", 1, 1)], 2), r"two different inputs from 0 to 1, got \(1, 1\)"),
        (lambda: Toy([Gate("and", 0, 1)], 17), "n_inputs must lie between 2 and 16 .* got 17"),
        (lambda: Toy([], 2), "gates must hold at least one gate"),
        (lambda: Toy([Gate("nor", 0, 1)], 2), r"nor\(x0, x1\) is not 0 where all inputs are, .* got bias=False"),
        (lambda: Toy([Gate("and", 0, 1)], 2, encoding="signs"), r"and\(x0, x1\) is not even, .* got bias=False"),
        (lambda: toys.train(of(["xor"]), 0, generator=torch.Generator()), "hidden must be at least 1, got 0"),
        (lambda: toys.train(of(["xor"]), steps=0, generator=torch.Generator()), "steps must be at least 1, got 0"),
    ],
)
def test_bad_input(make, message, unchecked):
    with pytest.raises(ValueError, match=message):
        make()
