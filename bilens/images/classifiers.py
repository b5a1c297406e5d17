"""Bilinear image classifiers: the hooked model, its tensors, training with noise and augmentations, files."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from bilens.models.checkpoints import check_device
from bilens.models.hooks import Hooked, Point
from bilens.models.layouts import Keys
from bilens.models.sources import CheckpointError, read_json, read_safetensors
from bilens.tensor.bilinear import BilinearTensor
from bilens.tensor.keeping import atomic_write, damaged, is_file, read_state, user_path, write_state
from bilens.tensor.records import Record

from .sets import ImageSet

# -- the model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassifierConfig:
    """The shape of an `ImageClassifier`."""

    height: int
    width: int
    n_classes: int
    d_hidden: int = 512  # width of the embedding and of every layer
    n_layers: int = 1
    bias: bool = False  # on the embedding, both sides of every layer, and the head
    residual: bool = False  # whether a layer adds to its input or replaces it

    def __post_init__(self):
        for name in ("height", "width", "n_classes", "d_hidden", "n_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def pixels(self) -> int:
        """Number of inputs."""
        return self.height * self.width


class ProductLayer(nn.Module):
    """A bilinear layer without a projection of its own: `(Lx) ⊙ (Rx)`, added to `x` or in its place."""

    def __init__(self, d_hidden: int, bias: bool, residual: bool):
        super().__init__()
        self.residual = residual
        self.left = nn.Linear(d_hidden, d_hidden, bias=bias)
        self.right = nn.Linear(d_hidden, d_hidden, bias=bias)
        self.hook_pre, self.hook_pre_linear, self.hook_post = Point(), Point(), Point()
        self.hook_out = Point()

    def forward(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        """Return the product of both sides, plus `x` if the layer is residual."""
        product = self.hook_post(self.hook_pre(self.left(x)) * self.hook_pre_linear(self.right(x)))
        return self.hook_out(x + product if self.residual else product)


class ImageClassifier(Hooked):
    """A classifier of images without any elementwise nonlinearity: embedding, bilinear layers, linear head.

    `logits = U h_n`, `h_l = (L h_{l-1} + b) ⊙ (R h_{l-1} + c) [+ h_{l-1}]`, `h_0 = E x [+ e]`; 2410.08417, section 4.
    Hook points in their order: `hook_image`, `hook_embed`, then for each layer `blocks.{l}.hook_pre` (left),
    `.hook_pre_linear` (right), `.hook_post` (their product), `.hook_out`, and at last `hook_logits`.

    Args:
        cfg: The shape.
        generator: Draws the initial weights, uniform in `±1/sqrt(fan in)` as torch's linear layers; zero if `None`.
    """

    def __init__(self, cfg: ClassifierConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Linear(cfg.pixels, cfg.d_hidden, bias=cfg.bias)
        self.blocks = nn.ModuleList(ProductLayer(cfg.d_hidden, cfg.bias, cfg.residual) for _ in range(cfg.n_layers))
        self.head = nn.Linear(cfg.d_hidden, cfg.n_classes, bias=cfg.bias)
        self.hook_image, self.hook_embed, self.hook_logits = Point(), Point(), Point()
        with torch.no_grad():
            for part in (self.embed, *(side for block in self.blocks for side in (block.left, block.right)), self.head):
                for parameter in part.parameters():
                    parameter.zero_()
                    if generator is not None:
                        bound = part.in_features**-0.5
                        parameter.uniform_(-bound, bound, generator=generator)
        self.setup()

    @classmethod
    def from_weights(
        cls,
        embed: Float[Tensor, "hidden pixels"],
        layers: Sequence[tuple[Float[Tensor, "hidden hidden"], Float[Tensor, "hidden hidden"]]],
        head: Float[Tensor, "classes hidden"],
        size: tuple[int, int],
        *,
        residual: bool = False,
    ) -> "ImageClassifier":
        """Build a classifier without biases from the arrays of somebody else's checkpoint.

        Args:
            embed: Rows read the image, row by row of pixels.
            layers: Left and right weights of each layer.
            head: One row for each class.
            size: Height and width of an image.
            residual: Whether a layer adds to its input.

        Raises:
            ValueError: The arrays do not fit together.
        """
        cfg = ClassifierConfig(*size, len(head), len(embed), len(layers), residual=residual)
        model = cls(cfg).to(embed)
        given = {"embed": embed, "head": head}
        for layer, sides in enumerate(layers):
            given |= {f"blocks.{layer}.{side}": part for side, part in zip(("left", "right"), sides, strict=True)}
        for name, weight in given.items():
            parameter = model.get_submodule(name).weight
            if weight.shape != parameter.shape:
                raise ValueError(f"{name} must have shape {list(parameter.shape)}, got {list(weight.shape)}")
            parameter.data.copy_(weight)
        return model.eval()

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "*batch classes"]:
        """Return the logits of images, given as rows of pixels or as `[.., height, width]`."""
        self.check_thread()
        h = self.hook_embed(self.embed(self.hook_image(self.rows(x))))
        for block in self.blocks:
            h = block(h)
        return self.hook_logits(self.head(h))

    def rows(self, x: Float[Tensor, "..."]) -> Float[Tensor, "*batch pixels"]:
        """Return images as rows of pixels, or say what their size must be."""
        size = (self.cfg.height, self.cfg.width)
        if x.shape[-1] == self.cfg.pixels:
            return x
        if x.shape[-2:] != size:
            raise ValueError(
                f"x must be images of {size[0]}x{size[1]}, or rows of {self.cfg.pixels}, got shape {list(x.shape)}"
            )
        return x.flatten(-2)

    def tensor(self, layer: int = -1, *, residual: bool = True) -> BilinearTensor:
        """Return a layer as a third-order tensor, exactly: from what enters it to the logits, or to what leaves it.

        The last layer includes the head. Biases and the residual path become linear terms with a constant leg.

        Args:
            layer: Which layer; the last by default.
            residual: Whether to include the residual path; without it only the product is there, as in published code.
        """
        n = self.cfg.n_layers
        if not -n <= layer < n:
            raise ValueError(f"layer must lie between {-n} and {n - 1}, got {layer}")
        block, last = self.blocks[layer], layer in (-1, n - 1)
        left, right, eye = block.left.weight, block.right.weight, torch.eye(self.cfg.d_hidden).to(block.left.weight)
        down, out_bias = (self.head.weight, self.head.bias) if last else (eye, None)
        if not (self.cfg.residual and residual):
            return BilinearTensor.from_weights(down, left, right, block.left.bias, block.right.bias, out_bias).detach()
        zero, one = left.new_zeros(len(eye)), left.new_ones(len(eye))  # x itself is the product of x and 1
        biases = (zero, zero) if block.left.bias is None else (block.left.bias, block.right.bias)
        return BilinearTensor.from_weights(
            torch.cat((down, down), 1),
            torch.cat((left, eye)),
            torch.cat((right, 0 * eye)),
            torch.cat((biases[0], zero)),
            torch.cat((biases[1], one)),
            out_bias,
        ).detach()

    def pixel_tensor(self, *, residual: bool = True) -> BilinearTensor:
        """Return a one-layer model as a tensor from pixels to logits, exactly: `B.apply(x)` is `model(x)`.

        Raises:
            ValueError: The model has several layers, so its logits are of a higher degree than two.
        """
        if self.cfg.n_layers != 1:
            raise ValueError(f"model must have one layer to be quadratic in its pixels, got {self.cfg.n_layers}")
        bias = None if self.embed.bias is None else self.embed.bias.detach()
        return self.tensor(residual=residual).project(inp=self.embed.weight.detach().T, inp_bias=bias)


def save(model: ImageClassifier, folder: str | os.PathLike[str]) -> None:
    """Write `config.json` and `model.safetensors`; loading them again is bit-identical."""
    folder = user_path(folder)
    with atomic_write(folder / "model.safetensors") as path:
        save_file({name: part.contiguous() for name, part in model.state_dict().items()}, path)
    with atomic_write(folder / "config.json") as path:
        path.write_text(json.dumps(asdict(model.cfg), indent=1) + "\n")


def load(folder: str | os.PathLike[str], device: torch.device | str | None = None) -> ImageClassifier:
    """Load a classifier that `save` wrote, in the dtype it was saved in; half precision is widened to float32.

    Raises:
        FileNotFoundError: The folder or one of the files is not there.
        CheckpointError: A key or tensor is missing, unknown, misshapen or not finite, says which; or tensors of
            several dtypes.
    """
    folder = user_path(folder)
    check_device(device)
    config = read_json(folder / "config.json")
    known = {field.name for field in fields(ClassifierConfig)}
    if set(config) != known:
        raise CheckpointError(f"{folder / 'config.json'} must have the keys {sorted(known)}, got {sorted(config)}")
    read = Keys(config, folder / "config.json")
    sizes = {name: read.size(name) for name in ("height", "width", "n_classes", "d_hidden", "n_layers")}
    cfg = ClassifierConfig(**sizes, bias=read.flag("bias", False), residual=read.flag("residual", False))
    found = dict(read_safetensors(folder / "model.safetensors"))
    shapes = {"embed.weight": [cfg.d_hidden, cfg.pixels], "head.weight": [cfg.n_classes, cfg.d_hidden]}
    for name, shape in shapes.items():
        got = list(found[name].shape) if name in found else "no such tensor"
        if got != shape:
            raise CheckpointError(f"{name} in {folder / 'model.safetensors'} must be {shape}, got {got}")
    if cfg.n_layers > len(found):
        raise CheckpointError(f"{read.path}: n_layers must be that of the {len(found)} tensors, got {cfg.n_layers}")
    with torch.device("meta"):  # sizes that are not those of the tensors must cost nothing
        model = ImageClassifier(cfg)
    expected = model.state_dict()
    for name in sorted(expected.keys() | found.keys()):
        shapes = [list(group[name].shape) if name in group else "no such tensor" for group in (expected, found)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(f"{name} in {folder / 'model.safetensors'} must be {shapes[0]}, got {shapes[1]}")
        if not found[name].isfinite().all():
            raise CheckpointError(f"{name} in {folder / 'model.safetensors'} must be finite")
    dtypes = {tensor.dtype for tensor in found.values()}
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        got = ", ".join(sorted(map(str, dtypes)))
        raise CheckpointError(f"tensors in {folder / 'model.safetensors'} must be of one floating dtype, got {got}")
    model.load_state_dict(found, assign=True)
    return model.to(device).eval()


# -- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained; the defaults are those of 2410.08417, table 1, but for the noise."""

    epochs: int = 20
    lr: float = 1e-3  # of AdamW, at the start; a cosine to zero, one step an epoch
    weight_decay: float = 1.0
    batch: int = 2048  # incomplete batches are dropped
    input_noise: float = 0.0  # Gaussian, added to the pixels, not clipped
    noise_unit: Literal["absolute", "batch"] = "absolute"  # a standard deviation, or one relative to the batch's
    latent_noise: float = 0.0  # on the embedding and what leaves each layer, relative to the batch's
    translate: float = 0.0  # pixels, at most, either way
    rotate: float = 0.0  # degrees, at most, either way
    blur: float = 0.0  # standard deviation of the kernel in pixels, at most
    precision: Literal["float32", "bfloat16"] = "float32"  # of the products in training; weights stay as they are
    seed: int = 0  # of weights, order, noise and augmentations

    def __post_init__(self):
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "weight_decay", "input_noise", "latent_noise", "translate", "rotate", "blur"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.noise_unit not in ("absolute", "batch"):
            raise ValueError(f"noise_unit must be 'absolute' or 'batch', got {self.noise_unit!r}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be 'float32' or 'bfloat16', got {self.precision!r}")


