"""How well an SAE stands in for what it reads: error, sparsity, and the model's loss with it spliced in."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bilens.models.texts import Texts
from bilens.models.transformer import BilinearTransformer
from bilens.models.windows import Windows, layer_of, observed
from bilens.tensor.records import Record

from .directions import check_stands, hook_of

if TYPE_CHECKING:
    from .stored import SAE


@dataclass(frozen=True, repr=False)
class Evaluation(Record, tells=("recovered", "recovered_mean")):
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
    model: BilinearTransformer, sae: "SAE", dataset: Texts, hook: str | None = None, batch: int = 32
) -> Evaluation:
    """Measure reconstruction, sparsity, dead features, and the loss with the reconstruction spliced in.

    BOS and padding count nowhere and are left as they are when splicing.

    Args:
        model: The model the SAE belongs to.
        sae: The SAE, on any device and in any dtype.
        dataset: Texts, or windows of token ids.
        hook: Where it goes; by default where it says it was fitted.
        batch: Windows at a time.

    Raises:
        ValueError: No text, or too little for the activations to have a variance; a transcoder, which does not stand in
            for what it reads; an SAE whose input is normalised by what it does not hold.
    """
    hook = hook_of(sae, hook)
    check_stands(model, sae, hook)
    windows = Windows.of(model, dataset)
    sums = _Sums(sae.cfg.d_in, sae.cfg.d_sae)
    for _, some, found in observed(model, windows, [hook], batch):
        x = found[hook][some.counts].to(sae.W_dec)
        z = sae.encode(x)
        sums.add(x, z, sae.decode(z))
    mean = sums.mean.to(model.W_E)
    edits = (None, lambda x: reconstruct(sae, x), torch.zeros_like, mean.expand_as)
    losses, n = torch.zeros(len(edits), dtype=torch.float64), 0
    for _, some in windows.batches(batch):
        if some.tokens.shape[1] > 1:  # a lone token has no loss
            losses += torch.stack([*_losses(model, hook, some, edits)])
            n += int((some.attend[:, 1:] & some.attend[:, :-1]).sum())
    clean, spliced, zero, average = (losses / n).tolist()
    return Evaluation(sums.fvu, sums.l0, sums.dead, clean, spliced, zero, average, sums.n)


Edit = Callable[[Float[Tensor, "row seq d"]], Float[Tensor, "row seq d"]] | None


def _losses(
    model: BilinearTransformer, hook: str, some: Windows, edits: tuple[Edit, ...]
) -> Iterator[Float[Tensor, ""]]:
    """Yield the summed loss of a batch under each edit; the blocks before the hook point run once."""
    layer = layer_of(hook)
    resid = model(some.tokens, attention_mask=some.attend, stop_at_layer=layer)
    for edit in edits:
        with nullcontext() if edit is None else model.hooks(fwd_hooks=[(hook, splice(edit, some.counts))]):
            loss = model(
                resid,
                "loss",
                attention_mask=some.attend,
                start_at_layer=layer,
                tokens=some.tokens,
                loss_per_token=True,
            )
        yield loss.double().sum().cpu()


def reconstruct(sae: "SAE", x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
    """Return what an SAE makes of activations, on their own device and in their dtype."""
    return sae.decode(sae.encode(x.to(sae.W_dec))).to(x)


def splice(edit: Edit, counts: Bool[Tensor, "row seq"]) -> Callable[..., Float[Tensor, "row seq d"]]:
    """Return the hook that edits the positions that count."""
    return lambda x, hook: torch.where(counts[..., None], edit(x), x)


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
        spread = self.squares - self.n * self.mean.pow(2).sum().item()
        if spread <= 1e-12 * self.squares:
            raise ValueError(f"dataset must hold activations that differ, got {self.n} positions without variance")
        return self.errors / spread

    @property
    def l0(self) -> float:
        return self.active / self.n

    @property
    def dead(self) -> float:
        return (~self.fired).double().mean().item()
