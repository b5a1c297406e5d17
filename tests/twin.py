"""A planted twin of ts-medium: the ids, layer and SAE names of the published one, at a width that runs in seconds.

Its layer 4 holds a not-good / not-bad pair whose eigenvalues, input features and activations follow from the numbers
below. `Reference` works them out in float64 from those numbers alone, without the weights and without the library.
"""

import json
import math
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from hub_server import contents

from bilens.circuits.compiled import Compiled, Move, Plan, Product, Shape, compile_plan

BAD, GOOD, NEGATED = (326, 1376, 1636, 123, 990, 1929, 491, 947), (882, 1395), (240, 766, 1604)
NOT_GOOD, NOT_BAD, OTHER = 1882, 1179, 2000
VALUES = (0.62217, -0.66281)  # of not-good
OPPOSED = (-0.63, 0.69)  # of not-bad, whose decoder has this cosine with not-good's:
COSINE = -0.975
RUNNERS_UP = {461: 0.9, 111: 0.8, 1219: 0.7}  # |λ₁| + |λ₂| of those that follow in the ranking
ANGLE = math.pi / 4  # of the eigenvectors between negation and sentiment
SOURCES, ALWAYS = (10, 11, 12), 20
TOPICS, BACKGROUND = tuple(range(21, 57)), tuple(range(1, 37))  # input features of every word, and outputs of those
SHAPE = Shape(6, 4, 160, 288, 8, 48, 13, 30)  # 2,080 features, as many as the ids need
K, EPS = SHAPE.k, 1e-8
MODEL, SCOPE = "tdooms/ts-medium", "tdooms/ts-medium-scope"
NAMES = ("4-resid-mid-x4-k30", "4-mlp-out-x4-k30")


def directions() -> tuple[dict[int, float], dict[int, float]]:
    """Return negation and sentiment as unit combinations of their features, bad positive and good negative."""
    negation = dict.fromkeys(NEGATED, 3**-0.5)
    sentiment = {f: (1 if f in BAD else -1) * (0.5 + 0.1 * i) for i, f in enumerate(BAD + GOOD)}
    size = math.sqrt(sum(v * v for v in sentiment.values()))
    return negation, {f: v / size for f, v in sentiment.items()}


def eigenvectors() -> list[dict[int, float]]:
    """Return the two planted eigenvectors."""
    negation, sentiment = directions()
    c, s = math.cos(ANGLE), math.sin(ANGLE)
    turned = ((c, s), (-s, c))
    return [{f: a * v for f, v in negation.items()} | {f: b * v for f, v in sentiment.items()} for a, b in turned]


def rank_two(out: int, values: tuple[float, float]) -> list[Product]:
    """Return the products of `Σ λ v vᵀ`, each unordered pair once."""
    vectors, features = eigenvectors(), NEGATED + BAD + GOOD
    found = []
    for n, i in enumerate(features):
        for j in features[n:]:
            value = sum(one * v[i] * v[j] for one, v in zip(values, vectors, strict=True))
            found.append(Product(out, i, j, value if i == j else 2 * value))
    return found


