"""What a classifier's weights say: sums that are exact, planted structure, agreement with direct computations."""

import pytest
import torch
from scipy.stats import t as student

from bilens import BilinearTensor, images
from bilens.images import ClassEigen, classifiers
from bilens.images import sets as imagesets
from bilens.images.classifiers import ClassifierConfig, ImageClassifier, Recipe
from bilens.images.sets import ImageSet

SHAPES = [{}, {"bias": True}, {"residual": True}, {"bias": True, "residual": True}]


def random_model(seed=0, **cfg):
    shape = {"height": 3, "width": 4, "n_classes": 3, "d_hidden": 5} | cfg
    return ImageClassifier(ClassifierConfig(**shape), torch.Generator().manual_seed(seed)).double().eval()


def draw(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=atol)


def planted(values, pixels, size=(1, 4)):
    """Eigenvectors of one class or several, as they are given."""
    values, pixels = torch.as_tensor(values).double(), torch.as_tensor(pixels).double()
    return ClassEigen(values, pixels, torch.zeros_like(values), size)


@pytest.fixture(scope="module")
def trained():
    """Five classifiers of digits that differ in their seeds."""
    train = imagesets.load("digits")
    recipes = [Recipe(epochs=12, batch=128, lr=4e-3, input_noise=0.2, seed=seed) for seed in range(5)]
    return [classifiers.train(train, recipe, d_hidden=24, progress=False)[0] for recipe in recipes]


@pytest.fixture(scope="module")
def test_images():
    return imagesets.load("digits", "test")


# -- eigenvectors and explanations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["embed", "pixel"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contributions_sum_to_the_logits(shape, space):
    model, x = random_model(**shape), draw(7, 12)
    full = images.class_eigenvectors(model, space=space)
    close(full.contributions(x).sum(-1), model(x))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weighed_by_data_the_spectrum_does_not_depend_on_the_space(shape):
    model = random_model(**shape, d_hidden=12)
    data = ImageSet(draw(60, 3, 4, seed=5), torch.zeros(60).long(), ("a", "b", "c"))
    full = [images.class_eigenvectors(model, space=space, data=data) for space in ("embed", "pixel")]
    for one in full:
        close(one.contributions(draw(7, 12)).sum(-1), model(draw(7, 12)), atol=1e-8)
    if not shape:  # with a constant leg each space weighs it against other coordinates
        close(full[0].values, full[1].values, atol=1e-8)


def test_weighed_by_data_fewer_eigenvectors_explain_the_logits(trained, test_images):
    train = imagesets.load("digits")
    plain, weighed = (images.class_eigenvectors(trained[0], data=data) for data in (None, train))
    curves = [images.truncation(full, test_images, range(1, 8)) for full in (plain, weighed)]
    assert (curves[1].r2 > curves[0].r2).all()


def test_activations_are_means_and_frequencies(trained, test_images):
    full = images.class_eigenvectors(trained[0])
    parts = full.contributions(test_images.flat())
    found = images.activation(full, test_images, 0.02)
    torch.testing.assert_close(found.mean, parts.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.frequency, (parts.abs() > 0.02).float().mean(0))
    with pytest.raises(ValueError, match="threshold must not be negative, got -1"):
        images.activation(full, test_images, -1.0)


def test_the_logits_of_a_trained_model_are_the_sum_on_every_test_image(trained, test_images):
    model = trained[0]
    logits = model(test_images.x).detach()
    parts = images.class_eigenvectors(model).contributions(test_images.flat()).sum(-1)
    scale = logits.abs().amax(1, keepdim=True)
    assert float(((parts - logits) / scale).abs().max()) < 1e-5


def test_pixel_vectors_are_orthonormal_and_those_of_the_embedding_are_not():
    model = random_model()
    for rows in images.class_eigenvectors(model, space="pixel").pixels:
        close(rows @ rows.T, torch.eye(12, dtype=torch.float64))
    embedded = images.class_eigenvectors(model).pixels[0]
    assert (embedded @ embedded.T - torch.eye(5)).abs().max() > 0.1


