"""Families of cases whose files are damaged: checkpoints, SAEs, cards, states of long jobs, images."""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from fuzz_things import HOOKS, TEXTS, Bench, Refused, Wrong, damage, damage_bytes, right
from safetensors.torch import load_file, save_file

import bilens
from bilens import images
from bilens.images import classifiers
from bilens.saes import FeatureCards


def named(error: Exception, folder: Path) -> Refused:
    """Return a refusal, if it names the file or its folder; else raise what is wrong with it."""
    if str(folder) not in str(error) and folder.name not in str(error):
        raise Wrong(f"refused without a name: {type(error).__name__}: {error}") from error
    return Refused(f"{type(error).__name__}: {str(error)[:160]}")


def try_file(bench: Bench, folder: Path, told: str, use: Callable[[], str]) -> str:
    """Use damaged files: they must be refused by name, or what comes of them be right."""
    bench.told = told
    try:
        return f"{told}: {use()}"
    except (ValueError, FileNotFoundError) as error:
        raise named(error, folder) from error


def checkpoint(rng: random.Random, bench: Bench) -> str:
    """Damage a model's folder; one that loads gives finite losses."""
    folder = bench.copy("model")
    told = damage(rng, folder, ["config.json", "config.json", "model.safetensors", "tokenizer.json"])

    def use() -> str:
        model = bilens.load(folder)
        tokens = bench.tokens.clamp(max=model.cfg.d_vocab - 1)[:, : model.cfg.n_ctx]
        loss = model(tokens, "loss") if tokens.shape[1] > 1 else model(tokens).sum()
        right(bool(loss.isfinite().all()), f"loss {loss}")
        return f"loss {loss.item():.3f}"

    return try_file(bench, folder, told, use)


def shards(rng: random.Random, bench: Bench) -> str:
    """Damage a checkpoint in shards, or its index."""
    folder = bench.copy("model")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    where = {name: part for part, some in parts.items() for name in some}
    for part, some in parts.items():
        save_file({name: tensors[name] for name in some}, folder / part)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    kind, name = rng.choice(["lie", "drop", "extra", "odd", "none", "bytes"]), rng.choice(names)
    match kind:
        case "lie":
            where[name] = "b.safetensors" if where[name] == "a.safetensors" else "a.safetensors"
        case "drop":
            del where[name]
        case "extra":
            where["no.such.tensor"] = "a.safetensors"
        case "odd":
            where[name] = rng.choice([3, None, "../a.safetensors", "", "a.bin", "c.safetensors", "config.json"])
    index.write_text(json.dumps({"weight_map": where}))
    told = f"{kind} {name}" if kind != "bytes" else damage_bytes(rng, folder / rng.choice([*parts, index.name]))

    def use() -> str:
        loss = bilens.load(folder)(bench.tokens, "loss").item()
        right(kind in ("none", "bytes") and loss == loss, f"loss {loss}")
        return f"loss {loss:.3f}"

    return try_file(bench, folder, told, use)


def sae(rng: random.Random, bench: Bench) -> str:
    """Damage an SAE in SAELens' format; one that loads gives finite features."""
    folder, hook = bench.copy("saes"), rng.choice(HOOKS)
    told = damage(rng, folder / hook, ["cfg.json", "sae_weights.safetensors"])

    def use() -> str:
        found = bilens.saes.load(folder, hook)
        z = found.encode(torch.linspace(-1, 1, found.cfg.d_in)[None])
        right(bool(z.isfinite().all()) and z.shape == (1, found.cfg.d_sae), f"features {z}")
        same = bench.saes[hook].encode(torch.linspace(-1, 1, 16)[None])
        right(" gone " not in told or torch.equal(z, same), f"other features without a key: {z}")
        right(bool(found.decode(z).isfinite().all()), "reconstruction")
        return f"{int((z != 0).sum())} features"

    return try_file(bench, folder, told, use)


def scope(rng: random.Random, bench: Bench) -> str:
    """Damage an SAE in the published layout."""
    folder = bench.copy("scope")
    told = damage(rng, folder / "1-mlp-out-x2-k5", ["config.json", "model.safetensors"])

    def use() -> str:
        found = bilens.saes.load_scope(folder, "1-mlp-out-x2-k5")
        z = found.encode(torch.linspace(-1, 1, found.cfg.d_in)[None])
        right(bool(z.isfinite().all()) and int((z != 0).sum()) <= found.cfg.k, f"features {z}")
        return f"{int((z != 0).sum())} features"

    return try_file(bench, folder, told, use)


def cards(rng: random.Random, bench: Bench) -> str:
    """Damage feature cards; those that load are finite, and of tokens that there are."""
    folder, hook = bench.copy("saes"), rng.choice(HOOKS)
    told = damage(rng, folder / hook, ["cards.safetensors"])

    def use() -> str:
        found = FeatureCards.load(folder, hook, bench.model)
        for feature in (0, len(found) - 1):
            card = found[feature]
            numbers = torch.tensor([card.density, card.mean, *card.promoted.values(), *card.demoted.values()])
            right(bool(numbers.isfinite().all()) and 0 <= card.density <= 1, f"card {card}")
        return f"{len(found)} cards"

    return try_file(bench, folder, told, use)


