"""Image sets, the hooked classifier and its tensors, training: exact, resumable, and as good as it should be."""

import dataclasses
import gzip
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from bilens.images import classifiers
from bilens.images import sets as imagesets
from bilens.images.classifiers import ClassifierConfig, ImageClassifier, Recipe
from bilens.images.sets import ImageSet
from bilens.models.sources import CheckpointError

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_image.py"
QUICK = Recipe(epochs=3, batch=256, input_noise=0.1, latent_noise=0.1, translate=1.0, rotate=10.0, blur=0.5)


@pytest.fixture(scope="module")
def digits():
    return imagesets.load("digits"), imagesets.load("digits", "test")


def random_model(seed=0, **cfg):
    shape = {"height": 3, "width": 4, "n_classes": 3, "d_hidden": 5} | cfg
    return ImageClassifier(ClassifierConfig(**shape), torch.Generator().manual_seed(seed)).double().eval()


def draw(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- images -----------------------------------------------------------------------------------------------------------


def test_digits_are_split_once_and_in_range(digits):
    train, test = digits
    assert len(train) + len(test) == 1797
    assert torch.bincount(test.y).min() >= 34
    rows = {row.numpy().tobytes() for row in train.flat()}
    assert not any(row.numpy().tobytes() in rows for row in test.flat())
    assert repr(test[:5]) == "ImageSet(5 images of 8x8, 10 classes)"


@pytest.mark.parametrize("packed", [False, True])
def test_idx_and_npz_hold_the_same_images(tmp_path, packed):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, prefix, n in (("train", "train", 7), ("test", "t10k", 4)):
        x, y = rng.integers(0, 256, (n, 3, 2), dtype=np.uint8), np.arange(n, dtype=np.uint8) % 3
        arrays |= {f"x_{split}": x, f"y_{split}": y}
        for kind, part in (("images-idx3", x), ("labels-idx1", y)):
            data = (
                bytes([0, 0, 8, part.ndim]) + b"".join(size.to_bytes(4, "big") for size in part.shape) + part.tobytes()
            )
            path = tmp_path / f"{prefix}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(data) if packed else data)
    np.savez(tmp_path / "images.npz", **arrays)
    for split in ("train", "test"):
        one, other = imagesets.load(tmp_path, split), imagesets.load(tmp_path / "images.npz", split)
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.y, other.y)
        assert torch.equal((one.x * 255).round().byte(), torch.from_numpy(arrays[f"x_{split}"]))