@dataclass(frozen=True, repr=False)
class History(Record, rows="epoch", along=("loss", "accuracy")):
    """What a training run saw: loss and accuracy on the training batches (with their noise), per epoch."""

    loss: tuple[float, ...]
    accuracy: tuple[float, ...]
    seconds: float

    def __repr__(self) -> str:
        last = f", loss {self.loss[-1]:.4g}" if len(self.loss) else ""
        return f"History({len(self.loss)} epochs{last}, {self.seconds:.0f} s)"


def add_noise(
    x: Float[Tensor, "*shape"], scale: float, unit: Literal["absolute", "batch"], generator: torch.Generator
) -> Float[Tensor, "*shape"]:
    """Add Gaussian noise of standard deviation `scale`, or `scale` times that of all of `x`.

    Both are published, under one name: "input noise 0.5" is about 0.15 in brightness on MNIST if it is relative.
    """
    if not scale:
        return x
    noise = torch.empty_like(x).normal_(generator=generator)
    return x + noise * (scale if unit == "absolute" else scale * x.detach().std())


def augment(
    x: Float[Tensor, "n height width"],
    generator: torch.Generator,
    *,
    translate: float = 0.0,
    rotate: float = 0.0,
    blur: float = 0.0,
) -> Float[Tensor, "n height width"]:
    """Shift and turn each image, and blur the batch, each by an amount drawn evenly up to the given one.

    Args:
        x: Images; what is moved in from outside is black.
        generator: Draws the amounts.
        translate: Pixels, at most, either way, in both directions.
        rotate: Degrees, at most, either way.
        blur: Standard deviation of a Gaussian kernel of 5 by 5, in pixels, at most.
    """

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=x.device, dtype=x.dtype)

    n, height, width = x.shape
    if translate or rotate:
        angle = (2 * draw(n) - 1) * (rotate * torch.pi / 180)
        shift = (2 * draw(2, n) - 1) * 2 * translate / torch.tensor([[width], [height]]).to(x)
        cos, sin, ratio = angle.cos(), angle.sin(), height / width
        matrix = torch.stack((cos, -sin * ratio, shift[0], sin / ratio, cos, shift[1]), -1).unflatten(-1, (2, 3))
        grid = F.affine_grid(matrix, [n, 1, height, width], align_corners=False)
        x = F.grid_sample(x[:, None], grid, align_corners=False)[:, 0]
    if blur:
        sigma = float(draw(1)) * blur + 0.01
        kernel = torch.exp(-torch.arange(-2.0, 3).pow(2) / (2 * sigma**2)).to(x)
        kernel = kernel / kernel.sum()
        x = F.conv2d(x[:, None], torch.outer(kernel, kernel)[None, None], padding=2)[:, 0]
    return x


