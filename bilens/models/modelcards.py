"""Model cards: what a published model is, in the words of the Hub."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import ModelCardData

from .transformer import BilinearTransformer


@dataclass(frozen=True)
class Facts:
    """What only its maker knows of a model; what is left out, the card says is not stated."""

    licence: str | None = None  # as the Hub spells it, e.g. "mit"
    data: Sequence[str] = ()  # what it was trained on: Hub datasets by name, or in words
    losses: Mapping[str, float] = field(default_factory=dict)  # held-out, in nats per token, by text
    text: str = ""  # a paragraph in Markdown, after the title
    languages: Sequence[str] = ()
    base_model: str | None = None  # the Hub repository of the model that it was made from


def model_card(
    model: BilinearTransformer, name: str, facts: Facts | None = None, *, layout: str | None = None, saes: str = ""
) -> str:
    """Return the `README.md` of a model: metadata for the Hub, then what it is, in Markdown.

    Args:
        model: The model.
        name: What it is loaded by.
        facts: What its maker knows.
        layout: As `bilens.save` takes it.
        saes: The Markdown table of the SAEs beside it; empty if there are none.
    """
    facts = facts or Facts()
    sections = {
        "Use": _use(model, name, layout, bool(saes)),
        "Shape": _shape(model, layout),
        "Data": "\n".join(f"- {one}" for one in facts.data) or "Not stated.",
        "Held-out loss": table(("text", "nats per token"), ((t, f"{v:.4f}") for t, v in facts.losses.items()))
        if facts.losses
        else "Not stated.",
        "Hook points": _hooks(model),
        **({"Sparse autoencoders": saes} if saes else {}),
        "Licence": facts.licence or "Not stated.",
    }
    head = f"---\n{_metadata(model, facts, layout, bool(saes))}\n---\n\n# {name.rstrip('/').split('/')[-1]}\n"
    parts = [head, *([facts.text.strip() + "\n"] if facts.text else [])]
    return "\n".join([*parts, *(f"## {title}\n\n{text}\n" for title, text in sections.items())])


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table; bars within cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _metadata(model: BilinearTransformer, facts: Facts, layout: str | None, saes: bool) -> str:
    kind = "attention-only" if model.cfg.mlp is None else model.cfg.mlp.kind
    tags = ["bilens", "interpretability", kind, *(["sparse-autoencoder"] if saes else [])]
    named = [one for one in facts.data if one.count("/") == 1 and not one.strip().count(" ")]
    return ModelCardData(
        license=facts.licence,
        language=list(facts.languages) or None,
        library_name="transformers" if layout == "llama" else "bilens",
        pipeline_tag="text-generation",
        tags=tags,
        datasets=named or None,
        base_model=facts.base_model,
    ).to_yaml()


def _use(model: BilinearTransformer, name: str, layout: str | None, saes: bool) -> str:
    lines = ["import bilens", "", f"model = bilens.load({name!r})"]
    if saes:
        lines.append(f"print(bilens.saes.catalogue({name!r}))")
    if layout == "llama":
        lines += ["", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
        lines += [f"model = AutoModelForCausalLM.from_pretrained({name!r})"]
        lines += [f"tokenizer = AutoTokenizer.from_pretrained({name!r})"] if model.tokenizer is not None else []
    return "\n".join(["```python", *lines, "```"])


def _shape(model: BilinearTransformer, layout: str | None) -> str:
    cfg = model.cfg
    sizes = {name: getattr(cfg, name) for name in ("n_layers", "d_model", "d_hidden", "n_heads", "d_head")}
    sizes |= {"n_ctx": cfg.n_ctx, "d_vocab": cfg.d_vocab}
    sizes["parameters"] = f"{sum(weight.numel() for weight in model.parameters()):,}"
    mlp = "none" if cfg.mlp is None else cfg.mlp.kind + (f" ({cfg.mlp.act})" if cfg.mlp.act else "")
    sizes |= {"MLP": mlp, "attention": cfg.attention.kind, "norm": _norm(model)}
    text = table(("", ""), sizes.items())
    if layout == "llama":
        text += "\n\nWritten as a Llama"
        text += (
            ", whose MLP `down(linear(gate x) ⊙ up x)` is bilinear: `hidden_act` is `linear`."
            if mlp == "bilinear"
            else "."
        )
    return text


def _norm(model: BilinearTransformer) -> str:
    norm = model.cfg.norm
    return "none" if norm is None else f"{norm.kind}, {norm.place}, eps {norm.eps:g}" + (", gain" if norm.gain else "")


def _hooks(model: BilinearTransformer) -> str:
    """Return the hook points, those of the blocks once."""
    names = [name for name in model.hook_dict if not name.startswith("blocks.")]
    inside = [name.replace("blocks.0.", "blocks.{i}.", 1) for name in model.hook_dict if name.startswith("blocks.0.")]
    where = [name for name in names if name.startswith("hook_embed")]
    return ", ".join(f"`{name}`" for name in [*where, *inside, *(name for name in names if name not in where)])
