"""A model as a Llama: the same function in the weights and words that transformers' own classes have."""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from .attention import Attention, AttentionConfig
from .embedding import UnembedConfig
from .layers import NoNorm, Norm, NormConfig
from .llama import Llama
from .mlp import MLP, MLPConfig
from .transformer import BilinearConfig, BilinearTransformer

# Where a model has no norms: x · 2^-30 · 2^30 is x to the bit, as long as mean(x²) vanishes beside eps (below 2^36 in
# float32, 2^7 in float64). float16 cannot hold such a gain, and `save` refuses it as not finite.
NORMLESS_EPS = 2.0**60


def obstacles(model: BilinearTransformer) -> list[str]:
    """Return what a Llama cannot compute, each with the field that says so; empty if `as_llama` can write the model."""
    annealed = any(block.mlp.gate is not None for block in model.blocks)
    gates = ["mlp.gate must be None, got one that is being annealed"] if annealed else []
    return [*_in_attention(model.cfg), *_in_stream(model.cfg), *_in_norms(model), *gates]


def as_llama(model: BilinearTransformer) -> BilinearTransformer:
    """Return the same function as a Llama: RMS norms with a gain, attention unscaled, `hidden_act="linear"`.

    A bilinear MLP is a Llama's with the activation `"linear"`, a plain one has an up projection of zeros with bias one.
    Attention's scale goes into `o`, another scale of the scores and a reversed rotation into `q` and `k`, shifts of
    norms into the biases behind them, scale and norm of the embeddings into the embedding. A norm that is not there
    becomes one with eps 2^60 and gain 2^30, which changes no bit of float32. Every stream between blocks, and what
    attention and MLP write to it, keep their values up to rounding.

    Source: transformers' `LlamaForCausalLM`; the folding follows from linearity, `W (g x + s) + b = W g x + (W s + b)`.

    Returns:
        A new model that shares what it can; the model itself if it is a Llama already.

    Raises:
        ValueError: A Llama cannot compute it; says which fields stand in the way.
    """
    if model.source.get("model_type") == "llama" and Llama("llama").expresses(model.cfg):
        return model
    if found := obstacles(model):
        raise ValueError("layout 'llama' cannot hold this model: " + "; ".join(found))
    cfg = _config(model)
    with torch.device("meta"):
        made = BilinearTransformer(cfg, starting_with_bos(model), {"model_type": "llama", **special_ids(model)})
    state = dict(_ends(model, cfg))
    for layer, block in enumerate(model.blocks):
        state |= {f"blocks.{layer}.{name}": weight for name, weight in _block(block, cfg)}
    made.load_state_dict({name: weight.detach() for name, weight in state.items()}, assign=True)
    made.has_bos, made.generation = model.has_bos, dict(model.generation)
    made.without_tokenizer = model.without_tokenizer
    return made.train(model.training)


# -- the tokenizer ----------------------------------------------------------------------------------------------------


def special_ids(model: BilinearTransformer) -> dict[str, int | None]:
    """Return the keys of a config that say which tokens start a text, end it and pad it; None of a model of ids."""
    eos = None if model.tokenizer is None else model.tokenizer.eos_token_id  # some have none
    bos = model.bos_id if model.tokenizer is not None and model.has_bos else None
    pad = None if model.tokenizer is None else model.tokenizer.pad_token_id
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos if pad is None else pad}


def starting_with_bos(model: BilinearTransformer) -> Any:
    """Return the tokenizer, made to start a text as `model.to_tokens` does, for those who ask only the tokenizer.

    None of a model of ids.
    """
    if model.tokenizer is None:
        return None
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.model_max_length = model.cfg.n_ctx
    start = [model.bos_id] if model.has_bos else []
    bare, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    if full != start + bare:
        for key in ("add_bos_token", "add_eos_token"):  # by which transformers would make the template anew
            tokenizer.init_kwargs.pop(key, None)
        names = tokenizer.convert_ids_to_tokens(start)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=[*names, "$A"], pair=[*names, "$A", "$B:1"], special_tokens=list(zip(names, start, strict=True))
        )
    return tokenizer


# -- what stands in the way -------------------------------------------------------------------------------------------


