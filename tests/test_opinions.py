"""Texts that end in a verdict: balanced, the same every time, nothing held out in training; and the readout."""

import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import bag_of_words
import evaluate_verdicts
import make_opinions
import make_verdicts
import opinion_lexicon
from opinion_frames import Frame
from opinion_patterns import patterns, side
from opinion_words import ADJECTIVES, NOUNS, PERSONAL, VERBS, Word, held_out_words, stem, words_of
from opinions import negator, verdict, write

SAID = ("the", "film", "was", "not")
FILM = Frame("the film", "was", "film", False, "the film")
BAD = set(ADJECTIVES[ADJECTIVES.index("abhorrent") :].split())
BAD |= set(PERSONAL[PERSONAL.index("abusive") :].split()) | set(NOUNS[NOUNS.index("anger") :].split())
BAD |= set(VERBS[VERBS.index("avoid") :].replace("|", " ").split())


@pytest.fixture(scope="module")
def lexicon():
    """Ratings made up for the listed words: the lists put good words first, and the sizes vary."""
    words = [w for text in (ADJECTIVES, PERSONAL, NOUNS, VERBS) for w in text.replace("|", " ").split()]
    draw = random.Random(0)
    return {word: (-1 if word in BAD else 1) * draw.uniform(1, 3.4) for word in dict.fromkeys(words)}


@pytest.fixture(scope="module")
def counts(lexicon):
    """Uses made up for the listed words, and for words of no list: a fifth of the latter nouns."""
    found = {word: Counter(all=50) for word in lexicon}
    more = [f"word{letter}{other}" for letter in "abcdef" for other in "bcdfghklmnp"]
    lexicon |= {word: 2.0 if i % 2 else -2.0 for i, word in enumerate(more)}
    for i, word in enumerate(more):
        liked = {"positive": 20, "negative": 2} if i % 2 else {"positive": 2, "negative": 20}
        found[word] = Counter({"all": 50, "adjective" if i % 5 else "noun": 20} | liked)
    return found


@pytest.fixture(scope="module")
def rows(lexicon, counts):
    return make_opinions.corpus(lexicon, counts, {"train": 1500, "held-out": 200}, 0.1, seed=3)


def word(form, rating, base=None):
    return Word(form, base or form, rating, "adjective")


def test_the_same_arguments_give_the_same_corpus(lexicon, counts, rows):
    pairs = {"train": 1500, "held-out": 200}
    assert make_opinions.corpus(lexicon, counts, pairs, 0.1, seed=3) == rows
    assert make_opinions.corpus(lexicon, counts, pairs, 0.1, seed=4) != rows
    assert len({row["statement"] for row in rows if row["split"] == "held-out"}) == 400


def test_neither_word_nor_negator_tells_the_outcome(rows):
    train = [row for row in rows if row["split"] == "train"]
    rules = make_opinions.balance(train)
    assert rules["word"] == rules["frame"] == rules["nothing"] == 0.5
    assert rules["negator"] < 0.56  # 3,000 statements: two standard errors are 0.02, and each rare negator adds some
    assert rules["negated"] < 0.56
    assert rules["polarity and negated"] == 1


def test_a_pair_has_opposite_outcomes(rows):
    sides = {}
    for row in rows:
        if row["kind"] != "mixed":
            sides.setdefault(row["pair"], set()).add(row["verdict"] in ("great", "good"))
    assert all(outcomes == {True, False} for outcomes in sides.values())


def test_held_out_words_and_subjects_never_occur_in_training(lexicon, counts, rows):
    stems = opinion_lexicon.held_out_stems(lexicon, opinion_lexicon.all_words(lexicon, counts), 0.1)
    assert held_out_words(words_of(lexicon), 0.1) <= stems
    assert any(found.startswith("word") for found in stems)
    train = [row for row in rows if row["split"] == "train"]
    tokens = {token.strip(".,!") for row in train for token in row["text"].replace("'", " ").split()}
    assert stems
    assert not stems & {stem(token) for token in tokens}
    held = [row for row in rows if row["split"] == "held-out"]
    said = [row["word"] for row in held if row["kind"] == "adjective"]
    assert all({stem(word), stem(word.removeprefix("un"))} & stems for word in said)
    assert not {row["frame"] for row in held} & {row["frame"] for row in train}


