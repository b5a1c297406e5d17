"""Masks do what they promise; the trust-region bound is attained and never beaten, also in its hard case."""

import pytest
import torch

from bilens import BilinearTensor, images
from bilens.images import adversarial, classifiers
from bilens.images import sets as imagesets
from bilens.images.adversarial import best_perturbation
from bilens.images.classifiers import ClassifierConfig, ImageClassifier, Recipe
from bilens.images.sets import ImageSet


@pytest.fixture(scope="module")
def model():
    recipe = Recipe(epochs=15, batch=128, lr=4e-3, input_noise=0.2, weight_decay=0.1)
    return classifiers.train(imagesets.load("digits"), recipe, d_hidden=48, residual=True, progress=False)[0]


@pytest.fixture(scope="module")
def train():
    return imagesets.load("digits")


@pytest.fixture(scope="module")
def held_out():
    return imagesets.load("digits", "test")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def quadratic(Q, linear=None):
    """Two classes, the first of which is `xᵀ Q x + linear·x` and the second zero."""
    inp = len(Q)
    U, S, V = torch.linalg.svd(Q)
    down = torch.stack((S, torch.zeros_like(S)))
    left, right = U.T, V
    if linear is None:
        return BilinearTensor(down, left, right)
    one = torch.zeros(2 * inp, dtype=Q.dtype)
    one[inp:] = 1
    down = torch.cat((down, torch.stack((linear, torch.zeros_like(linear)))), 1)
    eye = torch.eye(inp, dtype=Q.dtype)
    zero = torch.zeros(2 * inp, dtype=Q.dtype)
    return BilinearTensor.from_weights(down, torch.cat((left, eye)), torch.cat((right, 0 * eye)), zero, one)


def symmetric(values, seed=0):
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator(seed), dtype=torch.float64)).Q
    return basis @ torch.diag(torch.tensor(values).double()) @ basis.T, basis


def climb(B, x, eps, starts=200, steps=400):
    """The best of many gradient ascents on the sphere and in the ball: a reference without any theory."""
    m = torch.randn(starts, x.shape[-1], generator=generator(1), dtype=torch.float64)
    m = (eps * m / m.norm(dim=1, keepdim=True)).requires_grad_()
    best = torch.full((starts,), -torch.inf).double()
    for step in range(steps):
        value = B.apply(x + m)[:, 0]
        best = torch.maximum(best, value.detach())
        (gradient,) = torch.autograd.grad(value.sum(), m)
        with torch.no_grad():
            m += 0.3 * eps * 0.99**step * gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1e-30)
            m *= (eps / m.norm(dim=1, keepdim=True)).clamp(max=1)
    return float(best.max())


# -- the bound --------------------------------------------------------------------------------------------------------

SPECTRA = {
    "indefinite": [3.0, 1, 0.5, -1, -2],
    "negative": [-0.5, -1, -2, -3, -4],
    "double": [2.0, 2, 0, 0, -1],
    "semidefinite": [0.0, 0, -1, -1, -2],
}