def _in_attention(cfg: BilinearConfig) -> Iterator[str]:
    attention = cfg.attention
    if attention.kind != "softmax":
        yield f"attention.kind must be 'softmax', got {attention.kind!r}"
    for name in ("qk_norm", "cap"):
        if (value := getattr(attention, name)) is not None:
            yield f"attention.{name} must be None, got {value}"
    if attention.value_residual:
        yield "attention.value_residual must be False, got True"
    if attention.rope.tables != "float32":
        yield f"attention.rope.tables must be 'float32', got {attention.rope.tables!r}"
    windows = {attention.at(layer).window for layer in range(cfg.n_layers)}
    if any(window is not None and window < cfg.n_ctx for window in windows):
        shortest = min(window for window in windows if window is not None)
        yield f"attention.window must be None or n_ctx={cfg.n_ctx} at least, got {shortest}"
    if attention.local is not None and attention.local.rope not in (None, attention.rope):
        yield f"attention.local.rope must be None, got {attention.local.rope}"


def _in_stream(cfg: BilinearConfig) -> Iterator[str]:
    if cfg.mlp is None:
        yield "mlp must be there, got None (attention only)"
    for name in ("restart", "interpolate"):
        if getattr(cfg.stream, name):
            yield f"stream.{name} must be False, got True"
    if cfg.unembed.cap is not None:
        yield f"unembed.cap must be None, got {cfg.unembed.cap}"


def _in_norms(model: BilinearTransformer) -> Iterator[str]:
    cfg = model.cfg
    last = cfg.unembed.norm or cfg.norm
    for name, norm in {"norm": cfg.norm, "unembed.norm": cfg.unembed.norm}.items():
        if norm is not None and norm.kind != "rms":
            yield f"{name}.kind must be 'rms', got {norm.kind!r}"
    if cfg.norm is not None and cfg.norm.place != "before":
        yield f"norm.place must be 'before', got {cfg.norm.place!r}"
    if (last and last.eps) != (cfg.norm and cfg.norm.eps):
        yield f"unembed.norm must have the eps of norm, as a Llama has one, got {last} and {cfg.norm}"
    if model.ln_final.affine(model.W_E)[1].any():
        yield "ln_final.bias must be zero, as a Llama's logits have no bias (norm.shift)"


# -- the shape --------------------------------------------------------------------------------------------------------


def _config(model: BilinearTransformer) -> BilinearConfig:
    """Return the shape of the Llama: every layer has the biases that one of them needs."""
    cfg, attention = model.cfg, model.cfg.attention
    shifted = bool(cfg.norm and cfg.norm.shift)
    rope = replace(attention.rope, reverse=False, kind=_rope_kind(attention))
    fields = {"n_key_value_heads": attention.n_key_value_heads, "rope": rope}
    biased = any(map(bool, attention.bias)) or shifted
    return BilinearConfig(
        cfg.n_layers,
        cfg.d_model,
        cfg.n_ctx,
        cfg.d_vocab,
        attention=AttentionConfig(attention.n_heads, attention.d_head, bias=(biased,) * 2, **fields),
        mlp=_mlp_config(cfg.mlp, shifted),
        norm=NormConfig(cfg.eps if cfg.norm else NORMLESS_EPS, gain=True),
        unembed=UnembedConfig(tied=cfg.unembed.tied and not _embeds_otherwise(cfg)),
    )


def _rope_kind(attention: AttentionConfig) -> str:
    return "default" if attention.rope.kind == "published" else attention.rope.kind


def _mlp_config(mlp: MLPConfig, shifted: bool) -> MLPConfig:
    linear = mlp.act in (None, "identity")
    bias = (any(mlp.bias) or shifted or mlp.kind == "plain",) * 2
    return MLPConfig(mlp.d_hidden, "bilinear" if linear else "gated", None if linear else mlp.act, bias)


def _embeds_otherwise(cfg: BilinearConfig) -> bool:
    return cfg.embed.scale != 1 or cfg.embed.norm is not None


# -- the weights ------------------------------------------------------------------------------------------------------


