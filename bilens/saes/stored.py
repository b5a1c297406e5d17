"""Sparse autoencoders around an MLP: load published ones, fit new ones with SAELens, read and evaluate them."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple

import huggingface_hub
import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE, TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig, register_sae_class
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from bilens.models.sources import EMBEDDED, CheckpointError, Source, assets, read_json, read_safetensors
from bilens.models.transformer import BilinearTransformer

POINTS = {  # names of the published layout, and what they are called here
    "resid-pre": "hook_resid_pre",
    "resid-mid": "hook_resid_mid",
    "resid-post": "hook_resid_post",
    "mlp-in": "hook_mlp_in",
    "mlp-out": "hook_mlp_out",
    "attn-out": "hook_attn_out",
}


# -- published and embedded SAEs --------------------------------------------------------------------------------------


class SignedTopK(nn.Module):
    """Keep the k largest entries, whatever their sign: no ReLU, as in the published SAEs."""

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with all but the k largest entries of the last axis set to zero."""
        top = x.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(x).scatter_(-1, top.indices, top.values)


@dataclass
class ScopeSAEConfig(TopKSAEConfig):
    """SAELens' top-k configuration under the name of the published architecture."""

    @classmethod
    def architecture(cls) -> str:
        """Return the name SAELens registers the architecture by."""
        return "bilens_signed_topk"


class ScopeSAE(TopKSAE):
    """A published top-k SAE: `z = TopK(W_enc (x - b_dec) [+ b_enc])` without a ReLU, so a feature can be negative."""

    def get_activation_fn(self) -> nn.Module:
        """Return the activation: the k largest, of either sign."""
        return SignedTopK(self.cfg.k)


register_sae_class("bilens_signed_topk", ScopeSAE, ScopeSAEConfig)


def load_scope(repo_or_folder: str | Path, name: str, *, revision: str | None = None) -> ScopeSAE:
    """Load an SAE of the published -scope layout as a SAELens SAE with the same features, negative values included.

    Args:
        repo_or_folder: A Hub repository such as `"tdooms/ts-medium-scope"`, or a folder laid out like one.
        name: `{layer}-{point}-x{expansion}-k{k}[-tag]`, e.g. `"4-mlp-out-x4-k30"`.
        revision: Branch, tag or commit on the Hub.

    Returns:
        The SAE in float32; `sae.cfg.metadata.hook_name` says where it goes.

    Raises:
        FileNotFoundError: No such SAE; the message lists the nearest names that there are.
        CheckpointError: A config that contradicts the tensors, or a variant whose features are not a top-k of a linear
            map (bilinear encoder, token lookup).
    """
    folder = _scope_folder(repo_or_folder, name, revision)
    config = read_json(folder / "config.json")
    tensors = dict(read_safetensors(folder / "model.safetensors"))
    for key in ("bilinear_encoder", "token_lookup"):
        if config.get(key):
            raise CheckpointError(f"{folder / 'config.json'}: {key} is set, which is not a linear top-k SAE")
    d_in, d_sae = config["d_model"], config["expansion"] * config["d_model"]
    shapes = {"w_enc.weight": (d_sae, d_in), "w_dec.weight": (d_in, d_sae), "b_dec": (d_in,)}
    if config.get("encoder_bias", "w_enc.bias" in tensors):
        shapes["w_enc.bias"] = (d_sae,)
    for key in sorted(shapes.keys() | tensors.keys()):
        found = tuple(tensors[key].shape) if key in tensors else None
        if found != shapes.get(key):
            raise CheckpointError(
                f"{folder / 'model.safetensors'}: tensor {key} must be "
                f"{list(shapes[key]) if key in shapes else 'absent'} by its config, got {found and list(found)}"
            )
    point, layer = config["point"]
    hook = f"blocks.{layer}.{POINTS[point.replace('_', '-')]}"
    metadata = SAEMetadata(model_name=str(repo_or_folder), hook_name=hook, context_size=config.get("n_ctx"))
    sae = ScopeSAE(ScopeSAEConfig(d_in=d_in, d_sae=d_sae, k=config["k"], metadata=metadata))
    zero = torch.zeros(d_sae)
    state = {
        "W_enc": tensors["w_enc.weight"].T.contiguous(),
        "W_dec": tensors["w_dec.weight"].T.contiguous(),
        "b_enc": tensors.get("w_enc.bias", zero),
        "b_dec": tensors["b_dec"],
    }
    sae.load_state_dict(state)
    return sae.eval()


