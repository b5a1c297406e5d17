"""Feature cards: where the features of an SAE are active, which tokens they promote, which labels they tell apart.

Everything is counted on text or read off the weights; no language model writes descriptions.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

from bilens.models.files import known_as
from bilens.models.sources import read_json, regular
from bilens.models.transformer import BilinearTransformer
from bilens.tensor.keeping import atomic_write, user_path
from bilens.tensor.records import Record, tabular
from bilens.tensor.tables import Made, number_of

from .cardfiles import casts_told, read_card_file
from .checks import LENS_FILES
from .naming import WIDEST, Label, label_of, word
from .peaks import Contexts
from .rolescores import Role, RoleScores
from .stored import sae_folder

FILE = "cards.safetensors"
_TELLS = 0.6  # AUROC from which a label names a group
_MOST = 0.6  # share of a group that must have the role which names it


@tabular()
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
    role: Role | None  # detected on text
    histogram: tuple[int, ...]  # positions by activation: negative, up to 2^-6, then by half octaves, above 2^6


@dataclass(frozen=True, repr=False, eq=False)
class FeatureCards(Record, rows="feature"):
    """The cards of all features of one SAE; `cards[feature]` is one of them, by its number, also in a slice.

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
    provenance: dict[str, str]  # hashes of model (of casts of it too), SAE and texts, and how many texts
    model: BilinearTransformer  # owner of the tokenizer
    roles: RoleScores | None = None  # what text tells of roles, where it was asked
    features: Sequence[int] | None = None  # those of a slice; all if None

    @property
    def numbers(self) -> Sequence[int]:
        """The numbers of the features whose cards these are."""
        return range(len(self.mean)) if self.features is None else self.features

    def columns(self) -> dict[str, Any]:
        """Return number, name, how often and how strongly each is active, and the AUROC for each label."""
        some, which = self.numbers, torch.tensor(self.numbers)
        found = {"feature": which, "name": Made(self.name, some), "density": self.contexts.density[which]}
        told = {f"auroc_{label}": self.auroc[which, index] for index, label in enumerate(self.labels)}
        words = Made(lambda feature: ", ".join(self._promoted(feature)), some)
        return (
            found | {"mean": self.mean[which]} | told | {"promotes": words, "histogram": self.histogram[which].float()}
        )

    def facts(self) -> dict[str, Any]:
        """Return the hook point, and what the cards were made of."""
        return {"hook": self.hook, "texts": self.provenance["texts"]}

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Card]:
        return map(self.__getitem__, self.numbers)

    def __repr__(self) -> str:
        told = f", labels {', '.join(self.labels)}" if self.labels else ""
        return f"FeatureCards({self.hook}, {len(self)} features, {self.provenance['texts']} texts{told})"

    def __getitem__(self, feature: Any) -> Any:
        """Return one feature's card by its number, or the cards of some by a slice, a mask or numbers.

        Raises:
            IndexError: No such feature.
        """
        if not isinstance(feature := number_of(feature), int):
            return replace(self, features=tuple(torch.tensor(self.numbers)[feature].tolist()))
        if feature not in self.numbers:
            first, last = (self.numbers[0], self.numbers[-1]) if len(self) else (0, -1)
            raise IndexError(f"feature must lie between {first} and {last} ({self.hook}), got {feature}")
        words = self.model.labels(self.tokens[feature].tolist())
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
            self.role(feature),
            tuple(self.histogram[feature].tolist()),
        )

    def role(self, feature: int) -> Role | None:
        """Return the role that a feature has by the tests on text (`RoleScores.best`), `None` if none or not tested."""
        return None if self.roles is None else self.roles.best(feature)

    def label(self, feature: int) -> Label:
        """Return what a feature is called, and the rule on text that this states.

        A detected role first: "negator (not / never), AUROC .97", or "positive word (great), 96 %" where most of the
        activation is at such words but not most such words activate it. Else the tokens it is active at, or after, if
        they tell most of it. Else the word before, the tokens of its contexts in square brackets, and an arrow to the
        tokens it promotes.
        """
        return label_of(
            feature,
            self.model,
            self.contexts,
            self.roles,
            [w for w in self._promoted(feature) if w.isascii() and w.isalnum()],
        )

    def describe(self, feature: int) -> str:
        """Say all that a label has no room for, in a sentence: the role's numbers, tokens, and what is promoted."""
        role, parts = self.role(feature), []
        if role is not None:
            parts.append(f"{role.name}: AUROC {role.auroc:.2f}, {100 * role.share:.0f} % of its activation there")
            parts[-1] += f" ({100 * role.base:.1f} % of positions)"
        if self.roles is not None:
            for where, some in (("at", self.roles.at), ("after", self.roles.after)):
                pairs = zip(some.tokens[feature].tolist(), some.share[feature].tolist(), strict=True)
                shown = [f"{word(self.model, token)} {100 * share:.0f} %" for token, share in pairs if share >= 0.02]
                parts += [f"{where} {', '.join(shown)}"] if shown else []
        best = self._promoted(feature)
        parts += [f"promotes {', '.join(best)}"] if best else []
        return "; ".join(parts)

    def _promoted(self, feature: int, n: int = 5) -> list[str]:
        """Return the tokens that a feature promotes, as labels show them, without those that stand for no text."""
        best = self.tokens[feature][self.effects[feature] > 0].tolist()
        words = [word(self.model, token) for token in best]
        return [one for one in words if not (one[:1] == "[" and one[-1:] == "]")][:n]

    def name(self, features: int | Sequence[int], weights: Sequence[float] | None = None, n: int = 3) -> str:
        """Name a feature by its label, or a group by the role that most of it has, or by the tokens at its peaks.

        Where the cards have labels and no role is found, the one with the largest mean AUROC, if at least 0.6, stands
        before: "positive: [great / loved] → performances".

        Args:
            features: Which.
            weights: Of the features in the group; equal if `None`, and the sign does not matter.
            n: How many tokens of a group.
        """
        some = [features] if isinstance(features, int) else list(features)
        share = torch.tensor([1.0] * len(some) if weights is None else list(map(abs, weights))).to(self.auroc)
        share = share / share.sum()
        if isinstance(features, int):
            label = self.label(features)
            text, role = label.text, label.role
        else:
            role, text = self._shared_role(some, share), self.contexts.label(some, self.model, n, weights)
            text = text if role is None else f"{role} ({text})"
        if role is not None or not self.labels:
            return text
        told = (share @ self.auroc[some]).nan_to_num(0)
        best = int(told.argmax())
        if told[best] < _TELLS:
            return text
        text = f"{list(self.labels)[best]}: {text}"
        return text if len(text) <= WIDEST or not isinstance(features, int) else f"{text[: WIDEST - 1]}…"

    def _shared_role(self, features: Sequence[int], share: Float[Tensor, " n"]) -> str | None:
        """Return the role that at least 60 % of a group has, by weight."""
        votes: dict[str, float] = {}
        for feature, weight in zip(features, share.tolist(), strict=True):
            if (role := self.role(feature)) is not None:
                votes[role.name] = votes.get(role.name, 0.0) + weight
        best = max(votes, key=votes.get, default=None)
        return best if best is not None and votes[best] >= _MOST else None

    def near(self, words: Sequence[str], share: float = 0.6) -> Int[Tensor, " found"]:
        """Return the features whose peaks have one of some words at, or up to three tokens before, them.

        Args:
            words: Tokens.
            share: Of a feature's activation at its strongest positions, how much must be near such a word.

        Raises:
            ValueError: None of the words is a token, or no feature is near them.
        """
        ids = self.model.tokens_of(words)
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
        if self.roles is not None:
            tensors |= self.roles.tensors()
            about |= {"roles": self.roles.places, "positions": self.roles.positions}
        with atomic_write(path) as partial:
            save_file(tensors, partial, {"cards": json.dumps(about)})

    @classmethod
    def load(cls, name: str | Path, hook: str, model: BilinearTransformer) -> "FeatureCards":
        """Read the cards stored beside an SAE, by the same arguments as `bilens.saes.load`.

        Args:
            name: As for `load`: `"bilens-mini"`, a folder or a Hub repository.
            hook: The hook point.
            model: Owner of the tokenizer.

        Raises:
            FileNotFoundError: No SAE, or none with cards.
            ValueError: The cards are of another model.
        """
        return read_cards(sae_folder(name, hook, (FILE,)) / FILE, model)


