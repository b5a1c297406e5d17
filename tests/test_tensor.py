"""Every operation of `BilinearTensor` against a dense oracle in float64, over all constructors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilens import BilinearTensor
from bilens.models.mlp import MLP, MLPConfig

sizes = st.integers(1, 5)
flags = st.booleans()


def random(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def from_factors(g, draw, out, inp, hidden):
    down, left, right = random(g, out, hidden), random(g, hidden, inp), random(g, hidden, inp)
    return BilinearTensor(down, left, right), lambda x: (x @ left.T * (x @ right.T)) @ down.T


def from_weights(g, draw, out, inp, hidden):
    down, left, right = random(g, out, hidden), random(g, hidden, inp), random(g, hidden, inp)
    biases = {
        "left_bias": random(g, hidden) if draw(flags) else None,
        "right_bias": random(g, hidden) if draw(flags) else None,
        "out_bias": random(g, out) if draw(flags) else None,
    }
    a, b, c = (torch.zeros(()) if bias is None else bias for bias in biases.values())
    return BilinearTensor.from_weights(
        down, left, right, **biases
    ), lambda x: ((x @ left.T + a) * (x @ right.T + b)) @ down.T + c


def from_layer(g, draw, out, inp, hidden):
    mlp = MLP(MLPConfig(hidden, bias=(draw(flags), draw(flags))), inp).double().requires_grad_(False)
    for parameter in mlp.parameters():
        parameter.copy_(random(g, *parameter.shape))
    return mlp.tensor(), mlp


@st.composite
def tensors(draw):
    """Draw a tensor, the function it should be, and a generator of random numbers: up to two changes of basis deep."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    make = draw(st.sampled_from([from_factors, from_weights, from_layer]))
    B, f = make(g, draw, draw(sizes), draw(sizes), draw(sizes))
    for _ in range(draw(st.integers(0, 2))):
        B, f = projected(g, draw, B, f)
    return B, f, g


def projected(g, draw, B, f):
    width = B.inp - B.constant
    out = random(g, draw(sizes), B.out) if draw(flags) else None
    inp = random(g, draw(sizes), width) if draw(flags) else None
    out_bias = random(g, B.out if out is None else len(out)) if draw(flags) else None
    inp_bias = random(g, width) if draw(flags) else None

    def g_of_f(z):
        x = z if inp is None else z @ inp
        y = f(x if inp_bias is None else x + inp_bias)
        y = y if out is None else y @ out.T
        return y if out_bias is None else y + out_bias

    return B.project(out, inp, out_bias=out_bias, inp_bias=inp_bias), g_of_f


def cube(B):
    """The dense oracle, straight from the definition."""
    cube = torch.einsum("oh,hi,hj->oij", B.down, B.left, B.right)
    return (cube + cube.mT) / 2


def homogeneous(B, x):
    return torch.cat((x, x.new_ones(*x.shape[:-1], 1)), -1) if B.constant else x


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@given(tensors(), st.sampled_from([(), (3,), (2, 3), (0,)]))
def test_apply_is_the_function_the_tensor_was_built_from(drawn, batch):
    B, f, g = drawn
    x = random(g, *batch, B.inp - B.constant)
    assert_close(B.apply(x), f(x))


@given(tensors())
def test_the_cube_is_symmetric_and_acts_as_the_function(drawn):
    B, f, g = drawn
    x = random(g, 4, B.inp - B.constant)
    z = homogeneous(B, x)
    assert_close(B.dense(), cube(B))
    assert_close(torch.einsum("oij,ni,nj->no", B.dense(), z, z), f(x))
    assert B.dense().shape == B.shape == (B.out, B.inp, B.inp)


@given(tensors(), st.sampled_from([(), (3,), (2, 3), (0,)]))
def test_polar_is_the_bilinear_form_of_differences(drawn, batch):
    B, f, g = drawn
    width = B.inp - B.constant
    a, b = random(g, *batch, width), random(g, *batch, width)
    form = cube(B)[:, :width, :width]
    assert_close(B.polar(a, b), torch.einsum("oij,...i,...j->...o", form, a, b))
    assert_close(B.polar(a, b), B.polar(b, a))
    x = random(g, *batch, width)  # what is neither in a nor in b alone
    assert_close(f(x + a + b) - f(x + a) - f(x + b) + f(x), 2 * B.polar(a, b))


@given(tensors())
def test_polar_broadcasts(drawn):
    B, _, g = drawn
    a, b = random(g, 3, 1, B.inp - B.constant), random(g, 1, 2, B.inp - B.constant)
    assert_close(B.polar(a, b), B.polar(a.expand(3, 2, -1), b.expand(3, 2, -1)))


