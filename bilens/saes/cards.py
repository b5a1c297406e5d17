"""Feature cards: where the features of an SAE are active, which tokens they promote, which labels they tell apart.

Everything is counted on text or read off the weights; no language model writes descriptions. One pass over a dataset
makes the cards of any number of SAEs. It is streamed, so the dataset may be larger than memory, and resumes where it
was killed.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from bilens.models.layers import RMSNorm
from bilens.models.transformer import BilinearTransformer

from .stored import (
    SAE,
    Contexts,
    ContextTally,
    Rows,
    activations,
    fingerprint,
    sae_folder,
    text_of_rows,
    to_rows,
    trim,
    writers,
)

EDGES = tuple(
    2 ** (i / 2) for i in range(-12, 13)
)  # of the histogram's bins; one more bin on either side, and negatives
FILE = "cards.safetensors"
_BATCH, _CHUNK = 32, 256  # windows that run at a time; texts between two saves
_TELLS = 0.6  # AUROC from which a label names a group


class Card(NamedTuple):
    """All that is known of one feature."""

    feature: int
    name: str
    density: float  # fraction of the positions at which it is active
    mean: float  # activation where active
    contexts: tuple[str, ...]  # the strongest, their peaks in square brackets
    promoted: dict[str, float]  # tokens by direct logit effect at activation 1
    demoted: dict[str, float]
    auroc: dict[str, float]  # of each label against the others
    histogram: tuple[int, ...]  # positions by activation: negative, up to 2^-6, then by half octaves, above 2^6


@dataclass(frozen=True, repr=False, eq=False)
class FeatureCards:
    """The cards of all features of one SAE; `cards[feature]` is one of them.

    `effects` are direct logit effects: what activation 1 adds to a token's logit through the final norm's gain and the
    unembedding, less the mean over the vocabulary, per unit of the final norm's scale (2410.08417, section 5.1 reads
    features so). An SAE at `hook_mlp_in` writes to a normalised copy of the residual stream, and is read as if to the
    stream itself, the norm's gain taken out.
    """

    hook: str
    contexts: Contexts
    histogram: Int[Tensor, "feature bin"]
    mean: Float[Tensor, " feature"]
    tokens: Int[Tensor, "feature n"]  # the n/2 with the largest effect, then the n/2 with the smallest, strongest first
    effects: Float[Tensor, "feature n"]
    auroc: Float[Tensor, "feature label"]
    labels: dict[str, int]  # how many texts have each
    provenance: dict[str, str]  # hashes of model, SAE and texts, and how many texts
    model: BilinearTransformer  # owner of the tokenizer

    def __len__(self) -> int:
        return len(self.mean)

    def __repr__(self) -> str:
        told = f", labels {', '.join(self.labels)}" if self.labels else ""
        return f"FeatureCards({self.hook}, {len(self)} features, {self.provenance['texts']} texts{told})"

    def __getitem__(self, feature: int) -> Card:
        """Return one feature's card.

        Raises:
            IndexError: No such feature.
        """
        if not 0 <= feature < len(self):
            raise IndexError(f"feature must lie between 0 and {len(self) - 1} ({self.hook}), got {feature}")
        words = map(self.model.tokenizer.id_to_token, self.tokens[feature].tolist())
        effects = dict(zip(words, self.effects[feature].tolist(), strict=True))
        n = int((self.contexts.tokens[feature, :, self.contexts.peak] >= 0).sum())
        return Card(
            feature,
            self.name(feature),
            self.contexts.density[feature].item(),
            self.mean[feature].item(),
            tuple(self.contexts.snippet(feature, i, self.model) for i in range(n)),
            {token: effect for token, effect in effects.items() if effect > 0},
            {token: effect for token, effect in effects.items() if effect < 0},
            dict(zip(self.labels, self.auroc[feature].tolist(), strict=True)),
            tuple(self.histogram[feature].tolist()),
        )

    def name(self, features: int | Sequence[int], weights: Sequence[float] | None = None, n: int = 3) -> str:
        """Name a feature, or a group, by the tokens at its peaks (`Contexts.label`), behind the label it tells apart.

        The label is the one with the largest mean AUROC over the group, if at least 0.6: "positive: great / loved".

        Args:
            features: Which.
            weights: Of the features in the group; equal if `None`, and the sign does not matter.
            n: How many tokens.
        """
        text = self.contexts.label(features, self.model, n, weights)
        if not self.labels:
            return text
        some = [features] if isinstance(features, int) else list(features)
        share = torch.tensor([1.0] * len(some) if weights is None else list(map(abs, weights)))
        told = (share @ self.auroc[some] / share.sum()).nan_to_num(0)
        best = int(told.argmax())
        return f"{list(self.labels)[best]}: {text}" if told[best] >= _TELLS else text

    def near(self, words: Sequence[str], share: float = 0.6) -> Int[Tensor, " found"]:
        """Return the features whose peaks have one of some words at, or up to three tokens before, them.

        Args:
            words: Tokens.
            share: Of a feature's activation at its strongest positions, how much must be near such a word.

        Raises:
            ValueError: None of the words is a token, or no feature is near them.
        """
        ids = [i for word in words if (i := self.model.tokenizer.token_to_id(word)) is not None]
        if not ids:
            raise ValueError(f"words must hold a token of the model, got {list(words)}")
        peak = self.contexts.peak
        there = torch.isin(self.contexts.tokens[:, :, peak - 3 : peak + 1], torch.tensor(ids)).any(-1)
        values = self.contexts.values[:, :, peak]
        found = ((there * values).sum(1) > share * values.sum(1)).nonzero()[:, 0]
        if not len(found):
            raise ValueError(f"words must be near the peaks of a feature ({self.hook}), {list(words)} are near none")
        return found

    def telling(self, label: str, least: float = 0.12) -> tuple[Int[Tensor, " found"], Float[Tensor, " found"]]:
        """Return the features whose AUROC for a label differs from one half, and `AUROC - ½` of each.

        Args:
            label: Which label.
            least: Least `|AUROC - ½|`.

        Raises:
            ValueError: The cards do not have the label, or no feature tells it.
        """
        if label not in self.labels:
            raise ValueError(f"label must be one of the cards' ({self.hook}), {list(self.labels)}, got {label!r}")
        told = self.auroc[:, list(self.labels).index(label)].nan_to_num(0.5) - 0.5
        found = (told.abs() > least).nonzero()[:, 0]
        if not len(found):
            raise ValueError(f"least must leave features that tell {label!r} ({self.hook}), {least} leaves none")
        return found, told[found]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, activations and effects in half precision, hashes and names in its header."""
        ids = torch.int16 if self.model.cfg.d_vocab < 2**15 else torch.int32
        tensors = {
            "contexts.tokens": self.contexts.tokens.to(ids),
            "contexts.values": self.contexts.values.half(),
            "density": self.contexts.density.float(),
            "histogram": self.histogram.to(torch.int32),
            "mean": self.mean.float(),
            "tokens": self.tokens.to(ids),
            "effects": self.effects.half(),
            "auroc": self.auroc.float(),
        }
        about = {"hook": self.hook, "labels": self.labels, "provenance": self.provenance, "peak": self.contexts.peak}
        save_file(tensors, path, {"cards": json.dumps(about)})

    @classmethod
    def load(cls, name: str | Path, hook: str, model: BilinearTransformer) -> "FeatureCards":
        """Read the cards stored beside an SAE, by the same arguments as `bilens.saes.load`.

        Args:
            name: `"bilens-mini"`, or a folder with one subfolder per hook point.
            hook: The hook point.
            model: Owner of the tokenizer.

        Raises:
            FileNotFoundError: No SAE, or none with cards.
            ValueError: The cards are of another model.
        """
        path = sae_folder(name, hook) / FILE
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["cards"])
        tensors = load_file(path)
        if about["provenance"]["model"] != fingerprint(model):
            raise ValueError(f"model must be the one that {path} was made with, but its weights have another hash")
        contexts = Contexts(
            tensors["contexts.tokens"].long(), tensors["contexts.values"].float(), tensors["density"], about["peak"]
        )
        return cls(
            about["hook"], contexts, tensors["histogram"].long(), tensors["mean"], tensors["tokens"].long(),
            tensors["effects"].float(), tensors["auroc"], about["labels"], about["provenance"], model,
        )  # fmt: skip