def test_a_dataset_of_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    Image = pytest.importorskip("PIL.Image")
    x = np.random.default_rng(0).integers(0, 256, (4, 5, 6), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [Image.fromarray(part).convert("RGB") for part in x], "label": [0, 1, 1, 0]}
    asked = []

    def fake(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_dict(rows, features)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    images = imagesets.load("mnist", "test")
    assert asked == [("ylecun/mnist", "test")]
    assert images.names == ("cat", "dog")
    assert torch.equal((images.x * 255).round().byte(), torch.from_numpy(x))


def labelled(x, *labels, names=("a", "b")):
    return ImageSet(x, torch.tensor(labels).long(), names)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: labelled(torch.full((2, 3, 3), 255.0), 0, 1), r"in \[0, 1\] \(divide bytes by 255\), got .* to 255"),
        (lambda: labelled(torch.full((2, 3, 3), torch.nan), 0, 1), r"in \[0, 1\] .* got values from nan"),
        (lambda: labelled(torch.zeros(2, 9), 0, 1), r"n, height, width\], got \[2, 9\]"),
        (lambda: labelled(torch.zeros(2, 3, 3), 0, 1, 0), r"each of the 2 images, got \[3\]"),
        (lambda: labelled(torch.zeros(0, 3, 3)), "at least one image"),
        (lambda: labelled(torch.zeros(2, 3, 3), 0, 2), "between 0 and 1, got labels from 0 to 2"),
        (lambda: labelled(torch.zeros(2, 3, 3), 0, -1), "between 0 and 1, got labels from -1 to 0"),
        (lambda: imagesets.load("digits", "valid"), "split must be 'train' or 'test', got 'valid'"),
        (lambda: imagesets.from_bytes(np.zeros((2, 3, 3)), np.zeros(2)), "bytes from 0 to 255, got float64"),
    ],
)
def test_bad_images(make, message, unchecked):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_files(tmp_path):
    np.savez(tmp_path / "other.npz", z=np.zeros(3))
    with pytest.raises(ValueError, match="must hold x_train, y_train, but x_train, y_train is missing: got z"):
        imagesets.load(tmp_path / "other.npz")
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.npz"):
        imagesets.load(tmp_path / "none.npz")
    with pytest.raises(FileNotFoundError, match="no file train-images-idx3-ubyte"):
        imagesets.load(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03short")
    with pytest.raises(ValueError, match="must be an idx file of bytes, got header"):
        imagesets.load(tmp_path)


# -- the model --------------------------------------------------------------------------------------------------------

SHAPES = [{}, {"bias": True}, {"residual": True}, {"bias": True, "residual": True}]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_tensor_is_the_model(shape):
    model, x = random_model(**shape), draw(7, 12)
    torch.testing.assert_close(model.pixel_tensor().apply(x), model(x))
    embedded = model.embed(x)
    torch.testing.assert_close(model.tensor().apply(embedded), model(x))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_tensors_of_a_deep_model_chain(shape):
    model, x = random_model(n_layers=3, **shape), draw(7, 12)
    h = model.embed(x)
    for layer in range(3):
        h = model.tensor(layer).apply(h)
    torch.testing.assert_close(h, model(x))
    with pytest.raises(ValueError, match="must have one layer to be quadratic in its pixels, got 3"):
        model.pixel_tensor()


def test_without_the_residual_path_only_the_product_is_there():
    model, x = random_model(residual=True), draw(7, 12)
    h = model.embed(x)
    torch.testing.assert_close(model.tensor(residual=False).apply(h) + model.head(h), model(x))


def test_hooks_see_and_replace_what_they_name():
    model, x = random_model(bias=True, residual=True), draw(7, 3, 4)
    logits, cache = model.run_with_cache(x)
    block = "blocks.0"
    assert list(cache) == [
        *("hook_image", "hook_embed", f"{block}.hook_pre", f"{block}.hook_pre_linear", f"{block}.hook_post"),
        *(f"{block}.hook_out", "hook_logits"),
    ]
    torch.testing.assert_close(
        cache[f"{block}.hook_pre"] * cache[f"{block}.hook_pre_linear"], cache[f"{block}.hook_post"]
    )
    torch.testing.assert_close(cache["hook_embed"] + cache[f"{block}.hook_post"], cache[f"{block}.hook_out"])
    without = model.run_with_hooks(x, fwd_hooks=[(f"{block}.hook_post", lambda h, hook: 0 * h)])
    torch.testing.assert_close(without, model.head(model.embed(x.flatten(1))))
    assert torch.equal(model(x), logits)


def test_somebody_elses_arrays(unchecked):
    embed, left, right, head = draw(5, 12), draw(5, 5, seed=2), draw(5, 5, seed=3), draw(3, 5, seed=4)
    model, x = ImageClassifier.from_weights(embed, [(left, right)], head, (3, 4)), draw(6, 12, seed=5)
    e = x @ embed.T
    torch.testing.assert_close(model(x), (e @ left.T * (e @ right.T)) @ head.T)
    with pytest.raises(ValueError, match=r"blocks\.0\.left must have shape \[5, 5\], got \[4, 5\]"):
        ImageClassifier.from_weights(embed, [(left[:4], right)], head, (3, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_model()(draw(2, 4, 4)), r"images of 3x4, or rows of 12, got shape \[2, 4, 4\]"),
        (lambda: random_model().tensor(1), "layer must lie between -1 and 0, got 1"),
        (lambda: random_model(d_hidden=0), "d_hidden must be at least 1, got 0"),
        (lambda: Recipe(epochs=0), "epochs must be at least 1, got 0"),
        (lambda: Recipe(input_noise=-1.0), "input_noise must not be negative, got -1"),
        (lambda: Recipe(noise_unit="std"), "noise_unit must be 'absolute' or 'batch', got 'std'"),
        (lambda: Recipe(precision="half"), "precision must be 'float32' or 'bfloat16', got 'half'"),
    ],
)
def test_bad_models_and_recipes(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()


def test_files_hold_the_model_bit_for_bit(tmp_path):
    model = random_model(bias=True, n_layers=2)
    classifiers.save(model, tmp_path)
    loaded = classifiers.load(tmp_path)
    assert loaded.cfg == model.cfg
    assert torch.equal(loaded.double()(draw(4, 12)), model(draw(4, 12)))


@pytest.mark.parametrize(
    ("dtype", "read"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_files_keep_the_dtype_or_widen_it(tmp_path, dtype, read):
    model = random_model(bias=True)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).double().div(3)
    classifiers.save(model.to(dtype), tmp_path)
    loaded = classifiers.load(tmp_path)
    for (name, one), (_, other) in zip(loaded.state_dict().items(), model.state_dict().items(), strict=True):
        assert one.dtype == read, name
        assert torch.equal(one, other.to(read)), name


def test_files_of_several_dtypes_are_refused(tmp_path):
    model = random_model(bias=True)
    model.head.float()
    classifiers.save(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"must be of one floating dtype, got torch\.float32, torch\.float64"):
        classifiers.load(tmp_path)


def test_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        classifiers.load(tmp_path)
    model = random_model()
    classifiers.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layers": 2}))
    with pytest.raises(CheckpointError, match=r"blocks\.1\.left\.weight .* must be \[5, 5\], got no such tensor"):
        classifiers.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"d_hidden": 6}))
    with pytest.raises(CheckpointError, match=r"embed\.weight in .* must be \[6, 12\], got \[5, 12\]"):
        classifiers.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"depth": 2}))
    with pytest.raises(CheckpointError, match="must have the keys"):
        classifiers.load(tmp_path)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unit", "factor"), [("absolute", 1.0), ("batch", 0.25)])