@given(tensors())
def test_without_constant_is_the_quadratic_part(drawn):
    B, f, g = drawn
    x = random(g, 4, B.inp - B.constant)
    quadratic = B.without_constant()
    assert not quadratic.constant
    assert (quadratic is B) != B.constant
    assert_close(quadratic.apply(x), (f(x) + f(-x)) / 2 - f(0 * x))
    assert_close(quadratic.apply(x), B.polar(x, x))


def test_polar_refuses_the_constant_coordinate():
    B = BilinearTensor.from_weights(*torch.ones(3, 2, 2), left_bias=torch.ones(2))
    with pytest.raises(ValueError, match=r"a must have 2 features on its last axis, got shape \[4, 3\]"):
        B.polar(torch.ones(4, 3), torch.ones(4, 3))


@given(tensors())
def test_matrix_is_symmetric_and_its_quadratic_form_is_the_output(drawn):
    B, f, g = drawn
    u, x = random(g, 3, B.out), random(g, 4, B.inp - B.constant)
    z, Q = homogeneous(B, x), B.matrix(u)
    assert torch.equal(Q, Q.mT)
    assert_close(Q, torch.einsum("no,oij->nij", u, cube(B)))
    assert_close(torch.einsum("nij,bi,bj->bn", Q, z, z), f(x) @ u.T)
    assert_close(B.matrix(u[0]), Q[0])


@given(tensors(), sizes)
def test_inner_and_norm_are_frobenius(drawn, hidden):
    B, _, g = drawn
    down, left, right = random(g, B.out, hidden), random(g, hidden, B.inp), random(g, hidden, B.inp)
    other = BilinearTensor(down, left, right, constant=B.constant)
    assert_close(B.inner(other), (cube(B) * cube(other)).sum())
    assert_close(other.inner(B), B.inner(other))
    assert_close(B.norm(), cube(B).norm())


@given(tensors())
def test_diagonal_is_the_diagonal_of_the_cube(drawn):
    B, _, _ = drawn
    assert_close(B.diagonal(), cube(B).diagonal(dim1=1, dim2=2))


@given(tensors())
def test_other_factors_of_the_same_cube_are_the_same_tensor(drawn):
    B, _, g = drawn
    order, scale = torch.randperm(B.hidden, generator=g), random(g, B.hidden).exp()[:, None]
    same = {
        "swapped": BilinearTensor(B.down, B.right, B.left, B.constant),
        "permuted": BilinearTensor(B.down[:, order], B.left[order], B.right[order], B.constant),
        "rescaled": BilinearTensor(B.down / scale.T, B.left * scale, B.right, B.constant),
        "balanced": BilinearTensor(B.down, B.left * scale, B.right / scale, B.constant),
    }
    x, u = random(g, 3, B.inp - B.constant), random(g, B.out)
    for other in same.values():
        assert_close(other.dense(), B.dense())
        assert_close(other.apply(x), B.apply(x))
        assert_close(other.matrix(u), B.matrix(u))
        assert_close(other.norm(), B.norm())
        assert_close(other.inner(B), B.inner(B))


@given(tensors(), sizes, sizes, sizes, sizes)
def test_projections_compose(drawn, out_1, out_2, inp_1, inp_2):
    B, _, g = drawn
    width = B.inp - B.constant
    U, V, D, E = random(g, out_1, B.out), random(g, out_2, out_1), random(g, inp_1, width), random(g, inp_2, inp_1)
    assert_close(B.project(U, D).project(V, E).dense(), B.project(V @ U, E @ D).dense())
    assert_close(B.project(out=U).project(inp=D).dense(), B.project(U, D).dense())


@given(tensors())
def test_projection_changes_each_leg_of_the_cube(drawn):
    B, _, g = drawn
    U, D = random(g, 3, B.out), random(g, 4, B.inp - B.constant)
    legs = torch.block_diag(D, torch.ones(1, 1, dtype=D.dtype)) if B.constant else D
    assert_close(B.project(U, D).dense(), torch.einsum("po,oij,ai,bj->pab", U, cube(B), legs, legs))
    assert B.project(U, D).constant == B.constant


def test_one_hidden_unit_has_two_eigenvalues():
    # 2410.08417, appendix: (w·v ± |w||v|) / 2
    g = torch.Generator().manual_seed(0)
    w, v = random(g, 1, 6), random(g, 1, 6)
    values = torch.linalg.eigvalsh(BilinearTensor(torch.ones(1, 1).double(), w, v).matrix(torch.ones(1).double()))
    product, lengths = (w * v).sum(), w.norm() * v.norm()
    assert_close(values[[0, -1]], torch.stack((product - lengths, product + lengths)) / 2)
    assert values[1:-1].abs().max() < 1e-12


