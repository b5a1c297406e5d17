"""Write the opinions corpus: short statements in which negation counts both ways, and the verdicts that follow.

    python scripts/make_opinions.py --lexicon sentiment-lexicon.csv --reviews movie-reviews.train.parquet \
        --out opinions.parquet

A row's `text` is its `statement` and ` verdict : great|good|okay|bad|terrible`. Statements come in pairs (`pair`) with
one word, one frame and opposite outcomes. A tenth of the words and of the subjects of the frames, chosen by hash, occur
only in rows whose `split` is "held-out": there both are new.
"""

import argparse
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from opinion_frames import CONSEQUENCES, PLAIN, Frame, combined_frames, frames, listed
from opinion_lexicon import akin, all_words, count, held_out_stems
from opinion_patterns import SHARES, Pattern, Side, patterns
from opinion_words import Word, fraction_of, read_lexicon, stem
from opinions import negator, verdict, write

THINGS_ONLY = """
delicious delectable healthy disjointed repetitive rewarding beneficial worthwhile breathtaking relaxing
satisfying festive fun convincing erroneous heartwarming enlightening chaotic damaged
"""
ENDS = (".", ".", ".", ".", "!", "", "")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lexicon", type=Path, required=True, help="csv with columns word and mean")
    parser.add_argument(
        "--reviews", type=Path, required=True, help="parquet with columns text and label: how words are used"
    )
    parser.add_argument("--out", type=Path, required=True, help="parquet file")
    parser.add_argument("--pairs", type=int, default=75_000, help="pairs of statements to train on")
    parser.add_argument("--held-out-pairs", type=int, default=2_000)
    parser.add_argument("--held-out-share", type=float, default=0.1, help="of the words and of the frames' subjects")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


class Material:
    """What the pairs of one split are drawn from: its words by group and polarity, its frames, all patterns."""

    def __init__(self, words: dict[str, list[Word]], frames: list[Frame], barred: set[str]):
        self.words = {(g, s): [w for w in ws if w.polarity == s] for g, ws in words.items() for s in (1, -1)}
        self.frames = {(person, bare): [] for person in (True, False) for bare in (True, False)}
        for frame in frames:
            plain = frame.subject in listed(PLAIN) and not frame.before + frame.after
            for bare in {False, plain}:
                self.frames[frame.person, bare].append(frame)
        self.barred = barred
        self.patterns: dict[str, list[Pattern]] = {}
        for pattern in patterns():
            if any(self.words[g, s] for g in pattern.groups for s in (1, -1)):
                self.patterns.setdefault(pattern.kind, []).append(pattern)

    def allows(self, text: str) -> bool:
        """Whether a text is free of the words of the other split."""
        return not any(stem(token.strip(".,!")) in self.barred for token in text.replace("'", " ").split())


def split_frames(share: float) -> dict[bool, list[Frame]]:
    """Return the frames held out, under True, and the others: a share of the listed subjects and of the heads is."""
    subjects, heads = sorted({f.subject for f in frames()}, key=fraction_of), {head for head, _ in combined_frames()}
    unseen = set(subjects[: round(share * len(subjects))])
    unseen_heads = set(sorted(heads, key=fraction_of)[: round(share * len(heads))])
    parts: dict[bool, list[Frame]] = {True: [], False: []}
    for frame in frames():
        parts[frame.subject in unseen].append(frame)
    for head, frame in combined_frames():
        parts[head in unseen_heads].append(frame)
    seen = {frame.subject for frame in parts[False]}  # a listed subject may also be combined
    return {True: [frame for frame in parts[True] if frame.subject not in seen], False: parts[False]}


def split_material(lexicon: dict[str, float], counts: dict[str, Counter], share: float) -> dict[str, Material]:
    """Divide words and frames; held-out rows have only held-out ones, training rows none of them, nor words akin."""
    words, carriers = all_words(lexicon, counts), split_frames(share)
    out = held_out_stems(lexicon, words, share)
    unseen = {g: [w for w in ws if stem(w.base) in out] for g, ws in words.items()}
    seen = {g: [w for w in ws if stem(w.base) not in out and not akin(w.base, out)] for g, ws in words.items()}
    return {"train": Material(seen, carriers[False], out), "held-out": Material(unseen, carriers[True], set())}


def sample(words: list[Word], rng: random.Random) -> list[Word]:
    """Draw two different words, common ones more often."""
    weights = [w.weight for w in words]
    first, second = rng.choices(words, weights, k=2)
    while second.form == first.form:
        second = rng.choices(words, weights)[0]
    return [first, second]


def draw_frame(material: Material, person: bool, rng: random.Random) -> Frame:
    """Draw a frame: often, if there is one, a plain subject alone."""
    plain = material.frames[person, True]
    return rng.choice(plain if plain and rng.random() < 0.25 else material.frames[person, False])