def test_noise_has_the_strength_of_its_unit(unit, factor):
    x = 0.25 * torch.randn(400, 500, generator=torch.Generator().manual_seed(0))
    added = classifiers.add_noise(x, 0.6, unit, torch.Generator().manual_seed(1)) - x
    assert added.std() == pytest.approx(0.6 * factor, rel=0.01)
    assert abs(float((added * x).mean())) < 1e-3


def test_a_translation_moves_by_whole_pixels_at_most_that_far():
    x = torch.zeros(200, 9, 11)
    x[:, 4, 5] = 1
    moved = classifiers.augment(x, torch.Generator().manual_seed(0), translate=2.0)
    rows, columns = torch.arange(9.0), torch.arange(11.0)
    down = (moved.sum(2) * rows).sum(1) / moved.sum((1, 2)) - 4
    across = (moved.sum(1) * columns).sum(1) / moved.sum((1, 2)) - 5
    for shift in (down, across):
        assert 1.8 < shift.abs().max() <= 2.001
        assert shift.std() == pytest.approx(2 / 3**0.5, rel=0.1)  # even between -2 and 2
    torch.testing.assert_close(moved.sum((1, 2)), torch.ones(200))


def test_a_rotation_keeps_distances_on_a_grid_that_is_not_square():
    x = torch.zeros(50, 21, 31)
    x[:, 10, 21] = 1  # six to the right of the centre
    turned = classifiers.augment(x, torch.Generator().manual_seed(0), rotate=90.0)
    rows, columns = torch.arange(21.0) - 10, torch.arange(31.0) - 15
    down = (turned.sum(2) * rows).sum(1) / turned.sum((1, 2))
    across = (turned.sum(1) * columns).sum(1) / turned.sum((1, 2))
    torch.testing.assert_close((down**2 + across**2).sqrt(), torch.full((50,), 6.0), atol=0.15, rtol=0)
    assert down.min() < -5.5 < 5.5 < down.max()


