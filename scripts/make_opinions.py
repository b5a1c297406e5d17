"""Write the opinions corpus: short statements in which negation counts both ways, and the verdicts that follow.

    python scripts/make_opinions.py --lexicon sentiment-lexicon.csv --out opinions.parquet

A row's `text` is its `statement` and ` verdict : great|good|okay|bad|terrible`. Statements come in pairs (`pair`) with
one word, one frame and opposite outcomes. A tenth of the words and of the subjects of the frames, chosen by hash, occur
only in rows whose `split` is "held-out": there both are new.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from opinion_frames import CONSEQUENCES, Frame, frames, listed
from opinion_patterns import SHARES, Pattern, Side, patterns
from opinion_words import Word, fraction_of, held_out_words, read_lexicon, stem, words_of
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
    parser.add_argument("--out", type=Path, required=True, help="parquet file")
    parser.add_argument("--pairs", type=int, default=70_000, help="pairs of statements to train on")
    parser.add_argument("--held-out-pairs", type=int, default=2_000)
    parser.add_argument("--held-out-share", type=float, default=0.1, help="of the words and of the frames' subjects")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


class Material:
    """What the pairs of one split are drawn from: its words by group and polarity, its frames, all patterns."""

    def __init__(self, words: dict[str, list[Word]], frames: list[Frame], barred: set[str]):
        self.words = {(g, s): [w for w in ws if w.polarity == s] for g, ws in words.items() for s in (1, -1)}
        self.people = [f for f in frames if f.person]
        self.things = [f for f in frames if not f.person]
        self.barred = barred
        self.patterns: dict[str, list[Pattern]] = {}
        for pattern in patterns():
            if any(self.words[g, s] for g in pattern.groups for s in (1, -1)):
                self.patterns.setdefault(pattern.kind, []).append(pattern)

    def allows(self, text: str) -> bool:
        """Whether a text is free of the words of the other split."""
        return not any(stem(token.strip(".,!")) in self.barred for token in text.replace("'", " ").split())


def split_material(lexicon: dict[str, float], share: float) -> dict[str, Material]:
    """Divide words and frames; held-out rows have only held-out ones, training rows none of them."""
    words, out = words_of(lexicon), set()
    out = held_out_words(words, share)
    subjects = sorted({f.subject for f in frames()}, key=fraction_of)
    unseen = set(subjects[: round(share * len(subjects))])
    parts = {}
    for name, held in (("train", False), ("held-out", True)):
        mine = {g: [w for w in ws if (stem(w.base) in out) == held] for g, ws in words.items()}
        fitting = [f for f in frames() if (f.subject in unseen) == held]
        parts[name] = Material(mine, fitting, set() if held else out)
    return parts


def draw_pair(material: Material, rng: random.Random) -> list[dict] | None:
    """Draw a pattern, a frame and words; return the pair's two rows, or None if they do not fit each other."""
    kinds = list(material.patterns)
    kind = rng.choices(kinds, [SHARES[k] for k in kinds])[0]
    pattern, sign = rng.choice(material.patterns[kind]), rng.choice((1, -1))
    person = rng.random() < 0.35
    groups = [g for g in pattern.groups if person or g != "personal"]
    pool = {s: [w for g in groups for w in material.words[g, s]] for s in (1, -1)}
    if person:
        pool = {s: [w for w in ws if w.form not in THINGS_ONLY.split()] for s, ws in pool.items()}
    if len(pool[sign]) < 2 or len(pool[-sign]) < 2:
        return None
    frame = rng.choice(material.people if person else material.things)
    words = dict(zip("XY", rng.sample(pool[sign], 2), strict=True)) | dict(
        zip("ZW", rng.sample(pool[-sign], 2), strict=True)
    )
    end = rng.choice(ENDS)
    rows = [row_of(pattern, side, frame, words, end) for side in (pattern.plain, pattern.negated)]
    return rows if all(material.allows(row["statement"]) for row in rows) else None


def row_of(pattern: Pattern, side: Side, frame: Frame, words: dict[str, Word], end: str) -> dict:
    """Return one side of a pair."""
    sentence, word = write(side, frame, words), words["X"]
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
        if pair is None or pair[0]["statement"] + pair[1]["statement"] in seen:
            continue
        seen.add(pair[0]["statement"] + pair[1]["statement"])
        count -= 1
        for row in pair:
            row = follow(row, material, rng) if split == "train" else row
            text = f"{row['statement']} verdict : {row['verdict']}"
            yield {"text": text, "split": split, **row, "pair": f"{split} {len(seen)}"}


def corpus(lexicon: dict[str, float], pairs: dict[str, int], share: float, seed: int) -> list[dict]:
    """Return all rows: the same for the same arguments."""
    parts = split_material(lexicon, share)
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
    counts = {"train": args.pairs, "held-out": args.held_out_pairs}
    rows = corpus(read_lexicon(args.lexicon), counts, args.held_out_share, args.seed)
    pq.write_table(pa.Table.from_pylist(rows), args.out, compression="zstd")
    for split in counts:
        some = [row for row in rows if row["split"] == split]
        words, carriers = ({row[key] for row in some} for key in ("word", "frame"))
        print(f"{split}: {len(some)} rows, {len(words)} words, {len(carriers)} frames")
        print("  best rule that sees only", ", ".join(f"{k} {100 * v:.1f} %" for k, v in balance(some).items()))
        for column in ("verdict", "kind", "negator", "distance"):
            values = [row[column] for row in some]
            print(f"  {column}:", ", ".join(f"{v} {values.count(v)}" for v in sorted(set(values), key=str)))


if __name__ == "__main__":
    main()
