"""Make feature cards: one pass over a dataset makes those of any number of SAEs.

It is streamed, so the dataset may be larger than memory, and resumes where it was killed.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata
from torch import Tensor
from tqdm import tqdm

from bilens.models.files import casts, fingerprint
from bilens.models.texts import Texts, rows_of, text_of
from bilens.models.transformer import BilinearTransformer
from bilens.models.windows import Windows, holds_text, observed
from bilens.tensor.keeping import damaged, is_file, read_state, user_path, write_state

from .cardfiles import AS
from .cards import FILE, FeatureCards
from .directions import check_sae, is_transcoder, reads_at, writes_at
from .peaks import ContextTally
from .roles import Roles
from .rolescores import Active, RoleTally
from .wording import logit_effects, residual_writers

if TYPE_CHECKING:
    from .stored import SAE

# The edges of the histogram's bins; there is one more bin on either side, and one for negatives.
EDGES = tuple(2 ** (i / 2) for i in range(-12, 13))
CHUNK = 256  # texts between two saves
TOKENS = 10  # by logit effect, of either sign


@torch.no_grad()
def collect(
    model: BilinearTransformer,
    saes: "Mapping[str, SAE]",
    dataset: Texts,
    *,
    folder: str | Path | None = None,
    text: str = "text",
    label: str | None = None,
    n: int = 8,
    roles: Roles | None = None,
) -> dict[str, FeatureCards]:
    """Make the cards of all features of some SAEs in one pass over a dataset.

    The AUROC of a label is that of the feature's mean activation over a text, for texts of the label against those of
    other labels, ties counting half; texts without a label (`None`) do not count for it. Empty texts, `None` too, count
    for nothing. Progress is shown.

    Args:
        model: The model.
        saes: SAEs by hook point, on any device and in any dtype.
        dataset: Texts; or rows with a column of texts, such as a `datasets` dataset, which may be streamed.
        folder: Where progress is kept, and each SAE's cards in a subfolder named by its hook point. Killed, the same
            call resumes to the same cards. `None` keeps nothing.
        text: Column of the texts.
        label: Column of the labels; none if `None`.
        n: Contexts per feature, at most one per window of text.
        roles: Tests the features for roles (`Roles.of`), which then name them; not tested if `None`.

    Returns:
        The cards by hook point. Memory: `n_features · (16 n + n_texts)` numbers for each SAE, the latter with labels;
        with roles `2 · n_features · (d_vocab + 500)` more.

    Raises:
        ValueError: An SAE of another width, hook point or model; rows without the columns, or with something else than
            text; no text; a `folder` of another run.
    """
    if not saes:
        raise ValueError("saes must hold at least one SAE by its hook point, got none")
    for hook, sae in saes.items():
        if is_transcoder(sae) and reads_at(sae) not in (None, hook):
            raise ValueError(f"saes must hold a transcoder by the hook point it reads, {reads_at(sae)}, got {hook}")
        check_sae(model, sae, (writes_at(sae) or hook) if is_transcoder(sae) else hook)
    about = {"model": fingerprint(model), "label": label or ""} | ({"roles": roles.digest} if roles else {})
    tallies = {hook: _Tally.empty(sae, n, model.cfg.d_vocab if roles else None) for hook, sae in saes.items()}
    about |= {hook: f"{fingerprint(sae)} n={n}" for hook, sae in saes.items()}
    run = _Run(about, tallies)
    folder = None if folder is None else user_path(folder)
    state = None if folder is None else folder / "state.safetensors"
    if state is not None and is_file(state):
        run.load(state)
    rows, bar = iter(_rows(dataset, text, label)), tqdm(desc="texts", unit="")
    _skip(run, rows, state)
    bar.update(run.n_texts)
    while some := list(islice(rows, CHUNK)):
        _take_in(model, saes, roles, run, some)
        bar.update(len(some))
        if state is not None:
            run.save(state)
    bar.close()
    if not run.positions:
        raise ValueError("dataset must hold a text that is not empty, got none")
    cards = {hook: _cards(model, saes[hook], hook, tally, run) for hook, tally in tallies.items()}
    if folder is not None:
        for hook, one in cards.items():
            one.save(folder / hook / FILE)
    return cards


class _Text(NamedTuple):
    text: str
    label: str | None


def _rows(dataset: Texts, text: str, label: str | None) -> Iterator[_Text]:
    """Read texts, empty where there is none, and labels; a `datasets` class label by its name."""
    feature = (getattr(dataset, "features", None) or {}).get(label)
    named = getattr(feature, "int2str", str)
    for index, row in enumerate(rows_of(dataset, "dataset", text)):
        one, told = text_of(row, index, text, "dataset"), None
        if label is not None:
            if not isinstance(row, Mapping):
                raise ValueError(f"dataset must have a column {label!r} for the labels, got texts without columns")
            if label not in row:
                raise ValueError(f"dataset must have a column {label!r}, got {', '.join(map(repr, row))}")
            told = None if row[label] is None else named(row[label])
        yield _Text(one or "", told)


@dataclass(eq=False)
class _Tally:
    """What has been counted for one SAE."""

    contexts: ContextTally
    histogram: Int[Tensor, "feature bin"]
    total: Float[Tensor, " feature"]  # of all activations
    roles: RoleTally | None = None
    scores: list[Float[Tensor, "text feature"]] = field(default_factory=list)  # mean activations, of labelled texts

    @classmethod
    def empty(cls, sae: "SAE", n: int, d_vocab: int | None) -> "_Tally":
        d_sae = sae.cfg.d_sae
        histogram = torch.zeros(d_sae, len(EDGES) + 2, dtype=torch.int64)
        roles = None if d_vocab is None else RoleTally.empty(d_sae, histogram.shape[1], d_vocab)
        return cls(ContextTally.empty(d_sae, n), histogram, torch.zeros(d_sae, dtype=torch.float64), roles)

    def add(
        self, windows: Windows, z: Float[Tensor, "row seq feature"], marks: Bool[Tensor, "row seq role"] | None
    ) -> Float[Tensor, "row feature"]:
        """Take in windows and the marks of their roles, and return each one's sum of activations."""
        z = self.contexts.add(windows, z)
        row, position, feature = z.nonzero(as_tuple=True)
        values = z[row, position, feature]
        bins = torch.bucketize(values, torch.tensor([0.0, *EDGES]).to(z))
        n_bins = self.histogram.shape[1]
        counts = torch.bincount(feature * n_bins + bins, minlength=self.histogram.numel())
        self.histogram += counts.view_as(self.histogram)
        if self.roles is not None:
            self.roles.add(windows, marks, Active(row, position, feature, values, bins))
        sums = torch.bincount(row * z.shape[2] + feature, values.double(), minlength=len(z) * z.shape[2])
        sums = sums.view(len(z), -1).to(self.total)  # of nothing it counts in integers
        self.total += sums.sum(0)
        return sums

    def tensors(self) -> dict[str, Tensor]:
        scores = torch.cat(self.scores) if self.scores else self.total.new_zeros(0, len(self.total)).float()
        contexts = {"tokens": self.contexts.tokens, "values": self.contexts.values, "active": self.contexts.active}
        roles = {} if self.roles is None else self.roles.tensors()
        return contexts | {"histogram": self.histogram, "total": self.total, "scores": scores} | roles

    def flaw(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Say what of a stored tally cannot be; None if nothing."""
        for name, own in self.tensors().items():
            one, free = tensors.get(name), name == "scores" or name.endswith((".index", ".value"))
            if one is None or one.dtype != own.dtype or (one.shape[free:] != own.shape[free:]):
                told = "nothing" if one is None else f"{one.dtype} of shape {list(one.shape)}"
                return f"{name} must be {own.dtype} of shape {list(own.shape)}, got {told}"
            if one.is_floating_point() and not one.isfinite().all():
                return f"{name} must be finite"
        return None

    def restore(self, tensors: Mapping[str, Tensor], positions: int) -> None:
        self.contexts = ContextTally(tensors["tokens"], tensors["values"], tensors["active"], positions)
        self.histogram, self.total, self.scores = tensors["histogram"], tensors["total"], [tensors["scores"]]
        if self.roles is not None:
            self.roles.restore(tensors)


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
        tensors = {f"{hook}/{key}": t for hook, tally in self.tallies.items() for key, t in tally.tensors().items()}
        about = {"about": self.about, "n_texts": self.n_texts, "digest": self.digest, "labels": self.labels}
        about |= {"positions": self.positions}
        write_state(path, tensors, about)

    def load(self, path: Path) -> None:
        tensors, about = read_state(path)
        if about.get("about") != self.about:
            raise ValueError(
                f"folder must be of this run, but {path} is of one with another model, SAEs or arguments: remove "
                "it or name another folder"
            )
        for hook, tally in self.tallies.items():
            stored = {key.removeprefix(f"{hook}/"): t for key, t in tensors.items() if key.startswith(f"{hook}/")}
            if (why := tally.flaw(stored)) is not None:
                raise damaged(path, f"{hook}/{why}")
            tally.restore(stored, about["positions"])
        self.n_texts, self.digest, self.labels = about["n_texts"], about["digest"], about["labels"]
        if min(self.n_texts, about["positions"]) < 0:
            raise damaged(path, f"n_texts and positions must not be negative, got {self.n_texts}, {about['positions']}")


def _skip(run: _Run, rows: Iterator[_Text], state: Path | None) -> None:
    """Pass over the texts that are in the state already, and make sure that they are the same."""
    if _chain(islice(rows, run.n_texts), "") != run.digest:
        raise ValueError(f"dataset must begin with the {run.n_texts} texts that {state} is of, but has others")


def _chain(texts: Iterable[_Text], digest: str) -> str:
    """Return a hash of texts and of the hash of those before them."""
    for one in texts:
        digest = hashlib.sha256(f"{digest}\0{one.label}\0{one.text}".encode()).hexdigest()
    return digest


def _take_in(
    model: BilinearTransformer, saes: "Mapping[str, SAE]", roles: Roles | None, run: _Run, texts: Sequence[_Text]
) -> None:
    """Run some texts and count."""
    run.n_texts, run.digest = run.n_texts + len(texts), _chain(texts, run.digest)
    if not any(holds_text(model, one.text) for one in texts):
        return
    windows = Windows.of(model, [one.text for one in texts])
    sums = {hook: torch.zeros(len(texts), sae.cfg.d_sae, dtype=torch.float64) for hook, sae in saes.items()}
    for rows, some, found in observed(model, windows, list(saes)):
        some = some.to("cpu")
        marks = None if roles is None else roles.of(model, some)
        for hook, sae in saes.items():
            counted = run.tallies[hook].add(some, sae.encode(found[hook].to(sae.W_dec)), marks)
            sums[hook].index_add_(0, windows.text[rows].cpu(), counted)
    text, sizes = windows.text.cpu(), windows.counts.sum(1).cpu()
    lengths = torch.zeros(len(texts), dtype=torch.int64).index_add_(0, text, sizes)
    labelled = (lengths > 0) & torch.tensor([one.label is not None for one in texts])
    run.labels += [one.label for one, kept in zip(texts, labelled.tolist(), strict=True) if kept]
    for hook, tally in run.tallies.items():
        if labelled.any():
            tally.scores.append((sums[hook] / lengths[:, None])[labelled].float())


# -- what the counts say ----------------------------------------------------------------------------------------------


def _cards(model: BilinearTransformer, sae: "SAE", hook: str, tally: _Tally, run: _Run) -> FeatureCards:
    contexts = tally.contexts.contexts()
    tokens, effects = _logit_effects(model, sae, hook)
    labels = {name: run.labels.count(name) for name in sorted(set(run.labels))}
    auroc_ = torch.full((len(contexts.density), len(labels)), torch.nan)
    if len(labels) > 1:
        scores, own = torch.cat(tally.scores), run.labels
        for i, name in enumerate(labels):
            one = torch.tensor([label == name for label in own])
            auroc_[:, i] = auroc(scores[one], scores[~one])
    about = {"model": run.about["model"], "sae": fingerprint(sae), "data": run.digest, "texts": str(run.n_texts)}
    about |= {f"{AS}{dtype}": digest for dtype, digest in casts(model).items()}
    mean = (tally.total / tally.contexts.active.clamp(min=1)).float()
    scores = None if tally.roles is None else tally.roles.scores(tally.histogram, tally.contexts.positions)
    return FeatureCards(hook, contexts, tally.histogram, mean, tokens, effects, auroc_, labels, about, model, scores)


def _logit_effects(model: BilinearTransformer, sae: "SAE", hook: str) -> tuple[Tensor, Tensor]:
    """Return the tokens whose logits each feature moves most, and by how much."""
    effects = logit_effects(model, residual_writers(model, sae, hook))
    n = min(TOKENS, effects.shape[1] // 2)
    best, worst = effects.topk(n, dim=1), effects.topk(n, dim=1, largest=False)
    return torch.cat((best.indices, worst.indices), 1).cpu(), torch.cat((best.values, worst.values), 1).cpu()


def auroc(positive: Float[Tensor, "p feature"], negative: Float[Tensor, "n feature"]) -> Float[Tensor, " feature"]:
    """Return the area under the ROC curve of each column: the chance that a positive exceeds a negative, ties half."""
    ranks = torch.from_numpy(rankdata(torch.cat((positive, negative)).cpu().numpy(), axis=0)).to(positive.device)
    n, m = len(positive), len(negative)
    return ((ranks[:n].sum(0) - n * (n + 1) / 2) / (n * m)).to(positive.dtype)
