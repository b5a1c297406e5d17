"""Transformers compiled from a stated circuit, in the published format, with the SAEs of their features.

Everything that bilens reads off a checkpoint is known of these beforehand: which words have which features, which head
moves a feature where, which pair drives which output by how much, and how large everything else is.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from bilens.models.attention import AttentionConfig
from bilens.models.checkpoints import save
from bilens.models.mlp import MLPConfig
from bilens.models.transformer import BilinearConfig, BilinearTransformer
from bilens.tensor.keeping import atomic_write, user_path
from bilens.tensor.records import Record, Rows, tabular

SPECIAL = ("[UNK]", "[BOS]", "[EOS]")
_CERTAIN = 30.0  # nats between a key that is to be seen and one that is not


@tabular()
class Product(NamedTuple):
    """What two input features do together: `value · z_left z_right` in the pre-activation of an output feature."""

    out: int
    left: int
    right: int
    value: float


@tabular()
class Move(NamedTuple):
    """A head that writes `target` wherever `source` is some words back.

    `z_target = value · z_source / rms`, with the root mean square of the residual stream where the source is, taken
    from the words in reach (their mean, if there are several).
    """

    source: int
    target: int
    value: float
    back: tuple[int, ...] = (1, 2, 3)


@dataclass(frozen=True)
class Shape:
    """Sizes of a compiled model and its SAEs."""

    n_layers: int = 2
    layer: int = 1  # the block that holds the circuit; the others do nothing
    d_model: int = 64
    d_hidden: int = 256
    n_heads: int = 4
    n_ctx: int = 64
    expansion: int = 4  # features of either SAE, in units of `d_model`
    k: int = 8
    point: Literal["resid-mid", "mlp-in"] = "resid-mid"  # of the input SAE

    @property
    def names(self) -> tuple[str, str]:
        """Names of the two SAEs in the -scope layout."""
        return tuple(f"{self.layer}-{point}-x{self.expansion}-k{self.k}" for point in (self.point, "mlp-out"))

    def config(self, d_vocab: int) -> BilinearConfig:
        """Return the model's config, that of a published one."""
        attention = AttentionConfig.of_width(self.d_model, self.n_heads, scale=1 / math.sqrt(2 * self.n_layers))
        mlp = MLPConfig(self.d_hidden)
        return BilinearConfig(self.n_layers, self.d_model, self.n_ctx, d_vocab, attention=attention, mlp=mlp)


@dataclass(frozen=True)
class Plan:
    """A circuit, stated: features are numbers, their directions are drawn when it is compiled.

    Args:
        words: Features of each word and how active they are; `"[BOS]"` may be one, else it has `always` alone.
        products: What pairs of input features do to output features.
        moves: One attention head each.
        says: Output features that raise a word's logit, and by how much per unit of the final stream.
        always: The input feature of every word, which queries read.
        noise: Standard deviation of the coefficients of all other pairs, from random hidden units.
        tilt: How far the SAEs' directions are off, `normalize(d + tilt · g / sqrt(d_model))` with Gaussian g.
        shape: Sizes.

    Raises:
        ValueError: A feature that is not there, a word without `always`, more moves than heads, or more products or
            features than the sizes hold.
    """

    words: Mapping[str, Mapping[int, float]]
    products: Sequence[Product]
    moves: Sequence[Move] = ()
    says: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    always: int = 0
    noise: float = 0.0
    tilt: float = 0.0
    shape: Shape = field(default_factory=Shape)

    def __post_init__(self):
        shape, n = self.shape, self.shape.expansion * self.shape.d_model
        for side, used in (("input", self.inputs), ("output", self.outputs)):
            if used and not 0 <= used[0] <= used[-1] < n:
                raise ValueError(f"{side} features must lie between 0 and {n - 1}, got {used[0]} to {used[-1]}")
        if len(self.inputs) + len(self.outputs) > shape.d_model:
            used = f"{len(self.inputs)} + {len(self.outputs)}"
            raise ValueError(f"d_model must hold all features at right angles, got {shape.d_model} for {used}")
        if len(self.products) > shape.d_hidden:
            raise ValueError(f"d_hidden must be at least {len(self.products)} (products), got {shape.d_hidden}")
        if len(self.moves) > shape.n_heads:
            raise ValueError(f"n_heads must be at least {len(self.moves)} (moves), got {shape.n_heads}")
        for word, codes in self.words.items():
            if codes.get(self.always, 0) <= 0:
                raise ValueError(f"words must all activate feature {self.always} (always), got {word!r} without it")

    @property
    def inputs(self) -> list[int]:
        """Input features that words, products or moves name."""
        named = {self.always, *(f for codes in self.words.values() for f in codes)}
        named |= {f for one in self.products for f in (one.left, one.right)}
        return sorted(named | {f for move in self.moves for f in (move.source, move.target)})

    @property
    def outputs(self) -> list[int]:
        """Output features that products or words name."""
        return sorted({one.out for one in self.products} | {f for said in self.says.values() for f in said})

    @property
    def vocabulary(self) -> list[str]:
        """All tokens, in the order of their ids."""
        return list(dict.fromkeys([*SPECIAL, *self.words, *self.says]))

    def codes(self, word: str) -> Mapping[int, float]:
        """Return the features of a word; those that only `says` names, and special ones, have `always` alone."""
        return self.words.get(word, {self.always: 1.0})