def test_reviews_tell_what_a_word_is_and_whether_it_keeps_its_sign(tmp_path):
    texts = [
        "A zesty film, so zesty. The mirth of it.",
        "It was very zesty! No mirth, no gloom.",
        "Very slow. Very grim.",
    ]
    labels = ["positive", "positive", "negative"]
    path = tmp_path / "reviews.parquet"
    pq.write_table(pa.table({"text": texts * 9, "label": labels * 9}), path)
    lexicon = {"zesty": 1.5, "mirth": 2.0, "gloom": -2.0, "slow": -1.0, "grim": 1.2, "x-rated": -1.0}
    counts = opinion_lexicon.count(lexicon, path)
    assert counts["zesty"] == Counter(all=27, adjective=18, attribute=9, positive=18)
    assert "x-rated" not in counts
    groups = {word: opinion_lexicon.group_of(word, lexicon[word], found) for word, found in counts.items()}
    assert groups == {"zesty": "adjective", "mirth": "noun", "gloom": None, "slow": "adjective", "grim": None}


def test_common_words_come_often():
    words = [word("common", 2.0)._replace(weight=9.0), word("rare", 2.0), word("odd", 2.0)]
    drawn = [make_opinions.sample(words, random.Random(seed)) for seed in range(200)]
    assert all(first.form != second.form for first, second in drawn)
    assert sum(first.form == "common" for first, _ in drawn) > 140


def test_related_forms_are_held_out_together():
    assert stem("amusing") == stem("amused") == stem("amuse")
    assert not held_out_words({"adjective": [word("bad", -2.5), word("good", 1.9)]}, 1.0)


@pytest.mark.parametrize(
    ("template", "said", "expected"),
    [
        ("S IS X", word("funny", 1.9), "good"),
        ("S IS X", word("gorgeous", 3.0), "great"),
        ("S IS very X +", word("funny", 1.9), "great"),
        ("S IS X", word("dull", -1.7), "bad"),
        ("S IS X", word("bad", -2.5), "bad"),
        ("S IS very X +", word("bad", -2.5), "terrible"),
        ("*S IS not X", word("gorgeous", 3.0), "bad"),
        ("*S IS not at all X +", word("funny", 1.9), "terrible"),
        ("*S IS not X", word("bad", -2.5), "good"),
        ("*S IS not very X ~", word("dull", -1.7), "good"),
        ("nobody said that S ISNT X", word("dull", -1.7), "bad"),
    ],
)
def test_verdicts(template, said, expected):
    assert verdict(said, side(template)) == expected


def test_statements_are_written_as_people_write_them():
    words = {"X": word("original", 1.3), "Y": word("funny", 1.9), "Z": word("dull", -1.7), "W": word("sad", -2.1)}
    assert write(side("*S ISNT a X N"), FILM, words) == "the film wasn't an original film"
    boys = Frame("the boys", "are", "boys", True, "the boys", before="well ,", after=", i think")
    assert write(side("S IS a very X N +"), boys, words) == "well, the boys are very original boys, i think"
    hated = {**words, "X": word("hated", -3.2, "hate")}
    assert write(side("*i didn't V O"), FILM, hated) == "i didn't hate the film"


def test_every_pattern_fills_all_its_slots():
    words = {slot: word(f"word{slot.lower()}", 2.0) for slot in "XYZW"}
    for pattern in patterns():
        for one in (pattern.plain, pattern.negated):
            text = write(one, FILM, words)
            assert not set(text.split()) & {"S", "O", "N", "X", "Y", "Z", "W", "V", "IS", "ISNT", "unX", "|"}
            assert text == text.lower()
            assert verdict(words["X"], one) in ("great", "good", "bad", "terrible")


def test_the_distance_counts_words_from_the_negator():
    assert negator("it was not good", "good") == ("not", 1)
    assert negator("it wasn't a very good film", "good") == ("n't", 3)
    assert negator("it was good, not bad", "good") == ("", 0)