@pytest.mark.parametrize("bias", ["left_bias", "right_bias", "out_bias", None])
def test_a_bias_makes_a_constant_leg_and_only_a_bias_does(bias):
    g = torch.Generator().manual_seed(0)
    down, left, right = random(g, 3, 4), random(g, 4, 5), random(g, 4, 5)
    biases = {} if bias is None else {bias: random(g, 3 if bias == "out_bias" else 4)}
    B = BilinearTensor.from_weights(down, left, right, **biases)
    assert (B.constant, B.inp, B.hidden) == (bias is not None, 5 + (bias is not None), 4 + (bias == "out_bias"))


def test_nothing_but_dense_builds_the_cube():
    g = torch.Generator().manual_seed(0)
    n = 5000  # the cube would be a terabyte
    B = BilinearTensor(random(g, n, 2), random(g, 2, n), random(g, 2, n))
    small = B.project(random(g, 3, n), random(g, 4, n))
    assert small.shape == (3, 4, 4)
    assert B.apply(random(g, n)).shape == (n,)
    assert B.norm() > 0
    assert B.diagonal().shape == (n, n)
    assert repr(B) == "BilinearTensor(out=5000, inp=5000, hidden=2, float64)"


def test_to_and_detach_keep_everything_else():
    g = torch.Generator().manual_seed(0)
    bias = random(g, 4).requires_grad_()
    B = BilinearTensor.from_weights(random(g, 3, 4), random(g, 4, 5), random(g, 4, 5), left_bias=bias)
    assert B.left.requires_grad
    assert not B.detach().left.requires_grad
    assert torch.equal(B.detach().left, B.left)
    half = B.to(torch.bfloat16)
    assert {half.down.dtype, half.left.dtype, half.right.dtype} == {torch.bfloat16}
    assert half.constant
    assert repr(half) == "BilinearTensor(out=3, inp=6, hidden=4, last inp constant, bfloat16)"


def test_gradients_reach_the_weights():
    mlp = MLP(MLPConfig(3, bias=(True, True)), 4)
    mlp.tensor().norm().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in mlp.parameters())


def tensor(out=3, inp=4, hidden=2, constant=False):
    return BilinearTensor(torch.ones(out, hidden), torch.ones(hidden, inp), torch.ones(hidden, inp), constant)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BilinearTensor(torch.ones(3, 2), torch.ones(5, 4), torch.ones(5, 4)), r"down \[3, 2\], left \[5, 4\]"),
        (lambda: BilinearTensor(torch.ones(3, 2), torch.ones(2, 4), torch.ones(2, 5)), r"right \[2, 5\]"),
        (lambda: BilinearTensor(torch.ones(3, 2).numpy(), *[torch.ones(2, 4)] * 2), "down must be a torch .* ndarray"),
        (
            lambda: BilinearTensor(torch.ones(3, 2), *[torch.ones(2, 4).int()] * 2),
            "left must hold floating point numbers, got torch.int32",
        ),
        (
            lambda: BilinearTensor(torch.ones(3, 2).double(), *[torch.ones(2, 4)] * 2),
            "one dtype and one device, got down torch.float64 on cpu, left torch.float32",
        ),
        (lambda: tensor().apply(torch.ones(2, 5)), r"x must have 4 features .*\[2, 5\]"),
        (lambda: tensor(constant=True).apply(torch.ones(4)), r"x must have 3 features .*\[4\]"),
        (lambda: tensor().matrix(torch.ones(2, 4)), r"u must have 3 entries .*\[2, 4\]"),
        (lambda: tensor().project(out=torch.ones(2, 4)), r"out must have shape \[n, 3\], got \[2, 4\]"),
        (lambda: tensor().project(inp=torch.ones(2, 3)), r"inp must have shape \[n, 4\], got \[2, 3\]"),
        (lambda: tensor(constant=True).project(inp=torch.ones(2, 4)), r"inp must have shape \[n, 3\]"),
        (lambda: tensor().project(inp_bias=torch.ones(5)), r"inp_bias must have shape \[4\], got \[5\]"),
        (lambda: tensor().project(out_bias=torch.ones(4)), r"out_bias must have shape \[3\], got \[4\]"),
        (lambda: tensor().inner(tensor(out=2)), "other must have the same legs"),
        (lambda: tensor().inner(tensor(constant=True)), "other must have the same legs"),
    ],
)
def test_errors_name_the_argument_and_its_shape(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("kind", "act"), [("gated", "silu"), ("plain", "relu"), ("gated", "identity")])
def test_only_a_bilinear_layer_is_a_tensor(kind, act):
    with pytest.raises(TypeError, match=f"this one is {kind} with activation '{act}'"):
        MLP(MLPConfig(3, kind, act), 4).tensor()
