"""Default and modifier features: complete, recovered where planted, and what an intervention on one factor measures."""

import pytest
import torch

import bilens
from bilens import BilinearTensor
from bilens.report import tensorplots
from bilens.tensor.defaults import default_features, modification, modifier_features, most_modified

WIDTH = 6


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def tensor(seed=0, out=4, hidden=9, bias=False):
    shapes = [(out, hidden), (hidden, WIDTH), (hidden, WIDTH), *([(hidden,), (hidden,), (out,)] if bias else [])]
    return BilinearTensor.from_weights(*(random(*shape, seed=seed + i) for i, shape in enumerate(shapes)))


def sparse(n=3000, width=WIDTH, seed=5):
    """Independent, skewed, sparse sources, mixed."""
    active = torch.rand(n, width, generator=rng(seed)) < 0.15
    sources = active * torch.rand(n, width, generator=rng(seed + 1), dtype=torch.float64)
    return sources, sources @ random(width, width, seed=seed + 2) + 0.1


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


def homogeneous(B, x):
    return torch.cat((x, x.new_ones(len(x), 1)), 1) if B.constant else x


# -- features of a factor ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["weights", "svd", "ica"])
def test_features_are_complete(how, side, bias):
    B, x = tensor(bias=bias), sparse()[1]
    options = {} if how == "weights" else {"method": how, "inputs": x, "generator": rng()}
    found = default_features(B, side=side, **options)
    factor = homogeneous(B, x) @ getattr(B, side).T
    close(found.activations(x) @ found.patterns + found.mean, factor)
    close(found.patterns.norm(dim=1), torch.ones(len(found.patterns)).double())
    assert (found.patterns.gather(1, found.patterns.abs().argmax(1, keepdim=True)) > 0).all()
    assert (found.strengths.diff() <= 0).all()
    if how != "weights":
        close(found.activations(x).square().mean(0).sqrt(), found.strengths)


def test_singular_vectors_of_weights_are_those_of_white_inputs():
    B = tensor()
    white = torch.linalg.qr(random(50, WIDTH)).Q * 50**0.5
    a, b = default_features(B), default_features(B, inputs=white)
    close(a.patterns, b.patterns)
    close(a.strengths, torch.linalg.svdvals(B.right))
    close(b.strengths, a.strengths)
    close(a.patterns @ a.patterns.T, torch.eye(WIDTH, dtype=torch.float64))


def test_ica_finds_planted_sources_and_svd_does_not():
    sources, x = sparse()
    correlation = {}
    for method in ("svd", "ica"):
        z = default_features(tensor(), method, inputs=x, generator=rng()).activations(x)
        both = torch.corrcoef(torch.cat((sources, z), 1).T)[:WIDTH, WIDTH:].abs()
        correlation[method] = both.amax(1).min().item()
    assert correlation["ica"] > 0.98
    assert correlation["svd"] < 0.9


def test_k_keeps_the_strongest_and_the_generator_decides():
    B, x = tensor(), sparse()[1]
    close(default_features(B, k=2).patterns, default_features(B).patterns[:2])
    first, again = (default_features(B, "ica", 3, inputs=x, generator=rng()) for _ in range(2))
    assert torch.equal(first.patterns, again.patterns)
    assert first.patterns.shape == (3, 9)


def test_modifier_features_are_those_of_the_other_factor():
    B = tensor()
    swapped = BilinearTensor(B.down, B.right, B.left)
    close(modifier_features(B).patterns, default_features(swapped).patterns)
    assert modifier_features(B).side == "left"
    close(modifier_features(B, side="left").readers, default_features(B).readers)


# -- what modifies what -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biases", [(False, False), (True, True)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_modification_is_what_adding_to_the_other_factor_measures(make_model, side, biases):
    """A feature added at the hook of the modifying factor changes the output by the sum of what is `written`."""
    mlp = make_model(n_layers=1, mlp_bias=biases).blocks[0].mlp
    x, feature = random(5, 16), random(16, seed=1)
    B = mlp.tensor().detach()
    defaults = default_features(B, side=side)
    found = most_modified(B, defaults, feature, k=100)
    assert len(found.feature) == len(defaults.patterns)
    hook, weights = (mlp.hook_pre, mlp.left) if side == "right" else (mlp.hook_pre_linear, mlp.right)
    before = mlp(x)
    hook.add_hook(lambda value, hook: value + 0.7 * weights @ feature)
    close(0.7 * defaults.activations(x)[:, found.feature] @ found.written, mlp(x) - before)


