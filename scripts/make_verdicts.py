"""Write documents that end in a verdict: rated sentences, ends of labelled reviews, and sentences judged by a teacher.

    python scripts/make_verdicts.py --rated rated-sentences.train.parquet --reviews movie-reviews.train.parquet \
        --tokenizer bilens/assets/bilens-mini/tokenizer.json --out verdicts.parquet --weak verdicts-weak.parquet

A row's `text` is its `sentence` and ` verdict : great|good|okay|bad|terrible`. Rated sentences are held out by the hash
of how they begin, so copies stay together; reviews by `corpora.is_held_out`, like the texts themselves. The
teacher, a bag of words, has seen no held-out text; of its sentences those are kept on which it and the review agree.
"""

import argparse
import hashlib
import json
import random
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bag_of_words import (
    NEUTRAL,
    TOP,
    has_negator,
    judge_of_reviews,
    judge_of_sentences,
    read_columns,
    sentences_of,
    vectorizer,
    verdict_of,
)
from corpora import is_held_out
from scipy.sparse import csr_matrix, hstack
from sklearn.linear_model import Ridge
from tokenizers import Tokenizer

STARS = {1: -3.0, 2: -2.0, 3: -1.5, 4: -1.0, 7: 1.0, 8: 1.5, 9: 2.0, 10: 3.0}  # a review's mark as a rating


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rated", type=Path, required=True, help="parquet with columns source, sentiment, text")
    parser.add_argument("--reviews", type=Path, required=True, help="parquet with columns label, rating, text")
    parser.add_argument("--tokenizer", type=Path, required=True, help="counts tokens")
    parser.add_argument("--out", type=Path, required=True, help="parquet of rated sentences and ends of reviews")
    parser.add_argument("--weak", type=Path, required=True, help="parquet of sentences judged by the teacher")
    parser.add_argument("--weak-rows", type=int, default=300_000)
    parser.add_argument("--holdout", type=float, default=0.1, help="fraction of the rated sentences")
    parser.add_argument("--holdout-reviews", type=float, default=0.01, help="fraction, as for train_language.py")
    parser.add_argument("--end", type=int, default=100, help="tokens of a review's end, at most")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def split_of(text: str, fraction: float) -> str:
    """Return held-out or train, by the first 40 letters and digits: copies with small changes stay together."""
    begin = re.sub(r"[^a-z0-9]", "", text.lower())[:40]
    return "held-out" if int(hashlib.sha256(begin.encode()).hexdigest()[:12], 16) < fraction * 16**12 else "train"


def row_of(sentence: str, rating: float, source: str, split: str, weak: bool = False) -> dict:
    """Return a row."""
    sentence = " ".join(sentence.split())
    verdict = verdict_of(rating)
    text = f"{sentence} verdict : {verdict}"
    row = {"text": text, "split": split, "source": source, "sentence": sentence}
    return row | {"rating": rating, "verdict": verdict, "weak": weak}


def rated_rows(path: Path, fraction: float) -> list[dict]:
    """Return the rated sentences."""
    columns = read_columns(path, "source", "sentiment", "text")
    return [row_of(text, r, source, split_of(text, fraction)) for source, r, text in zip(*columns, strict=True)]


class Review(NamedTuple):
    """A review, its mark (0: unknown) and split."""

    text: str
    mark: int
    split: str


def read_reviews(path: Path, fraction: float) -> list[Review]:
    """Return the distinct reviews."""
    texts, marks = read_columns(path, "text", "rating")
    both = dict(zip(texts, marks, strict=True))
    return [Review(t, m, "held-out" if is_held_out(t, fraction) else "train") for t, m in both.items()]


def end_of(text: str, tokenizer: Tokenizer, most: int) -> str:
    """Return the last whole sentences that have at most so many tokens, of a very long last one nothing."""
    kept, count = [], 0
    for sentence in reversed(sentences_of(text)):
        count += len(tokenizer.encode(sentence, add_special_tokens=False).ids)
        if count > most:
            break
        kept.append(sentence)
    return " ".join(reversed(kept))


