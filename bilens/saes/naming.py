"""What a feature is called: a detected role first, else the tokens it is active at or after, with what it promotes.

A label is a rule on text too, so that one can ask how often it is right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from bilens.models.transformer import BilinearTransformer
from bilens.models.windows import Windows
from bilens.tensor.records import Record

from .peaks import Contexts
from .roles import ROLES
from .rolescores import WHOLE, Role, RoleScores, TokenShares

WIDEST = 44  # characters of a label
_TOKENS = 8  # named at most
_PROMOTED = 2
_PART = 0.35  # share beyond chance from which a role names a feature, its share shown
_TELLS = 0.5  # share beyond chance from which tokens alone make a label
_LEAST = 0.03  # share beyond chance from which a token is worth naming
_CUE = 0.7  # share of the strongest contexts that a word before must have


@dataclass(frozen=True)
class Label(Record):
    """What a feature is called, and the rule on text that this states.

    The rule is a role; or, without one, a token at the position (`at`) or up to `reach` before it (`after`).
    """

    text: str
    role: Role | None = None
    at: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    reach: int = 1

    def holds(self, windows: Windows, marks: Bool[Tensor, "row seq role"]) -> Bool[Tensor, "row seq"]:
        """Tell where in text the rule holds: where it says that the feature is active.

        Args:
            windows: The text.
            marks: Where the roles are in it (`Roles.of`).
        """
        if self.role is not None:
            return marks[:, :, ROLES.index(self.role.name)]
        tokens = windows.tokens
        found = torch.isin(tokens, torch.tensor(self.at, dtype=tokens.dtype, device=tokens.device))
        cue = torch.isin(tokens, torch.tensor(self.after, dtype=tokens.dtype, device=tokens.device))
        for shift in range(1, self.reach + 1):
            found[:, shift:] |= cue[:, :-shift]
        return found & windows.counts


def label_of(
    feature: int, model: BilinearTransformer, contexts: Contexts, scores: RoleScores | None, promoted: Sequence[str]
) -> Label:
    """Return a feature's label, of at most 44 characters.

    Args:
        feature: Which.
        model: Owner of the tokenizer.
        contexts: Where it is most active.
        scores: Its roles, if they are known.
        promoted: Tokens it promotes, strongest first.
    """
    if not (contexts.tokens[feature, :, contexts.peak] >= 0).any():  # nor where it is negative alone
        return Label("(never active)")
    if scores is None:
        return _by_contexts(feature, model, contexts, None, promoted)
    role, tokens = scores.best(feature, lift=_PART), {"at": scores.at, "after": scores.after}
    named = {where: _worth(some, feature) for where, some in tokens.items()}
    tells = {where: sum(gain for _, gain in some) for where, some in named.items()}
    where = max(tells, key=tells.get)
    if role is not None and role.share - role.base >= tells[where] - 0.15:
        return _by_role(role, [token for token, _ in named["at"]], model, promoted)
    if tells[where] >= _TELLS:
        return _by_tokens(where, [token for token, _ in named[where]], model, promoted)
    return _by_contexts(feature, model, contexts, [token for token, _ in named["at"]], promoted)


def _worth(some: TokenShares, feature: int) -> list[tuple[int, float]]:
    """Return the tokens worth naming, and the share of each beyond chance."""
    gains = (some.share[feature] - some.base[feature]).tolist()[:_TOKENS]
    pairs = zip(some.tokens[feature].tolist(), gains, strict=False)
    return [(token, gain) for token, gain in pairs if gain >= _LEAST]


def word(model: BilinearTransformer, token: int) -> str:
    """Return a token as a label shows it: a piece within a word with a hyphen before it."""
    text = model.label(token)
    return f"-{text[2:]}" if text.startswith("##") else text.strip() or repr(text)[1:-1]


def _arrow(promoted: Sequence[str], room: int) -> str:
    """Return what a label says of promoted tokens, as far as there is room."""
    for n in range(min(_PROMOTED, len(promoted)), 0, -1):
        text = f" → {', '.join(promoted[:n])}"
        if len(text) <= room:
            return text
    return ""


def _finish(text: str, promoted: Sequence[str]) -> str:
    text = text if len(text) <= WIDEST else f"{text[: WIDEST - 1]}…"
    return text + _arrow(promoted, WIDEST - len(text))


def _by_role(role: Role, at: Sequence[int], model: BilinearTransformer, promoted: Sequence[str]) -> Label:
    whole = role.auroc >= WHOLE[0] and role.share >= WHOLE[1]
    told = f", AUROC {role.auroc:.2f}".replace("0.", ".") if whole else f", {100 * role.share:.0f} %"
    for n in range(min(3, len(at)), -1, -1):
        words = f" ({' / '.join(word(model, token) for token in at[:n])})" if n else ""
        text = role.name + words + told
        if len(text) <= WIDEST:
            break
    return Label(_finish(text, promoted), role)


def _by_tokens(
    where: Literal["at", "after"], tokens: Sequence[int], model: BilinearTransformer, promoted: Sequence[str]
) -> Label:
    before = "after " if where == "after" else ""
    for n in range(len(tokens), 0, -1):
        text = f'{before}"{" / ".join(word(model, token) for token in tokens[:n])}"'
        if len(text) <= WIDEST:
            break
    return Label(_finish(text, promoted), **{where: tuple(tokens[:n])})


def _by_contexts(
    feature: int,
    model: BilinearTransformer,
    contexts: Contexts,
    at: Sequence[int] | None,
    promoted: Sequence[str],
) -> Label:
    """Return the word before that most of the strongest contexts share, the tokens at the peaks, and the promoted."""
    tokens = list(at or contexts.top_ids(feature, 3))
    cue = contexts.cue(feature, _CUE)
    before = "" if cue is None else f"{word(model, cue)} … "
    arrow = _arrow(promoted, WIDEST // 3)
    for n in range(len(tokens), 0, -1):
        text = f"{before}[{' / '.join(word(model, token) for token in tokens[:n])}]"
        if len(text) + len(arrow) <= WIDEST:
            break
    text = text if len(text) + len(arrow) <= WIDEST else f"{text[: WIDEST - len(arrow) - 1]}…"
    return Label(text + arrow, None, tuple(tokens[:n]), () if cue is None else (cue,), 3)