def test_a_planted_modifier_is_found_first_and_its_gain_is_exact():
    """Hidden unit h is default feature h; the input feature multiplies unit 3 by -2, and unit 1 by half."""
    eye = torch.eye(WIDTH, dtype=torch.float64)
    strengths = torch.tensor([6.0, 5, 4, 3, 2, 1]).double()
    left = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    left[3, 0], left[1, 0] = -2, 0.5
    B = BilinearTensor(random(4, WIDTH), left, eye * strengths)
    found = most_modified(B, default_features(B), eye[0], k=2)
    assert found.feature.tolist() == [3, 1]
    close(found.gain, torch.tensor([-2, 0.5]).double())
    close(found.change, torch.stack((2 * 3 * B.down[:, 3].norm(), 0.5 * 5 * B.down[:, 1].norm())))
    close(found.written, torch.stack((-2 * B.down[:, 3], 0.5 * B.down[:, 1])))


def test_excess_is_one_on_average_over_a_basis_of_modifiers():
    """A layer whose left factor is the identity: input features are the modifiers themselves."""
    B = BilinearTensor(random(4, WIDTH), torch.eye(WIDTH, dtype=torch.float64), random(WIDTH, WIDTH, seed=1))
    defaults, squares = default_features(B), torch.zeros(WIDTH, dtype=torch.float64)
    for modifier in torch.linalg.qr(random(WIDTH, WIDTH, seed=2)).Q:
        found = most_modified(B, defaults, 3 * modifier, k=WIDTH)
        squares[found.feature] += found.excess.square() / WIDTH
    close(squares, torch.ones(WIDTH).double())


def test_the_table_holds_most_modified_for_every_modifier():
    B, x = tensor(), sparse()[1]
    defaults = default_features(B, "ica", inputs=x, generator=rng())
    modifiers = modifier_features(B)
    table = modification(B, defaults, modifiers)
    for j, reader in enumerate(torch.linalg.pinv(modifiers.readers).T):  # an input on which modifier j alone is active
        found = most_modified(B, defaults, reader, k=WIDTH)
        close(found.change * modifiers.strengths[j], table[found.feature, j])


def test_the_embedded_model_in_float32():
    model = bilens.load("bilens-mini")
    B = model.blocks[2].mlp.tensor().detach()
    _, cache = model.run_with_cache("once upon a time there was a little girl who liked to swim in the lake.")
    x = cache["blocks.2.hook_mlp_in"][0]
    defaults = default_features(B, inputs=x)
    assert len(defaults.patterns) == len(x)
    torch.testing.assert_close(defaults.activations(x) @ defaults.patterns, x @ B.right.T, rtol=1e-4, atol=1e-4)
    assert most_modified(B, defaults, x[3]).written.dtype == torch.float32


# -- errors and figures -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named():
    B, x = tensor(), sparse()[1]
    defaults, other = default_features(B), default_features(tensor(hidden=5))
    for use, says in (
        (lambda: default_features(B, "pca"), "method must be 'svd' or 'ica', got 'pca'"),
        (lambda: default_features(B, side="up"), "side must be 'left' or 'right', got 'up'"),
        (lambda: default_features(B, "ica"), "inputs must be given for method='ica'"),
        (lambda: default_features(B, k=0), "k must lie between 1 and 6, the rank .* got 0"),
        (lambda: default_features(B, "ica", 7, inputs=x), "k must lie between 1 and 6, the rank .* got 7"),
        (lambda: default_features(B, inputs=x[:, :5]), r"inputs must be .* \[n, 6\], got shape \[3000, 5\]"),
        (lambda: default_features(B, inputs=x[:1]), r"inputs must be at least two rows .*got shape \[1, 6\]"),
        (lambda: defaults.activations(x[:, :4]), r"x must have 6 features, .* got shape \[3000, 4\]"),
        (lambda: most_modified(B, defaults, x[0], k=0), "k must be at least 1, got 0"),
        (lambda: most_modified(B, defaults, x[0, :4]), r"feature must have shape \[6\], got \[4\]"),
        (lambda: most_modified(B, other, x[0]), "defaults must be features of this layer, .* ones of 5 hidden units"),
        (lambda: modification(B, defaults, other), "modifiers must be features of this layer"),
        (lambda: modification(B, defaults, defaults), "modifiers must be features of the left factor, got 'right' too"),
    ):
        with pytest.raises(ValueError, match=says):
            use()


def test_reprs_and_figures():
    B = tensor()
    defaults = default_features(B)
    found = most_modified(B, defaults, random(WIDTH), k=3)
    assert repr(defaults).startswith("FactorFeatures(6 of the right factor by svd; strengths: ")
    assert repr(found).startswith(f"Modified(3 default features; first: #{found.feature[0]} ")
    drawn = tensorplots.modified(found)
    assert list(drawn.data[0].y) == found.change.tolist()
    assert {*drawn.data[0].marker.color} <= {tensorplots.POSITIVE, tensorplots.NEGATIVE}
    assert len(tensorplots.modification(modification(B, defaults, modifier_features(B))).data[0].z) == 6