def review_rows(reviews: list[Review], tokenizer: Tokenizer, most: int, rng: random.Random) -> list[dict]:
    """Return the ends of the reviews with a mark; each has its own greatest length."""
    rows = []
    for review in reviews:
        if review.mark:
            end = end_of(review.text, tokenizer, rng.randint(most // 3, most))
            rows += [row_of(end, STARS[review.mark], "review", review.split)] if end else []
    return rows


# -- the teacher ------------------------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """A sentence of a review, and what the review says about it: its mark as a rating, known or judged."""

    sentence: str
    stars: float
    known: bool


class Teacher:
    """Ridge on words, pairs and the log-odds of a classifier trained on sentences labelled by their reviews."""

    def __init__(self, sentences: list[str], labels: list[bool], rated: list[dict], seed: int):
        self.judge = judge_of_sentences(seed).fit(sentences, labels)
        self.words = vectorizer().fit([row["sentence"] for row in rated])
        self.ridge = Ridge(alpha=1.0)
        self.ridge.fit(self.features([row["sentence"] for row in rated]), [row["rating"] for row in rated])

    def features(self, sentences: list[str]) -> csr_matrix:
        """Return the features of sentences."""
        odds = np.clip(self.judge.decision_function(sentences), -6, 6)[:, None]
        return hstack([self.words.transform(sentences), csr_matrix(0.5 * odds)]).tocsr()

    def __call__(self, sentences: list[str]) -> np.ndarray:
        """Rate sentences."""
        return self.ridge.predict(self.features(sentences))


def candidates(reviews: list[Review]) -> list[Candidate]:
    """Return the sentences of 5 to 45 words of the reviews to train on; unmarked reviews are judged first."""
    train = [review for review in reviews if review.split == "train"]
    marked = [review for review in train if review.mark]
    judge = judge_of_reviews().fit([r.text for r in marked], [r.mark > 5 for r in marked])
    bare = [review for review in train if not review.mark]
    judged = np.clip(judge.decision_function([r.text for r in bare]), -3, 3)
    both = [*((r, STARS[r.mark], True) for r in marked), *zip(bare, judged.tolist(), [False] * len(bare), strict=True)]
    return [
        Candidate(sentence, stars, known)
        for review, stars, known in both
        for sentence in sentences_of(review.text)
        if 5 <= len(sentence.split()) <= 45
    ]


def weak_rows(reviews: list[Review], rated: list[dict], count: int, seed: int) -> tuple[list[dict], Teacher]:
    """Return sentences rated by the teacher and their review together, as many of every verdict as there can be."""
    rng = random.Random(seed)
    found = list({c.sentence: c for c in candidates(reviews)}.values())
    rng.shuffle(found)
    known = [c for c in found if c.known]
    train = [row for row in rated if row["split"] == "train"]
    teacher = Teacher([c.sentence for c in known], [c.stars > 0 for c in known], train, seed)
    pool = found[: 6 * count]
    marks = teacher([c.sentence for c in pool])
    shares = {"great": 0.24, "good": 0.22, "okay": 0.08, "bad": 0.22, "terrible": 0.24}
    room = {verdict: round(share * count) for verdict, share in shares.items()}
    rows = []
    for candidate, mark in zip(pool, marks.tolist(), strict=True):
        rating = combine(mark, candidate)
        verdict = None if rating is None else verdict_of(rating)
        if verdict and room[verdict]:
            room[verdict] -= 1
            source = "sentence of a labelled review" if candidate.known else "sentence of an unlabelled review"
            rows.append(row_of(candidate.sentence, rating, source, "train", weak=True))
    return rows, teacher


def combine(mark: float, candidate: Candidate) -> float | None:
    """Return the rating of a sentence, None if the teacher and the review do not agree, or are not sure enough."""
    if abs(mark) < 0.2:
        return mark
    sure = abs(candidate.stars) >= (0 if candidate.known else 1.2)
    if not sure or mark * candidate.stars < 0 or abs(mark) < 0.4:
        return None
    return float(np.sign(mark)) * max(NEUTRAL, 1.3 * abs(mark))


# -- output -----------------------------------------------------------------------------------------------------------


def film_scores(rated: list[dict], predicted: np.ndarray) -> dict[str, float]:
    """Return accuracies of the sign on film sentences rated beyond 0.7, all and with a negator; the correlation."""
    film = [(row, p) for row, p in zip(rated, predicted, strict=True) if row["source"] == "movieReviewSnippets"]
    clear = [(row, p) for row, p in film if abs(row["rating"]) > 0.7]
    negated = [(row, p) for row, p in clear if has_negator(row["sentence"])]
    scores = {
        f"accuracy on {len(some)} {name}": float(np.mean([(row["rating"] > 0) == (p > 0) for row, p in some]))
        for name, some in (("film sentences", clear), ("film sentences with a negator", negated))
    }
    return scores | {"correlation": float(np.corrcoef([row["rating"] for row, _ in film], [p for _, p in film])[0, 1])}


def sizes(rows: list[dict], tokenizer: Tokenizer) -> str:
    """Return the numbers of rows, tokens and verdicts of each source and split."""
    lines = []
    for source, split in sorted({(row["source"], row["split"]) for row in rows}):
        some = [row for row in rows if (row["source"], row["split"]) == (source, split)]
        tokens = sum(len(e.ids) + 1 for e in tokenizer.encode_batch([row["text"] for row in some]))
        verdicts = [row["verdict"] for row in some]
        counts = ", ".join(f"{v} {verdicts.count(v)}" for v in ("great", "good", "okay", "bad", "terrible"))
        lines.append(f"{source}, {split}: {len(some)} rows, {tokens / 1e6:.3f}M tokens; {counts}")
    return "\n".join(lines)


def write(rows: list[dict], path: Path) -> None:
    """Write rows, with the thresholds."""
    thresholds = {"okay below": NEUTRAL, "great or terrible from": TOP, "stars": STARS}
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"thresholds": json.dumps(thresholds)})
    pq.write_table(table, path, compression="zstd")


def main() -> None:
    """Write both files and print their sizes."""
    args = parse_args()
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    rated, reviews = rated_rows(args.rated, args.holdout), read_reviews(args.reviews, args.holdout_reviews)
    rows = rated + review_rows(reviews, tokenizer, args.end, random.Random(args.seed))
    write(rows, args.out)
    print(sizes(rows, tokenizer), flush=True)
    weak, teacher = weak_rows(reviews, rated, args.weak_rows, args.seed)
    write(weak, args.weak)
    print(sizes(weak, tokenizer))
    unseen = [row for row in rated if row["split"] == "held-out"]
    print("the teacher on held-out sentences:", film_scores(unseen, teacher([row["sentence"] for row in unseen])))


if __name__ == "__main__":
    main()
