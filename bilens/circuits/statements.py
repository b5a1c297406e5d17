"""Minimal pairs: a statement about something good or bad, and the same with a negator."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bilens.tensor.records import Record, Rows

# Subjects with their verbs, negations and words: neither subjects nor words are in the opinions the model learns from.
SUBJECTS = (
    ("the performance", "was"),
    ("the photography", "was"),
    ("his latest album", "is"),
    ("the picnic", "was"),
    ("her toast at the wedding", "was"),
    ("the museum", "is"),
    ("the opening scene", "was"),
    ("the journey home", "was"),
)
NEGATIONS = (
    "{subject} {verb} not {word}",
    "{subject} {verb} never {word}",
    "{subject} {verb}n't {word}",
    "{subject} {verb} not very {word}",
    "{subject} {verb} not at all {word}",
    "nothing about {subject} {verb} {word}",
)
WORDS = {
    1: (
        *("charming", "entertaining", "impressive", "romantic", "outstanding", "hilarious", "wonderful", "thoughtful"),
        *("elegant", "comfortable", "cheerful", "sophisticated"),
    ),
    -1: (
        *("harsh", "offensive", "nasty", "sad", "shameful", "dreadful", "hateful", "lame", "rotten", "rude"),
        *("horrendous", "humiliating"),
    ),
}


@dataclass(frozen=True)
class MinimalPair(Record):
    """A statement, and the same with a negator."""

    plain: str
    negated: str
    word: str  # what is said of the subject
    polarity: int  # of the word, 1 or -1
    negator: str
    frame: str  # what is around the word and the negator

    def __post_init__(self):
        if self.polarity not in (1, -1):
            raise ValueError(f"polarity must be 1 or -1, got {self.polarity}")


def minimal_pairs() -> Rows[MinimalPair]:
    """Return built-in pairs, every subject with every word and one of six negations: as many good as bad ones."""
    pairs = Rows()
    for i, (subject, verb) in enumerate(SUBJECTS):
        for polarity, words in WORDS.items():
            for j, word in enumerate(words):
                negation = NEGATIONS[(i + j) % len(NEGATIONS)]
                parts = {"subject": subject, "verb": verb, "word": word}
                plain = f"{subject} {verb} {word}"
                pairs.append(
                    MinimalPair(plain, negation.format(**parts), word, polarity, negation.split()[-2], subject)
                )
    return pairs


def halves(pairs: Iterable[MinimalPair]) -> tuple[Rows[MinimalPair], Rows[MinimalPair]]:
    """Divide pairs into two halves that share neither a word nor a frame; pairs across are left out.

    Words of either polarity and frames go in turn to one half and the other, in the order of their first pair.

    Raises:
        ValueError: A half has no pair of a good or of a bad word.
    """
    pairs = list(pairs)
    words = {one: _turns(pair.word for pair in pairs if pair.polarity == one) for one in (1, -1)}
    frames = _turns(pair.frame for pair in pairs)
    found = Rows(), Rows()
    for pair in pairs:
        half = words[pair.polarity][pair.word]
        if frames[pair.frame] == half:
            found[half].append(pair)
    check_pairs(found[0])
    check_pairs(found[1])
    return found


def _turns(names: Iterable[str]) -> dict[str, int]:
    return {name: index % 2 for index, name in enumerate(dict.fromkeys(names))}


def check_pairs(pairs: Sequence[MinimalPair]) -> None:
    """Make sure that there are pairs of good and of bad words.

    Raises:
        ValueError: There are not.
    """
    if {pair.polarity for pair in pairs} != {1, -1}:
        n = len(pairs)
        raise ValueError(f"pairs must hold good and bad words, with and without each other's frames, got {n} pairs")
