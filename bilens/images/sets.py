"""Labelled images: scikit-learn's digits offline, MNIST and others from the Hub, or a local npz or idx file."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens.tensor.keeping import user_path
from bilens.tensor.records import Record
from bilens.tensor.tables import Images, number_of

from .files import read_idx, read_npz

Split = Literal["train", "test"]

MOST_CLASSES = 100_000  # of labels without names
HUB = {"mnist": "ylecun/mnist", "fashion-mnist": "zalando-datasets/fashion_mnist"}


@dataclass(frozen=True, repr=False, eq=False)
class ImageSet(Record, rows="n", unit="images"):
    """Grey images and their classes.

    Args:
        x: Brightness in [0, 1].
        y: Class of each image.
        names: Names of the classes.

    Raises:
        ValueError: Brightness outside [0, 1] or not finite, a label outside the classes, or another number of labels
            than images.
    """

    x: Float[Tensor, "n height width"]
    y: Int[Tensor, " n"]
    names: tuple[str, ...]

    def __post_init__(self):
        if self.x.ndim != 3:
            raise ValueError(f"x must have shape [n, height, width], got {list(self.x.shape)}")
        if self.y.shape != self.x.shape[:1]:
            raise ValueError(f"y must hold one label for each of the {len(self.x)} images, got {list(self.y.shape)}")
        if not len(self.x):
            raise ValueError("x must hold at least one image, got none")
        low, high = (float(end) for end in self.x.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"x must lie in [0, 1] (divide bytes by 255), got values from {low:g} to {high:g}")
        low, high = (int(end) for end in self.y.aminmax())
        if low < 0 or high >= len(self.names):
            raise ValueError(f"y must lie between 0 and {len(self.names) - 1}, got labels from {low} to {high}")

    def columns(self) -> dict[str, Any]:
        """Return the images, and the names of their classes."""
        names = [self.names[label] for label in self.y.tolist()] if self.names else self.y
        return {"image": Images(self.x), "class": names}

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> Any:
        """Return some of the images, by a slice, indices or a mask, or one and its class by its number."""
        if isinstance(index := number_of(index), int):
            return super().__getitem__(index)
        return replace(self, x=self.x[index], y=self.y[index])

    def __repr__(self) -> str:
        return f"ImageSet({len(self)} images of {self.height}x{self.width}, {len(self.names)} classes)"

    @property
    def height(self) -> int:
        """Rows of an image."""
        return self.x.shape[1]

    @property
    def width(self) -> int:
        """Columns of an image."""
        return self.x.shape[2]

    def flat(self) -> Float[Tensor, "n pixels"]:
        """Return the images as rows of pixels."""
        return self.x.flatten(1)

    def to(self, *args, **kwargs) -> "ImageSet":
        """Return the images on another device or in another floating-point type; labels keep their type."""
        x = self.x.to(*args, **kwargs)
        return replace(self, x=x, y=self.y.to(x.device))


def load(name: str | Path = "digits", split: Split = "train") -> ImageSet:
    """Load labelled images.

    Args:
        name: `"digits"`, scikit-learn's 1,797 digits of 8x8 pixels (offline; every fifth of each class is for testing);
            a file `.npz` with `x_train, y_train, x_test, y_test`; a folder with the four idx files of MNIST, gzipped
            or not; `"mnist"`, `"fashion-mnist"` or another Hub repository with the columns `image` and `label`.
        split: `"train"` or `"test"`.

    Returns:
        The images, bytes divided by 255.

    Raises:
        FileNotFoundError: No such file, folder or repository.
        ValueError: An unknown split, or a file that is damaged or does not hold images and labels.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if str(name) == "digits":
        return _digits(split)
    path = user_path(name)
    if path.is_dir():
        prefix = {"train": "train", "test": "t10k"}[split]
        x, y = (read_idx(path, f"{prefix}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    elif path.suffix == ".npz" or path.is_file():
        x, y = read_npz(path, (f"x_{split}", f"y_{split}"))
    else:
        return _from_hub(HUB.get(str(name), str(name)), split)
    try:
        return from_bytes(x, y)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def from_bytes(x: np.ndarray, y: np.ndarray, names: tuple[str, ...] | None = None) -> ImageSet:
    """Make a set of images `[n, height, width]` of bytes; classes are named by number unless `names` are given.

    Raises:
        ValueError: Not bytes, no images, another number of labels, or labels that are no class: negative, fractional,
            100,000 and more.
    """
    if x.dtype != np.uint8:
        raise ValueError(f"images must be bytes from 0 to 255, got {x.dtype}")
    if x.ndim != 3 or not x.size:
        raise ValueError(f"images must have shape [n, height, width], and none of them zero, got {list(x.shape)}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"labels must be one for each of the {len(x)} images, got {list(y.shape)}")
    if y.dtype.kind not in "iuf" or not (y == np.floor(y)).all():  # NaN equals nothing
        raise ValueError(f"labels must be whole numbers, got {y.dtype} such as {y[:3].tolist()}")
    low, high = y.min(), y.max()
    most = MOST_CLASSES if names is None else len(names)
    if not 0 <= low <= high < most:
        raise ValueError(f"labels must lie between 0 and {most - 1}, got {low:g} to {high:g}")
    names = tuple(str(i) for i in range(int(high) + 1)) if names is None else names
    return ImageSet(torch.tensor(x).float() / 255, torch.from_numpy(y.astype(np.int64)), names)


def _digits(split: Split) -> ImageSet:
    from sklearn.datasets import load_digits

    digits = load_digits()
    rank = np.zeros(len(digits.target), int)  # of an image among those of its class
    for label in range(10):
        mine = digits.target == label
        rank[mine] = np.arange(mine.sum())
    chosen = (rank % 5 == 4) == (split == "test")
    x = torch.from_numpy(digits.images[chosen] / 16).float()
    return ImageSet(x, torch.from_numpy(digits.target[chosen]), tuple("0123456789"))


def _from_hub(repository: str, split: Split) -> ImageSet:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        dataset = load_dataset(repository, split=split)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{repository!r} is no file or folder here, and no dataset that can be reached on the Hub"
        ) from error
    if not {"image", "label"} <= set(dataset.column_names):
        raise ValueError(f"{repository} must have columns image and label, got {', '.join(dataset.column_names)}")
    x = np.stack([np.asarray(image.convert("L")) for image in dataset["image"]])
    names = getattr(dataset.features["label"], "names", None)
    return from_bytes(x, np.asarray(dataset["label"]), None if names is None else tuple(names))
