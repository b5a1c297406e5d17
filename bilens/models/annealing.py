"""Gated MLPs become bilinear: the gate as a path to a linear map, schedules for walking it, and the fold at its end.

A gated layer `W_p(act(Lx) ⊙ (Rx))` is bilinear once `act` is linear. `prepare` returns a copy of a model whose gates
have an `alpha` from 0 (as it was) to 1 (linear); train it while a schedule moves `set_alpha` from 0 to 1, then `fold`
the linear gates into the weights. Two ways lead there: the activation's own path (`Gate`), or a blend with a linear map
fitted to it by least squares (`Blend`), which can also take the place of the norms.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import ACTIVATIONS, RMSNorm
from .transformer import BilinearTransformer

# -- schedules --------------------------------------------------------------------------------------------------------

Schedule = Callable[[float], float]


def linear(progress: float) -> float:
    """Return `p`: the gate changes at a constant pace (2410.08417, appendix J)."""
    return progress


def exponential(progress: float, sharpness: float = 1.05) -> float:
    """Return `min(p exp(k - k p), 1)`: most of the change early; with `k > 1` it is complete at about `1/k`."""
    return min(progress * math.exp(sharpness * (1 - progress)), 1.0)


def logistic(progress: float, sharpness: float = 10.0) -> float:
    """Return `σ(k (p - ½))`, shifted and stretched so that it starts at 0 and ends at 1: most of the change midway."""
    return 0.5 + 0.5 * math.tanh(sharpness / 2 * (progress - 0.5)) / math.tanh(sharpness / 4)


def smootherstep(progress: float) -> float:
    """Return `6p⁵ - 15p⁴ + 10p³`: the first two derivatives vanish at both ends."""
    return progress**3 * (progress * (6 * progress - 15) + 10)


SCHEDULES: dict[str, Schedule] = {
    "linear": linear,
    "exponential": exponential,
    "logistic": logistic,
    "smootherstep": smootherstep,
}


def alpha_at(schedule: str | Schedule, progress: int | float) -> float:
    """Return how far the gates are to be on their way, 0 to 1, at a `progress` from 0 to 1.

    Args:
        schedule: A name in `SCHEDULES`, or a function of the progress.
        progress: Fraction of the annealing that is done.

    Raises:
        ValueError: No schedule has that name, `progress` is outside [0, 1], or what the schedule returned is.
    """
    if isinstance(schedule, str) and schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)} or a function, got {schedule!r}")
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must lie in [0, 1], got {progress}")
    function = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
    alpha = float(function(progress))
    if not -1e-9 <= alpha <= 1 + 1e-9:
        raise ValueError(f"schedule must stay in [0, 1], but at progress {progress:g} it is {alpha:g}")
    return min(max(alpha, 0.0), 1.0)


# -- what an annealed gate computes -----------------------------------------------------------------------------------

# c z times a switch between 0 and 1: c times the activation at β = 1, c z/2 as β goes to 0, whichever the activation
PATHS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "silu": lambda z, beta, c: F.silu(beta * z) * (c / beta),
    "gelu": lambda z, beta, c: F.gelu(beta * z) * (c / beta),
    "relu": lambda z, beta, c: z * (c * (1 - beta) / 2) + F.relu(z) * (c * beta),
}
_SMALLEST = 1e-12  # of β, as its formulas divide by it: the switch then is 1/2 to the last digit


class Gate(nn.Module):
    """An activation on its way to a linear map, `c z s(βz)` with β = 1 - alpha (2410.08417, appendix J).

    The switch s is `σ(βz)` for SiLU, `Φ(βz)` for GELU and `(1 + β sign z)/2` for ReLU: at β = 1 the gate is the
    activation (c starts at 1), at β = 0 it is `c z / 2`.

    Args:
        act: The activation, a name in `PATHS`.
    """

    def __init__(self, act: str):
        super().__init__()
        if act not in PATHS:
            raise ValueError(f"act must be one of {', '.join(PATHS)} (those have a path to linear), got {act!r}")
        self.act = act
        self.c = nn.Parameter(torch.ones(()))
        self.register_buffer("beta", torch.ones(()))

    def forward(self, z: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        """Apply the gate to the left factor; for the backward pass nothing is kept but z."""
        beta = self.beta.clamp(min=_SMALLEST)
        return checkpoint(PATHS[self.act], z, beta, self.c, use_reentrant=False, preserve_rng_state=False)

    def set_alpha(self, alpha: int | float) -> None:
        """Go to β = 1 - alpha."""
        self.beta.fill_(1 - alpha)

    @property
    def alpha(self) -> float:
        """How far the gate is."""
        return 1 - self.beta.item()

    def fold_into(self, weight: Float[Tensor, "hidden *inp"]) -> Float[Tensor, "hidden *inp"]:
        """Return the weight (or bias) of the left factor times the gate's slope at β = 0, `c / 2`."""
        return weight * (self.c / 2).to(weight)