def _scope_folder(repo_or_folder: str | Path, name: str, revision: str | None) -> Path:
    """Return the local folder of one SAE, downloaded if need be."""
    source = Source.find(repo_or_folder, revision)
    paths = [source.optional(f"{name}/{file}") for file in SCOPE_FILES]
    if None not in paths:
        return paths[0].parent
    if source.folder is None:
        there = huggingface_hub.list_repo_files(source.name, revision=revision)
    else:
        there = [str(path.relative_to(source.folder)) for path in source.folder.glob("*/model.safetensors")]
    names = sorted({Path(file).parent.name for file in there if file.endswith("/model.safetensors")})
    raise FileNotFoundError(_no_sae(name, source.name, names))


SCOPE_FILES = ("config.json", "model.safetensors")


def _no_sae(name: str, where: str | Path, names: Sequence[str]) -> str:
    near = get_close_matches(name, names, n=4, cutoff=0.3) or names[:8]
    return f"{where} has no SAE {name!r}; it has {len(names)}, the nearest: {', '.join(near) or 'none'}"


def load(name: str | Path, hook: str) -> SAE:
    """Load an SAE in SAELens' own format: of the embedded model, or of a folder that `fit` wrote.

    Args:
        name: `"bilens-mini"`, or a folder with one subfolder per hook point.
        hook: The hook point, e.g. `"blocks.2.hook_mlp_out"`.
    """
    folder = sae_folder(name, hook)
    return SAE.load_from_disk(folder, device="cpu").eval()


def sae_folder(name: str | Path, hook: str) -> Path:
    """Return the folder that holds the SAE of a hook point.

    Raises:
        FileNotFoundError: There is none; the message lists those there are.
    """
    root = assets() / "saes" if name == EMBEDDED else Path(name)
    if not (root / hook / "cfg.json").is_file():
        there = sorted(path.parent.name for path in root.glob("*/cfg.json"))
        raise FileNotFoundError(f"{root} has no SAE for {hook!r}; it has {', '.join(there) or 'none'}")
    return root / hook


# -- directions -------------------------------------------------------------------------------------------------------


def readers(sae: SAE, which: Literal["encoder", "decoder"] = "encoder") -> Float[Tensor, "feature d_in"]:
    """Return the output directions that a bilinear tensor is read with, one row per feature.

    Args:
        sae: An SAE at the MLP's output.
        which: `"encoder"` rows give the features' pre-activations (what the paper uses), `"decoder"` rows the overlap
            with what a feature writes.
    """
    if which not in ("encoder", "decoder"):
        raise ValueError(f"which must be 'encoder' or 'decoder', got {which!r}")
    if which == "decoder":
        return sae.W_dec.detach()
    rows = sae.W_enc.detach().T
    return rows * sae.W_dec.detach().norm(dim=1, keepdim=True) if _rescales(sae) else rows


def writers(sae: SAE) -> Float[Tensor, "feature d_in"]:
    """Return what each feature of an SAE at the MLP's input writes at activation 1: its decoder row."""
    rows = sae.W_dec.detach()
    return rows / rows.norm(dim=1, keepdim=True) if _rescales(sae) else rows


def _rescales(sae: SAE) -> bool:
    return bool(getattr(sae.cfg, "rescale_acts_by_decoder_norm", False))


def offsets(sae: SAE) -> Float[Tensor, " feature"]:
    """Return the constant of each pre-activation: `pre = readers(sae) · x + offset`."""
    bias = sae.b_enc.detach() if getattr(sae, "b_enc", None) is not None else sae.W_enc.new_zeros(sae.cfg.d_sae)
    if _rescales(sae):
        bias = bias * sae.W_dec.detach().norm(dim=1)
    return bias - readers(sae) @ sae.b_dec.detach() if sae.cfg.apply_b_dec_to_input else bias


# -- text to activations ----------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Token windows and the positions that count: text, but not BOS or padding."""

    tokens: Int[Tensor, "row seq"]
    attend: Bool[Tensor, "row seq"]
    counts: Bool[Tensor, "row seq"]