def make_plan() -> Plan:
    """Return the circuit."""
    draw = random.Random(0)
    rest = math.sqrt(1 - COSINE**2)
    left = tuple((wanted - COSINE * own) / rest for wanted, own in zip(OPPOSED, VALUES, strict=True))
    products = rank_two(NOT_GOOD, VALUES) + rank_two(OTHER, left)
    products += [Product(NOT_GOOD, TOPICS[0], TOPICS[i], 0.1 + 0.01 * i) for i in (3, 5, 7)]  # beyond the two
    for out, topic in zip(BACKGROUND, TOPICS, strict=True):
        products += [Product(out, ALWAYS, topic, 0.05 + 0.002 * out), Product(out, topic, topic, 0.02)]
    for n, (out, strength) in enumerate(RUNNERS_UP.items()):
        products += [Product(out, TOPICS[n], TOPICS[-1 - n], strength)]
    spoken = [
        "not",
        "never",
        "no",
        "bad",
        "good",
        *(f"s{f}" for f in (BAD + GOOD)[1:-1]),
        *(f"w{i}" for i in range(12)),
    ]
    own = dict(zip(spoken, [*SOURCES, BAD[0], GOOD[0]], strict=False))
    own |= {f"s{f}": f for f in (BAD + GOOD)[1:-1]}
    words = {}
    for word in spoken:
        words[word] = {ALWAYS: 1.5} | {t: draw.uniform(0.3, 1.2) for t in draw.sample(TOPICS, 32)}
        words[word] |= {own[word]: 2.5} if word in own else {}
    pairs = zip(SOURCES, NEGATED, strict=True)
    moves = [Move(source, target, 0.6 + 0.1 * i) for i, (source, target) in enumerate(pairs)]
    says = {word: {out: draw.uniform(-1, 1) for out in draw.sample(BACKGROUND, 6)} for word in spoken}
    return Plan(words, products, moves, says | {"good": {NOT_BAD: 0.4}}, ALWAYS, shape=SHAPE)


def build(seed: int = 0) -> Compiled:
    """Compile the circuit; not-bad then shares most of not-good's direction."""
    made = compile_plan(make_plan(), generator=torch.Generator().manual_seed(seed))
    out = made.out.clone()
    out[NOT_BAD] = COSINE * out[NOT_GOOD] + math.sqrt(1 - COSINE**2) * out[OTHER]
    return replace(made, out=out)


def files(folder: Path, seed: int = 0) -> dict[str, dict[str, bytes]]:
    """Build the twin in a folder; return its files by repository and name.

    Its SAEs are called by the published names, which say 4x: the twin is narrower, with as many features.
    """
    build(seed).save(folder)
    scope = {name.replace("-x13-", "-x4-"): data for name, data in contents(folder / "scope").items()}
    return {MODEL: contents(folder / "model"), SCOPE: scope}


def make_texts(n: int, seed: int = 0, length: int = 40) -> list[str]:
    """Draw texts in which a quarter of the words negate."""
    draw, words = random.Random(seed), list(make_plan().words)
    pick = lambda: draw.choice(words[:3] if draw.random() < 0.25 else words[3:])  # noqa: E731
    return [" ".join(pick() for _ in range(length)) for _ in range(n)]


def write_texts(path: Path, texts: list[str]) -> Path:
    """Write texts as a corpus that the script reads."""
    path.write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))
    return path