# -- one pass over a dataset ------------------------------------------------------------------------------------------


@torch.no_grad()
def collect(
    model: BilinearTransformer,
    saes: Mapping[str, SAE],
    dataset: Iterable[str | Mapping[str, Any]],
    *,
    folder: str | Path | None = None,
    text: str = "text",
    label: str | None = None,
    n: int = 8,
    n_tokens: int = 10,
    progress: bool = True,
) -> dict[str, FeatureCards]:
    """Make the cards of all features of some SAEs in one pass over a dataset.

    The AUROC of a label is that of the feature's mean activation over a text, for texts of the label against those of
    other labels, ties counting half; texts without a label (`None`) do not count for it.

    Args:
        model: The model.
        saes: SAEs by hook point.
        dataset: Texts; or rows with a column of texts, such as a `datasets` dataset, which may be streamed.
        folder: Where progress is kept, and each SAE's cards in a subfolder named by its hook point. Killed, the same
            call resumes to the same cards. `None` keeps nothing.
        text: Column of the texts.
        label: Column of the labels; none if `None`.
        n: Contexts per feature, at most one per window of text.
        n_tokens: Tokens by logit effect, for either sign.
        progress: Whether to show a progress bar.

    Returns:
        The cards by hook point. Memory: `n_features · (16 n + n_texts)` numbers for each SAE, the latter with labels.

    Raises:
        ValueError: An SAE of another width, hook point or model; rows without the columns; no text; a `folder` of
            another run.
    """
    for hook, sae in saes.items():
        check_sae(model, sae, hook)
    about = {"model": fingerprint(model), "label": label or ""}
    tallies = {hook: _Tally.empty(sae, n) for hook, sae in saes.items()}
    about |= {hook: f"{fingerprint(sae)} n={n}" for hook, sae in saes.items()}
    run = _Run(about, tallies)
    state = None if folder is None else Path(folder) / "state.safetensors"
    if state is not None and state.exists():
        run.load(state)
    rows, bar = iter(_rows(dataset, text, label)), tqdm(desc="texts", unit="", disable=not progress)
    _skip(run, rows, state)
    bar.update(run.n_texts)
    while some := list(islice(rows, _CHUNK)):
        _take_in(model, saes, run, some)
        bar.update(len(some))
        if state is not None:
            run.save(state)
    bar.close()
    if not run.positions:
        raise ValueError("dataset must hold a text that is not empty, got none")
    cards = {hook: _cards(model, saes[hook], hook, tally, run, n_tokens) for hook, tally in tallies.items()}
    if folder is not None:
        for hook, one in cards.items():
            (Path(folder) / hook).mkdir(exist_ok=True)
            one.save(Path(folder) / hook / FILE)
    return cards


