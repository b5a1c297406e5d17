"""Fine-tune an SAE on what its reconstruction does to the model's predictions."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from bilens.models.texts import Texts
from bilens.models.transformer import BilinearTransformer
from bilens.models.windows import Windows, layer_of

from .directions import hook_of
from .evaluation import reconstruct, splice

if TYPE_CHECKING:
    from .stored import SAE


@dataclass(frozen=True)
class Tuning:
    """How to fine-tune an SAE."""

    tokens: int = 500_000  # token positions to train on, padding counted
    windows: int = 16  # windows of text per step
    lr: float = 6e-4  # Adam's rate, decayed linearly to zero
    fvu_weight: float = 0.1  # weight of the fraction of variance unexplained
    seed: int = 0  # of the order of the windows
    autocast: bool = False  # bfloat16 matrix products


def finetune(
    model: BilinearTransformer,
    sae: "SAE",
    dataset: Texts,
    hook: str | None = None,
    tuning: Tuning = Tuning(),
) -> "SAE":
    """Fine-tune a fitted SAE, in place, on what its reconstruction does to the model's predictions.

    Minimises `KL(p ‖ p_spliced) + fvu_weight · FVU`: a short run takes away part of the loss that splicing adds, which
    a fit to the activations alone leaves, for a little more FVU. Decoder rows keep unit norm; the model is not changed,
    nor its gradients.

    Args:
        model: The model, in eval mode.
        sae: A top-k SAE with unit decoder rows, as `fit` returns.
        dataset: Texts, or windows of token ids. BOS and padding are not spliced.
        hook: Where it goes; by default where it says it was fitted.
        tuning: How.
    """
    hook, windows = hook_of(sae, hook), Windows.of(model, dataset)
    steps = max(1, tuning.tokens // (tuning.windows * windows.tokens.shape[1]))
    generator = torch.Generator().manual_seed(tuning.seed)
    epochs = math.ceil(steps * tuning.windows / len(windows))
    picked = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(epochs)])
    picked = picked.to(windows.tokens.device)
    parameters = list(sae.parameters())
    optimizer = torch.optim.Adam(parameters, lr=tuning.lr)
    progress = tqdm(range(steps), desc=f"fine-tuning {hook}")
    for step in progress:
        some = windows[picked[step * tuning.windows : (step + 1) * tuning.windows]].trim()
        optimizer.param_groups[0]["lr"] = tuning.lr * (1 - step / steps)
        with torch.autocast(model.W_E.device.type, torch.bfloat16, enabled=tuning.autocast):
            divergence, fvu = _splicing_loss(model, sae, hook, some)
        gradients = torch.autograd.grad(divergence + tuning.fvu_weight * fvu.to(divergence), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        progress.set_postfix(kl=f"{divergence.item():.4f}", fvu=f"{fvu.item():.3f}")
    return sae.eval()


def _splicing_loss(
    model: BilinearTransformer, sae: "SAE", hook: str, windows: Windows
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the divergence of the spliced model's predictions from its own, per position, and the batch's FVU."""
    seen, layer = {}, layer_of(hook)

    def reconstructed(x: Tensor) -> Tensor:
        seen["x"], seen["new"] = x.detach(), reconstruct(sae, x.detach())
        return seen["new"]

    def predictions() -> Tensor:
        logits = model(resid, attention_mask=windows.attend, start_at_layer=layer, tokens=windows.tokens)
        return logits[windows.counts].log_softmax(-1)

    with torch.no_grad():
        resid = model(windows.tokens, attention_mask=windows.attend, stop_at_layer=layer)
        clean = predictions()
    with model.hooks(fwd_hooks=[(hook, splice(reconstructed, windows.counts))]):
        spliced = predictions()
    x, new = (seen[name][windows.counts].float() for name in ("x", "new"))
    divergence = torch.nn.functional.kl_div(spliced.float(), clean.float(), log_target=True, reduction="batchmean")
    return divergence, (x - new).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