@dataclass(frozen=True, eq=False, repr=False)
class Compiled(Record):
    """A plan, the model that carries it out, and the directions of its features."""

    plan: Plan
    model: BilinearTransformer
    inp: Float[Tensor, "feature d_model"]
    out: Float[Tensor, "feature d_model"]

    def facts(self) -> dict[str, Any]:
        """Return its words, features, products and moves."""
        counts = {"features": len(self.inp), "outputs": len(self.out), "noise": self.plan.noise}
        parts = {"products": Rows(self.plan.products), "moves": Rows(self.plan.moves)}
        return {"words": tuple(self.plan.words)} | counts | parts

    def save(self, folder: str | Path) -> None:
        """Write `model` in the published format and, beside it, `scope` in the layout of the published SAEs."""
        folder = user_path(folder)
        save(self.model, folder / "model")
        shape = self.plan.shape
        for name, point, directions in zip(shape.names, (shape.point, "mlp-out"), (self.inp, self.out), strict=True):
            write_scope(folder / "scope" / name, (point, shape.layer), directions, shape.k)


def compile_plan(plan: Plan, *, generator: torch.Generator) -> Compiled:
    """Build the model of a plan and the SAEs of its features.

    The features that a plan names lie at right angles to one another, and those of the SAEs that it does not name at
    right angles to those it does, elsewhere at random. So `readers · B · writers` holds each product's value, and for
    all other pairs nothing but the noise (2410.08417, section 3.1, read backwards).

    Args:
        plan: What the model is to do.
        generator: Source of directions, noise and tilt.
    """
    shape, n_in, n_out = plan.shape, len(plan.inputs), len(plan.outputs)
    basis = torch.linalg.qr(_normal(shape.d_model, shape.d_model, generator=generator)).Q
    inp = _dictionary(shape, plan.inputs, basis[:n_in], generator)
    out = _dictionary(shape, plan.outputs, basis[n_in : n_in + n_out], generator)
    model = BilinearTransformer(shape.config(len(plan.vocabulary)), _tokenizer(plan.vocabulary))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        block = model.blocks[shape.layer]
        for row, word in enumerate(plan.vocabulary):
            model.embed.weight[row] = _mix(plan.codes(word), inp)
            model.unembed.weight[row] = _mix(plan.says.get(word, {}), out)
        for head, move in enumerate(plan.moves):
            _install(block.attn, head, move, plan, inp)
        left, right, down = _factors(plan, inp, out, generator)
        block.mlp.w.weight.copy_(torch.cat((left, right)))
        block.mlp.p.weight.copy_(down)
    return Compiled(plan, model.eval(), *(_tilted(one, plan.tilt, generator).float() for one in (inp, out)))


