"""Roles of tokens that text itself tells: negators, sentiment words, names, quotations, parts of speech, positions.

Each role is a rule on the tokens of a window, so the same rule that names a feature can predict where it is active.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from bilens.models.texts import Texts, list_of
from bilens.models.transformer import BilinearTransformer
from bilens.models.windows import Windows

RATED = 1.0  # least size of a rating of a positive or negative word
SCOPE = 4  # tokens after a negator
NEAR = 3  # tokens after a positive or negative word
LONGEST = 60  # tokens of a quotation: more is taken for an unpaired mark
STOPS = frozenset(".!?;:")
ENDS = frozenset(".!?")
APOSTROPHES = frozenset("'’")
QUOTES = frozenset('"“”')
GOOD, BAD = frozenset(("great", "good")), frozenset(("bad", "terrible"))
NEGATORS = frozenset(
    {"not", "never", "no", "nobody", "nothing", "none", "neither", "nor", "nowhere", "cannot", "without", "hardly"}
    | {"barely", "scarcely", "lack", "lacks", "lacked", "lacking"}
)
# Roles that a word has by its form.
CLOSED = {
    "pronoun": "i you he she it we they me him us them myself yourself himself herself itself ourselves themselves",
    "pronoun she": "she her hers herself",
    "pronoun he": "he him his himself",
    "pronoun they": "they them their theirs themselves",
    "pronoun I / we": "i me my mine myself we us our ours ourselves",
    "pronoun you": "you your yours yourself",
    "pronoun it": "it its itself",
    "possessive": "my your his her its our their",
    "somebody": "everyone everybody someone somebody anyone anybody people everything something anything",
    "article": "a an the",
    "this / that": "this that these those",
    "quantifier": "all some any every each many much more most few several both enough another other",
    "preposition": "of in on at by for from with to into onto about over under through between after before during "
    "against among around behind near off up down out toward towards upon within like as than",
    "conjunction": "and or but so because if although though while when until unless since whereas",
    "comparison": "than more less most least better best worse worst as like same",
    "question word": "what who whom whose which where when why how",
    "verb to be": "is was are were be been being am",
    "auxiliary verb": "do does did have has had will would can could should may might must shall",
    "contracted verb": "don doesn didn isn aren wasn weren hasn haven hadn won wouldn can couldn shouldn",
    "verb of saying": "said say says saying asked ask asks told tell tells replied shouted called cried answered thank",
    "verb of the mind": "think thinks thought know knows knew want wants wanted feel feels felt like likes liked love "
    "loves loved hope hoped believe believed remember see sees saw wish need needed try tried decided",
    "verb of motion": "go goes going went come comes came run runs ran walk walked walking jumped flew climbed left "
    "moved turned followed get gets got",
    "verb of doing": "make makes made making take takes took taken give gives gave given put find finds found keep "
    "kept play plays played playing help helped use used work works worked",
    "person": "man men woman women boy boys girl girls mom mommy mum dad daddy mother father brother sister friend "
    "friends wife husband son daughter child children kid kids family guy people baby person",
    "animal": "dog dogs cat cats bird birds bear rabbit fish bunny frog lion duck mouse horse squirrel animal animals",
    "place": "park house home school room forest garden tree town city beach kitchen outside inside world place store",
    "film word": "movie movies film films show series story plot acting actor actors actress director scene scenes "
    "script character characters cast performance performances ending dialogue role watch watching watched horror",
    "time word": "day days time times year years once again then now soon always ever never night morning today",
    "number": "one two three four five six seven eight nine ten eleven twelve twenty thirty fifty hundred thousand",
    "ordinal": "first second third fourth fifth last next",
    "intensifier": "very really so too quite extremely absolutely totally incredibly rather pretty such",
    "hedge": "just only even still almost maybe perhaps actually probably also",
    "size or colour": "big little small tiny huge long old new young red blue green yellow black white",
}
# Roles that the token after such a word has.
FOLLOWING = {
    "after an article": "article",
    "after a possessive": "possessive",
    "after a preposition": "preposition",
    "after a conjunction": "conjunction",
    "after a pronoun": "pronoun",
    "after a verb to be": "verb to be",
    "after an auxiliary verb": "auxiliary verb",
    "after an intensifier": "intensifier",
    "after a film word": "film word",
    "after a person": "person",
}


class Word(NamedTuple):
    """A word of a window: its lower-case text, and the positions of its first and last piece."""

    text: str
    first: int
    last: int


@dataclass(frozen=True)
class Line:
    """The text of one window, as the rules see it."""

    pieces: Sequence[str]
    words: Sequence[Word]
    lexicon: Mapping[str, float]
    names: frozenset[str]

    @cached_property
    def negators(self) -> dict[int, str]:
        """Where negators end; of a contraction (didn ' t), the t."""
        found = {word.last: word.text for word in self.words if word.text in NEGATORS}
        for left, mark, right in zip(self.words, self.words[1:], self.words[2:], strict=False):
            if right.text == "t" and mark.text in APOSTROPHES and left.text.endswith("n"):
                found[right.last] = "t"
        return found

    @cached_property
    def scope(self) -> frozenset[int]:
        """Positions within four tokens after a negator, in the same clause."""
        return frozenset(self.after(self.negators, SCOPE))

    def rated(self, sign: int) -> list[int]:
        """Where words end whose rating is at least 1 in the direction of a sign, negators left out."""
        return [
            word.last
            for word in self.words
            if sign * self.lexicon.get(word.text, 0.0) >= RATED and word.text not in NEGATORS
        ]

    def after(self, places: Iterable[int], n: int) -> Iterator[int]:
        """Yield the n positions after each place, up to the end of the clause."""
        for place in places:
            for at in range(place + 1, min(place + 1 + n, len(self.pieces))):
                if self.pieces[at] in STOPS:
                    break
                yield at

    def ending(self, suffix: str) -> Iterator[int]:
        """Yield where words of more than four letters end that have a suffix."""
        return (word.last for word in self.words if len(word.text) > 4 and word.text.endswith(suffix))

    def quoted(self) -> Iterator[int]:
        """Yield the positions between a quotation mark and the next."""
        start = None
        for at, piece in enumerate(self.pieces):
            if piece in QUOTES:
                if start is not None and piece != "“":
                    yield from range(start + 1, at) if at - start <= LONGEST else ()
                    start = None
                else:
                    start = at

    def slots(self, verdicts: frozenset[str] | None = None) -> Iterator[int]:
        """Yield the colons of `verdict :`, of all or of those before some verdicts."""
        for here, (left, right) in enumerate(zip(self.words, self.words[1:], strict=False)):
            said = self.words[here + 2].text if here + 2 < len(self.words) else None
            if (left.text, right.text) == ("verdict", ":") and (verdicts is None or said in verdicts):
                yield right.last

    def sentences(self) -> Iterator[int]:
        """Yield where sentences begin."""
        ended = True
        for at, piece in enumerate(self.pieces):
            if ended and piece[:1].isalnum():
                yield at
                ended = False
            ended = ended or piece in ENDS


def _of_words(line: Line, words: frozenset[str]) -> list[int]:
    return [word.last for word in line.words if word.text in words]


# The other roles, and where they hold in a window.
RULES: dict[str, Callable[[Line], Iterable[int]]] = {
    "negator": lambda line: line.negators,
    "after a negator": lambda line: line.scope,
    "positive word": lambda line: line.rated(1),
    "negative word": lambda line: line.rated(-1),
    "negated positive word": lambda line: line.scope.intersection(line.rated(1)),
    "negated negative word": lambda line: line.scope.intersection(line.rated(-1)),
    "after a positive word": lambda line: line.after(line.rated(1), NEAR),
    "after a negative word": lambda line: line.after(line.rated(-1), NEAR),
    "verdict slot": lambda line: line.slots(),
    "slot of a good verdict": lambda line: line.slots(GOOD),
    "slot of a bad verdict": lambda line: line.slots(BAD),
    "name": lambda line: _of_words(line, line.names),
    "quotation mark": lambda line: (at for at, piece in enumerate(line.pieces) if piece in QUOTES),
    "inside a quotation": lambda line: line.quoted(),
    "numeral": lambda line: (word.last for word in line.words if word.text[:1].isdigit()),
    "-ing form": lambda line: line.ending("ing"),
    "-ed form": lambda line: line.ending("ed"),
    "-ly adverb": lambda line: line.ending("ly"),
    "comma": lambda line: (at for at, piece in enumerate(line.pieces) if piece == ","),
    "sentence end": lambda line: (at for at, piece in enumerate(line.pieces) if piece in ENDS),
    "punctuation": lambda line: (at for at, piece in enumerate(line.pieces) if not piece[:1].isalnum()),
    "sentence start": lambda line: line.sentences(),
    "unfinished word": lambda line: (at for word in line.words for at in range(word.first, word.last)),
    "end of a split word": lambda line: (word.last for word in line.words if word.last > word.first),
    "piece of a split word": lambda line: (
        at for word in line.words if word.last > word.first for at in range(word.first, word.last + 1)
    ),
    "after a name": lambda line: (at + 1 for at in _of_words(line, line.names) if at + 1 < len(line.pieces)),
    "after a comma": lambda line: (at for at in range(1, len(line.pieces)) if line.pieces[at - 1] == ","),
    "first 8 tokens": lambda line: range(min(8, len(line.pieces))),
    "beyond token 128": lambda line: range(128, len(line.pieces)),
}
ROLES = (*RULES, *CLOSED, *FOLLOWING)


def _by_word(roles: Mapping[str, str]) -> dict[str, list[int]]:
    """Return by word the numbers of the roles that list it."""
    found: dict[str, list[int]] = {}
    for role, words in roles.items():
        for word in words.split():
            found.setdefault(word, []).append(ROLES.index(role))
    return found


OWN = _by_word(CLOSED)
NEXT = _by_word({role: CLOSED[of] for role, of in FOLLOWING.items()})


def marks_of(line: Line) -> Iterator[tuple[int, int]]:
    """Yield every position of a window that has a role, and the number of the role."""
    for role, rule in enumerate(RULES.values()):
        yield from ((at, role) for at in rule(line))
    for word in line.words:
        yield from ((word.last, role) for role in OWN.get(word.text, ()))
        if word.last + 1 < len(line.pieces):
            yield from ((word.last + 1, role) for role in NEXT.get(word.text, ()))


@dataclass(frozen=True)
class Roles:
    """Where the roles (`ROLES`) hold in text, given what is known of words.

    Args:
        lexicon: Ratings by word, positive words at least 1, negative ones at most -1. Without it no word is either.
        names: Words that are names, in lower case, for example `names_of(texts)`. Without it no word is.
    """

    lexicon: Mapping[str, float] = field(default_factory=dict)
    names: frozenset[str] = frozenset()

    def of(self, model: BilinearTransformer, windows: Windows) -> Bool[Tensor, "row seq role"]:
        """Mark the positions of text that have each role, on the windows' device.

        A role of words holds at a word's last piece, where the model can know it.
        """
        vocabulary = _vocabulary(model)
        marks = torch.zeros(*windows.tokens.shape, len(ROLES), dtype=torch.bool)
        for row, (tokens, counts) in enumerate(zip(windows.tokens.cpu(), windows.counts.cpu(), strict=True)):
            places = counts.nonzero()[:, 0]
            line = self._line([vocabulary[token] for token in tokens[places].tolist()])
            at, role = torch.tensor([*marks_of(line), (0, 0)])[:-1].T
            marks[row, places[at], role] = True
        return marks.to(windows.tokens.device)

    def _line(self, pieces: Sequence[tuple[str, bool]]) -> Line:
        words: list[Word] = []
        for at, (text, goes_on) in enumerate(pieces):
            if goes_on and words:
                words[-1] = Word(words[-1].text + text, words[-1].first, at)
            else:
                words.append(Word(text, at, at))
        return Line([text for text, _ in pieces], words, self.lexicon, self.names)

    @property
    def digest(self) -> str:
        """A hash of the rules' names and of what is known of words."""
        known = [ROLES, sorted(self.lexicon.items()), sorted(self.names)]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _vocabulary(model: BilinearTransformer) -> list[tuple[str, bool]]:
    """Return each token's lower-case text, and whether it goes on with a word: WordPiece, or marks of a space."""
    tokens = model.labels(range(model.cfg.d_vocab))
    if " the" not in tokens:
        return [(token.removeprefix("##").lower(), token.startswith("##") and token != "##") for token in tokens]
    return [(token.removeprefix(" ").lower(), token[:1].isalpha()) for token in tokens]


def names_of(texts: Texts, least: int = 3, odds: float = 4.0) -> frozenset[str]:
    """Return the words, in lower case, that texts write with a capital within sentences.

    Args:
        texts: Texts with their capitals.
        least: How often.
        odds: How much more often than without a capital.
    """
    capital, small = Counter(), Counter()
    for text in list_of(texts):
        capital.update(word.lower() for word in re.findall(r"(?<=[a-z,;] )[A-Z][a-z]+\b", text))
        small.update(re.findall(r"\b[a-z]+\b", text))
    return frozenset(word for word, n in capital.items() if n >= least and n > odds * small[word])
