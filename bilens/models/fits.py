"""The linear maps nearest to a model's gates and norms, by least squares on what they see."""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bilens.tensor.records import Record

from .gates import Blend
from .layers import NoNorm
from .mlp import ACTIVATIONS
from .transformer import BilinearTransformer


@dataclass(frozen=True, repr=False)
class LinearFit(Record):
    """The linear map without offset that is nearest to a gate or a norm on captured pairs, `min_M Σ |f(x) - M x|²`.

    `r2` is `1 - Σ |f(x) - M x|² / Σ |f(x) - mean f|²`: 1 if the map says it all; below 0 if a constant says more.
    """

    weight: Float[Tensor, "..."]  # [width, width], or [width] for a diagonal map
    r2: float
    pairs: int

    def __repr__(self) -> str:
        return f"LinearFit(weight={list(self.weight.shape)}, r2={self.r2:.3f}, pairs={self.pairs})"


class _Moments:
    """Sums over pairs, in float64, that a least-squares fit needs; no pair is kept."""

    def __init__(self, width: int, diagonal: bool, device: torch.device):
        shape = (width,) if diagonal else (width, width)
        self.xx, self.xy = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2))
        self.y, self.yy, self.n = torch.zeros(width, dtype=torch.float64, device=device), 0.0, 0

    def add(self, x: Float[Tensor, "*batch width"], y: Float[Tensor, "*batch width"]) -> None:
        """Add pairs of input and output."""
        x, y = (part.detach().double().flatten(0, -2) for part in (x, y))
        if self.xx.ndim == 1:
            self.xx, self.xy = self.xx + (x * x).sum(0), self.xy + (x * y).sum(0)
        else:
            self.xx, self.xy = self.xx + x.T @ x, self.xy + x.T @ y
        self.y, self.yy, self.n = self.y + y.sum(0), self.yy + y.pow(2).sum().item(), self.n + len(x)

    def solve(self, dtype: torch.dtype) -> LinearFit:
        """Return the best map, the smallest one where the pairs leave it open."""
        if self.xx.ndim == 1:
            weight = torch.where(self.xx > 0, self.xy / self.xx, 0)
        else:
            weight = (torch.linalg.pinv(self.xx, hermitian=True) @ self.xy).T
        missed = self.yy - (weight * (self.xy if self.xx.ndim == 1 else self.xy.T)).sum().item()
        spread = self.yy - self.y.pow(2).sum().item() / self.n
        return LinearFit(weight.to(dtype), 1 - missed / spread, self.n)


@torch.no_grad()
def fit_gates(
    model: BilinearTransformer, rows: Int[Tensor, "batch seq"], diagonal: bool = True, batch: int = 8
) -> list[LinearFit]:
    """Fit each layer's gate by a linear map of the left factor, by least squares on the pairs that `rows` give.

    Args:
        model: A gated model.
        rows: Token ids, without padding.
        diagonal: One slope for each hidden unit; else a full `[hidden, hidden]` map, which may mix them. Cost of the
            latter: `2 hidden²` float64 sums in each layer, and `hidden²` operations for each token.
        batch: Rows that run at a time.

    Raises:
        ValueError: The model's MLPs are not gated.
    """
    check_gated(model)
    fits = [_Moments(model.cfg.d_hidden, diagonal, model.W_E.device) for _ in model.blocks]
    hooks = [
        (
            f"blocks.{layer}.mlp.hook_pre",
            lambda z, hook, fit=fit, act=ACTIVATIONS[block.mlp.config.act]: fit.add(z, act(z)),
        )
        for layer, (fit, block) in enumerate(zip(fits, model.blocks, strict=True))
    ]
    with model.hooks(fwd_hooks=hooks):
        for some in rows.split(batch):
            model(some, return_type=None)
    return [fit.solve(model.W_E.dtype) for fit in fits]


@torch.no_grad()
def fit_norms(
    model: BilinearTransformer, rows: Int[Tensor, "batch seq"], diagonal: bool = False, batch: int = 8
) -> dict[str, LinearFit]:
    """Fit every norm by a linear map of the residual stream, by least squares on the pairs that `rows` give.

    Args:
        model: A model with norms.
        rows: Token ids, without padding.
        diagonal: One slope for each coordinate; else a full `[d_model, d_model]` map.
        batch: Rows that run at a time.

    Returns:
        The fits by the norm's name, `blocks.0.ln1` to `ln_final`.

    Raises:
        ValueError: The model has no norms, or they are being annealed.
    """
    norms = norms_of(model)
    fits = {name: _Moments(model.cfg.d_model, diagonal, model.W_E.device) for name in norms}
    with ExitStack() as stack:
        for name, norm in norms.items():
            seen = norm.register_forward_hook(lambda module, args, out, fit=fits[name]: fit.add(args[0], out))
            stack.callback(seen.remove)
        for some in rows.split(batch):
            model.ln_final(model(some, stop_at_layer=model.cfg.n_layers))
    return {name: fit.solve(model.W_E.dtype) for name, fit in fits.items()}


def norms_of(model: BilinearTransformer) -> dict[str, nn.Module]:
    """Return the norms of a model's residual stream by name, `blocks.0.ln1` to `ln_final`; not of queries and keys.

    Raises:
        ValueError: It has none, or they are being annealed.
    """
    if model.cfg.norm is None:
        raise ValueError("model must have norms to fit, and this one has none")
    names = ("ln1", "ln1_post", "ln2", "ln2_post")
    places = [f"blocks.{layer}.{name}" for layer in range(model.cfg.n_layers) for name in names]
    norms = {name: model.get_submodule(name) for name in (*places, "ln_final")}
    norms = {name: norm for name, norm in norms.items() if not isinstance(norm, NoNorm)}
    if any(isinstance(norm, Blend) for norm in norms.values()):
        raise ValueError("model is being annealed already: its norms are on their way to linear maps")
    return norms


def check_gated(model: BilinearTransformer) -> None:
    """Raise a ValueError unless all MLPs are gated, each with its own activation."""
    if model.cfg.mlp is None:
        raise ValueError("model must have gated MLPs, act(Lx) ⊙ (Rx), and this one has attention only")
    kind = model.cfg.mlp.kind
    if kind != "gated":
        why = "it needs no annealing" if model.cfg.mlp.quadratic else "it has no product to keep"
        raise ValueError(f"model must have gated MLPs, act(Lx) ⊙ (Rx), got {kind} ones: {why}")
    if any(block.mlp.gate is not None for block in model.blocks):
        raise ValueError("model is being annealed already: its gates are not its activation any more")
