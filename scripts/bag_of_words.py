"""A bag of words and pairs as a judge of sentences: the baseline that a model has to beat, and the weak teacher."""

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge, SGDClassifier
from sklearn.pipeline import Pipeline, make_pipeline

TOKEN = r"(?u)[a-z0-9]+(?:'[a-z]+)?|[!?]"
NEGATORS = """
not no never nor neither nothing nobody none nowhere cannot without hardly barely scarcely lacks lack lacking
"""
MARK = re.compile(r"\d\s*(/|out of)\s*(10|ten|5|five)\b")
TOP, NEUTRAL = 1.8, 0.5  # mean ratings from which a sentence is great, and up to which it is okay


def verdict_of(rating: float) -> str:
    """Return the verdict that a mean rating from -4 to 4 is given."""
    size = abs(rating)
    if size < NEUTRAL:
        return "okay"
    return ("great" if size >= TOP else "good") if rating > 0 else ("terrible" if size >= TOP else "bad")


def has_negator(text: str) -> bool:
    """Whether a text has a word that negates."""
    words = re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower().replace("’", "'"))
    return any(word in NEGATORS.split() or word.endswith("n't") for word in words)


def sentences_of(text: str) -> list[str]:
    """Split a review into sentences, at their ends and at line ends; sentences that name a mark are left out."""
    parts = re.split(r"(?<=[.!?])[\"')]*\s+|\n+", text.replace("<br />", " "))
    return [part.strip() for part in parts if part.strip() and not MARK.search(part)]


def read_columns(path: Path, *columns: str) -> list[list]:
    """Return columns of a parquet file as lists."""
    table = pq.read_table(path, columns=list(columns))
    return [table[column].to_pylist() for column in columns]


def vectorizer(least: int = 2) -> TfidfVectorizer:
    """Return tf-idf features of words and pairs of them."""
    return TfidfVectorizer(
        lowercase=True, token_pattern=TOKEN, ngram_range=(1, 2), min_df=least, sublinear_tf=True, dtype=np.float32
    )


def ridge(alpha: float = 1.0) -> Pipeline:
    """Return the baseline: ridge regression of the rating on words and pairs."""
    return make_pipeline(vectorizer(), Ridge(alpha=alpha))


def judge_of_reviews() -> Pipeline:
    """Return a classifier of whole reviews."""
    return make_pipeline(vectorizer(5), LogisticRegression(C=30.0, solver="liblinear"))


def judge_of_sentences(seed: int) -> Pipeline:
    """Return a classifier of sentences that have their review's label, many and noisy."""
    return make_pipeline(
        vectorizer(3), SGDClassifier("log_loss", alpha=2e-6, max_iter=8, tol=None, random_state=seed, average=True)
    )