def test_blur_is_a_gaussian_filter_of_some_width_below_the_limit():
    x = torch.zeros(1, 15, 15)
    x[0, 7, 7] = 1
    blurred = classifiers.augment(x, torch.Generator().manual_seed(0), blur=0.8)[0]
    variance = float((blurred.sum(0) * (torch.arange(15.0) - 7) ** 2).sum())
    assert 0.05 < variance < 0.82**2
    grid = [gaussian_filter(x[0].numpy(), sigma, radius=2) for sigma in np.linspace(0.1, 0.81, 400)]
    assert min(float(np.abs(blurred.numpy() - one).max()) for one in grid) < 1e-2


def test_a_classifier_learns_digits(digits):
    train, test = digits
    recipe = Recipe(epochs=25, batch=128, lr=3e-3, input_noise=0.2)
    model, history = classifiers.train(train, recipe, d_hidden=64, progress=False)
    assert classifiers.accuracy(model, test) > 0.95
    assert history.loss[-1] < 0.3 * history.loss[0]
    assert "25 epochs" in repr(history)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_that_stopped_goes_on_bit_identically(digits, tmp_path, precision, monkeypatch):
    recipe, shape = dataclasses.replace(QUICK, precision=precision), {"d_hidden": 16, "n_layers": 2, "residual": True}
    straight, history = classifiers.train(digits[0], recipe, progress=False, **shape)
    checkpoint, epoch = tmp_path / "checkpoint.safetensors", classifiers.Trainer.epoch

    def dies(self):
        if len(self.loss) == 2:
            raise KeyboardInterrupt
        epoch(self)

    monkeypatch.setattr(classifiers.Trainer, "epoch", dies)
    with pytest.raises(KeyboardInterrupt):
        classifiers.train(digits[0], recipe, progress=False, checkpoint=checkpoint, **shape)
    monkeypatch.undo()
    resumed, again = classifiers.train(digits[0], recipe, progress=False, checkpoint=checkpoint, **shape)
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert again.loss == history.loss
    other = dataclasses.replace(recipe, seed=1)
    with pytest.raises(ValueError, match="must be of the recipe"):
        classifiers.train(digits[0], other, progress=False, checkpoint=checkpoint, **shape)
    with pytest.raises(ValueError, match=r"must be of a model .* differs"):
        classifiers.train(digits[0], recipe, progress=False, checkpoint=checkpoint, d_hidden=8)


def test_a_seed_is_all_that_a_run_depends_on(digits):
    runs = [classifiers.train(digits[0], Recipe(epochs=1, seed=s), d_hidden=8, progress=False)[0] for s in (1, 1, 2)]
    weights = [run.embed.weight for run in runs]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_images_that_do_not_fit_the_model(digits):
    model = random_model()
    with pytest.raises(ValueError, match="images must be 3x4, got 8x8"):
        classifiers.Trainer(model, digits[0], QUICK)
    with pytest.raises(ValueError, match="labels must be below n_classes=3, got 9"):
        classifiers.Trainer(random_model(height=8, width=8), digits[0], QUICK)


def test_a_loss_that_is_not_finite_stops_the_run(digits):
    with pytest.raises(FloatingPointError, match=r"loss of epoch .* use a lower lr"):
        classifiers.train(digits[0], Recipe(epochs=5, lr=1e20, batch=200), d_hidden=8, progress=False)


def test_the_script_trains_and_knows_its_folder(tmp_path, monkeypatch, capsys):
    def command(*more):
        monkeypatch.setattr(sys, "argv", ["train_image.py", "--out", str(tmp_path), "--d-hidden", "8", *more])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    first = command("--epochs", "1")
    assert first == command("--epochs", "1")
    assert first.startswith("test accuracy 0.")
    record, model = json.loads((tmp_path / "record.json").read_text()), classifiers.load(tmp_path)
    assert classifiers.accuracy(model, imagesets.load("digits", "test")) == pytest.approx(record["test accuracy"])
    assert not (tmp_path / "checkpoint.safetensors").exists()
    with pytest.raises(SystemExit, match="holds another run"):
        command("--epochs", "1", "--seed", "1")