def read_cards(path: Path, model: BilinearTransformer) -> FeatureCards:
    """Read the cards of one file.

    Raises:
        FileNotFoundError: No such file.
        CheckpointError: It is damaged, or holds what no cards do; it says which tensor.
        ValueError: The cards are of another model.
    """
    path = user_path(path)
    about, tensors = read_card_file(path, model.cfg.d_vocab)
    told = about["provenance"]
    if known_as(model, told["model"], casts_told(told) or _casts_beside(path, told["model"])) is None:
        raise ValueError(f"model must be the one that {path} was made with, but its weights have another hash")
    contexts = Contexts(
        tensors["contexts.tokens"].long(), tensors["contexts.values"].float(), tensors["density"], about["peak"]
    )
    roles = RoleScores.read(about["roles"], about["positions"], tensors) if "roles" in about else None
    return FeatureCards(
        about["hook"], contexts, tensors["histogram"].long(), tensors["mean"], tensors["tokens"].long(),
        tensors["effects"].float(), tensors["auroc"], about["labels"], told, model, roles,
    )  # fmt: skip


def _casts_beside(path: Path, digest: str) -> dict[str, str]:
    """Return the fingerprints of casts of the model that the SAE beside some cards tells, if it was fitted to it."""
    config = path.parent / LENS_FILES[0]
    metadata = read_json(config).get("metadata") if regular(config) else None
    told = metadata.get("settings") if isinstance(metadata, dict) else None
    return told.get("casts", {}) if isinstance(told, dict) and told.get("model") == digest else {}
