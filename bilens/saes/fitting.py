"""Fit SAEs to a model's activations with SAELens' trainer."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE, TrainingSAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from torch import Tensor

from bilens.models.files import casts, fingerprint
from bilens.models.sources import read_json
from bilens.models.texts import Texts
from bilens.models.transformer import BilinearTransformer
from bilens.models.windows import Windows, observed
from bilens.tensor.keeping import atomic_write, checksum_of, damaged, user_path

from .checks import LENS_FILES
from .kinds import KINDS, finished, untrained
from .stored import load, save, unit_rows
from .tuning import TUNED


class ActivationStream:
    """Shuffled batches of activations, in float32, the same tokens at several hook points; resumes at any batch.

    Windows are visited in a new order each epoch, run through the model a chunk at a time, and the positions of a chunk
    shuffled; a chunk is as many windows as `chunk` says, and more where those are too short for a batch. What is left
    of a chunk when its batches are full waits for the next epoch. Batch `n` depends on the seed and `n` alone.

    Raises:
        ValueError: Fewer positions of text than one batch holds.
    """

    def __init__(
        self, model: BilinearTransformer, windows: Windows, hooks: Sequence[str], batch: int, seed: int, chunk: int
    ):
        self.model, self.windows, self.hooks = model, windows, list(hooks)
        self.batch, self.seed, self.chunk = batch, seed, chunk
        if (n := int(windows.counts.sum())) < batch:
            raise ValueError(f"dataset must hold at least one batch of {batch} tokens, got {n}")

    def __call__(self, first: int = 0) -> Iterator[dict[str, Float[Tensor, "position d"]]]:
        """Yield batches from number `first` on, without end."""
        sizes = self.windows.counts.sum(1).cpu()
        number, epoch = 0, 0
        while True:
            seed = self.seed + epoch
            for chunk in self._chunks(_shuffled(len(sizes), seed), sizes):
                n_batches = int(sizes[chunk].sum()) // self.batch
                if number + n_batches > first:
                    yield from self._chunk(chunk, seed, max(0, first - number))
                number += n_batches
            epoch += 1

    def _chunks(self, order: Int[Tensor, " row"], sizes: Int[Tensor, " row"]) -> Iterator[Int[Tensor, " some"]]:
        """Cut the windows into chunks that hold a batch each; the last windows may not, and are left out."""
        start, n = 0, 0
        for stop, size in enumerate(sizes[order].tolist(), 1):
            n += size
            if n >= self.batch and (stop - start >= self.chunk or stop == len(order)):
                yield order[start:stop]
                start, n = stop, 0

    def _chunk(self, chunk: Int[Tensor, " some"], seed: int, first: int) -> Iterator[dict[str, Tensor]]:
        parts: dict[str, list[Any]] = {hook: [None] * len(chunk) for hook in self.hooks}
        windows = self.windows[chunk.to(self.windows.tokens.device)]
        for rows, some, seen in observed(self.model, windows, self.hooks):
            for i, row in enumerate(rows.tolist()):
                for hook in self.hooks:
                    parts[hook][row] = seen[hook][i][some.counts[i]].float()
        stacked = {hook: torch.cat(parts.pop(hook)) for hook in self.hooks}
        order = _shuffled(int(windows.counts.sum()), seed + int(chunk[0])).to(windows.tokens.device)
        for batch in list(order.split(self.batch))[first : len(order) // self.batch]:
            yield {hook: stacked[hook][batch] for hook in self.hooks}


def _shuffled(n: int, seed: int) -> Int[Tensor, " n"]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Recipe:
    """What SAEs to fit, and how."""

    expansion: int = 4  # features per dimension of the activation
    k: int = 32  # active features per position, on average where the kind is not topk
    tokens: int = 4_000_000  # activations to train on, per SAE
    batch: int = 2048  # activations per step
    lr: float = 1e-3  # Adam's peak rate; warmed up over 5 % of the steps, decayed linearly over the last 40 %
    seed: int = 0  # of the initial weights and the order of the activations: a number, to resume from
    autocast: bool = False  # bfloat16 matrix products: about twice as fast on recent CPUs
    kind: str = "topk"  # or batchtopk, matryoshka, jumprelu: SAELens' training classes

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for name in ("expansion", "k", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.tokens < self.batch:
            raise ValueError(f"tokens must be at least one batch of {self.batch}, got {self.tokens}")


def fit(
    model: BilinearTransformer,
    dataset: Texts,
    hooks: Sequence[str],
    folder: str | Path,
    recipe: Recipe = Recipe(),
    n_checkpoints: int = 10,
) -> dict[str, SAE]:
    """Fit SAEs at several hook points from one activation stream, with SAELens' trainer.

    `x̂ = W_dec TopK(ReLU(W_enc (x - b_dec) + b_enc)) + b_dec` (2410.08417, appendix G; auxiliary loss for dead features
    as in SAELens), or another `kind` of the recipe. The decoder ends with unit rows. Progress is shown; killed, the
    same call resumes at the last checkpoint under `folder`; finished, it loads what is there. Torch's own random
    numbers go on as if it had not run.

    Args:
        model: The model, in eval mode.
        dataset: Texts, or windows of token ids. BOS and padding are left out of the activations.
        hooks: Hook point names, e.g. `["blocks.0.hook_mlp_in", "blocks.0.hook_mlp_out"]`.
        folder: Where checkpoints go, and each finished SAE, in SAELens' format in a subfolder named by its hook point.
        recipe: What SAEs, and how.
        n_checkpoints: How many times to save on the way.

    Returns:
        The SAEs by hook point, on the model's device.

    Raises:
        ValueError: An unknown hook point, a dataset too small, or a `folder` with checkpoints of another run.
    """
    if model.training:
        raise ValueError("model must be in eval mode (model.eval()), so that its activations are what users see")
    if isinstance(hooks, str) or not hooks:
        raise ValueError(f"hooks must be a list of hook point names, got {hooks!r}")
    folder, device = user_path(folder), model.W_E.device
    windows = Windows.of(model, dataset)
    stream = ActivationStream(model, windows, hooks, recipe.batch, recipe.seed, chunk=128)
    settings = {"hooks": list(hooks), **asdict(recipe), "model": fingerprint(model), "data": _hash(windows)}
    if all((folder / hook / LENS_FILES[0]).exists() for hook in hooks):
        saes = {hook: load(folder, hook).to(device) for hook in hooks}
        if any(_asked(sae.cfg.metadata.settings) != settings for sae in saes.values()):
            raise ValueError(f"folder {folder} holds SAEs fitted with other data or arguments; give another one")
        return saes
    with torch.random.fork_rng(devices=[]):  # SAELens draws initial weights from torch's own generator
        torch.default_generator.manual_seed(recipe.seed)
        trained = _trainer(model, stream, recipe, settings, folder / "checkpoints", n_checkpoints).fit()
        known = settings | {"casts": casts(model)}
        saes = {hook: _finish(trained[_key(hook)], model, hook, known) for hook in hooks}
    for hook, sae in saes.items():
        save(sae, folder / hook)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return saes


def _asked(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what an SAE says of the run that fitted it, without what follows from the model or came later."""
    return {"kind": "topk"} | {key: value for key, value in (settings or {}).items() if key not in ("casts", TUNED)}