class Blend(nn.Module):
    """A gate or a norm on its way to a fitted linear map, `(1 - alpha) f(x) + alpha M x` (2410.08417, appendix J).

    Args:
        original: f: an activation's name, or the norm itself.
        weight: M, `[width, width]`; or `[width]`, its diagonal.
    """

    def __init__(self, original: str | nn.Module, weight: Float[Tensor, "..."]):
        super().__init__()
        self.original = original
        self.register_buffer("weight", weight)
        self.register_buffer("beta", weight.new_ones(()))

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Apply the blend."""
        before = ACTIVATIONS[self.original](x) if isinstance(self.original, str) else self.original(x)
        after = x * self.weight if self.weight.ndim == 1 else F.linear(x, self.weight)
        return torch.lerp(after.to(before), before, self.beta.to(before))

    def set_alpha(self, alpha: int | float) -> None:
        """Go to a weight of `alpha` for the linear map."""
        self.beta.fill_(1 - alpha)

    @property
    def alpha(self) -> float:
        """Weight of the linear map."""
        return 1 - self.beta.item()

    def fold_into(self, weight: Float[Tensor, "width *inp"]) -> Float[Tensor, "width *inp"]:
        """Return the weight (or bias) of the layer before a gate, followed by M."""
        own = self.weight.to(weight)
        return own @ weight if own.ndim == 2 else own.view(-1, *(1 for _ in weight.shape[1:])) * weight

    def fold_before(self, weight: Float[Tensor, "out width"]) -> Float[Tensor, "out width"]:
        """Return the weight of the layer after a norm, preceded by M."""
        own = self.weight.to(weight)
        return weight * own if own.ndim == 1 else weight @ own


# -- fitting linear maps ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class LinearFit:
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
    _check_gated(model)
    fits = [_Moments(model.cfg.d_hidden, diagonal, model.W_E.device) for _ in model.blocks]
    hooks = [
        (f"blocks.{layer}.mlp.hook_pre", lambda z, hook, fit=fit, act=block.mlp.act: fit.add(z, ACTIVATIONS[act](z)))
        for layer, (fit, block) in enumerate(zip(fits, model.blocks, strict=True))
    ]
    _capture(model, rows, hooks, batch)
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
        ValueError: The model has no norms.
    """
    norms = _norms(model)
    fits = {name: _Moments(model.cfg.d_model, diagonal, model.W_E.device) for name in norms}
    points = {"ln1": "hook_resid_pre", "ln2": "hook_resid_mid"}
    hooks = []
    for name, norm in norms.items():
        block, _, which = name.rpartition(".")
        point = f"{block}.{points[which]}" if block else f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
        hooks.append((point, lambda x, hook, fit=fits[name], norm=norm: fit.add(x, _normalise(norm, x))))
    _capture(model, rows, hooks, batch)
    return {name: fit.solve(model.W_E.dtype) for name, fit in fits.items()}


def _normalise(norm: RMSNorm, x: Tensor) -> Tensor:
    """What the norm computes, without its hooks: they are not to see it twice."""
    x = x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
    x = x if norm.weight is None else x * norm.weight
    return x if norm.bias is None else x + norm.bias


def _capture(model: BilinearTransformer, rows: Tensor, hooks: list, batch: int) -> None:
    with model.hooks(fwd_hooks=hooks):
        for some in rows.split(batch):
            model(some, return_type=None)


# -- there and back ---------------------------------------------------------------------------------------------------


def prepare(
    model: BilinearTransformer,
    *,
    gates: Iterable[LinearFit] | None = None,
    norms: Mapping[str, LinearFit] | None = None,
) -> BilinearTransformer:
    """Return a copy of a gated model whose gates can be annealed; at alpha 0, where it starts, it computes the same.

    Args:
        model: A gated model, e.g. of a SwiGLU.
        gates: Fits of `fit_gates`, to blend in; if `None` each gate takes its activation's own path with a learnable
            factor c.
        norms: Fits of `fit_norms`, to blend in as well; if `None` the norms stay.

    Raises:
        ValueError: The MLPs are not gated (a bilinear one needs no annealing, a plain one has no product), their
            activation has no path, there are not as many fits as layers, or norms are named that the model lacks.
    """
    _check_gated(model)
    fits = None if gates is None else list(gates)
    if fits is not None and len(fits) != len(model.blocks):
        raise ValueError(f"gates must hold one fit for each of the {len(model.blocks)} layers, got {len(fits)}")
    if norms is not None and set(norms) != set(_norms(model)):
        raise ValueError(f"norms must hold a fit for each of {', '.join(_norms(model))}, got {', '.join(norms)}")
    soft = copy.deepcopy(model)
    soft.reset_hooks(including_permanent=True)
    for block, gate in zip(soft.blocks, _new_gates(model, fits), strict=True):
        block.mlp.gate = gate
    for name, fit in (norms or {}).items():
        parent, _, which = name.rpartition(".")
        setattr(soft.get_submodule(parent), which, Blend(soft.get_submodule(name), fit.weight.to(model.W_E)))
    soft.setup()
    return soft