class Trainer:
    """One training run, an epoch at a time; what an epoch draws depends on the seed and its number alone."""

    def __init__(self, model: ImageClassifier, images: ImageSet, recipe: Recipe):
        cfg = model.cfg
        if (images.height, images.width) != (cfg.height, cfg.width):
            raise ValueError(f"images must be {cfg.height}x{cfg.width}, got {images.height}x{images.width}")
        if int(images.y.max()) >= cfg.n_classes:
            raise ValueError(f"labels must be below n_classes={cfg.n_classes}, got {int(images.y.max())}")
        self.model, self.images, self.recipe = model, images, recipe
        self.optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        self.loss: list[float] = []
        self.accuracy: list[float] = []
        self.seconds = 0.0

    def epoch(self) -> None:
        """Train for one epoch."""
        start, recipe, done = time.perf_counter(), self.recipe, len(self.loss)
        generator = torch.Generator(self.images.x.device).manual_seed(recipe.seed * 1_000_003 + done + 1)
        for group in self.optimiser.param_groups:
            # by the formula, which needs no state: torch's schedule carries rounding from epoch to epoch
            group["lr"] = recipe.lr * (1 + float(torch.tensor(torch.pi * done / recipe.epochs).cos())) / 2
        with self.model.hooks(fwd_hooks=self._latent_noise(generator)):
            sums = [self._step(batch, generator) for batch in self._batches(generator)]
        self.loss.append(float(torch.stack([loss for loss, _ in sums]).mean()))
        self.accuracy.append(float(torch.stack([right for _, right in sums]).mean()))
        self.seconds += time.perf_counter() - start
        if not torch.tensor(self.loss[-1]).isfinite():
            raise FloatingPointError(f"the loss of epoch {done + 1} is {self.loss[-1]}; use a lower lr")

    def _batches(self, generator: torch.Generator) -> Iterator[Tensor]:
        n, size = len(self.images), min(self.recipe.batch, len(self.images))
        order = torch.randperm(n, generator=generator, device=generator.device)
        return iter(order[: n // size * size].split(size))

    def _step(self, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y, recipe = self.images.x[batch], self.images.y[batch], self.recipe
        x = augment(x, generator, translate=recipe.translate, rotate=recipe.rotate, blur=recipe.blur)
        x = add_noise(x, recipe.input_noise, recipe.noise_unit, generator)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            logits = self.model(x)
        loss = F.cross_entropy(logits.to(x), y)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return loss.detach(), (logits.argmax(-1) == y).float().mean()

    def _latent_noise(self, generator: torch.Generator) -> list[tuple[str, Callable]]:
        scale = self.recipe.latent_noise
        places = ["hook_embed", *(f"blocks.{layer}.hook_out" for layer in range(self.model.cfg.n_layers))]
        return [(place, lambda h, hook: add_noise(h, scale, "batch", generator)) for place in places if scale]

    def save(self, path: Path) -> None:
        """Write everything that the next epoch depends on, replacing the file at once."""
        tensors = {"loss": torch.tensor(self.loss).double(), "accuracy": torch.tensor(self.accuracy).double()}
        tensors["seconds"] = torch.tensor([self.seconds]).double()
        for name, parameter in self.model.named_parameters():
            tensors |= {f"{name}/{key}": part for key, part in self.optimiser.state[parameter].items()}
            tensors[name] = parameter.detach()
        write_state(path, tensors, {"recipe": asdict(self.recipe)})

    def resume(self, path: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            ValueError: The file is of another recipe or of a model of another shape, or it is damaged.
        """
        tensors, about = read_state(path)
        if about.get("recipe") != asdict(self.recipe):
            raise ValueError(
                f"checkpoint {path} must be of the recipe {asdict(self.recipe)}, got {about.get('recipe')}"
            )
        tensors = {name: tensor.to(self.images.x.device) for name, tensor in tensors.items()}
        for name, parameter in self.model.named_parameters():
            if name not in tensors or tensors[name].shape != parameter.shape:
                raise ValueError(f"checkpoint {path} must be of a model {self.model.cfg}, {name} differs")
            parameter.data.copy_(tensors[name])
            keys = [key for key in tensors if key.startswith(f"{name}/")]
            self.optimiser.state[parameter] = {key.rpartition("/")[2]: tensors[key] for key in keys}
        self.loss, self.accuracy = (tensors[name].tolist() for name in ("loss", "accuracy"))
        if not len(self.loss) == len(self.accuracy) <= self.recipe.epochs:
            raise damaged(path, f"{self.recipe.epochs} epochs were asked for, and it has {len(self.loss)}")
        self.seconds = float(tensors["seconds"])


def train(  # eight parameters: the shape of the model in four, as in `ClassifierConfig`
    images: ImageSet,
    recipe: Recipe,
    *,
    d_hidden: int = 512,
    n_layers: int = 1,
    bias: bool = False,
    residual: bool = False,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> tuple[ImageClassifier, History]:
    """Train a classifier with cross-entropy and AdamW (2410.08417, section 4 and table 1).

    Args:
        images: What to train on; also says size, classes, device and floating-point type.
        recipe: Rates, noise, augmentations and the seed.
        d_hidden: Width of the embedding and of every layer.
        n_layers: Number of bilinear layers.
        bias: Whether there are biases.
        residual: Whether a layer adds to its input.
        checkpoint: File to write after every epoch and, if it is there, to go on from; the result is bit-identical.
        progress: Whether to show a progress bar.

    Returns:
        The model in eval mode, and what was seen on the way.

    Raises:
        ValueError: A checkpoint of another run.
        FloatingPointError: The loss is not finite any more.
    """
    cfg = ClassifierConfig(images.height, images.width, len(images.names), d_hidden, n_layers, bias, residual)
    model = ImageClassifier(cfg, torch.Generator().manual_seed(recipe.seed)).to(images.x)
    trainer = Trainer(model.train(), images, recipe)
    checkpoint = None if checkpoint is None else user_path(checkpoint)
    if checkpoint is not None and is_file(checkpoint):
        trainer.resume(checkpoint)
    epochs = range(len(trainer.loss), recipe.epochs)
    with tqdm(total=recipe.epochs, initial=epochs.start, unit="epoch", disable=not progress) as bar:
        for _ in epochs:
            trainer.epoch()
            if checkpoint is not None:
                trainer.save(checkpoint)
            bar.set_postfix(loss=f"{trainer.loss[-1]:.4f}", accuracy=f"{trainer.accuracy[-1]:.4f}")
            bar.update()
    return model.eval(), History(tuple(trainer.loss), tuple(trainer.accuracy), trainer.seconds)


@torch.no_grad()
def predict(model: ImageClassifier, images: ImageSet, batch: int = 4096) -> Float[Tensor, "n classes"]:
    """Return the logits of all images, `batch` at a time."""
    return torch.cat([model(x) for x in images.x.split(batch)])


def accuracy(model: ImageClassifier, images: ImageSet) -> float:
    """Return the fraction of images whose class has the largest logit."""
    return float((predict(model, images).argmax(-1) == images.y).double().mean())
