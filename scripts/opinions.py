"""The grammar of the opinions corpus: a word, a frame and a pattern make a pair of statements with opposite outcomes.

Every pattern has two sides. Written out for a frame and a word, one side's outcome has the sign of the word, the
other's the opposite (but for "both", where a negator stands and nothing turns: there the sides differ in the word).
So in a corpus of pairs with as many good words as bad ones neither the word nor the negator tells the outcome.
"""

import re

from opinion_frames import Frame
from opinion_patterns import Side
from opinion_words import Word

STRONG = 2.3  # size of a rating from which a plain word alone means great or terrible

NEGATORS = """
not never no nobody nothing none neither nor hardly barely without lack lacked far anything few less least free
failed nowhere
"""


def verdict(word: Word, side: Side) -> str:
    """Return great, good, bad or terrible: the sign turned where the side turns it, extreme where it is strong.

    A verdict said plainly is itself. A turned negative word is good at best, a turned positive word terrible only
    under a strong negator.
    """
    sign = -word.polarity if side.turns else word.polarity
    if side.turns:
        return "good" if sign > 0 else "terrible" if side.strength == "strong" else "bad"
    if word.form in ("great", "good", "bad", "terrible") and side.strength == "even":
        return word.form
    size = abs(word.rating) + {"strong": 0.9, "even": 0.0, "soft": -1.0}[side.strength]
    return ("great" if size >= STRONG else "good") if sign > 0 else ("terrible" if size >= STRONG else "bad")


def write(side: Side, frame: Frame, words: dict[str, Word]) -> str:
    """Fill in a side's slots; `words` has X and, where the side asks for them, Y, Z and W."""
    values = {"S": frame.subject, "O": frame.object, "N": frame.noun, "IS": frame.be, "ISNT": f"{frame.be}n't"}
    values |= {slot: word.form for slot, word in words.items()} | {"V": words["X"].base, "unX": f"un{words['X'].form}"}
    body = " ".join(values.get(token, token) for token in side.text.split())
    text = " ".join(part for part in (frame.before, body, frame.after) if part)
    return tidy(text, plural=frame.be in ("are", "were"))


PLURALS = "things|people|scenes|songs|poems|pictures|boys|guests"


def tidy(text: str, plural: bool) -> str:
    """Set articles and commas right."""
    if plural:
        text = re.sub(rf"\ba (?=(very |really )?\S+ ({PLURALS})\b)", "", text)
    text = re.sub(r"\ba (?=[aeio]|un(?!i)|u(?!ni|se)|hono|hones)", "an ", text)
    return text.replace(" ,", ",")


def negator(text: str, word: str) -> tuple[str, int]:
    """Return the negator next before a word, and how many words on the word stands; ("", 0) if there is none."""
    tokens = text.replace(",", " ").split()
    place = next((i for i, token in enumerate(tokens) if token.strip(".!") == word), -1)
    for i in range(place - 1, -1, -1):
        if tokens[i].endswith("n't"):
            return "n't", place - i
        if tokens[i] in NEGATORS.split() or (tokens[i] == "no" and tokens[i + 1] == "one"):
            return tokens[i], place - i
    return "", 0