def test_a_planted_stroke_is_the_first_eigenvector():
    stroke = torch.tensor([0.0, 3, 4, 0]).double() / 5
    both = torch.stack((stroke, 1 - stroke))
    B = BilinearTensor(torch.tensor([[1.0, -0.2], [-2, 0.1]]).double(), both, both)
    full = images.class_eigenvectors(B, 1, size=(2, 2))
    assert full.size == (2, 2)
    cosine = torch.nn.functional.cosine_similarity(full.pixels[1, 0], stroke, dim=0)
    assert cosine > 0.9
    assert full.values[1, 0] < -1.5
    close(images.class_eigenvectors(B).contributions(draw(3, 4)).sum(-1), B.apply(draw(3, 4)))


def test_a_tensor_from_raw_arrays_gives_what_its_classifier_gives(trained, test_images):
    model = trained[0]
    mine = images.class_eigenvectors(model, space="pixel")
    theirs = images.class_eigenvectors(model.pixel_tensor(), size=(8, 8))
    assert torch.equal(mine.values, theirs.values)
    x = test_images.x[3].flatten()
    raw, whole = images.explain(model.pixel_tensor(), x).logits, images.explain(model, x).logits
    torch.testing.assert_close(raw, whole, rtol=0, atol=1e-5 * float(whole.abs().max()))  # they sum in another order