def set_alpha(model: BilinearTransformer, alpha: int | float) -> None:
    """Move every gate (and norm) of a prepared model to `alpha`: 0 as it was, 1 linear.

    Raises:
        ValueError: `alpha` is outside [0, 1], or the model is not a prepared one.
    """
    _check_alpha(alpha)
    for part in _annealed(model):
        part.set_alpha(alpha)


@contextmanager
def annealed(model: BilinearTransformer, alpha: int | float) -> Iterator[BilinearTransformer]:
    """Run a gated model with its gates at `alpha` on their own path, c = 1, for the length of a `with` block.

    At its end, also after an exception, the model is what it was. The factor c is not there to be learnt: `prepare` is
    for training.

    Raises:
        ValueError: As for `prepare` and `set_alpha`.
    """
    _check_gated(model)
    _check_alpha(alpha)
    gates = _new_gates(model, None)
    for block, gate in zip(model.blocks, gates, strict=True):
        gate.requires_grad_(False).set_alpha(alpha)
        block.mlp.gate = gate
    try:
        yield model
    finally:
        for block in model.blocks:
            del block.mlp.gate  # a module in the list of modules: it has to leave that list
            block.mlp.gate = None


@torch.no_grad()
def fold(model: BilinearTransformer) -> BilinearTransformer:
    """Return the bilinear model that a prepared model at alpha 1 is: linear gates, and norms, become part of weights.

    `W_p((c/2) Lx ⊙ Rx)` has the left weights `(c/2) L`; a fitted map M goes into `M L`, or for a norm into the weights
    that read it. The result has the dtype and device of the weights, no hooks, and can be saved.

    Raises:
        ValueError: The model is not a prepared one, or its gates are not at alpha 1.
    """
    for part in _annealed(model):
        if part.alpha != 1:
            raise ValueError(f"the gates must be at alpha 1 to be folded (set_alpha(model, 1)), got {part.alpha:g}")
    linear_norms = isinstance(model.ln_final, Blend)
    cfg = replace(model.cfg, mlp="bilinear", act=None)
    if linear_norms:  # the last one goes into the unembedding, which then is no longer the embedding
        cfg = replace(cfg, norm="none", tied=False)
    with torch.device("meta"):
        folded = BilinearTransformer(cfg, model.tokenizer, model.source)
    state = {name: weight.clone() for name, weight in model.state_dict().items() if name in folded.state_dict()}
    for layer, block in enumerate(model.blocks):
        name = f"blocks.{layer}.mlp.w"
        for kind in ("weight", "bias"):
            if (whole := state.get(f"{name}.{kind}")) is not None:
                left, right = whole.chunk(2)
                state[f"{name}.{kind}"] = torch.cat((block.mlp.gate.fold_into(left), right))
        if linear_norms:
            for norm, reader in ((block.ln1, f"blocks.{layer}.attn.qkv.weight"), (block.ln2, f"{name}.weight")):
                state[reader] = norm.fold_before(state[reader])
    if linear_norms:
        state["unembed.weight"] = model.ln_final.fold_before(state["unembed.weight"])
    folded.load_state_dict(state, assign=True)
    folded.ignored_keys = model.ignored_keys
    return folded.train(model.training)


def _new_gates(model: BilinearTransformer, fits: list[LinearFit] | None) -> list[nn.Module]:
    if fits is None:
        return [Gate(block.mlp.act).to(model.W_E) for block in model.blocks]
    return [Blend(block.mlp.act, fit.weight.to(model.W_E)) for block, fit in zip(model.blocks, fits, strict=True)]


def _annealed(model: BilinearTransformer) -> list[Gate | Blend]:
    parts = [module for module in model.modules() if isinstance(module, Gate | Blend)]
    if not parts:
        raise ValueError("model must be one that `prepare` returned: it has no gate to anneal")
    return parts


def _norms(model: BilinearTransformer) -> dict[str, RMSNorm]:
    norms = {name: module for name, module in model.named_modules() if isinstance(module, RMSNorm)}
    if not norms:
        raise ValueError("model must have norms to fit, and this one has none")
    return norms


def _check_gated(model: BilinearTransformer) -> None:
    cfg = model.cfg
    if cfg.mlp != "gated":
        why = "it needs no annealing" if cfg.mlp == "bilinear" else "it has no product to keep"
        raise ValueError(f"model must have gated MLPs, act(Lx) ⊙ (Rx), got {cfg.mlp} ones: {why}")
    if any(block.mlp.gate is not None for block in model.blocks):
        raise ValueError("model is being annealed already: its gates are not its activation any more")


def _check_alpha(alpha: int | float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