def test_ratings_become_verdicts():
    ratings = (2.0, 1.0, 0.2, -0.2, -1.0, -2.0)
    assert [bag_of_words.verdict_of(r) for r in ratings] == ["great", "good", "okay", "okay", "bad", "terrible"]
    assert bag_of_words.has_negator("It didn't work.")
    assert not bag_of_words.has_negator("A notable knot")


def test_copies_of_a_sentence_are_held_out_together():
    long = "a film of some length that is copied with a change at its end"
    splits = {make_verdicts.split_of(f"{n} {long}", 0.3) for n in range(40)}
    assert splits == {"train", "held-out"}
    for n in range(40):
        copies = (f"{n} {long}", f'"{n}, {long.upper()}!"', f"{n} {long} (again)")
        assert len({make_verdicts.split_of(copy, 0.3) for copy in copies}) == 1


def test_the_teacher_is_believed_where_the_review_agrees():
    liked = make_verdicts.Candidate("fine", 3.0, known=True)
    guess = make_verdicts.Candidate("fine", 0.4, known=False)
    assert make_verdicts.combine(1.0, liked) == pytest.approx(1.3)
    assert make_verdicts.combine(-1.0, liked) is None
    assert make_verdicts.combine(1.0, guess) is None
    assert make_verdicts.combine(0.1, liked) == pytest.approx(0.1)


@pytest.fixture
def judge(make_model):
    """A random model whose tokenizer knows the verdicts."""
    words = ["[UNK]", "[BOS]", "[EOS]", "verdict", ":", "great", "good", "okay", "bad", "terrible", *SAID]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    return make_model(tokenizer=tokenizer, n_ctx=12)


def test_the_readout_is_the_log_odds_after_the_prompt(judge):
    sentences = ["the film was good", "film", "the film was not " * 8]
    odds = evaluate_verdicts.log_odds(judge, sentences, batch=2)
    logits = judge("the film was good verdict :")[0, -1].softmax(-1)
    expected = torch.log(logits[5] + logits[6]) - torch.log(logits[8] + logits[9])
    assert odds[0] == pytest.approx(expected.item(), abs=1e-5)
    alone = [evaluate_verdicts.log_odds(judge, [sentence])[0] for sentence in sentences]
    assert np.allclose(odds, alone, atol=1e-5)


def test_verdicts_must_be_single_tokens(judge):
    with pytest.raises(ValueError, match="single tokens"):
        evaluate_verdicts.verdict_ids(judge, ("great good",))


def test_flips_are_counted_by_polarity_and_distance():
    def rows_of(pair, polarity, distance):
        base = {"pair": pair, "polarity": polarity, "kind": "adjective"}
        return [base | {"negated": False, "distance": 0}, base | {"negated": True, "distance": distance}]

    rows = rows_of("a", 1, 1) + rows_of("b", 1, 3) + rows_of("c", -1, 1)
    found = evaluate_verdicts.flips(rows, np.array([1.0, -1.0, 1.0, 0.5, -1.0, 2.0]))
    assert found["good"] == {"pairs": 2, "flips": 0.5, "turns": 0.5, "plain": 1.0, "negated": 0.5}
    assert found["good, distance 3"]["flips"] == 0
    assert found["bad, distance 1"]["flips"] == 1
    found = evaluate_verdicts.flips(rows[-2:], np.array([1.0, -2.0]))["bad"]
    assert (found["turns"], found["flips"]) == (1, 0)  # the negator turns what the model takes the word for


def test_film_sentences_are_scored_by_sign_and_correlation():
    ratings = (2.0, -2.0, 0.1, -1.0)
    texts = ("good", "bad", "fine", "not good")
    rows = [make_verdicts.row_of(t, r, "movieReviewSnippets", "train") for t, r in zip(texts, ratings, strict=True)]
    scores = make_verdicts.film_scores(rows, np.array([1.0, -1.0, -5.0, 3.0]))
    assert scores["accuracy on 3 film sentences"] == pytest.approx(2 / 3)
    assert scores["accuracy on 1 film sentences with a negator"] == 0