def to_rows(
    model: BilinearTransformer, texts: Sequence[str] | Int[Tensor, "row seq"], length: int | None = None
) -> Rows:
    """Cut texts into windows that each start with BOS (if the model knows one), right-padded.

    Args:
        model: Owner of the tokenizer.
        texts: Texts, or windows of token ids that are taken as they are.
        length: Tokens per window, BOS included; the model's context if `None`.
    """
    length = length or model.cfg.n_ctx
    if isinstance(texts, Tensor):
        marked = model.tokenizer is not None and model.has_bos
        counts = texts != model.bos_id if marked else torch.ones_like(texts, dtype=torch.bool)
        return Rows(texts, torch.ones_like(texts, dtype=torch.bool), counts)
    pieces, first = [], int(model.has_bos)  # the first position of text
    for encoding in model.tokenizer.encode_batch(list(texts), add_special_tokens=False):
        ids, step = encoding.ids, length - first
        pieces += [ids[start : start + step] for start in range(0, len(ids), step)]
    if not pieces:
        raise ValueError("texts must hold at least one text that is not empty")
    tokens = torch.full((len(pieces), length), model.eos_id)
    if model.has_bos:
        tokens[:, 0] = model.bos_id
    attend = torch.zeros(len(pieces), length, dtype=torch.bool)
    for row, piece in enumerate(pieces):
        tokens[row, first : len(piece) + first] = torch.tensor(piece)
        attend[row, : len(piece) + first] = True
    counts = attend.clone()
    counts[:, :first] = False
    return Rows(tokens, attend, counts)