def check_sae(model: BilinearTransformer, sae: SAE, hook: str) -> None:
    """Make sure that an SAE belongs to a hook point of a model, as far as it says where it was fitted.

    Raises:
        ValueError: It is of another width, of another hook point, or was fitted to a model with other weights.
    """
    model.check_hook_name(hook)
    if sae.cfg.d_in != model.cfg.d_model:
        raise ValueError(f"the SAE at {hook} must read {model.cfg.d_model} dimensions (d_model), got {sae.cfg.d_in}")
    own = sae.cfg.metadata.hook_name
    if own not in (None, hook):
        raise ValueError(f"the SAE at {hook} must be one that was fitted there, got one of {own}")
    fitted = (sae.cfg.metadata.settings or {}).get("model")
    if fitted not in (None, fingerprint(model)):
        raise ValueError(f"the SAE at {hook} must be one of this model, but it was fitted to one with other weights")


class _Text(NamedTuple):
    text: str
    label: str | None


def _rows(dataset: Iterable[str | Mapping[str, Any]], text: str, label: str | None) -> Iterator[_Text]:
    """Read texts and labels; a `datasets` class label by its name."""
    feature = (getattr(dataset, "features", None) or {}).get(label)
    named = getattr(feature, "int2str", str)
    for row in dataset:
        if isinstance(row, str):
            if label is not None:
                raise ValueError(f"dataset must have a column {label!r} for the labels, got texts without columns")
            yield _Text(row, None)
            continue
        for name in filter(None, (text, label)):
            if name not in row:
                raise ValueError(f"dataset must have a column {name!r}, got {', '.join(map(repr, row))}")
        yield _Text(row[text], None if label is None or row[label] is None else named(row[label]))


