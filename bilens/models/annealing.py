"""Gated MLPs become bilinear: the gate as a path to a linear map, and the fold at its end.

A gated layer `W_p(act(Lx) ⊙ (Rx))` is bilinear once `act` is linear. `prepare` returns a copy of a model whose gates
have an `alpha` from 0 (as it was) to 1 (linear); train it while a schedule moves `set_alpha` from 0 to 1, then `fold`
the linear gates into the weights. Two ways lead there: the activation's own path (`Gate`), or a blend with a linear map
fitted to it by least squares (`Blend`), which can also take the place of the norms.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from .blocks import Block
from .fits import LinearFit, check_gated, norms_of
from .gates import Blend, Gate
from .transformer import BilinearTransformer


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
    check_gated(model)
    fits = None if gates is None else list(gates)
    if fits is not None and len(fits) != len(model.blocks):
        raise ValueError(f"gates must hold one fit for each of the {len(model.blocks)} layers, got {len(fits)}")
    if norms is not None and set(norms) != set(norms_of(model)):
        raise ValueError(f"norms must hold a fit for each of {', '.join(norms_of(model))}, got {', '.join(norms)}")
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
    check_gated(model)
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
    cfg = replace(model.cfg, mlp=replace(model.cfg.mlp, kind="bilinear", act=None))
    if linear_norms:  # the last one goes into the unembedding, which then is no longer the embedding
        cfg = replace(cfg, norm=None, unembed=replace(cfg.unembed, tied=False, norm=None))
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
            _fold_norms(block, f"blocks.{layer}", state)
    if linear_norms:
        state["unembed.weight"] = model.ln_final.fold_before(state["unembed.weight"])
    folded.load_state_dict(state, assign=True)
    folded.ignored_keys = model.ignored_keys
    return folded.train(model.training)


def _fold_norms(block: Block, name: str, state: dict[str, Tensor]) -> None:
    """Fold a block's linear norms into the weights that read them, or that write what they read."""
    for norm, reader in ((block.ln1, f"{name}.attn.qkv.weight"), (block.ln2, f"{name}.mlp.w.weight")):
        if isinstance(norm, Blend):
            state[reader] = norm.fold_before(state[reader])
    for norm, writer in ((block.ln1_post, f"{name}.attn.o"), (block.ln2_post, f"{name}.mlp.p")):
        for key in (f"{writer}.weight", f"{writer}.bias"):
            if isinstance(norm, Blend) and key in state:
                state[key] = norm.fold_into(state[key])


def _new_gates(model: BilinearTransformer, fits: list[LinearFit] | None) -> list[nn.Module]:
    if fits is None:
        return [Gate(block.mlp.config.act).to(model.W_E) for block in model.blocks]
    return [
        Blend(block.mlp.config.act, fit.weight.to(model.W_E)) for block, fit in zip(model.blocks, fits, strict=True)
    ]


def _annealed(model: BilinearTransformer) -> list[Gate | Blend]:
    parts = [module for module in model.modules() if isinstance(module, Gate | Blend)]
    if not parts:
        raise ValueError("model must be one that `prepare` returned: it has no gate to anneal")
    return parts


def _check_alpha(alpha: int | float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
