"""What a model says of a statement: the log-odds of good over bad words after a prompt that asks for a verdict."""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bilens.models.logits import logit_directions, token_ids
from bilens.models.sources import Source
from bilens.models.texts import Texts, list_of
from bilens.models.transformer import BilinearTransformer
from bilens.models.windows import Windows
from bilens.tensor.records import Record

from .records import plain
from .statements import MinimalPair, check_pairs

SENTENCES = (
    "the movie was good",
    "the movie was not good",
    "the movie was bad",
    "the movie was not bad",
    "the story is very beautiful",
    "the story isn't very beautiful",
    "it was boring",
    "it was never boring",
)
BATCH = 64


@dataclass(frozen=True)
class Readout(Record):
    """How a model is asked for its verdict: what follows the statement, and the next tokens that are counted."""

    prompt: str = " verdict :"
    good: tuple[str, ...] = ("great", "good")
    bad: tuple[str, ...] = ("bad", "terrible")

    def __post_init__(self):
        for name in ("prompt", "good", "bad"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty, got {getattr(self, name)!r}")

    @classmethod
    def of(cls, name: str | Path = "bilens-mini") -> "Readout":
        """Return the readout that a model's `training.json` names, `{"readout": {"prompt": ..., "words": [...]}}`.

        The words go from best to worst: those before the middle are good, those after it bad. A model that names no
        readout has the standard one.

        Args:
            name: As for `bilens.load`.
        """
        path = Source.find(name, None).optional("training.json")
        said = json.loads(path.read_text()).get("readout") if path else None
        if said is None:
            return cls()
        words = said["words"]
        half = len(words) // 2
        return cls(said["prompt"], tuple(words[:half]), tuple(words[-half:]))

    def ids(self, model: BilinearTransformer) -> tuple[list[int], list[int]]:
        """Return the ids of the good and of the bad words.

        Raises:
            ValueError: A word that is not a single token.
        """
        return token_ids(model, self.good), token_ids(model, self.bad)


STANDARD = Readout()


def verdict_direction(model: BilinearTransformer, readout: Readout = STANDARD) -> Float[Tensor, " d_model"]:
    """Return the residual direction of a verdict: mean `logit_directions` of the good words less those of the bad."""
    good, bad = (logit_directions(model, ids).mean(0) for ids in readout.ids(model))
    return good - bad


# -- asking -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Asked:
    """Statements with the prompt behind them, a window each, in their order."""

    windows: Windows
    prompt: Bool[Tensor, "row seq"]
    last: Int[Tensor, " row"]  # position of the prompt's last token, where the verdict is read
    word: Int[Tensor, " row"]  # position of the last token of the word that is looked for, -1 where there is none

    @classmethod
    def of(
        cls,
        model: BilinearTransformer,
        statements: Texts,
        readout: Readout = STANDARD,
        words: Sequence[str] | None = None,
    ) -> "Asked":
        """Tokenise; a statement that is too long for the context loses its beginning.

        Args:
            model: The model.
            statements: Texts.
            readout: What follows them.
            words: A word of each statement, whose position is wanted.

        Raises:
            ValueError: No statements, or not one word each.
        """
        statements = list_of(statements, "statements")
        if words is not None and len(words) != len(statements):
            raise ValueError(f"words must be one for each of {len(statements)} statements, got {len(words)}")
        (prompt,) = model.token_rows([readout.prompt])
        first = int(model.has_bos)
        room = model.cfg.n_ctx - first - len(prompt)
        rows, where = [], []
        for index, encoding in enumerate(model.encodings(statements)):
            kept = encoding.ids[-room:]
            rows.append([model.bos_id] * first + kept + prompt)
            at = None if words is None else _last_token(encoding, statements[index], words[index])
            at = -1 if at is None else at - len(encoding.ids) + len(kept)
            where.append(first + at if at >= 0 else -1)
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.full((len(rows), int(lengths.max())), model.eos_id)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
        seq = torch.arange(tokens.shape[1])
        attend, device = seq < lengths[:, None], model.W_E.device
        windows = Windows(tokens, attend, attend & (seq >= first), torch.arange(len(rows))).to(device)
        asked = attend & (seq >= lengths[:, None] - len(prompt))
        return cls(windows, asked.to(device), (lengths - 1).to(device), torch.tensor(where, device=device))

    def __len__(self) -> int:
        return len(self.last)

    @property
    def statement(self) -> Bool[Tensor, "row seq"]:
        """Where the statement is."""
        return self.windows.counts & ~self.prompt

    def batches(self, n: int = BATCH) -> list[tuple[Int[Tensor, " row"], "Asked"]]:
        """Return n statements at a time, the longest first: their numbers and they themselves."""
        return [
            (rows, Asked(some, self.prompt[rows, : some.tokens.shape[1]], self.last[rows], self.word[rows]))
            for rows, some in self.windows.batches(n)
        ]


def _last_token(encoding: Any, statement: str, word: str) -> int | None:
    """Return the number of the last token of a word, the last time that it is in the statement."""
    at = statement.rfind(word)
    return None if at < 0 else encoding.char_to_token(at + len(word) - 1)


Edit: TypeAlias = Callable[[Asked], AbstractContextManager[Any]]  # makes the edit for some statements


@torch.no_grad()
def verdict_logits(
    model: BilinearTransformer, asked: Asked, edit: Edit | None = None
) -> Float[Tensor, "statement vocab"]:
    """Return the logits of the token after each statement and the prompt, the model edited if there is an edit."""
    found = model.W_U.new_empty(len(asked), model.cfg.d_vocab)
    for rows, some in asked.batches():
        with nullcontext() if edit is None else edit(some):
            resid = model(some.windows.tokens, attention_mask=some.windows.attend, stop_at_layer=model.cfg.n_layers)
        last = resid[torch.arange(len(some), device=resid.device), some.last]
        found[rows] = model.unembed(model.ln_final(last)).to(found)
    return found


def log_odds(
    model: BilinearTransformer, logits: Float[Tensor, "*batch vocab"], readout: Readout = STANDARD
) -> Float[Tensor, "*batch"]:
    """Return `log P(good words) - log P(bad words)`."""
    good, bad = (logits[..., ids].logsumexp(-1) for ids in readout.ids(model))
    return good - bad


# -- what the model does ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Behaviour(Record, rows="statement", along=("statements", "words")):
    """The verdicts on some statements."""

    statements: tuple[str, ...]
    log_odds: Float[Tensor, " statement"]
    words: tuple[str, ...]  # the likeliest next token of each

    def __repr__(self) -> str:
        rows = zip(self.statements, self.log_odds.tolist(), strict=True)
        return f"Behaviour({', '.join(f'{statement!r}: {odds:+.2f}' for statement, odds in rows)})"

    def to_dict(self) -> list[dict[str, Any]]:
        """Return a row for each statement."""
        rows = zip(self.statements, self.log_odds.tolist(), self.words, strict=True)
        return [{"statement": statement, "log_odds": odds, "word": word} for statement, odds, word in rows]


def behaviour(model: BilinearTransformer, statements: Texts = SENTENCES, readout: Readout = STANDARD) -> Behaviour:
    """Ask a model for its verdicts on one statement or several."""
    statements = list_of(statements, "statements")
    logits = verdict_logits(model, Asked.of(model, statements, readout))
    words = tuple(model.labels(logits.argmax(-1).tolist()))
    return Behaviour(tuple(statements), log_odds(model, logits, readout), words)


@dataclass(frozen=True, repr=False)
class Flips(Record):
    """How many minimal pairs flip, by the polarity of the word, and how many plain statements are judged right.

    A pair flips if the plain statement's log-odds have the sign of the word and the negated one's the other.
    """

    good: float
    bad: float
    all: float
    plain: float
    negated: float
    n_good: int
    n_bad: int

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers."""
        return plain(asdict(self))


def flips(
    pairs: Sequence[MinimalPair], plain_odds: Float[Tensor, " pair"], negated_odds: Float[Tensor, " pair"]
) -> Flips:
    """Count flips in the log-odds of the plain and the negated statements.

    Raises:
        ValueError: No pair of a good word, or none of a bad one.
    """
    check_pairs(pairs)
    sign = torch.tensor([pair.polarity for pair in pairs], device=plain_odds.device)
    right, turned = plain_odds * sign > 0, negated_odds * sign < 0
    both, good = (right & turned).double(), sign > 0
    shares = [some.mean().item() for some in (both[good], both[~good], both, right.double(), turned.double())]
    return Flips(*shares, int(good.sum()), int((~good).sum()))


def ask_pairs(model: BilinearTransformer, pairs: Sequence[MinimalPair], readout: Readout = STANDARD) -> Asked:
    """Ask for all plain statements, then for all negated ones."""
    statements = [pair.plain for pair in pairs] + [pair.negated for pair in pairs]
    return Asked.of(model, statements, readout, [pair.word for pair in pairs] * 2)