def test_directions_are_combinations_of_logits():
    model, x = random_model(bias=True), draw(7, 12)
    difference = images.class_eigenvectors(model, directions=torch.tensor([[-1.0, 0, 1]]).double())
    close(difference.contributions(x).sum(-1)[:, 0], model(x)[:, 2] - model(x)[:, 0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_affine_form_has_three_parts(shape):
    model, x, u = random_model(**shape), draw(7, 12), draw(3, seed=2)
    quadratic, linear, constant = images.affine(model, u)
    close(((x @ quadratic) * x).sum(1) + x @ linear + constant, model(x) @ u)


def test_an_explanation_is_of_one_image(trained, test_images):
    explanation = images.explain(trained[0], test_images.x[0])
    logits = trained[0](test_images.x[:1])[0].detach()
    torch.testing.assert_close(explanation.logits, logits, rtol=1e-5, atol=1e-5)
    assert explanation.top(2) == logits.topk(2).indices.tolist()
    assert "Explanation(logits " in repr(explanation)
    with pytest.raises(ValueError, match="x must be one image"):
        images.explain(trained[0], test_images.x[:2])


def test_best_takes_one_end():
    full = planted([[3, -2, 1, -0.5]], torch.eye(4)[None])
    assert full.best(2).values.tolist() == [[3, -2]]
    assert full.best(2, "positive").values.tolist() == [[3, 1]]
    assert full.best(2, "negative").values.tolist() == [[-2, -0.5]]
    assert full.best(1, "negative").pixels.argmax(-1).tolist() == [[1]]
    with pytest.raises(ValueError, match="k must lie between 1 and 2, the positive eigenvectors"):
        full.best(3, "positive")


# -- truncation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["abs", "paired", "activation", "global"])
def test_truncation_is_what_keeping_some_gives(trained, test_images, by):
    full = images.class_eigenvectors(trained[0])
    parts = full.contributions(test_images.flat())
    k = 3
    if by == "abs":
        keep = full.values.abs() >= full.values.abs().sort(1, descending=True).values[:, k - 1 : k]
    elif by == "paired":
        ordered = full.values.sort(1, descending=True).values
        keep = (full.values >= ordered[:, k - 1 : k]) | (full.values <= ordered[:, -k][:, None])
    elif by == "activation":
        score = parts.abs().mean(0)
        keep = score >= score.sort(1, descending=True).values[:, k - 1 : k]
    else:
        keep = full.values.abs() >= full.values.abs().flatten().sort(descending=True).values[10 * k - 1]
    logits = (parts * keep).sum(-1)
    curve = images.truncation(full, test_images, [0, k, 24], by)
    assert float(curve.accuracy[1]) == pytest.approx(float((logits.argmax(1) == test_images.y).double().mean()))
    whole = parts.sum(-1)
    r2 = 1 - (logits - whole).pow(2).sum() / (whole - whole.mean()).pow(2).sum()
    assert float(curve.r2[1]) == pytest.approx(float(r2), abs=1e-5)
    kl = torch.nn.functional.kl_div(logits.log_softmax(1), whole.softmax(1), reduction="batchmean")
    assert float(curve.kl[1]) == pytest.approx(float(kl), rel=1e-4)
    assert float(curve.accuracy[0]) == float((test_images.y == 0).double().mean())


def test_all_of_them_are_the_full_model(trained, test_images):
    curve = images.truncation(images.class_eigenvectors(trained[0]), test_images, range(25))
    assert curve.full == classifiers.accuracy(trained[0], test_images) == float(curve.accuracy[-1])
    assert float(curve.r2[-1]) == pytest.approx(1, abs=1e-6)
    smallest = curve.smallest()
    assert all(curve.full - accuracy <= 0.001 for accuracy in curve.accuracy[smallest:].tolist())
    assert curve.full - float(curve.accuracy[smallest - 1]) > 0.001
    assert f"k={smallest}" in repr(curve)


@pytest.mark.parametrize("k", [[], [1, 1], [3, 2], [-1, 2], [25]])
def test_truncation_out_of_range(trained, test_images, k, unchecked):
    with pytest.raises(ValueError, match="k must rise, from at least 0 to at most 24"):
        images.truncation(images.class_eigenvectors(trained[0]), test_images, k)


# -- similarity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matching", ["rank", "max", "hungarian"])
def test_similarity_of_a_model_with_its_mirror_image_is_one(trained, matching):
    full = images.class_eigenvectors(trained[0])
    mirror = ClassEigen(full.values, -full.pixels, full.constant, full.size)
    close(images.similarity([full, mirror], 3, matching=matching).mean, torch.ones(3), atol=1e-5)


def test_matchings_differ_as_they_should():
    eye = torch.eye(4)
    one, other = planted([[3, 2, 1]], eye[None, :3]), planted([[3, 2, 1]], eye[None, [1, 0, 3]])
    assert images.similarity([one, other], 3, matching="rank").mean.tolist() == [0, 0, 0]
    assert images.similarity([one, other], 3, matching="max").mean.tolist() == [1, 1, 0]
    assert images.similarity([one, other], 3, matching="hungarian").mean.tolist() == [1, 1, 0]
    # the best of all: also outside the first k
    assert images.similarity([one, other], 1, matching="max").mean.tolist() == [1]
    assert images.similarity([one, other], 1, matching="hungarian").mean.tolist() == [0]


def test_hungarian_is_one_to_one():
    shared = torch.tensor([1.0, 1, 0, 0]) / 2**0.5
    one = planted([[2, 1]], torch.stack((shared, torch.tensor([1.0, -1, 0, 0]) / 2**0.5))[None])
    other = planted([[2, 1]], torch.stack((shared, shared + 1e-3))[None])
    assert images.similarity([one, other], 2, matching="hungarian").mean[1] < 0.1


def test_no_model_is_compared_with_itself(trained):
    full = [images.class_eigenvectors(model) for model in trained]
    found = images.similarity(full, 2)
    assert len(found.pairs) == 10
    assert all(a < b for a, b in found.pairs)
    against = images.similarity(full, 2, references=full[:2])
    assert len(against.pairs) == 8
    with pytest.raises(ValueError, match="models must be at least two different ones, got 1"):
        images.similarity(full[:1])


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Random vectors around a common one: the expected cosine is known from many pairs."""
    g = torch.Generator().manual_seed(0)

    def model():
        return planted(torch.ones(1, 1), torch.ones(1, 1, 6) + 0.5 * torch.randn(1, 1, 6, generator=g))

    truth = float(images.similarity([model() for _ in range(60)]).mean)
    hits = 0
    for _ in range(60):
        low, high = images.similarity([model() for _ in range(6)]).interval(0.9)
        hits += float(low) <= truth <= float(high)
    assert 0.75 < hits / 60 < 0.98


def test_intervals_need_three_models_and_references_count_as_none(trained):
    full = [images.class_eigenvectors(model) for model in trained]
    with pytest.raises(ValueError, match="an interval needs at least 3 models, got 2"):
        images.similarity(full[:2]).interval()
    against = images.similarity(full[:4], references=full[4:])
    means = against.cosine.mean((1, 2)).double()
    half = student.ppf(0.95, 3) * float(means.std()) / 2
    low, high = against.interval()
    assert float(high - low) / 2 == pytest.approx(half, rel=1e-5)


def test_the_published_variant_counts_self_pairs_at_the_negative_end(trained):
    full = [images.class_eigenvectors(model) for model in trained]
    published, half = images.published_similarity(full, k=3)
    honest = images.similarity(full, 3, side="negative")
    torch.testing.assert_close(published, (5 * torch.ones(3) + 10 * honest.mean) / 15)  # 5 of 15 pairs are 1
    assert (half > 0).all()


def test_trained_digits_share_their_first_eigenvectors(trained):
    full = [images.class_eigenvectors(model) for model in trained]
    shuffled = [ClassEigen(f.values, f.pixels.roll(1, 0), f.constant, f.size) for f in full[1:]]
    same, other = images.similarity(full).mean, images.similarity(full[:1], references=shuffled).mean
    assert float(same) > float(other) + 0.1  # the control: the first eigenvector of another digit


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: images.similarity([f, f], 1, matching="best"), "matching must be 'rank', 'max' or 'hungarian'"),
        (lambda f: images.similarity([f, f], 1, side="both"), "side must be 'abs', 'positive' or 'negative'"),
        (lambda f: images.similarity([f, f], 30), "k must lie between 1 and"),
        (lambda f: images.similarity([f, planted([[1.0]], torch.ones(1, 1, 4))]), "same classes and pixels"),
        (lambda f: f.contributions(torch.zeros(2, 9)), r"x must be rows of 64 pixels, got shape \[2, 9\]"),
    ],
)
def test_bad_comparisons(trained, call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call(images.class_eigenvectors(trained[0]))


def test_bad_decompositions(unchecked):
    model = random_model(n_layers=2)
    with pytest.raises(ValueError, match=r"one layer, got 2: see bilens\.images\.tree"):
        images.class_eigenvectors(model)
    with pytest.raises(ValueError, match="space must be 'embed' or 'pixel', got 'latent'"):
        images.class_eigenvectors(random_model(), space="latent")
    with pytest.raises(ValueError, match="k must lie between 1 and inp=5, got 6"):
        images.class_eigenvectors(random_model(), 6)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        images.tree(model, torch.ones(3).double(), 0)
    with pytest.raises(ValueError, match=r"direction must have 3 entries, got shape \[2\]"):
        images.tree(model, torch.ones(2).double())


# -- Casper and deep models -------------------------------------------------------------------------------------------


def test_casper_is_true_for_the_target_and_for_its_complement(test_images):
    target = test_images.x[1]
    assert 0.2 < float(target.mean()) < 0.8
    some = ImageSet(torch.stack((target, 1 - target, torch.zeros(8, 8))), torch.zeros(3).long(), tuple("0123456789"))
    labelled = images.casper(some, target, 0.95)
    assert labelled.y.tolist() == [1, 1, 0]
    assert labelled.names == ("False", "True")
    with pytest.raises(ValueError, match="target must be 8x8, got"):
        images.casper(some, target[:5])


def test_a_casper_classifier_shows_the_target_in_one_positive_eigenvector():
    train = imagesets.load("digits")
    target = train.x[1]  # a one
    recipe = Recipe(epochs=40, batch=128, lr=4e-3, input_noise=0.1)
    model, _ = classifiers.train(images.casper(train, target, 0.7), recipe, d_hidden=16, bias=True, progress=False)
    labels = images.casper(imagesets.load("digits", "test"), target, 0.7)
    share = float(labels.y.double().mean())
    assert classifiers.accuracy(model, labels) > max(share, 1 - share)
    first = images.class_eigenvectors(model, directions=torch.tensor([[-1.0, 1]])).best(1, "positive")
    shown = first.pixels[0, 0] - first.pixels[0, 0].mean()
    cosine = torch.nn.functional.cosine_similarity(shown, target.flatten() - target.mean(), dim=0)
    assert abs(float(cosine)) > 0.6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_whole_tree_is_the_output(layers, shape):
    model, x, u = random_model(n_layers=layers, d_hidden=3, **shape), draw(5, 12), draw(3, seed=2)
    close(images.evaluate(images.tree(model, u, k=None), x), model(x) @ u)


def test_a_tree_follows_both_ends():
    model = random_model(n_layers=2)
    nodes = images.tree(model, torch.eye(3)[0].double(), 1)
    values = torch.linalg.eigvalsh(model.tensor(1).matrix(torch.eye(3)[0].double()))
    torch.testing.assert_close(torch.tensor([node.value for node in nodes]).double(), values[[-1, 0]])
    assert all(len(node.children) == 2 and node.children[0].pixels.shape == (12,) for node in nodes)
    assert "2 children" in repr(nodes[0])