@dataclass
class _Tally:
    """What has been counted for one SAE."""

    contexts: ContextTally
    histogram: Int[Tensor, "feature bin"]
    total: Float[Tensor, " feature"]  # of all activations
    scores: list[Float[Tensor, "text feature"]] = field(default_factory=list)  # mean activations, of labelled texts

    @classmethod
    def empty(cls, sae: SAE, n: int) -> "_Tally":
        d_sae = sae.cfg.d_sae
        histogram = torch.zeros(d_sae, len(EDGES) + 2, dtype=torch.int64)
        return cls(ContextTally.empty(d_sae, n), histogram, torch.zeros(d_sae, dtype=torch.float64))

    def add(self, rows: Rows, z: Float[Tensor, "row seq feature"]) -> Float[Tensor, "row feature"]:
        """Take in windows, and return each one's sum of activations."""
        self.contexts.add(rows, z)
        row, position, feature = z.nonzero(as_tuple=True)
        values = z[row, position, feature]
        bins = torch.bucketize(values, torch.tensor([0.0, *EDGES]).to(z))
        n_bins = self.histogram.shape[1]
        counts = torch.bincount(feature * n_bins + bins, minlength=self.histogram.numel())
        self.histogram += counts.view_as(self.histogram)
        sums = torch.bincount(row * z.shape[2] + feature, values.double(), minlength=len(z) * z.shape[2])
        sums = sums.view(len(z), -1)
        self.total += sums.sum(0)
        return sums

    def tensors(self) -> dict[str, Tensor]:
        scores = torch.cat(self.scores) if self.scores else self.total.new_zeros(0, len(self.total)).float()
        contexts = {"tokens": self.contexts.tokens, "values": self.contexts.values, "active": self.contexts.active}
        return contexts | {"histogram": self.histogram, "total": self.total, "scores": scores}

    def restore(self, tensors: Mapping[str, Tensor], positions: int) -> None:
        self.contexts = ContextTally(tensors["tokens"], tensors["values"], tensors["active"], positions)
        self.histogram, self.total, self.scores = tensors["histogram"], tensors["total"], [tensors["scores"]]


