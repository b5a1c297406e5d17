"""The layout of the `Elriggs/*` models: bilinear and gated MLPs, attention with and without a softmax.

They are GPTs of loganriggs/modded-nanogpt: an RMSNorm without weights wherever there is a norm, on the embeddings and
on each head's queries and keys too; every block mixes in the start of the stream and the first block's values.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .attention import AttentionConfig, QKNormConfig
from .blocks import StreamConfig
from .embedding import EmbedConfig, UnembedConfig
from .layers import NormConfig
from .layouts import UNREAD, CheckpointError, Keys, Layout, blaming
from .mlp import MLPConfig
from .rotary import Rope
from .tokenization import StoredTokenizer
from .transformer import BilinearConfig

NORM = NormConfig(eps=2.0**-23)  # float32's epsilon: what torch's rms_norm takes where it is not told
CAP = 30.0
N_CTX = 1024  # which the models were trained at; their configs do not say it
SIZES = {"n_layer": 12, "n_head": 6, "n_embd": 768}  # and what the authors' code takes where a config is silent
FLAGS = {*("squared_mlp", "bilinear", "gated", "squared_attn", "bilinear_attn")}
KINDS = {  # by squared_attn and bilinear_attn
    (False, False): "softmax",
    (True, True): "bilinear",
    (True, False): "squared",
    (False, True): "differential",
}


class Elriggs(Layout):
    """The layout of the `Elriggs/gpt2-*` models.

    A squared attention whose config has no `bilinear_attn` at all is older than that key, and divides the rows of its
    pattern by their sums; one that says false does not. `normalize_pattern` decides where it is set. Rotary tables are
    rounded to bfloat16, as the authors' code does, unless `rotary_dtype` says `"float32"`.
    """

    embedding = "transformer.wte.weight"
    overridable = ("rotary_dtype", "normalize_pattern", "n_ctx")
    known = frozenset({*SIZES, *FLAGS, *overridable, "vocab_size", "expansion_factor", "step", *UNREAD})
    archived = True

    def __init__(self):
        self.labels = {}

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        """Tell whether a config is in the words of these models: GPT-2's, without transformers' `model_type`."""
        return "n_embd" in config and "model_type" not in config

    def tokenizer(self, config: Mapping[str, Any]) -> str | None:
        """Return the repository of GPT-2's tokenizer, which all were trained with."""
        return "openai-community/gpt2"

    def has_bos(self, tokenizer: StoredTokenizer) -> bool:
        """Tell that texts need no BOS: training contexts started anywhere in a document."""
        return False

    def parts(self, name: str, rows: int, cfg: BilinearConfig) -> dict[str, int]:
        """Return the tensors that a parameter is made of, with their rows; names as in the authors' code."""
        top = {"embed.weight": self.embedding, "unembed.weight": "lm_head.weight"}
        if name in top:
            return {top[name]: rows}
        _, layer, rest = name.split(".", 2)
        double = cfg.mlp.kind in ("bilinear", "gated")
        inner = {
            "attn.qkv.weight": [f"attn.c_{part}.weight" for part in _projections(cfg.attention)],
            "attn.o.weight": ["attn.c_proj.weight"],
            "attn.lamb2": ["attn.bilinear_lamb"],
            "mlp.w.weight": ["mlp.Left.weight", "mlp.Right.weight"] if double else ["mlp.c_fc.weight"],
            "mlp.p.weight": ["mlp.Down.weight" if double else "mlp.c_proj.weight"],
            "mlp.p.bias": ["mlp.Down_bias" if double else "mlp.bias"],
        }
        names = inner.get(rest, [rest])
        return {f"transformer.h.{layer}.{part}": rows // len(names) for part in names}

    def shape(self, config: Mapping[str, Any], d_vocab: int, path: Path) -> BilinearConfig:
        """Read the model's shape off a config; the arguments are those of `Layout.shape`."""
        read = Keys(config, path)
        n_layers, n_heads, d_model = (read.size(key, default) for key, default in SIZES.items())
        if read.size("vocab_size", 50304) != d_vocab:
            raise CheckpointError(
                f"{path}: vocab_size is {read.size('vocab_size', 50304)}, but the embedding has {d_vocab} rows"
            )
        with blaming(path):
            return BilinearConfig(
                n_layers,
                d_model,
                read.size("n_ctx", N_CTX),
                d_vocab,
                attention=_attention(read, d_model, n_heads),
                mlp=_mlp(read, d_model),
                norm=NORM,
                unembed=UnembedConfig(cap=CAP),
                embed=EmbedConfig(norm=NORM),
                stream=StreamConfig(restart=True),
            )

    def keys(self, cfg: BilinearConfig) -> dict[str, Any]:
        """Return the config keys that say what the model computes."""
        attention, mlp = cfg.attention, cfg.mlp
        keys: dict[str, Any] = {"vocab_size": cfg.d_vocab, "n_layer": cfg.n_layers, "n_head": cfg.n_heads}
        keys |= {"n_embd": cfg.d_model, "n_ctx": cfg.n_ctx, "rotary_dtype": attention.rope.tables}
        squared, paired = next(flags for flags, kind in KINDS.items() if kind == attention.kind)
        keys |= {"squared_attn": squared}
        keys |= {"normalize_pattern": attention.normalize} if attention.kind == "squared" else {"bilinear_attn": paired}
        double = mlp.kind in ("bilinear", "gated")
        keys |= {"bilinear": double, "gated": mlp.kind == "gated", "squared_mlp": mlp.kind == "squared"}
        return keys | ({"expansion_factor": max(mlp.d_hidden // cfg.d_model, 1)} if double else {})


def _projections(attention: AttentionConfig) -> tuple[str, ...]:
    return ("q", "k", "q2", "k2", "v") if attention.kind in ("bilinear", "differential") else ("q", "k", "v")


def _attention(read: Keys, d_model: int, n_heads: int) -> AttentionConfig:
    kind = KINDS[read.flag("squared_attn", False), read.flag("bilinear_attn", False)]
    said = read.config.get("normalize_pattern")
    if said is not None and kind != "squared":
        raise CheckpointError(
            f"{read.path}: normalize_pattern must be absent, since it is for squared attention of one branch and this "
            f"is {kind} attention, got {said!r}"
        )
    older = "bilinear_attn" not in read.config
    normalize = kind == "squared" and (older if said is None else read.flag("normalize_pattern", older))
    by_root = kind == "softmax" or normalize  # the others divide each branch's scores by d_head itself
    tables = read.one_of("rotary_dtype", {name: name for name in ("bfloat16", "float32")}, "bfloat16")
    return AttentionConfig.of_width(
        d_model,
        n_heads,
        kind=kind,
        score_scale=None if by_root else n_heads / d_model,
        normalize=normalize,
        qk_norm=QKNormConfig("head", NORM),
        value_residual=True,
        rope=Rope(kind="default", reverse=True, tables=tables),
    )


def _mlp(read: Keys, d_model: int) -> MLPConfig:
    if read.flag("bilinear", False):
        kind, act = ("gated", "silu") if read.flag("gated", False) else ("bilinear", None)
        return MLPConfig(d_model * read.size("expansion_factor", 4), kind, act, (False, True))
    kind, act = ("squared", None) if read.flag("squared_mlp", False) else ("plain", "relu2")
    return MLPConfig(4 * d_model, kind, act, (False, True))  # which no expansion_factor changes