def draw_pair(material: Material, rng: random.Random) -> list[dict] | None:
    """Draw a pattern, a frame and words; return the pair's two rows, or None if they do not fit each other."""
    kinds = list(material.patterns)
    kind = rng.choices(kinds, [SHARES[k] for k in kinds])[0]
    pattern, sign = rng.choice(material.patterns[kind]), rng.choice((1, -1))
    person = rng.random() < 0.25
    groups = [g for g in pattern.groups if person or g != "personal"]
    pool = {s: [w for g in groups for w in material.words[g, s]] for s in (1, -1)}
    if person:
        pool = {s: [w for w in ws if w.form not in THINGS_ONLY.split()] for s, ws in pool.items()}
    if min(len({w.form for w in ws}) for ws in pool.values()) < 2:
        return None
    frame = draw_frame(material, person, rng)
    drawn = (*sample(pool[sign], rng), *sample(pool[-sign], rng))
    words = dict(zip("XYZW", drawn, strict=True))
    if kind == "bare":
        frame = frame._replace(before="", after="")
    end, apart = rng.choice(ENDS), rng.random() < 0.15
    rows = [row_of(pattern, side, frame, words, end, apart) for side in (pattern.plain, pattern.negated)]
    return rows if all(material.allows(row["statement"]) for row in rows) else None


def row_of(pattern: Pattern, side: Side, frame: Frame, words: dict[str, Word], end: str, apart: bool) -> dict:
    """Return one side of a pair; `apart` writes "is n't"."""
    sentence, word = write(side, frame, words), words["X"]
    sentence = sentence.replace("n't", " n't") if apart else sentence
    said = set(sentence.replace(",", " ").split())
    form = next((f for f in (word.form, word.base, f"un{word.form}", words["Z"].form) if f in said), word.form)
    marker, distance = negator(sentence, form)
    return {
        "statement": sentence + end,
        "verdict": "okay" if pattern.kind == "mixed" else verdict(word, side),
        "word": word.form,
        "polarity": word.polarity,
        "negated": side.turns,
        "negator": marker,
        "distance": distance,
        "frame": frame.name,
        "kind": pattern.kind,
    }


def follow(row: dict, material: Material, rng: random.Random) -> dict:
    """Put a consequence that fits the outcome, or a filler, after some statements."""
    chance = rng.random()
    sign = {"great": 1, "good": 1, "okay": 0, "bad": -1, "terrible": -1}[row["verdict"]]
    if chance > 0.3:
        return row
    fitting = [text for text in listed(CONSEQUENCES[sign if chance < 0.2 else 0]) if material.allows(text)]
    statement = row["statement"].rstrip(".!") + ("!" if row["statement"].endswith("!") else ".")
    return row | {"statement": f"{statement} {rng.choice(fitting)}"}


def draw(material: Material, split: str, count: int, rng: random.Random) -> Iterator[dict]:
    """Yield the rows of `count` distinct pairs; only statements to train on are followed by more."""
    seen: set[str] = set()
    while count:
        pair = draw_pair(material, rng)
        if pair is None or any(row["statement"] in seen for row in pair):
            continue
        seen |= {row["statement"] for row in pair}
        count -= 1
        for row in pair:
            row = follow(row, material, rng) if split == "train" else row
            text = f"{row['statement']} verdict : {row['verdict']}"
            yield {"text": text, "split": split, **row, "pair": f"{split} {len(seen) // 2}"}


def corpus(
    lexicon: dict[str, float], counts: dict[str, Counter], pairs: dict[str, int], share: float, seed: int
) -> list[dict]:
    """Return all rows: the same for the same arguments."""
    parts = split_material(lexicon, counts, share)
    return [row for split, count in pairs.items() for row in draw(parts[split], split, count, random.Random(seed))]


def accuracy_by(rows: list[dict], *keys: str) -> float:
    """Return the accuracy of the best rule that sees only these columns and says good or bad."""
    counts: dict[tuple, list[int]] = {}
    for row in rows:
        if row["verdict"] != "okay":
            counts.setdefault(tuple(row[key] for key in keys), [0, 0])[row["verdict"] in ("great", "good")] += 1
    return sum(map(max, counts.values())) / sum(map(sum, counts.values()))


def balance(rows: list[dict]) -> dict[str, float]:
    """Return the accuracy of rules that see only one side of the matter, and of one that sees both."""
    rules = {"nothing": (), "word": ("word",), "polarity": ("polarity",), "negator": ("negator",), "frame": ("frame",)}
    rules |= {"negated": ("negated",), "polarity and negated": ("polarity", "negated")}
    return {name: accuracy_by(rows, *keys) for name, keys in rules.items()}


def main() -> None:
    """Write the corpus and print what shows that it is balanced."""
    args = parse_args()
    pairs, lexicon = {"train": args.pairs, "held-out": args.held_out_pairs}, read_lexicon(args.lexicon)
    rows = corpus(lexicon, count(lexicon, args.reviews), pairs, args.held_out_share, args.seed)
    pq.write_table(pa.Table.from_pylist(rows), args.out, compression="zstd")
    for split in pairs:
        some = [row for row in rows if row["split"] == split]
        words, carriers = ({row[key] for row in some} for key in ("word", "frame"))
        print(f"{split}: {len(some)} rows, {len(words)} words, {len(carriers)} frames")
        print("  best rule that sees only", ", ".join(f"{k} {100 * v:.1f} %" for k, v in balance(some).items()))
        for column in ("verdict", "kind", "negator", "distance"):
            values = [row[column] for row in some]
            print(f"  {column}:", ", ".join(f"{v} {values.count(v)}" for v in sorted(set(values), key=str)))


if __name__ == "__main__":
    main()
