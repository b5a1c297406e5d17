"""The degree check: bilinear layers pass, every impostor is told apart; the tensor of a black box is the layer's."""

from pathlib import Path

import pytest
import torch
from torch import nn

import bilens
from bilens import BilinearTensor, check_quadratic, degree, recover_tensor
from bilens.report import tensorplots

PUBLISHED = Path(__file__).parents[1] / "../shared/fixtures/published-format"
WIDTH = 7


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def tensor(seed=0, out=3, hidden=5, bias=False):
    shapes = [(out, hidden), (hidden, WIDTH), (hidden, WIDTH), *([(hidden,), (hidden,), (out,)] if bias else [])]
    g = rng(seed)
    return BilinearTensor.from_weights(*(torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes))


def power(n, seed=0):
    """Products of n random linear maps, elementwise: of degree n."""
    factors = torch.randn(n, WIDTH, 4, generator=rng(seed), dtype=torch.float64)
    return lambda x: (x @ factors).prod(0) if n else x.new_ones(len(x), 4)


class Annealed(nn.Module):
    """A gate that was to become linear: at its end it is (Lx) ⊙ x, so the block around it is cubic."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.down = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x):
        return self.down(self.left(x) * x * self.right(x))


# -- degree -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(8))
def test_a_product_of_n_linear_maps_has_degree_n(n):
    found = degree(power(n), WIDTH, max_degree=8, generator=rng())
    assert found.degree == n
    assert found.residual < 1e-13
    assert all(residual > 1e-3 for residual in found.residuals[:n])


def test_one_output_of_a_higher_degree_is_seen_however_small():
    square, cube = power(2), power(3, seed=1)
    assert degree(lambda x: torch.cat((square(x), 1e-6 * cube(x)), 1), WIDTH, generator=rng()).degree == 3
    assert degree(lambda x: square(x) + 1e-6 * cube(x), WIDTH, generator=rng()).degree == 3
    assert degree(lambda x: torch.cat((square(x), 0 * cube(x)), 1), WIDTH, generator=rng()).degree == 2


def test_the_residual_is_the_part_that_no_lower_degree_explains():
    """Along the line from b to a, x² is (mean + t·half)²: its Chebyshev coefficients are known."""
    a, b = 3.0, 1.0
    points = torch.tensor([[a], [b]], dtype=torch.float64)
    found = degree(lambda x: x**2, points, generator=rng())
    mean, half = (a + b) / 2, (a - b) / 2
    coefficients = torch.tensor([mean**2 + half**2 / 2, 2 * mean * half, half**2 / 2], dtype=torch.float64)
    expected = [(coefficients[k:].norm() / coefficients.norm()).item() for k in (1, 2)]
    assert found.residuals[:2] == pytest.approx(expected, rel=1e-5)
    assert found.degree == 2


@pytest.mark.parametrize("biases", [(False, False), (True, True), (True, False)])
def test_a_bilinear_layer_is_quadratic_in_any_precision(make_model, biases):
    for dtype in (torch.float32, torch.bfloat16):
        mlp = make_model(dtype=dtype, mlp_bias=biases).blocks[0].mlp
        found = check_quadratic(mlp, generator=rng())
        assert found.degree == 2
        assert found.residual < 1e-13
        assert mlp.w.weight.dtype == dtype


def test_linear_and_constant_maps_pass_and_are_named(make_model):
    assert check_quadratic(nn.Linear(WIDTH, 3), generator=rng()).degree == 1
    silent = make_model().blocks[0].mlp
    silent.p.weight.data.zero_()
    assert check_quadratic(silent, generator=rng()).degree == 0


# -- impostors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gated", "plain"])
@pytest.mark.parametrize("act", ["silu", "gelu", "relu"])
def test_gates_and_activations_are_refused(make_model, kind, act):
    mlp = make_model(mlp=kind, act=act).blocks[0].mlp
    says = f"f\\(2x\\) = {4 if kind == 'gated' else 2} f\\(x\\)" if act == "relu" else "no polynomial of degree up to 6"
    with pytest.raises(ValueError, match=rf"f must be quadratic .*{says}.* the best quadratic function misses \d"):
        check_quadratic(mlp, generator=rng())


def test_a_gate_that_is_the_identity_is_no_impostor(make_model):
    assert check_quadratic(make_model(mlp="gated", act="identity").blocks[0].mlp, generator=rng()).degree == 2


def test_the_cubic_impostor_is_named():
    with pytest.raises(ValueError, match="f must be quadratic in its input, but is a polynomial of degree 3"):
        check_quadratic(Annealed(), generator=rng())


@pytest.mark.parametrize("norm", ["rms", "rms_gain_shift"])
def test_a_norm_left_in_is_named(make_model, norm):
    block = make_model(norm=norm).blocks[0]
    with pytest.raises(ValueError, match="does not depend on the length of its input, so a norm is left in"):
        check_quadratic(nn.Sequential(block.ln2, block.mlp), generator=rng())


def test_an_almost_annealed_gate_is_no_polynomial():
    L, R = torch.randn(2, WIDTH, 4, generator=rng(), dtype=torch.float64)
    for beta, passes in ((1e-3, False), (1e-12, True)):
        found = degree(lambda x, beta=beta: (x @ L) * (beta * (x @ L)).sigmoid() * (x @ R), WIDTH, generator=rng())
        assert (found.degree == 2) == passes


def test_what_is_clipped_far_out_shows_there_only():
    square = power(2)
    clipped = lambda x: square(x.clamp(-20, 20))  # noqa: E731
    assert check_quadratic(clipped, WIDTH, generator=rng()).degree == 2
    with pytest.raises(ValueError, match="f must be quadratic"):
        check_quadratic(clipped, WIDTH, scale=30, generator=rng())
    far = 100 * torch.randn(50, WIDTH, generator=rng(), dtype=torch.float64)
    with pytest.raises(ValueError, match="f must be quadratic"):
        check_quadratic(clipped, far, generator=rng())


@pytest.mark.parametrize("name", ["bilinear", "bias", "no-norm", "swiglu", "relu-mlp", "2024-06", "2024-05"])
@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs the published fixtures in ../shared")
def test_published_layers(name):
    model = bilens.load(PUBLISHED / name)
    found = degree(model.blocks[-1].mlp, generator=rng())
    assert found.degree == (2 if model.cfg.mlp.kind == "bilinear" else None)


# -- the tensor of a black box ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_the_tensor_of_a_black_box_is_the_layers(bias):
    B = tensor(bias=bias)
    found = recover_tensor(B.apply, WIDTH, generator=rng())
    assert found.constant == bias
    torch.testing.assert_close(found.dense(), B.dense(), rtol=1e-10, atol=1e-10)


def test_directions_of_the_output_and_a_module(make_model):
    mlp = make_model(mlp_bias=(True, False)).blocks[0].mlp
    out = torch.randn(2, 16, generator=rng(), dtype=torch.float64)
    found = recover_tensor(mlp, out=out, scale=3.0, generator=rng())
    torch.testing.assert_close(found.dense(), mlp.tensor().project(out).dense(), rtol=1e-10, atol=1e-10)


def test_a_linear_map_and_low_rank_keep_few_hidden_units():
    weight = torch.randn(3, WIDTH, generator=rng(), dtype=torch.float64)
    found = recover_tensor(lambda x: x @ weight.T, WIDTH, generator=rng())
    torch.testing.assert_close(found.apply(torch.eye(WIDTH, dtype=torch.float64)), weight.T)
    assert recover_tensor(tensor(out=2, hidden=1).apply, WIDTH, generator=rng()).hidden == 4
    assert recover_tensor(lambda x: 0 * x, WIDTH, generator=rng()).hidden == 0


def test_what_is_not_quadratic_has_no_tensor():
    with pytest.raises(ValueError, match="is a polynomial of degree 3"):
        recover_tensor(power(3), WIDTH, generator=rng())
    square = power(2)
    with pytest.raises(ValueError, match="read off at unit vectors misses"):  # special where two coordinates are alone
        recover_tensor(lambda x: torch.where((x != 0).sum(1, True) == 2, 0, square(x)), WIDTH, generator=rng())


# -- errors and reprs -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("f", "options", "says"),
    [
        (power(2), {"inp": None}, "inp must give the width of the input"),
        (nn.ReLU(), {"inp": None}, "inp must give the width of the input"),
        (power(2), {"inp": 0}, "inp must be at least 1, got 0"),
        (power(2), {"inp": torch.zeros(1, 7)}, r"inp must be at least two inputs \[n, inp\], got shape \[1, 7\]"),
        (power(2), {"max_degree": 31}, "max_degree must lie between 0 and 30, got 31"),
        (power(2), {"lines": 0}, "lines must be at least 1, got 0"),
        (power(2), {"scale": 0.0}, "scale must be positive, got 0.0"),
        (lambda x: x.sum(1), {}, r"f must map \[n, inp\] to \[n, out\], here n = 512, got shape \[512\]"),
        (lambda x: x.float(), {}, "f must compute in float64, .* got torch.float32"),
        (lambda x: x / 0, {}, "f must be finite"),
    ],
)
def test_bad_input_is_named(f, options, says):
    with pytest.raises(ValueError, match=says):
        degree(f, **{"inp": WIDTH, "generator": rng(), **options})


def test_directions_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"out must have shape \[n, 4\], got \[2, 3\]"):
        recover_tensor(power(2), WIDTH, out=torch.zeros(2, 3), generator=rng())


def test_reprs_and_the_figure():
    found = {"bilinear": degree(power(2), WIDTH, generator=rng()), "tanh": degree(torch.tanh, WIDTH, generator=rng())}
    assert repr(found["bilinear"]).startswith("Degree(2, residual ")
    assert repr(found["tanh"]).startswith("Degree(None: degree 6 leaves ")
    assert repr(degree(lambda x: 0 * x, WIDTH, generator=rng())) == "Degree(0, residual 0.0e+00)"
    figure = tensorplots.residuals(found)
    assert [trace.name for trace in figure.data] == ["bilinear", "tanh"]
    assert figure.data[0].y[2] < 1e-13 < figure.data[1].y[2]
