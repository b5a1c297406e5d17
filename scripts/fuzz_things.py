"""What the fuzzer starts from: a small model with SAEs, cards and images, whole; and how its cases are told."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import bilens
from bilens import AttentionConfig, BilinearConfig, BilinearTransformer, MLPConfig
from bilens.saes import of_arrays

WORDS = "the a cat dog sat ran on mat not good bad movie was very and saw big little once upon time".split()  # noqa: SIM905
TEXTS = ["the movie was not good", "a cat sat on the mat", "the dog ran and saw a big cat"]
HOOKS = ("blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out")
N_CTX = 16


class Refused(Exception):  # noqa: N818 - no error
    """An input was refused as it must be."""


class Wrong(Exception):  # noqa: N818 - no error
    """A result is neither the intact one nor what the change makes of it."""


def right(condition: bool, what: str) -> None:
    """Raise unless a result is as it must be."""
    if not condition:
        raise Wrong(what)


class Bench:
    """A folder with everything, intact: cases copy what they change."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.told = folder, ""
        generator = torch.Generator().manual_seed(seed)
        vocabulary = {word: i for i, word in enumerate(["[UNK]", "[BOS]", "[EOS]", *dict.fromkeys(WORDS)])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.add_special_tokens(["[UNK]", "[BOS]", "[EOS]"])
        cfg = BilinearConfig(2, 16, N_CTX, len(vocabulary), AttentionConfig.of_width(16, 2, scale=0.5), MLPConfig(24))
        self.model = BilinearTransformer(cfg, tokenizer).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        bilens.save(self.model, folder / "model")
        self.model = bilens.load(folder / "model")
        self.tokens = self.model.to_tokens(TEXTS[0])
        self.loss = self.model(self.tokens, "loss").item()
        self.saes = {hook: self._sae(hook, generator) for hook in HOOKS}
        for hook, sae in self.saes.items():
            bilens.saes.save(sae, folder / "saes" / hook)
        collected = bilens.saes.collect(self.model, self.saes, [*TEXTS] * 2)
        for hook, cards in collected.items():
            cards.save(folder / "saes" / hook / "cards.safetensors")
        self._scope(generator)
        self._images(generator)

    def _sae(self, hook: str, generator: torch.Generator) -> Any:
        arrays = torch.randn(2, 24, 16, generator=generator)
        return of_arrays(arrays[0], arrays[1], hook=hook, activation="relu", k=5)

    def _scope(self, generator: torch.Generator) -> None:
        """Write an SAE in the published layout."""
        folder = self.folder / "scope" / "1-mlp-out-x2-k5"
        folder.mkdir(parents=True)
        shapes = {"w_enc.weight": (32, 16), "w_dec.weight": (16, 32), "b_dec": (16,)}
        save_file({n: torch.randn(s, generator=generator) for n, s in shapes.items()}, folder / "model.safetensors")
        about = {"d_model": 16, "expansion": 2, "k": 5, "point": ["mlp-out", 1], "encoder_bias": False}
        (folder / "config.json").write_text(json.dumps(about))

    def _images(self, generator: torch.Generator) -> None:
        x = (torch.rand(20, 6, 6, generator=generator) * 255).to(torch.uint8).numpy()
        y = np.arange(20) % 4
        (self.folder / "images").mkdir()
        np.savez(self.folder / "images" / "set.npz", x_train=x, y_train=y, x_test=x, y_test=y)
        for stem, array in (("train-images-idx3-ubyte", x), ("train-labels-idx1-ubyte", y.astype(np.uint8))):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            (self.folder / "images" / stem).write_bytes(head + array.tobytes())

    def copy(self, name: str) -> Path:
        """Return a fresh copy of a part of the folder."""
        to = self.folder / "case" / name
        shutil.rmtree(self.folder / "case", ignore_errors=True)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(self.folder / name, to)
        return to


# -- how things are damaged -------------------------------------------------------------------------------------------

ODD: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    2**31,
    10**9,
    10**30,
    1e100,
    -1e-300,
    0.5,
    "",
    "x",
    "x" * 5000,
    [],
    {},
]
ODD += [[[]], {"a": {"a": [1]}}, [10**9], "\u202e\u0000", float("nan"), float("inf"), [None] * 5, "mlp-out", "float32"]