def write_scope(folder: Path, point: tuple[str, int], directions: Float[Tensor, "feature d_model"], k: int) -> None:
    """Write a tied top-k SAE without biases in the published -scope layout, which `saes.load_scope` reads.

    Args:
        folder: `{layer}-{point}-x{expansion}-k{k}[-tag]`, in the folder of all SAEs.
        point: Hook point, as the layout spells it, and layer.
        directions: Unit rows, a whole multiple of `d_model` of them: encoder and decoder.
        k: How many are active.
    """
    n, d = directions.shape
    config = {"point": point, "d_model": d, "expansion": n // d, "k": k, "encoder_bias": False}
    tensors = {"w_enc.weight": directions, "w_dec.weight": directions.T.contiguous(), "b_dec": torch.zeros(d)}
    with atomic_write(folder / "model.safetensors") as weights, atomic_write(folder / "config.json") as about:
        save_file(tensors, weights)
        about.write_text(json.dumps(config, indent=1))


# -- directions -------------------------------------------------------------------------------------------------------


def _normal(*shape: int, generator: torch.Generator) -> Float[Tensor, "..."]:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _mix(codes: Mapping[int, float], directions: Tensor) -> Float[Tensor, " d_model"]:
    return sum((value * directions[f] for f, value in codes.items()), directions.new_zeros(directions.shape[1]))


def _dictionary(shape: Shape, used: list[int], own: Tensor, generator: torch.Generator) -> Tensor:
    """Give the features in use their directions, and the others random ones at right angles to those."""
    rows = _normal(shape.expansion * shape.d_model, shape.d_model, generator=generator)
    rows = torch.nn.functional.normalize(rows - rows @ own.T @ own, dim=1)
    rows[used] = own
    return rows


def _tilted(rows: Tensor, tilt: float, generator: torch.Generator) -> Tensor:
    noise = _normal(*rows.shape, generator=generator) / math.sqrt(rows.shape[1])
    return torch.nn.functional.normalize(rows + tilt * noise, dim=1)


def _tokenizer(words: Iterable[str]) -> Tokenizer:
    """Return a tokenizer of whole words."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


# -- weights ----------------------------------------------------------------------------------------------------------


def _factors(plan: Plan, inp: Tensor, out: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return left, right and down weights: a hidden unit for each product, and random ones for the noise.

    Entries of standard deviation s in n units give `2 Q_ij` the standard deviation `sqrt(2 n) s³` for unit directions.
    """
    shape, products = plan.shape, plan.products
    n = shape.d_hidden - len(products)
    s = (plan.noise / math.sqrt(2 * n)) ** (1 / 3) if n else 0.0
    rest = [s * _normal(n, shape.d_model, generator=generator) for _ in range(3)]
    own = [inp[[one.left for one in products]], inp[[one.right for one in products]]]
    own += [out[[one.out for one in products]] * inp.new_tensor([one.value for one in products])[:, None]]
    left, right, down = (torch.cat(parts) for parts in zip(own, rest, strict=True))
    return left, right, down.T


def _install(attn: torch.nn.Module, head: int, move: Move, plan: Plan, inp: Tensor) -> None:
    """Write a move into one head: queries are the same everywhere, keys turn with the distance, values are copied."""
    shape, d_head = plan.shape, attn.config.d_head
    key = _key_of_distance(move.back, shape.n_ctx, attn.config)
    query = torch.cat((torch.ones(d_head // 2), torch.zeros(d_head // 2)))
    words = [_mix(plan.codes(word), inp) for word in plan.vocabulary]
    normal = torch.stack([word / word.pow(2).mean().sqrt() for word in words])
    sources = (normal @ inp[move.source]).abs()
    least = (normal @ inp[plan.always]).min() * sources[sources > 1e-9].min()
    gain = _CERTAIN * math.sqrt(d_head) / least
    rows = slice(head * d_head, (head + 1) * d_head)
    parts = attn.qkv.weight.split(attn.widths)
    parts[0][rows] = query[:, None] * inp[plan.always]
    parts[1][rows] = gain * key[:, None] * inp[move.source]
    parts[2][rows.start] = inp[move.source].to(parts[2])
    attn.o.weight[:, rows.start] = (move.value / attn.config.scale * inp[move.target]).to(parts[2])


def _key_of_distance(back: Sequence[int], n_ctx: int, config: AttentionConfig) -> Float[Tensor, " d_head"]:
    """Return the key that `q = (1, ..., 1, 0, ..., 0)` scores at least 1 at these distances, at most -1 at all others.

    Rotated, `q · k = Σ_f a_f cos(θ_f Δ) + b_f sin(θ_f Δ)`; of all such keys that with the smallest largest entry.

    Raises:
        ValueError: The head's frequencies cannot tell these distances from the others.
    """
    from scipy.optimize import linprog  # takes a second to import

    angles = np.arange(n_ctx)[:, None] * config.rope.frequencies(config.d_head, torch.float64).numpy()
    waves = np.concatenate((np.cos(angles), np.sin(angles)), 1)
    sign = np.where(np.isin(np.arange(n_ctx), back), 1.0, -1.0)
    # unknowns: the key's entries, and a bound on their size
    scores = np.hstack((-sign[:, None] * waves, np.zeros((n_ctx, 1))))
    bounds = np.vstack([np.hstack((side * np.eye(config.d_head), -np.ones((config.d_head, 1)))) for side in (1, -1)])
    found = linprog(
        np.eye(config.d_head + 1)[-1],
        A_ub=np.vstack((scores, bounds)),
        b_ub=np.concatenate((-np.ones(n_ctx), np.zeros(2 * config.d_head))),
        bounds=(None, None),
    )
    if found.status != 0:
        raise ValueError(f"back must be distances that a head of width {config.d_head} can tell, got {tuple(back)}")
    return torch.from_numpy(found.x[:-1])