def top_k(z: np.ndarray, k: int = K) -> np.ndarray:
    """Keep the k largest of each row."""
    kept = np.zeros_like(z)
    at = np.argsort(-z, axis=1)[:, :k]
    np.put_along_axis(kept, at, np.take_along_axis(z, at, 1), 1)
    return kept


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Return the correlation."""
    return float(np.corrcoef(a, b)[0, 1])


@dataclass
class Reference:
    """What the plan says of some texts, in float64: no weights, no directions, no library.

    Columns of `z` are the input features in `inputs`, columns of `y` the output features in `outputs`, each at right
    angles to all others; not-bad is none of these but a mixture of two.
    """

    texts: list[str]

    def __post_init__(self):
        self.plan = make_plan()
        self.inputs, self.outputs = self.plan.inputs, [f for f in self.plan.outputs if f != NOT_BAD]
        self.i = {f: n for n, f in enumerate(self.inputs)}
        self.o = {f: n for n, f in enumerate(self.outputs)}
        self.rows = [["[BOS]", *text.split()] for text in self.texts]
        self.z = np.concatenate([self.stream(row) for row in self.rows])
        self.text = np.concatenate([[False] + [True] * (len(row) - 1) for row in self.rows])

    def stream(self, words: list[str]) -> np.ndarray:
        """Return the residual stream before the MLP, a row for each word."""
        z = np.zeros((len(words), len(self.inputs)))
        for n, word in enumerate(words):
            for f, value in self.plan.codes(word).items():
                z[n, self.i[f]] = value
        rms, moved = self.rms(z), z.copy()
        for move in self.plan.moves:
            for n in range(len(words)):
                near = [m for m in range(max(0, n - 3), n) if z[m, self.i[move.source]]]
                if near:
                    moved[n, self.i[move.target]] += move.value * z[near[0], self.i[move.source]] / rms[near[0], 0]
        return moved

    @staticmethod
    def rms(*parts: np.ndarray) -> np.ndarray:
        """Return the root mean square of a stream given by its parts at right angles."""
        return np.sqrt(sum((part**2).sum(1, keepdims=True) for part in parts) / SHAPE.d_model + EPS)

    def matrix(self, feature: int) -> np.ndarray:
        """Return a feature's interaction matrix among `inputs`."""
        if feature == NOT_BAD:
            return COSINE * self.matrix(NOT_GOOD) + math.sqrt(1 - COSINE**2) * self.matrix(OTHER)
        Q = np.zeros((len(self.inputs),) * 2)
        for one in self.plan.products:
            if one.out == feature:
                Q[self.i[one.left], self.i[one.right]] += one.value / 2
                Q[self.i[one.right], self.i[one.left]] += one.value / 2
        return Q

    def layer(self, z: np.ndarray) -> np.ndarray:
        """Return what the MLP writes, by output feature."""
        x = z / self.rms(z)
        return np.stack([np.einsum("ni,ij,nj->n", x, self.matrix(f), x) for f in self.outputs], 1)

    def codes(self, y: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Return the activations of the output SAE, and the features they are of."""
        mixed = COSINE * y[:, self.o[NOT_GOOD]] + math.sqrt(1 - COSINE**2) * y[:, self.o[OTHER]]
        return top_k(np.concatenate((y, mixed[:, None]), 1)), [*self.outputs, NOT_BAD]

    def loss(self, splice: str | None = None) -> float:
        """Return the mean loss, with an SAE's reconstruction in place of what it reads at all words but BOS."""
        z = np.where(self.text[:, None], top_k(self.z), self.z) if splice == "resid-mid" else self.z
        y = self.layer(z)
        if splice == "mlp-out":
            kept, _ = self.codes(y)
            told = kept[:, :-1].copy()
            told[:, self.o[NOT_GOOD]] += COSINE * kept[:, -1]
            told[:, self.o[OTHER]] += math.sqrt(1 - COSINE**2) * kept[:, -1]
            y = np.where(self.text[:, None], told, y)
        words = self.plan.vocabulary
        U = np.zeros((len(words), len(self.outputs) + 1))
        columns = self.o | {NOT_BAD: len(self.outputs)}
        for word, said in self.plan.says.items():
            for f, value in said.items():
                U[words.index(word), columns[f]] = value
        return self._cross_entropy(z, y, U, words)

    def _cross_entropy(self, z: np.ndarray, y: np.ndarray, U: np.ndarray, words: list[str]) -> float:
        logits = (y / self.rms(z, y)) @ U[:, :-1].T  # not-bad's own direction in the model is not written to
        log = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        total, n, start = 0.0, 0, 0
        for row in self.rows:
            ids = [words.index(word) for word in row]
            total -= sum(log[start + m, ids[m + 1]] for m in range(len(row) - 1))
            n, start = n + len(row) - 1, start + len(row)
        return total / n

    def seen(self) -> tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]:
        """Return, at all words but BOS, the stream, what enters the MLP, and the activations by output feature."""
        z = self.z[self.text]
        kept, features = self.codes(self.layer(z))
        return z, z / self.rms(z), dict(zip(features, kept.T, strict=True))

    def spectrum(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """Return eigenvalues, strongest first, and eigenvectors as rows."""
        values, vectors = np.linalg.eigh(self.matrix(feature))
        order = np.argsort(-np.abs(values), kind="stable")
        return values[order], vectors[:, order].T

    def predicted(self, feature: int, x: np.ndarray, k: int) -> np.ndarray:
        """Predict by the k strongest eigenvectors."""
        values, vectors = self.spectrum(feature)
        return (x @ vectors[:k].T) ** 2 @ values[:k]