def text_of_rows(
    model: BilinearTransformer, texts: Sequence[str] | Int[Tensor, "row seq"], length: int | None = None
) -> Int[Tensor, " row"]:
    """Return which text each window of `to_rows` is cut from."""
    if isinstance(texts, Tensor):
        return torch.arange(len(texts))
    encodings = model.tokenizer.encode_batch(list(texts), add_special_tokens=False)
    step = (length or model.cfg.n_ctx) - int(model.has_bos)
    windows = [-(-len(encoding.ids) // step) for encoding in encodings]
    return torch.arange(len(texts)).repeat_interleave(torch.tensor(windows))


def trim(rows: Rows) -> Rows:
    """Cut columns that are padding in every row."""
    width = int(rows.attend.any(0).nonzero().max()) + 1
    return Rows(*(part[:, :width] for part in rows))


def layer_of(hook: str) -> int:
    """Return the block that a hook point belongs to; the embedding counts as part of the first."""
    if hook == "hook_embed":
        return 0
    if not hook.startswith("blocks."):
        raise ValueError(f"hook must be 'hook_embed' or a hook point of a block, got {hook!r}")
    return int(hook.split(".")[1])


@torch.no_grad()
def activations(model: BilinearTransformer, rows: Rows, hooks: Sequence[str]) -> dict[str, Float[Tensor, "row seq d"]]:
    """Run the model as far as need be and return what the hook points see, padding included."""
    last = max(map(layer_of, hooks)) + 1
    device = model.W_E.device
    _, cache = model.run_with_cache(
        rows.tokens.to(device),
        attention_mask=rows.attend.to(device),
        names_filter=list(hooks),
        stop_at_layer=last,
        return_cache_object=False,
    )
    return cache


# -- fitting ----------------------------------------------------------------------------------------------------------


class ActivationStream:
    """Shuffled batches of activations at several hook points, the same tokens for each; resumes at any batch.

    Windows are visited in a new order each epoch, run through the model a chunk at a time, and the positions of a chunk
    shuffled. Batch `n` depends on the seed and `n` alone.
    """

    def __init__(self, model: BilinearTransformer, rows: Rows, hooks: Sequence[str], batch: int, seed: int, chunk: int):
        self.model, self.rows, self.hooks = model, rows, list(hooks)
        self.batch, self.seed, self.chunk = batch, seed, chunk
        if rows.counts[:chunk].sum() < batch:
            raise ValueError(f"dataset is too small: {int(rows.counts.sum())} tokens for batches of {batch}")

    def __call__(self, first: int = 0) -> Iterator[dict[str, Tensor]]:
        """Yield batches from number `first` on, without end."""
        number, epoch = 0, 0
        while True:
            order = torch.randperm(len(self.rows.tokens), generator=torch.Generator().manual_seed(self.seed + epoch))
            for chunk in order.split(self.chunk):
                counts = self.rows.counts[chunk]
                n_batches = int(counts.sum()) // self.batch
                if number + n_batches > first:
                    yield from self._chunk(chunk, counts, self.seed + epoch, max(0, first - number))
                number += n_batches
            epoch += 1

    def _chunk(self, chunk: Tensor, counts: Tensor, seed: int, first: int) -> Iterator[dict[str, Tensor]]:
        parts: dict[str, list[Tensor]] = {hook: [] for hook in self.hooks}
        for some in chunk.split(32):
            found = activations(self.model, Rows(*(part[some] for part in self.rows)), self.hooks)
            for hook in self.hooks:
                parts[hook].append(found[hook][self.rows.counts[some]])
        generator = torch.Generator().manual_seed(seed + int(chunk[0]))
        order = torch.randperm(int(counts.sum()), generator=generator)
        stacked = {hook: torch.cat(parts.pop(hook)) for hook in self.hooks}
        for batch in list(order.split(self.batch))[first : len(order) // self.batch]:
            yield {hook: stacked[hook][batch.to(stacked[hook].device)] for hook in self.hooks}


def fit(
    model: BilinearTransformer,
    dataset: Sequence[str] | Int[Tensor, "row seq"],
    hooks: Sequence[str],
    *,
    folder: str | Path,
    expansion: int = 4,
    k: int = 32,
    tokens: int = 4_000_000,
    batch: int = 2048,
    lr: float = 1e-3,
    seed: int = 0,
    n_checkpoints: int = 10,
    autocast: bool = False,
) -> dict[str, TopKSAE]:
    """Fit top-k SAEs at several hook points from one activation stream, with SAELens' trainer.

    `x̂ = W_dec TopK(ReLU(W_enc (x - b_dec) + b_enc)) + b_dec` (2410.08417, appendix G; auxiliary loss for dead features
    as in SAELens). The decoder ends with unit rows. Progress is shown; killed, the same call resumes at the last
    checkpoint under `folder`; finished, it loads what is there.

    Args:
        model: The model, in eval mode.
        dataset: Texts, or windows of token ids. BOS and padding are left out of the activations.
        hooks: Hook point names, e.g. `["blocks.0.hook_mlp_in", "blocks.0.hook_mlp_out"]`.
        folder: Where checkpoints go, and each finished SAE, in SAELens' format in a subfolder named by its hook point.
        expansion: Features per dimension of the activation.
        k: Active features per position.
        tokens: Activations to train on, per SAE.
        batch: Activations per step.
        lr: Adam's peak rate; warmed up over 5 % of the steps, decayed linearly over the last 40 %.
        seed: Of the initial weights and the order of the activations.
        n_checkpoints: How many times to save on the way.
        autocast: bfloat16 matrix products: about twice as fast on recent CPUs.

    Returns:
        The SAEs by hook point.

    Raises:
        ValueError: An unknown hook point, a dataset too small, or a `folder` with checkpoints of another run.
    """
    if model.training:
        raise ValueError("model must be in eval mode (model.eval()), so that its activations are what users see")
    if isinstance(hooks, str) or not hooks:
        raise ValueError(f"hooks must be a list of hook point names, got {hooks!r}")
    for hook in hooks:
        model.check_hook_name(hook)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = to_rows(model, dataset)
    stream = ActivationStream(model, rows, hooks, batch, seed, chunk=128)
    settings = {"hooks": list(hooks), "expansion": expansion, "k": k, "tokens": tokens, "batch": batch, "lr": lr}
    settings |= {"seed": seed, "autocast": autocast, "model": fingerprint(model), "data": _hash(rows.tokens)}
    finished = {hook: folder / hook for hook in hooks}
    if all((path / "cfg.json").exists() for path in finished.values()):
        saes = {hook: SAE.load_from_disk(path).eval() for hook, path in finished.items()}
        if any(sae.cfg.metadata.settings != settings for sae in saes.values()):
            raise ValueError(f"folder {folder} holds SAEs fitted with other data or arguments; give another one")
        return saes
    trainer = _trainer(model, stream, settings, folder / "checkpoints", n_checkpoints)
    trained = trainer.fit()
    saes = {hook: _finish(trained[_key(hook)], model, hook, settings) for hook in hooks}
    for hook, sae in saes.items():
        save(sae, finished[hook])
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return saes


def finetune(
    model: BilinearTransformer,
    sae: SAE,
    dataset: Sequence[str] | Int[Tensor, "row seq"],
    *,
    hook: str | None = None,
    tokens: int = 500_000,
    windows: int = 16,
    lr: float = 6e-4,
    fvu_weight: float = 0.1,
    seed: int = 0,
    autocast: bool = False,
) -> SAE:
    """Fine-tune a fitted SAE, in place, on what its reconstruction does to the model's predictions.

    Minimises `KL(p ‖ p_spliced) + fvu_weight · FVU`: a short run takes away part of the loss that splicing adds, which
    a fit to the activations alone leaves, for a little more FVU. Decoder rows keep unit norm; the model is not changed.

    Args:
        model: The model, in eval mode.
        sae: A top-k SAE with unit decoder rows, as `fit` returns.
        dataset: Texts, or windows of token ids. BOS and padding are not spliced.
        hook: Where it goes; by default where it says it was fitted.
        tokens: How many token positions to train on, padding counted.
        windows: Windows of text per step.
        lr: Adam's rate, decayed linearly to zero.
        fvu_weight: Weight of the fraction of variance unexplained.
        seed: Of the order of the windows.
        autocast: bfloat16 matrix products.
    """
    hook = hook or sae.cfg.metadata.hook_name
    layer, rows = layer_of(hook), to_rows(model, dataset)
    steps = max(1, tokens // (windows * rows.tokens.shape[1]))
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * windows / len(rows.tokens))
    picked = torch.cat([torch.randperm(len(rows.tokens), generator=generator) for _ in range(epochs)])
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    progress = tqdm(range(steps), desc=f"fine-tuning {hook}")
    for step in progress:
        some = Rows(*(part[picked[step * windows : (step + 1) * windows]] for part in rows))
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        with torch.autocast(model.W_E.device.type, torch.bfloat16, enabled=autocast):
            divergence, fvu = _splicing_loss(model, sae, hook, layer, some)
        optimizer.zero_grad()
        (divergence + fvu_weight * fvu).backward()
        optimizer.step()
        with torch.no_grad():
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        progress.set_postfix(kl=f"{divergence.item():.4f}", fvu=f"{fvu.item():.3f}")
    for parameter in model.parameters():
        parameter.grad = None
    return sae.eval()


def _splicing_loss(
    model: BilinearTransformer, sae: SAE, hook: str, layer: int, rows: Rows
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the divergence of the spliced model's predictions from its own, per position, and the batch's FVU."""
    seen = {}

    def splice(x: Tensor, hook: object) -> Tensor:
        seen["x"], seen["new"] = x.detach(), sae.decode(sae.encode(x.detach())).to(x.dtype)
        return torch.where(rows.counts[..., None], seen["new"], x.detach())

    with torch.no_grad():
        resid = model(rows.tokens, attention_mask=rows.attend, stop_at_layer=layer)
        clean = model(resid, attention_mask=rows.attend, start_at_layer=layer)[rows.counts].log_softmax(-1)
    with model.hooks(fwd_hooks=[(hook, splice)]):
        spliced = model(resid, attention_mask=rows.attend, start_at_layer=layer)[rows.counts].log_softmax(-1)
    x, new = (seen[name][rows.counts].float() for name in ("x", "new"))
    divergence = torch.nn.functional.kl_div(spliced.float(), clean.float(), log_target=True, reduction="batchmean")
    return divergence, (x - new).pow(2).sum() / (x - x.mean(0)).pow(2).sum()


def _key(hook: str) -> str:
    return hook.replace(".", "_")


def _trainer(
    model: BilinearTransformer,
    stream: ActivationStream,
    settings: dict[str, Any],
    checkpoints: Path,
    n_checkpoints: int,
) -> MultiSAETrainer:
    """Set SAELens' trainer up, at the start or at the newest complete checkpoint."""
    d_in, steps = model.cfg.d_model, settings["tokens"] // settings["batch"]
    torch.manual_seed(settings["seed"])
    saes = {
        _key(hook): TopKTrainingSAE(
            TopKTrainingSAEConfig(d_in=d_in, d_sae=settings["expansion"] * d_in, k=settings["k"])
        )
        for hook in stream.hooks
    }
    config = SAETrainerConfig(
        total_training_samples=steps * settings["batch"],
        train_batch_size_samples=settings["batch"],
        lr=settings["lr"],
        lr_warm_up_steps=steps // 20,
        lr_end=settings["lr"] / 10,  # of cosine schedules only, but SAELens wants it
        lr_decay_steps=2 * steps // 5,
        device=str(model.W_E.device),
        autocast=settings["autocast"],
        dead_feature_window=max(20, min(1000, steps // 10)),
        feature_sampling_window=steps + 1,
        n_checkpoints=n_checkpoints,
        checkpoint_path=str(checkpoints),
        logger=LoggingConfig(log_to_wandb=False),
    )

    def complete(checkpoint_path: Path | None) -> None:
        (checkpoint_path / "complete.json").write_text(json.dumps(settings))
        for older in checkpoints.iterdir():
            if older != checkpoint_path:
                shutil.rmtree(older)

    trainer = MultiSAETrainer(config, saes, {_key(hook): hook for hook in stream.hooks}, iter(()), None, complete)
    saved = sorted(checkpoints.glob("*/complete.json"), key=lambda path: int(path.parent.name))
    if saved:
        if json.loads(saved[-1].read_text()) != settings:
            raise ValueError(f"folder {checkpoints} holds checkpoints of a run with other data or arguments; delete it")
        trainer.load_checkpoint(saved[-1].parent)
        # SAELens saves before it counts the step as done
        for one in trainer.trainers.values():
            one.n_training_steps = one.n_training_samples // settings["batch"]
        trainer.n_training_steps = trainer.n_training_samples // settings["batch"]
        trainer.checkpoint_thresholds = [n for n in trainer.checkpoint_thresholds if n >= trainer.n_training_samples]
    else:
        _start_at_the_mean(trainer, next(stream()))
    trainer.data_provider = stream(trainer.n_training_steps)
    return trainer


@torch.no_grad()
def _start_at_the_mean(trainer: MultiSAETrainer, sample: Mapping[str, Tensor]) -> None:
    """Scale the activations to norm sqrt(d), which SAELens folds away at the end, and centre the decoder bias."""
    for key, hook in trainer.hook_names.items():
        scale = math.sqrt(sample[hook].shape[1]) / sample[hook].norm(dim=1).mean().item()
        trainer.trainers[key].activation_scaler.scaling_factor = scale
        trainer.saes[key].b_dec.copy_(sample[hook].mean(0) * scale)


@torch.no_grad()
def _finish(trained: TopKTrainingSAE, model: BilinearTransformer, hook: str, settings: dict[str, Any]) -> TopKSAE:
    """Turn a trained SAE into an inference one with unit decoder rows."""
    trained.fold_W_dec_norm()
    metadata = SAEMetadata(
        hook_name=hook, context_size=model.cfg.n_ctx, prepend_bos=True, settings=settings, model_name="bilens"
    )
    cfg = TopKSAEConfig(d_in=trained.cfg.d_in, d_sae=trained.cfg.d_sae, k=trained.cfg.k, metadata=metadata)
    sae = TopKSAE(cfg).to(trained.W_dec.device)
    sae.load_state_dict({name: weight.detach().clone() for name, weight in trained.state_dict().items()})
    return sae.eval()


def save(sae: SAE, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write an SAE in SAELens' format, to be read with `SAE.load_from_disk`.

    Args:
        sae: The SAE.
        folder: Where to.
        dtype: Round the stored weights to it; they are widened again on loading.
    """
    weights, _ = sae.save_model(folder)
    if dtype is not None:
        save_file({name: weight.to(dtype) for name, weight in load_file(weights).items()}, weights)


def fingerprint(model: nn.Module) -> str:
    """Return a hash of the weights of a model or an SAE."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode() + _hash(weight).encode())
    return digest.hexdigest()


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


# -- evaluation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """How well an SAE stands in for the activations at its hook point."""

    fvu: float  # Σ‖x - x̂‖² / Σ‖x - mean(x)‖², over the whole dataset
    l0: float  # active features per position
    dead: float  # fraction of the features active nowhere in the dataset
    loss: float  # the model's own, nats per token
    loss_spliced: float  # with x̂ in place of x, at every position but BOS
    loss_zero: float  # with 0 in place of x
    loss_mean: float  # with mean(x) in place of x
    tokens: int

    @property
    def recovered(self) -> float:
        """Loss recovered against zero ablation, `1 - (spliced - loss) / (zero - loss)`."""
        return 1 - (self.loss_spliced - self.loss) / (self.loss_zero - self.loss)

    @property
    def recovered_mean(self) -> float:
        """Loss recovered against mean ablation."""
        return 1 - (self.loss_spliced - self.loss) / (self.loss_mean - self.loss)


@torch.no_grad()
def evaluate(
    model: BilinearTransformer,
    sae: SAE,
    dataset: Sequence[str] | Int[Tensor, "row seq"],
    hook: str | None = None,
    batch: int = 32,
) -> Evaluation:
    """Measure reconstruction, sparsity, dead features, and the loss with the reconstruction spliced in.

    BOS and padding count nowhere and are left as they are when splicing.

    Args:
        model: The model the SAE belongs to.
        sae: The SAE.
        dataset: Texts, or windows of token ids.
        hook: Where it goes; by default where it says it was fitted.
        batch: Windows at a time.
    """
    hook = hook or sae.cfg.metadata.hook_name
    rows = to_rows(model, dataset)
    batches = [Rows(*(part[i : i + batch] for part in rows)) for i in range(0, len(rows.tokens), batch)]
    sums = _Sums(sae.cfg.d_in, sae.cfg.d_sae)
    for some in batches:
        x = activations(model, some, [hook])[hook][some.counts].to(sae.W_dec)
        z = sae.encode(x)
        sums.add(x, z, sae.decode(z))
    mean = sums.mean.float()
    layer = layer_of(hook)  # the blocks before it are run once
    losses = torch.zeros(4, dtype=torch.float64)
    weight = 0
    for some in batches:

        def splice(value: Tensor, new: Tensor | None, counts: Tensor = some.counts) -> Tensor:
            new = sae.decode(sae.encode(value)) if new is None else new
            return torch.where(counts[..., None], new, value)

        edits = (None, lambda x, hook: splice(x, None), lambda x, hook: splice(x, x.new_zeros(())))
        edits = (*edits, lambda x, hook: splice(x, mean))
        resid = model(some.tokens, attention_mask=some.attend, stop_at_layer=layer)
        for i, edit in enumerate(edits):
            with model.hooks(fwd_hooks=[] if edit is None else [(hook, edit)]):
                per_token = model(
                    resid,
                    "loss",
                    attention_mask=some.attend,
                    start_at_layer=layer,
                    tokens=some.tokens,
                    loss_per_token=True,
                )
            losses[i] += per_token.double().sum()
        weight += int((some.attend[:, 1:] & some.attend[:, :-1]).sum())
    clean, spliced, zero, average = (losses / weight).tolist()
    return Evaluation(sums.fvu, sums.l0, sums.dead, clean, spliced, zero, average, sums.n)


class _Sums:
    """Running sums over positions, in float64."""

    def __init__(self, d_in: int, d_sae: int):
        self.n, self.squares, self.errors, self.active = 0, 0.0, 0.0, 0
        self.total = torch.zeros(d_in, dtype=torch.float64)
        self.fired = torch.zeros(d_sae, dtype=torch.bool)

    def add(self, x: Tensor, z: Tensor, reconstruction: Tensor) -> None:
        x = x.double()
        self.n += len(x)
        self.total += x.sum(0).cpu()
        self.squares += x.pow(2).sum().item()
        self.errors += (x - reconstruction).pow(2).sum().item()
        self.active += int((z != 0).sum())
        self.fired |= (z != 0).any(0).cpu()

    @property
    def mean(self) -> Tensor:
        return self.total / self.n

    @property
    def fvu(self) -> float:
        return self.errors / (self.squares - self.n * self.mean.pow(2).sum().item())

    @property
    def l0(self) -> float:
        return self.active / self.n

    @property
    def dead(self) -> float:
        return (~self.fired).double().mean().item()


# -- what a feature responds to ---------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Contexts:
    """Where each feature of an SAE is most active: short token windows, and the activation at each token.

    The window's peak is at `peak`; padding is token -1.
    """

    tokens: Int[Tensor, "feature n width"]
    values: Float[Tensor, "feature n width"]
    density: Float[Tensor, " feature"]  # fraction of the positions at which the feature is active
    peak: int

    def __repr__(self) -> str:
        return f"Contexts({len(self.tokens)} features, {self.tokens.shape[1]} windows of {self.tokens.shape[2]} tokens)"

    def top_tokens(
        self,
        features: int | Sequence[int],
        model: BilinearTransformer,
        n: int = 4,
        weights: Sequence[float] | None = None,
    ) -> list[str]:
        """Return the tokens with the largest share of the activation at the strongest positions of features.

        Args:
            features: A feature, or several.
            model: Owner of the tokenizer.
            n: How many tokens.
            weights: Of the features; equal if `None`, and the sign does not matter.
        """
        counted: dict[int, float] = {}
        for window, weight in self._windows(features, weights):
            counted[window[self.peak]] = counted.get(window[self.peak], 0.0) + weight
        return [model.tokenizer.id_to_token(token) for token in sorted(counted, key=counted.get, reverse=True)[:n]]

    def label(
        self,
        features: int | Sequence[int],
        model: BilinearTransformer,
        n: int = 3,
        weights: Sequence[float] | None = None,
    ) -> str:
        """Name a feature, or several together, by top tokens, and the word before that most contexts share, if any.

        Arguments are those of `top_tokens`.
        """
        windows = list(self._windows(features, weights))
        if not windows:
            return "(never active)"
        words = self.top_tokens(features, model, n, weights)
        if isinstance(features, int) and len(words) == 1:
            # always the same token: show the words before it, which tell such features apart
            return self.snippet(features, 0, model, before=3, after=0)
        before: dict[int, float] = {}
        for window, weight in windows:
            for token in {*window[self.peak - 3 : self.peak]} - {-1}:
                before[token] = before.get(token, 0.0) + weight
        shared, total = max(before, key=before.get, default=None), sum(weight for _, weight in windows)
        cue = shared is not None and before[shared] > 0.7 * total
        return f"{model.tokenizer.id_to_token(shared)} … {' / '.join(words)}" if cue else " / ".join(words)

    def _windows(
        self, features: int | Sequence[int], weights: Sequence[float] | None
    ) -> Iterator[tuple[list[int], float]]:
        """Yield the windows of features, and each one's share of its feature's activation times the weight."""
        features = [features] if isinstance(features, int) else features
        for feature, weight in zip(features, [1.0] * len(features) if weights is None else weights, strict=True):
            peaks = self.values[feature, :, self.peak]
            for window, value in zip(self.tokens[feature].tolist(), peaks.tolist(), strict=True):
                if window[self.peak] >= 0:
                    yield window, abs(weight) * value / peaks.sum().item()

    def snippet(self, feature: int, n: int, model: BilinearTransformer, before: int = 8, after: int = 4) -> str:
        """Return one window as text, the peak in square brackets."""
        window = self.tokens[feature, n].tolist()
        left = [t for t in window[max(0, self.peak - before) : self.peak] if t >= 0]
        right = [t for t in window[self.peak + 1 : self.peak + 1 + after] if t >= 0]
        peak = model.tokenizer.id_to_token(window[self.peak]) if window[self.peak] >= 0 else ""
        return f"{model.to_string(left)} [{peak}] {model.to_string(right)}".strip()


CONTEXT = (10, 5)  # tokens kept before and after a peak


@torch.no_grad()
def contexts(
    model: BilinearTransformer,
    sae: SAE,
    dataset: Sequence[str] | Int[Tensor, "row seq"],
    hook: str | None = None,
    n: int = 8,
    batch: int = 32,
) -> Contexts:
    """Find the n positions at which each feature is most active, at most one per window of text.

    Args:
        model: The model the SAE belongs to.
        sae: The SAE.
        dataset: Texts, or windows of token ids.
        hook: Where the SAE goes; by default where it says it was fitted.
        n: Positions per feature.
        batch: Windows at a time.
    """
    hook = hook or sae.cfg.metadata.hook_name
    rows = to_rows(model, dataset)
    found = ContextTally.empty(sae.cfg.d_sae, n)
    for start in range(0, len(rows.tokens), batch):
        some = Rows(*(part[start : start + batch] for part in rows))
        z = sae.encode(activations(model, some, [hook])[hook].to(sae.W_dec)).cpu()
        found.add(some, z.masked_fill(~some.counts[..., None], 0))
    return found.contexts()


@dataclass
class ContextTally:
    """The strongest contexts seen so far, while text is streamed; the order of the windows decides ties alone."""

    tokens: Int[Tensor, "feature n width"]
    values: Float[Tensor, "feature n width"]
    active: Int[Tensor, " feature"]  # positions at which the feature was active
    positions: int = 0

    @classmethod
    def empty(cls, d_sae: int, n: int) -> "ContextTally":
        """Return the tally of no text, to hold n windows per feature."""
        width = sum(CONTEXT) + 1
        tokens, values = torch.full((d_sae, n, width), -1), torch.zeros(d_sae, n, width)
        return cls(tokens, values, torch.zeros(d_sae, dtype=torch.int64))

    def add(self, rows: Rows, z: Float[Tensor, "row seq feature"]) -> None:
        """Take in windows of text and the features' activations there, zero where a position does not count."""
        before, after = CONTEXT
        around = torch.arange(-before, after + 1)
        self.active += (z != 0).sum((0, 1))
        self.positions += int(rows.counts.sum())
        row, feature = torch.arange(len(z))[:, None, None], torch.arange(z.shape[2])[None, :, None]
        position = z.argmax(1)[..., None] + around  # [row, feature, width]
        inside = (position >= 0) & (position < z.shape[1])
        position = position.clamp(0, z.shape[1] - 1)
        inside &= rows.counts[row, position]
        found = rows.tokens[row, position].masked_fill(~inside, -1), z[row, position, feature].masked_fill(~inside, 0)
        tokens, values = (
            torch.cat((old, new.transpose(0, 1)), 1) for old, new in zip((self.tokens, self.values), found, strict=True)
        )
        strongest = values[:, :, before].topk(self.tokens.shape[1], dim=1).indices[..., None]
        strongest = strongest.expand(-1, -1, len(around))
        self.tokens, self.values = tokens.gather(1, strongest), values.gather(1, strongest)

    def contexts(self) -> Contexts:
        """Return what was found."""
        before = CONTEXT[0]
        tokens = self.tokens.masked_fill(self.values[:, :, before, None] <= 0, -1)
        return Contexts(tokens, self.values, self.active / self.positions, peak=before)