@dataclass
class _Run:
    """One pass: how far it is, and the tallies."""

    about: dict[str, str]
    tallies: dict[str, _Tally]
    n_texts: int = 0
    digest: str = ""  # of the texts so far, each hashed with the digest before it
    labels: list[str] = field(default_factory=list)  # of the labelled texts so far

    @property
    def positions(self) -> int:
        return next(iter(self.tallies.values())).contexts.positions

    def save(self, path: Path) -> None:
        """Write the state so that a kill at any time leaves the old one or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"{hook}/{key}": t for hook, tally in self.tallies.items() for key, t in tally.tensors().items()}
        about = {"about": self.about, "n_texts": self.n_texts, "digest": self.digest, "labels": self.labels}
        about |= {"positions": self.positions}
        partial = path.with_suffix(f".{os.getpid()}.partial")
        save_file(tensors, partial, {"run": json.dumps(about)})
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["run"])
            if about["about"] != self.about:
                raise ValueError(
                    f"folder must be of this run, but {path} is of one with another model, SAEs or arguments: remove "
                    "it or name another folder"
                )
            for hook, tally in self.tallies.items():
                keys = ("tokens", "values", "active", "histogram", "total", "scores")
                tally.restore({key: file.get_tensor(f"{hook}/{key}") for key in keys}, about["positions"])
        self.n_texts, self.digest, self.labels = about["n_texts"], about["digest"], about["labels"]


def _skip(run: _Run, rows: Iterator[_Text], state: Path | None) -> None:
    """Pass over the texts that are in the state already, and make sure that they are the same."""
    if _chain(islice(rows, run.n_texts), "") != run.digest:
        raise ValueError(f"dataset must begin with the {run.n_texts} texts that {state} is of, but has others")


def _chain(texts: Iterable[_Text], digest: str) -> str:
    """Return a hash of texts and of the hash of those before them."""
    for one in texts:
        digest = hashlib.sha256(f"{digest}\0{one.label}\0{one.text}".encode()).hexdigest()
    return digest


def _take_in(model: BilinearTransformer, saes: Mapping[str, SAE], run: _Run, texts: Sequence[_Text]) -> None:
    """Run some texts and count."""
    run.n_texts, run.digest = run.n_texts + len(texts), _chain(texts, run.digest)
    kept = [one for one in texts if one.text.strip()]
    run.labels += [one.label for one in kept if one.label is not None]
    if not kept:
        return
    rows, of = (cut(model, [one.text for one in kept]) for cut in (to_rows, text_of_rows))
    sums = {hook: torch.zeros(len(kept), sae.cfg.d_sae, dtype=torch.float64) for hook, sae in saes.items()}
    for start in range(0, len(rows.tokens), _BATCH):
        some = trim(Rows(*(part[start : start + _BATCH] for part in rows)))
        found = activations(model, some, list(saes))
        for hook, sae in saes.items():
            z = sae.encode(found[hook].to(sae.W_dec)).cpu().masked_fill(~some.counts[..., None], 0)
            sums[hook].index_add_(0, of[start : start + _BATCH], run.tallies[hook].add(some, z))
    lengths = torch.zeros(len(kept), dtype=torch.int64).index_add_(0, of, rows.counts.sum(1))
    labelled = torch.tensor([one.label is not None for one in kept])
    for hook, tally in run.tallies.items():
        if labelled.any():
            tally.scores.append((sums[hook] / lengths[:, None])[labelled].float())


# -- what the counts say ----------------------------------------------------------------------------------------------


def _cards(model: BilinearTransformer, sae: SAE, hook: str, tally: _Tally, run: _Run, n_tokens: int) -> FeatureCards:
    contexts = tally.contexts.contexts()
    tokens, effects = _logit_effects(model, sae, hook, n_tokens)
    labels = {name: run.labels.count(name) for name in sorted(set(run.labels))}
    auroc_ = torch.full((len(contexts.density), len(labels)), torch.nan)
    if len(labels) > 1:
        scores, own = torch.cat(tally.scores), run.labels
        for i, name in enumerate(labels):
            one = torch.tensor([label == name for label in own])
            auroc_[:, i] = auroc(scores[one], scores[~one])
    about = {"model": run.about["model"], "sae": fingerprint(sae), "data": run.digest, "texts": str(run.n_texts)}
    mean = (tally.total / tally.contexts.active.clamp(min=1)).float()
    return FeatureCards(hook, contexts, tally.histogram, mean, tokens, effects, auroc_, labels, about, model)


def _logit_effects(model: BilinearTransformer, sae: SAE, hook: str, n: int) -> tuple[Tensor, Tensor]:
    """Return the tokens whose logits each feature moves most, and by how much."""
    rows = writers(sae)
    if hook.endswith("hook_mlp_in"):
        norm = model.blocks[int(hook.split(".")[1])].ln2
        rows = rows / norm.weight.detach() if isinstance(norm, RMSNorm) and norm.weight is not None else rows
    if isinstance(model.ln_final, RMSNorm) and model.ln_final.weight is not None:
        rows = rows * model.ln_final.weight.detach()
    effects = rows @ model.W_U.detach().to(rows)
    effects -= effects.mean(1, keepdim=True)
    n = min(n, effects.shape[1] // 2)
    best, worst = effects.topk(n, dim=1), effects.topk(n, dim=1, largest=False)
    return torch.cat((best.indices, worst.indices), 1).cpu(), torch.cat((best.values, worst.values), 1).cpu()


def auroc(positive: Float[Tensor, "p feature"], negative: Float[Tensor, "n feature"]) -> Float[Tensor, " feature"]:
    """Return the area under the ROC curve of each column: the chance that a positive exceeds a negative, ties half."""
    columns = torch.cat((positive, negative)).double().T.contiguous()
    first, last = (torch.searchsorted(columns.sort(1).values, columns, side=side) for side in ("left", "right"))
    ranks = (first + last + 1).T / 2  # ties share their mean rank
    n, m = len(positive), len(negative)
    return ((ranks[:n].sum(0) - n * (n + 1) / 2) / (n * m)).to(positive.dtype)