def damage_bytes(rng: random.Random, path: Path) -> str:
    """Change the bytes of a file."""
    data = bytearray(path.read_bytes())
    kind, at = rng.choice(["flip", "cut", "more", "zero", "noise", "double", "empty", "swap"]), rng.randrange(len(data))
    if rng.random() < 0.5:
        at = rng.randrange(min(len(data), 200))  # headers are short, and what is in them matters most
    n = rng.choice([1, 8, 64])
    match kind:
        case "flip":
            data[at] ^= 1 << rng.randrange(8)
        case "cut":
            del data[at:]
        case "more":
            data += rng.randbytes(n)
        case "zero":
            data[at : at + n] = bytes(len(data[at : at + n]))
        case "noise":
            data[at : at + n] = rng.randbytes(len(data[at : at + n]))
        case "double":
            data[at:at] = data[at : at + n]
        case "empty":
            data.clear()
        case "swap":
            data[at : at + n], data[:n] = data[:n], data[at : at + n]
    path.unlink()
    path.write_bytes(data)
    return f"{path.name}: {kind} at {at}"


def damage_place(rng: random.Random, path: Path) -> str:
    """Put something else where a file was."""
    kind = rng.choice(["folder", "pipe", "loop", "nowhere", "nothing", "large"])
    path.unlink()
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            import os

            os.mkfifo(path)
        case "loop":
            path.symlink_to(path.name)
        case "nowhere":
            path.symlink_to("no such file")
        case "large":
            with path.open("wb") as file:
                file.truncate(1 << 33)
    return f"{path.name}: {kind}"


def damage_json(rng: random.Random, path: Path) -> str:
    """Change a key of a JSON object, or how it is written."""
    told = json.loads(path.read_text())
    where = told
    while (inner := [value for value in where.values() if isinstance(value, dict) and value]) and rng.random() < 0.4:
        where = rng.choice(inner)
    key, kind = rng.choice([*where]), rng.choice(["odd"] * 6 + ["gone", "twice", "deep", "more", "number"])
    odd = rng.choice(ODD)
    match kind:
        case "odd":
            where[key] = odd
        case "gone":
            del where[key]
        case "more":
            where[rng.choice(["", "k" * 5000, "n_layer", "rope_scaling", "model_type", "d_out"])] = odd
        case "number":
            where[key] = rng.choice([-1, 0, 1, 2, 7, 10**9, 10**12])
    text = json.dumps(told)
    if kind == "twice":
        text = f"{{{json.dumps(key)}: {json.dumps(odd)}, {json.dumps(key)}: {json.dumps(odd)}, {text[1:]}"
    if kind == "deep":
        text = f'{{"a": {"[" * 3000}{"]" * 3000}, {text[1:]}'
    path.write_text(text)
    return f"{path.name}: {kind} {key!r:.40} {odd!r:.30}"


def damage_tensors(rng: random.Random, path: Path) -> str:
    """Change a tensor of a safetensors file; its other tensors and its header stay."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    kinds = ["nan", "inf", "huge", "tiny", "zero", "whole", "shape", "deep", "gone", "more", "long", "half", "double"]
    kind, one = rng.choice(kinds), tensors[name].clone()
    spot = rng.randrange(max(1, one.numel()))
    if kind in ("nan", "inf", "huge", "tiny") and one.is_floating_point() and one.numel():
        one.view(-1)[spot] = {"nan": float("nan"), "inf": float("inf"), "huge": 1e30, "tiny": 1e-40}[kind]
    match kind:
        case "zero":
            one.zero_()
        case "whole":
            one = one.to(torch.int8)
        case "shape":
            one = rng.choice([one.reshape(-1), one[:0], one[..., :1], one[None], one.mT if one.ndim > 1 else one[:1]])
        case "deep":
            one = one.reshape(*[1] * rng.choice([7, 64, 70]), *one.shape)
        case "half" | "double":
            one = one.to(torch.bfloat16 if kind == "half" else torch.float64) if one.is_floating_point() else one
    tensors[name] = one.contiguous()
    if kind == "gone":
        del tensors[name]
    if kind in ("more", "long"):
        tensors["x" * (300 if kind == "long" else 3)] = torch.zeros(2)
    path.unlink()
    save_file(tensors, path, about)
    return f"{path.name}: {kind} {name}"


def damage(rng: random.Random, folder: Path, names: list[str]) -> str:
    """Damage one of some files of a folder in some way that its kind allows."""
    path = folder / rng.choice(names)
    ways = [damage_bytes, damage_bytes, damage_place]
    ways += [damage_json] * 6 if path.suffix == ".json" else []
    ways += [damage_tensors] * 4 if path.suffix == ".safetensors" else []
    return rng.choice(ways)(rng, path)