def _hash(windows: Windows) -> str:
    parts = (windows.tokens, windows.counts)
    return hashlib.sha256(b"".join(part.cpu().numpy().tobytes() for part in parts)).hexdigest()


def _key(hook: str) -> str:
    return hook.replace(".", "_")


def _trainer(
    model: BilinearTransformer,
    stream: ActivationStream,
    recipe: Recipe,
    settings: dict[str, Any],
    checkpoints: Path,
    n_checkpoints: int,
) -> MultiSAETrainer:
    """Set SAELens' trainer up, at the start or at the newest complete checkpoint."""
    d_in, steps = model.cfg.d_model, recipe.tokens // recipe.batch
    saes = {_key(hook): untrained(recipe.kind, d_in, recipe.expansion * d_in, recipe.k, steps) for hook in stream.hooks}
    config = SAETrainerConfig(
        total_training_samples=steps * recipe.batch,
        train_batch_size_samples=recipe.batch,
        lr=recipe.lr,
        lr_warm_up_steps=steps // 20,
        lr_end=recipe.lr / 10,  # of cosine schedules only, but SAELens wants it
        lr_decay_steps=2 * steps // 5,
        device=str(model.W_E.device),
        autocast=recipe.autocast,
        dead_feature_window=max(20, min(1000, steps // 10)),
        feature_sampling_window=steps + 1,
        n_checkpoints=n_checkpoints,
        checkpoint_path=str(checkpoints),
        logger=LoggingConfig(log_to_wandb=False),
    )

    def complete(checkpoint_path: Path | None) -> None:
        with atomic_write(checkpoint_path / "complete.json") as path:
            path.write_text(json.dumps({"settings": settings, "files": _checksums(checkpoint_path)}))
        for older in checkpoints.iterdir():
            if older != checkpoint_path:
                shutil.rmtree(older)

    trainer = MultiSAETrainer(config, saes, {_key(hook): hook for hook in stream.hooks}, iter(()), None, complete)
    saved = sorted(checkpoints.glob("*/complete.json"), key=lambda path: int(path.parent.name))
    if not saved:
        _start_at_the_mean(trainer, next(stream()))
    else:
        told = read_json(saved[-1])
        if told.get("settings") != settings:
            raise ValueError(f"folder {checkpoints} holds checkpoints of a run with other data or arguments; delete it")
        if told.get("files") != _checksums(saved[-1].parent):
            raise damaged(checkpoints, f"the files of {saved[-1].parent.name} do not have the checksums in {saved[-1]}")
        _resume(trainer, saved[-1].parent, recipe.batch)
    trainer.data_provider = stream(trainer.n_training_steps)
    return trainer


def _checksums(checkpoint: Path) -> dict[str, str]:
    """Return the checksums of the files of a checkpoint, but for what says that it is complete."""
    files = (path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.suffix != ".partial")
    told = {path.relative_to(checkpoint).as_posix(): checksum_of(path) for path in files}
    told.pop("complete.json", None)
    return told


def _resume(trainer: MultiSAETrainer, checkpoint: Path, batch: int) -> None:
    """Go back to a checkpoint; SAELens saves one before it counts the step as done."""
    trainer.load_checkpoint(checkpoint)
    for one in trainer.trainers.values():
        one.n_training_steps = one.n_training_samples // batch
    trainer.n_training_steps = trainer.n_training_samples // batch
    trainer.checkpoint_thresholds = [n for n in trainer.checkpoint_thresholds if n >= trainer.n_training_samples]


@torch.no_grad()
def _start_at_the_mean(trainer: MultiSAETrainer, sample: Mapping[str, Tensor]) -> None:
    """Scale the activations to norm sqrt(d), which SAELens folds away at the end, and centre the decoder bias."""
    for key, hook in trainer.hook_names.items():
        scale = math.sqrt(sample[hook].shape[1]) / sample[hook].norm(dim=1).mean().item()
        trainer.trainers[key].activation_scaler.scaling_factor = scale
        trainer.saes[key].b_dec.copy_(sample[hook].mean(0) * scale)


@torch.no_grad()
def _finish(trained: TrainingSAE, model: BilinearTransformer, hook: str, settings: dict[str, Any]) -> SAE:
    """Turn a trained SAE into an inference one that says where it belongs."""
    about = {"context_size": model.cfg.n_ctx, "prepend_bos": True, "model_name": model.name or "bilens"}
    return unit_rows(finished(trained, SAEMetadata(hook_name=hook, settings=settings, **about)))
