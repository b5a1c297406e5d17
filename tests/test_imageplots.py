"""Figures of image classifiers hold the numbers of their records."""

import pytest
import torch

from bilens import images
from bilens.images import adversarial, classifiers
from bilens.images import sets as imagesets
from bilens.images.classifiers import Recipe
from bilens.report import imageplots

NAMES = tuple("0123456789")


@pytest.fixture(scope="module")
def models():
    train = imagesets.load("digits")
    recipes = [Recipe(epochs=5, batch=128, lr=4e-3, seed=seed) for seed in range(3)]
    return [classifiers.train(train, recipe, d_hidden=24, progress=False)[0] for recipe in recipes]


@pytest.fixture(scope="module")
def full(models):
    return [images.class_eigenvectors(model) for model in models]


def test_a_grid_puts_every_pixel_in_its_place():
    tiles = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    figure = imageplots.image_grid(tiles, "ab", "xyz", "tiles")
    sheet = torch.tensor([[float("nan") if v is None else v for v in row] for row in figure.data[0].z])
    assert sheet.shape == (10, 18)
    for row in range(2):
        for column in range(3):
            tile = sheet[5 * row : 5 * row + 4, 6 * column : 6 * column + 5]
            expected = tiles[row, column] / tiles[row, column].abs().max()
            torch.testing.assert_close(tile, expected, atol=0.006, rtol=0)
    assert sheet[4].isnan().all()
    assert list(figure.layout.yaxis.ticktext) == ["a", "b"]
    with pytest.raises(ValueError, match="names must be 2 and 3, got 2 and 2"):
        imageplots.image_grid(tiles, "ab", "xy", "tiles")


def test_class_eigenvectors_show_both_ends(full):
    figure = imageplots.class_eigenvectors(full[0], NAMES, 2)
    assert figure.data[0].text[0][0] == f"0: λ = {float(full[0].values[0].max()):+.3f}"
    assert list(figure.layout.xaxis.ticktext) == ["+1", "+2", "−1", "−2"]


def test_spectra_fall(full):
    figure = imageplots.class_spectra(full[0], NAMES)
    assert [trace.name for trace in figure.data] == list(NAMES)
    assert list(figure.data[3].y) == sorted(figure.data[3].y, reverse=True)


def test_truncation_and_similarity_hold_their_curves(full):
    curve = images.truncation(full[0], imagesets.load("digits", "test"), range(5))
    figure = imageplots.truncation({"24": curve})
    torch.testing.assert_close(torch.tensor(figure.data[0].y).double(), 1 - curve.accuracy, atol=1e-3, rtol=1e-3)
    found = images.similarity(full, 2)
    figure = imageplots.similarity({"24": found})
    torch.testing.assert_close(torch.tensor(figure.data[-1].y), found.mean, atol=1e-3, rtol=1e-3)
    bars, (low, high) = figure.data[0].error_y, found.interval()
    torch.testing.assert_close(
        torch.tensor(bars.array) + torch.tensor(bars.arrayminus), high - low, atol=1e-3, rtol=1e-3
    )


def test_an_explanation_shows_the_strongest(models):
    x = imagesets.load("digits", "test").x[0]
    found = images.explain(models[0], x)
    figure = imageplots.explanation(found, NAMES, classes=2, n=24)
    assert [trace.name[0] for trace in figure.data] == [NAMES[label] for label in found.top(2)]
    drawn = imageplots.explanation_images(found, NAMES, classes=2, n=3)
    assert list(drawn.layout.yaxis.ticktext) == [NAMES[label] for label in found.top(2)]
    assert (
        drawn.data[0].text[0][9]
        == f"{NAMES[found.top(1)[0]]}: adds {float(found.contributions.max(1).values[found.top(1)[0]]):+.2f}"
    )
    assert sum(figure.data[0].y) == pytest.approx(float(found.logits.max()), abs=0.05)


def test_an_attack_shows_controls_bound_and_what_was_published(models):
    train, test = imagesets.load("digits"), imagesets.load("digits", "test")
    aimed = adversarial.masks(models[0], train, n=1, stack=2)
    generator = torch.Generator().manual_seed(0)
    found = adversarial.attack(models[0], test, aimed, (0.1, 0.2), controls=1, generator=generator)
    figure = imageplots.attack(found, torch.tensor([0.5, 0.9]), {0.1: (0.9, 0.01)})
    curves = {trace.name: list(trace.y) for trace in figure.data}
    assert curves["targeted"] == pytest.approx(found.targeted.mean((0, 1)).tolist(), rel=1e-3)
    assert curves["reachable at that norm"] == [0.5, 0.9]
    assert curves["accuracy, published"] == [0.9]
    assert len(imageplots.attack(found).data) == 4


def test_a_grid_of_numbers_says_them():
    figure = imageplots.grid(torch.tensor([[1.0, 2], [3, 4]]), ["0", "1"], ["a", "b"], "ranks")
    assert [list(row) for row in figure.data[0].text] == [["1", "2"], ["3", "4"]]
    with pytest.raises(ValueError, match=r"values must be 1x2, got \[2, 2\]"):
        imageplots.grid(torch.ones(2, 2), ["0"], ["a", "b"], "ranks")