@pytest.mark.parametrize("eps", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_nothing_that_climbs_beats_the_bound_and_it_is_attained(spectrum, eps):
    Q, _ = symmetric(SPECTRA[spectrum])
    linear = torch.randn(5, generator=generator(3), dtype=torch.float64)
    B, x = quadratic(Q, linear), torch.randn(1, 5, generator=generator(4), dtype=torch.float64)
    found = best_perturbation(B, x, 0, 1, eps)
    assert float(found.delta.norm()) <= eps * (1 + 1e-9)
    attained = B.apply(x + found.delta)[:, 0]
    torch.testing.assert_close(found.margin, attained)
    torch.testing.assert_close(found.bound, attained)
    reference = climb(B, x, eps)
    assert float(found.bound) >= reference - 1e-9
    assert float(found.bound) == pytest.approx(reference, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("eps", [1.0, 10.0])
@pytest.mark.parametrize("values", [[3.0, 1, 0.5, -1, -2], [3.0, 3, 0.5, -1, -2]], ids=["one", "two"])
def test_the_hard_case(values, eps):
    """The gradient has no part in the largest eigenvalue's space: the multiplier is that eigenvalue itself."""
    Q, basis = symmetric(values)
    count = values.count(3.0)
    x = (basis[:, count:] @ torch.tensor([0.3, -0.2, 0.1, 0.05, 0.02][count:]).double())[None]
    B = quadratic(Q)
    found = best_perturbation(B, x, 0, 1, eps)
    assert found.hard.all()
    assert float(found.multiplier) == pytest.approx(3, rel=1e-9)
    assert float(found.delta.norm()) == pytest.approx(eps, rel=1e-9)
    torch.testing.assert_close(B.apply(x + found.delta)[:, 0], found.bound)
    assert float(found.bound) == pytest.approx(climb(B, x, eps), rel=1e-3)


def test_the_almost_hard_case():
    Q, basis = symmetric([3.0, 1, 0.5, -1, -2])
    for tilt in (1e-6, 1e-10, 1e-14):
        x = (basis @ torch.tensor([tilt, 0.3, -0.2, 0.1, 0.05]).double())[None]
        found = best_perturbation(quadratic(Q), x, 0, 1, 5.0)
        assert float(found.delta.norm()) == pytest.approx(5, rel=1e-9)
        torch.testing.assert_close(found.margin, found.bound)


def test_a_maximum_inside_the_ball_is_taken():
    Q, _ = symmetric([-1.0, -2, -3])
    linear, x = torch.tensor([1.0, 2, 3]).double(), torch.zeros(1, 3).double()
    found = best_perturbation(quadratic(Q, linear), x, 0, 1, 100.0)
    torch.testing.assert_close(found.delta[0], torch.linalg.solve(-2 * Q, linear))
    assert float(found.multiplier) == 0
    assert not found.hard.any()


@pytest.mark.parametrize("kind", ["dense", "edge"])
def test_no_mask_beats_the_bound_on_a_trained_model(model, train, held_out, kind):
    aimed, exact = adversarial.masks(model, train, kind), model.pixel_tensor().to(torch.float64)
    for target in range(10):
        some = held_out[held_out.y != target][:40]
        x, rows = some.flat().double(), torch.arange(len(some))
        for eps in (0.3, 2.0):
            found = best_perturbation(model, some.flat(), target, some.y, eps)
            at = exact.apply(x + found.delta)
            torch.testing.assert_close(at[:, target] - at[rows, some.y], found.bound)
            for mask in aimed.mask[target].double():
                logits = exact.apply(x + eps * mask / mask.norm())
                assert (logits[:, target] - logits[rows, some.y] <= found.bound + 1e-9).all()


def test_reachable_bounds_the_rate_of_every_mask(model, train, held_out):
    aimed = adversarial.masks(model, train)
    for target in (0, 7):
        for mask in aimed.mask[target]:
            strengths = (0.05, 0.1, 0.2)
            limit = adversarial.reachable(model, held_out, target, [s * float(mask.norm()) for s in strengths])
            slope = adversarial.Masks(mask[None, None].expand(10, 1, -1), "dense", (8, 8))
            found = adversarial.attack(model, held_out, slope, strengths, controls=1, generator=generator())
            assert (found.targeted[target, 0] <= limit + 1e-12).all()
            assert (limit.diff() >= 0).all()
            assert float(limit[1]) > 0


# -- masks ------------------------------------------------------------------------------------------------------------


def test_masks_are_dual_where_there_is_room(train):
    """Few eigenvectors in many pixels: each mask moves its own eigenvector's reading alone."""
    cfg = ClassifierConfig(8, 8, 10, 48)
    random = ImageClassifier(cfg, generator()).eval()
    aimed = adversarial.masks(random, train, stack=3, space="pixel")
    tensor = random.tensor()
    rows = [torch.linalg.eigh(tensor.matrix(u)).eigenvectors[:, -3:].flip(-1).T for u in torch.eye(10)]
    response = torch.cat(rows) @ random.embed.weight.detach() @ aimed.mask.flatten(0, 1).T
    own = response.diagonal().abs()
    assert (response - torch.diag(response.diagonal())).abs().max() < 1e-3 * own.min()


def test_masks_have_the_scale_of_their_kind(model, train):
    torch.testing.assert_close(adversarial.masks(model, train).mask.std(-1), torch.ones(10, 3))
    edge = adversarial.masks(model, train, "edge")
    assert not edge.mask[..., train.flat().mean(0) >= 0.01].any()
    positive = [row[row > 0].std() for row in edge.mask.flatten(0, 1)]
    torch.testing.assert_close(torch.stack(positive), torch.ones(30))
    torch.testing.assert_close(adversarial.masks(model, train, "top").mask.abs().amax(-1), torch.ones(10, 3))
    assert repr(edge) == "Masks(edge, 3 for each of 10 classes, 8x8)"


def test_top_pixels_keeps_the_largest():
    mask = torch.tensor([0.1, -3, 2, 0.5])
    assert adversarial.top_pixels(mask, 2).tolist() == [0, -3, 2, 0]
    with pytest.raises(ValueError, match="n must lie between 1 and 4 pixels, got 5"):
        adversarial.top_pixels(mask, 5)


@pytest.mark.parametrize("kind", ["dense", "edge", "top"])
def test_an_attack_is_what_adding_the_mask_does(model, train, held_out, kind):
    aimed = adversarial.masks(model, train, kind, n=2)
    strengths = (5, 20) if kind == "top" else (0.1, 0.3)
    found = adversarial.attack(model, held_out, aimed, strengths, controls=2, generator=generator())
    for target, number, place in ((3, 0, 1), (8, 1, 0)):
        mask, strength = aimed.mask[target, number], strengths[place]
        x = held_out.flat() + (adversarial.top_pixels(mask, strength) if kind == "top" else strength * mask)
        predicted = model(x.clamp(0, 1) if kind == "top" else x).argmax(1)
        others = held_out.y != target
        right = float((predicted == held_out.y).double().mean())
        assert float(found.accuracy[target, number, place]) == pytest.approx(right, abs=0.003)  # ties in rounding
        rate = float((predicted[others] == target).double().mean())
        assert float(found.targeted[target, number, place]) == pytest.approx(rate, abs=0.003)
        of_all = float(((predicted == target) & others).double().mean())
        assert float(found.targeted_of_all[target, number, place]) == pytest.approx(of_all, abs=0.003)


def test_masks_do_more_than_their_permutations(model, train, held_out):
    aimed = adversarial.masks(model, train)
    found = adversarial.attack(model, held_out, aimed, (0.2,), controls=3, generator=generator())
    assert found.targeted.mean() > 2 * found.control_targeted.mean()
    assert "1 strengths to 0.2" in repr(found)


def test_a_tensor_from_raw_arrays_is_attacked_like_its_classifier(model, train, held_out):
    B = model.pixel_tensor(residual=False)
    theirs, mine = adversarial.masks(B, train, stack=3), adversarial.masks(B, train, stack=3, space="pixel")
    torch.testing.assert_close(theirs.mask, mine.mask)
    exact = model.pixel_tensor()
    for aimed, strengths in ((theirs, (0.1, 0.3)), (adversarial.masks(B, train, "top", stack=3), (5, 20))):
        one, other = (
            adversarial.attack(tried, held_out, aimed, strengths, controls=1, generator=generator())
            for tried in (model, exact)
        )
        torch.testing.assert_close(one.accuracy, other.accuracy, atol=0.003, rtol=0)  # ties in rounding


def test_a_permutation_of_an_edge_mask_stays_on_its_pixels():
    mask = torch.tensor([0, 1.0, 0, -2, 3, 0])
    permuted = torch.stack([adversarial.permuted(mask, "edge", generator(seed)) for seed in range(20)])
    assert not permuted[:, [0, 2, 5]].any()
    assert (permuted.sort(1).values == mask.sort().values).all()
    assert len(permuted.unique(dim=0)) > 3


def test_masks_for_images_of_another_size(model, train, unchecked):
    with pytest.raises(ValueError, match="images must have 64 pixels, got 8x4"):
        adversarial.masks(model, ImageSet(train.x[:, :, :4], train.y, train.names))


def brighter(x):
    return ImageSet(0.5 + x.x / 2, x.y, x.names)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: adversarial.masks(m, t, "all"), "kind must be 'dense', 'edge' or 'top', got 'all'"),
        (lambda m, t: adversarial.masks(m, t, space="latent"), "space must be 'embed' or 'pixel'"),
        (lambda m, t: adversarial.masks(m, t, n=11), "n must lie between 1 and stack=10, got 11"),
        (lambda m, t: adversarial.masks(m, t, stack=48), "stack must be at most .* got 48"),
        (
            lambda m, t: adversarial.masks(m, ImageSet(0.5 + t.x / 2, t.y, t.names), "edge"),
            "images must have pixels of",
        ),
        (lambda m, t: best_perturbation(m, t.flat()[:2], 0, 1, 0.0), "eps must be positive and finite, got 0"),
        (lambda m, t: best_perturbation(m, t.flat()[:2], 0, 10, 1.0), "against must lie between 0 and 9"),
        (lambda m, t: best_perturbation(m, t.flat()[:2], 3, 3, 1.0), "against must be another class"),
        (lambda m, t: adversarial.reachable(m, t[t.y == 4], 4, [1.0]), "another class than the target 4, got none"),
    ],
)
def test_bad_input(model, train, call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call(model, train)


def test_attacks_out_of_range(model, train, held_out, unchecked):
    aimed = adversarial.masks(model, train)
    with pytest.raises(ValueError, match="at least one each, got 0 and 5"):
        adversarial.attack(model, held_out, aimed, (), generator=generator())
    other = adversarial.Masks(aimed.mask, "dense", (4, 16))
    with pytest.raises(ValueError, match="aimed must be masks of 8x8, got 4x16"):
        adversarial.attack(model, held_out, other, (0.1,), generator=generator())


def test_derivatives_are_those_of_the_model(model, held_out):
    B, x = model.pixel_tensor(), held_out.flat()[:5]
    m = torch.randn(64, generator=generator())
    slope, curve = adversarial.derivatives(B, x, m)
    assert images.affine(B, torch.eye(10)[0]).linear.any()  # the residual path is in there
    torch.testing.assert_close(B.apply(x + 0.3 * m), B.apply(x) + 0.3 * slope + 0.09 * curve, rtol=1e-4, atol=1e-4)