def ranking(rng: random.Random, bench: Bench) -> str:
    """Damage the state of a ranking that was cut short; the ranking that goes on is the one without a state."""
    folder = bench.folder / "case" / "state"
    B = bench.model.blocks[0].mlp.tensor().detach()
    if not hasattr(bench, "ranked"):
        bench.ranked = bilens.top_interactions(B, 40, per_output=2)
    for path in folder.glob("*"):
        path.unlink() if not path.is_dir() else path.rmdir()
    bilens.top_interactions(B, 40, per_output=2, checkpoint=folder)
    path = next(folder.glob("rank*"))
    told = damage(rng, folder, [path.name])

    def use() -> str:
        found = bilens.top_interactions(B, 40, per_output=2, checkpoint=folder)
        same = all(torch.equal(a, b) for a, b in zip(found, bench.ranked, strict=True))
        right(same, "another table")
        return "the same table"

    return try_file(bench, folder, told, use)


def collecting(rng: random.Random, bench: Bench) -> str:
    """Damage the state of a pass over text; the cards that come of it are those without a state."""
    folder = bench.folder / "case" / "collecting"
    collect = partial(bilens.saes.collect, bench.model, bench.saes)
    if not hasattr(bench, "collected"):
        bench.collected = collect(TEXTS)[HOOKS[1]]
    folder.mkdir(parents=True, exist_ok=True)
    if not (state := folder / "state.safetensors").is_file() or state.is_symlink():
        state.rmdir() if state.is_dir() else state.unlink(missing_ok=True)
    state.unlink(missing_ok=True)
    collect(TEXTS, folder=folder)
    told = damage(rng, folder, ["state.safetensors"])

    def use() -> str:
        found = collect(TEXTS, folder=folder)[HOOKS[1]]
        same = torch.equal(found.mean, bench.collected.mean)
        right(same and torch.equal(found.contexts.values, bench.collected.contexts.values), "other cards")
        return "the same cards"

    return try_file(bench, folder, told, use)


def training(rng: random.Random, bench: Bench) -> str:
    """Damage the checkpoint of a training of images; the model that comes of it is the one without a break."""
    folder = bench.folder / "case" / "training"
    folder.mkdir(parents=True, exist_ok=True)
    state, data = folder / "state.safetensors", images.sets.load(bench.folder / "images" / "set.npz")
    if state.is_dir() and not state.is_symlink():
        state.rmdir()
    state.unlink(missing_ok=True)
    recipe = classifiers.Recipe(epochs=2, batch=10)
    train = partial(classifiers.train, data, recipe, d_hidden=6, progress=False)
    if not hasattr(bench, "trained"):
        bench.trained = train()[0].state_dict()
    train(checkpoint=state)
    told = damage(rng, folder, [state.name])

    def use() -> str:
        found = train(checkpoint=state)[0].state_dict()
        right(all(torch.equal(found[name], one) for name, one in bench.trained.items()), "another model")
        return "the same model"

    return try_file(bench, folder, told, use)


def pictures(rng: random.Random, bench: Bench) -> str:
    """Damage files of images; those that load lie in [0, 1] and have classes."""
    folder = bench.copy("images")
    packed = rng.random() < 0.5
    names = ["set.npz"] if packed else ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"]
    told = damage(rng, folder, names)

    def use() -> str:
        found = images.sets.load(folder / "set.npz" if packed else folder)
        right(len(found) == len(found.y) and bool(found.x.isfinite().all()), "images")
        return f"{len(found)} images"

    return try_file(bench, folder, told, use)


def classifier(rng: random.Random, bench: Bench) -> str:
    """Damage a stored classifier of images."""
    folder = bench.folder / "case" / "classifier"
    cfg = classifiers.ClassifierConfig(6, 6, 4, 6)
    for name in ("config.json", "model.safetensors"):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        path.unlink(missing_ok=True)
    classifiers.save(classifiers.ImageClassifier(cfg, torch.Generator().manual_seed(0)), folder)
    told = damage(rng, folder, ["config.json", "model.safetensors"])

    def use() -> str:
        found = classifiers.load(folder)
        logits = found(torch.ones(1, found.cfg.pixels).to(next(found.parameters())))
        right(bool(logits.isfinite().all()), f"logits {logits}")
        return "logits are finite"

    return try_file(bench, folder, told, use)


FAMILIES = {
    "checkpoints": (checkpoint, 12),
    "shards": (shards, 4),
    "SAEs": (sae, 8),
    "published SAEs": (scope, 6),
    "cards": (cards, 8),
    "ranking states": (ranking, 4),
    "collecting states": (collecting, 4),
    "training states": (training, 3),
    "image files": (pictures, 6),
    "classifiers": (classifier, 4),
}