def _ends(model: BilinearTransformer, cfg: BilinearConfig) -> Iterator[tuple[str, Tensor]]:
    table = model.W_E
    if _embeds_otherwise(model.cfg):
        table = model.embedded(torch.arange(cfg.d_vocab, device=table.device))
    yield "embed.weight", table
    yield "unembed.weight", table if cfg.unembed.tied else model.unembed.weight
    yield "ln_final.weight", _gain(model.ln_final, model.W_E)


def _block(block: torch.nn.Module, cfg: BilinearConfig) -> Iterator[tuple[str, Tensor]]:
    parts = {
        "ln1": {"weight": _gain(block.ln1, block.attn.qkv.weight)},
        "ln2": {"weight": _gain(block.ln2, block.mlp.w.weight)},
        **_attention(block.attn, block.ln1),
        **_mlp(block.mlp, block.ln2),
    }
    shape = {"attn": cfg.attention.bias[0], "mlp": cfg.mlp.bias[0]}
    for module, part in parts.items():
        yield f"{module}.weight", part["weight"]
        if shape.get(module.split(".")[0]):
            bias = part.get("bias")
            yield f"{module}.bias", part["weight"].new_zeros(len(part["weight"])) if bias is None else bias


def _gain(norm: Norm, like: Tensor) -> Float[Tensor, " d_model"]:
    gain = norm.affine(like)[0]
    return gain * math.sqrt(NORMLESS_EPS) if isinstance(norm, NoNorm) else gain


def _attention(attn: Attention, norm: Norm) -> dict[str, dict[str, Tensor | None]]:
    """Return queries, keys and values behind the norm's shift, turned as Llama turns, and what writes the heads."""
    weight, config = attn.qkv.weight, attn.config
    bias = attn.qkv.bias if attn.qk_bias is None else F.pad(attn.qk_bias, (0, attn.widths[-1]))
    qkv = {"weight": weight, "bias": _shifted(bias, weight, norm)}
    scaled = config.factor * math.sqrt(config.d_head)
    sides = [
        {name: None if part is None else part.split(attn.widths)[i] for name, part in qkv.items()} for i in range(3)
    ]
    for side, factor in ((sides[0], scaled), (sides[1], 1.0)):
        for name, part in side.items():
            side[name] = None if part is None else _turned(part, config, factor)
    joined = {name: None if part is None else torch.cat([side[name] for side in sides]) for name, part in qkv.items()}
    o = {
        name: None if part is None else part * config.scale
        for name, part in (("weight", attn.o.weight), ("bias", attn.o.bias))
    }
    return {"attn.qkv": joined, "attn.o": o}


def _turned(part: Tensor, config: AttentionConfig, factor: float) -> Tensor:
    """Return rows of queries or keys times a factor, the second half of each head negated if it turns the other way."""
    signs = part.new_full((config.d_head,), factor)
    if config.rope.reverse:
        signs[config.d_head // 2 :] *= -1
    if (signs == 1).all():
        return part
    return part * signs.repeat(len(part) // config.d_head).view(-1, *[1] * (part.ndim - 1))


def _mlp(mlp: MLP, norm: Norm) -> dict[str, dict[str, Tensor | None]]:
    weight, bias = mlp.w.weight, _shifted(mlp.w.bias, mlp.w.weight, norm)
    if mlp.config.kind == "plain":
        right = weight.new_zeros(len(weight)) if bias is None else bias
        weight, bias = torch.cat((weight, torch.zeros_like(weight))), torch.cat((right, torch.ones_like(right)))
    elif mlp.config.kind == "squared":
        weight, bias = (None if part is None else torch.cat((part, part)) for part in (weight, bias))
    return {"mlp.w": {"weight": weight, "bias": bias}, "mlp.p": {"weight": mlp.p.weight, "bias": mlp.p.bias}}


def _shifted(bias: Tensor | None, weight: Tensor, norm: Norm) -> Tensor | None:
    """Return the bias behind a norm's shift s: `W (g x + s) + b = W g x + (W s + b)`."""
    shift = norm.affine(weight)[1]
    if isinstance(norm, NoNorm) or norm.bias is None:
        return bias
    moved = weight @ shift
    return moved if bias is None else bias + moved
