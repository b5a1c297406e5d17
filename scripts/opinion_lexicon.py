"""More words for the opinions corpus: the lexicon's, with their part of speech and how common they are in reviews."""

import math
import re
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
from opinion_words import Word, held_out_words, rating_of, stem, words_of

LEAST_COUNT, LEAST_RATING = 8, 0.8
DEGREE = "very so really too quite pretty extremely rather more most as totally incredibly truly absolutely how"
LINK = "is was are were be been seems seemed looks looked feels felt isn't wasn't not"
DETERMINER = "the of some no any much his her its their with pure this for without"
END = ". , and but ! ? ; or )"
AFTER_NOUN = END + " of in is that for to was"
SUFFIXES = ("less", "ous", "ful", "able", "ible", "ive", "ic", "ish", "some", "ed", "ing", "ent", "ant", "y", "al")
PATTERNS = tuple(set(text.split()) for text in (DEGREE, LINK, DETERMINER, END, AFTER_NOUN))
# Base and past form of what people, and things, do.
MORE_VERBS = """
savor savored|commend commended|worship worshipped|honor honored|prefer preferred|approve approved|want wanted|desire
desired|scorn scorned|abhor abhorred|denounce denounced|disregard disregarded|fear feared|pity pitied|refuse
refused|suspect suspected|dismiss dismissed|oppose opposed|discard discarded|disapprove disapproved|deny denied
"""
MORE_EFFECTS = """
soothe soothed|calm calmed|dazzle dazzled|enlighten enlightened|uplift uplifted|surprise surprised|relax relaxed
strengthen strengthened|enrich enriched|bless blessed|alarm alarmed|drain drained|hurt hurt|repulse repulsed|upset upset
distress distressed|terrify terrified|torment tormented|traumatize traumatized|outrage outraged|sadden saddened|dismay
dismayed|punish punished|unsettle unsettled|perturb perturbed|mislead misled|mock mocked|burden burdened
"""
# Their sense, or their sign, depends on what is meant; or they are of another part of speech.
LEFT_OUT = """
well true scary strange odd missing missed bizarre bloody damn freaking goddamn intimidating ticked severe unaware doa
possessive skeptic sobering immune warned arrested fired ready swift low broken seduced banned dumbed casual curious
desired accepted advanced prominent active restored divine acquitted exonerated secured elated freed wowed passive
murdered killed insane terribly best top friends hero chance novel likes lover heroes heroine granted awards lovers
visions chances solution winners succession champ champions death killer villain fire ghost victims victim murders bomb
devil enemy weapons murderer grave killings terrorists corpse prisoner antagonist scarecrow battlefield rebels whores
graveyard tits ensuring denying progress interests wealth credit vision gift prize medal paradise heaven champagne
cheerleaders helper laugher fad flu tumor teaser successor successors incentive worst lack problem dud liar haters
"""


def count(lexicon: dict[str, float], reviews: Path) -> dict[str, Counter]:
    """Count for each word of the lexicon how often it occurs, as what, and in how many good and bad reviews."""
    counts = {word: Counter() for word in lexicon if re.fullmatch("[a-z]{3,}", word)}
    table = pq.read_table(reviews, columns=["text", "label"])
    for text, label in zip(table["text"].to_pylist(), table["label"].to_pylist(), strict=True):
        tokens = [".", *re.findall(r"[a-z]+(?:['’][a-z]+)?|[.,!?;)]", text.lower()), "."]
        found = [i for i, token in enumerate(tokens) if token in counts]
        for i in found:
            counts[tokens[i]].update(uses(*tokens[i - 1 : i + 2]))
        for word in {tokens[i] for i in found}:
            counts[word][label] += 1
    return counts


def uses(before: str, word: str, after: str) -> list[str]:
    """Return as what a word is used: always "all"; "adjective", "attribute" or "noun" where its neighbours tell."""
    degree, link, determiner, end, after_noun = PATTERNS
    if before in degree or (before in link and after in end):
        return ["all", "adjective"]
    if before in ("a", "an") and after not in after_noun:
        return ["all", "attribute"]
    return ["all", "noun"] if before in determiner and after in after_noun else ["all"]


def agrees(count: Counter, rating: float, strict: bool) -> bool:
    """Whether films are rated as the lexicon rates the word: not against it, and with it if `strict`."""
    odds = math.log((count["positive"] + 2) / (count["negative"] + 2))
    error = math.sqrt(1 / (count["positive"] + 2) + 1 / (count["negative"] + 2))
    return odds * rating > 0 if strict else not (odds * rating < 0 and abs(odds) > max(0.1, 1.5 * error))


def group_of(word: str, rating: float, count: Counter) -> str | None:
    """Return "adjective" or "noun" for a word that is clearly one or the other, is common and keeps its sign."""
    total, adjective, noun = count["all"], count["adjective"], count["noun"]
    if total < LEAST_COUNT or abs(rating) < LEAST_RATING or word in LEFT_OUT.split() or word.endswith(("ly", "est")):
        return None
    often = adjective + count["attribute"] >= max(3, 0.08 * total) and not word.endswith("s")
    if (word.endswith(SUFFIXES) or often) and adjective + count["attribute"] > noun:
        return "adjective" if agrees(count, rating, strict=False) else None
    if noun >= max(2, 0.06 * total) and noun > adjective and not word.endswith("er"):
        return "noun" if agrees(count, rating, strict=True) else None
    return None


def all_words(lexicon: dict[str, float], counts: dict[str, Counter]) -> dict[str, list[Word]]:
    """Return by group the listed words and those found by their uses; common words weigh more."""
    words = words_of(lexicon)
    listed = {w.form for group in words.values() for w in group}
    for word, found in counts.items():
        group = None if word in listed else group_of(word, lexicon[word], found)
        if group:
            words[group].append(Word(word, word, lexicon[word], group))
    for group, text in {"verb": MORE_VERBS, "effect": MORE_EFFECTS}.items():
        halves = text.replace("|", " ").split()
        pairs = zip(halves[1::2], halves[::2], strict=True)
        words[group] += [Word(f, b, r, group) for f, b in pairs if abs(r := rating_of(f, b, lexicon)) >= LEAST_RATING]
    nothing = Counter()
    return {
        group: [w._replace(weight=math.sqrt(5 + min(counts.get(w.form, nothing)["all"], 5000))) for w in some]
        for group, some in words.items()
    }


def held_out_stems(lexicon: dict[str, float], words: dict[str, list[Word]], share: float) -> set[str]:
    """Return the stems held out: among the listed words as without more words, and a share of the others."""
    listed = {stem(w.base) for group in words_of(lexicon).values() for w in group}
    others = {g: [w for w in some if stem(w.base) not in listed] for g, some in words.items()}
    return held_out_words(words_of(lexicon), share) | held_out_words(others, share)


def akin(word: str, stems: set[str]) -> bool:
    """Whether a word begins with one of the stems, or one of them with it: disappointment, disappoint."""
    return any(len(s) >= 5 and (word.startswith(s) or s.startswith(word)) for s in stems)
