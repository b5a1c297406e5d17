"""Recurring shapes of interaction among the outputs of a layer, from weights alone, with p-values against null models.

Notation of the code: for one output feature, `M` is the interaction matrix in the residual basis, `D` the writers and
`Q = D M Dᵀ`. `T` holds its coefficients in units of their root mean square `σ` over all pairs: `t_ij = 2 Q_ij / σ`,
`t_ii = Q_ii / σ`, among the features with the strongest ones. A pair scores for either sign
`x±_ij = ± t_ij - |t_ii| - |t_jj|`, which is positive only if `[[Q_ii, Q_ij], [Q_ij, Q_jj]]` is indefinite: the square
of one direction, however its features overlap, scores nothing.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from einops import einsum, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bilens.tensor.bilinear import BilinearTensor

MOTIFS = ("outlier", "and", "xor", "negation", "copy")
NULLS = {  # and the motifs whose score each of them changes
    "readers": MOTIFS,
    "rotation": ("and", "xor", "negation", "copy"),
    "signs": ("and", "xor", "negation"),
    "untrained": MOTIFS,
}
_NUMBERS = 1 << 24  # held at once by the matrices of a chunk of outputs
_SEEDS = 8  # features from which a search for groups starts
_REFERENCES = 3  # features whose couplings may be the effects that negators flip
_ROUNDS = 4  # of coordinate ascent; it rarely moves after three
_TAIL = 0.1  # share of the null scores that the tail is fitted to
_EXCEEDANCES = 10  # with fewer null scores above it, a p-value comes from the tail
_LEAST_FOR_TAIL = 200
_PART = {"xor": "and", "negation": "xor"}  # what null models must not reach: a part of the motif may really be there
_SHARE = 0.5  # of the strongest weight, to be named in a group: planted groups are named best then
_OWN = ("rotation", "signs")  # null models that keep something of each output, which is compared with its own draws
_DRAWS = 8  # at least, of each output from those


@runtime_checkable
class Layer(Protocol):
    """What a search reads of a layer between two dictionaries; `circuits.FeatureLayer` is one."""

    tensor: BilinearTensor
    readers: Tensor
    writers: Tensor


# -- records ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False, eq=False)
class Group:
    """Input features that play one role in a motif, the strongest first, with their mean signed coefficients.

    Features with less than half the weight of the strongest are not named; most are there because they overlap with it.
    """

    role: str
    features: Int[Tensor, " k"]
    weights: Float[Tensor, " k"]

    def __repr__(self) -> str:
        top = ", ".join(f"#{f} {w:+.2g}" for f, w in zip(self.features.tolist(), self.weights.tolist(), strict=True))
        return f"{self.role}({top})"


@dataclass(frozen=True, repr=False, eq=False)
class Discovery:
    """One motif of one output feature."""

    out: int
    motif: str
    score: float
    p: float
    q: float
    groups: tuple[Group, ...]

    def __repr__(self) -> str:
        groups = " × ".join(map(repr, self.groups))
        return f"Discovery({self.motif} in #{self.out}, score={self.score:.3g}, q={self.q:.2g}: {groups})"


@dataclass(frozen=True, repr=False, eq=False)
class Null:
    """Scores of outputs of a null model, and the generalised-Pareto tail fitted to the highest tenth of them.

    `P(score > x) = 0.1 (1 + shape (x - threshold) / scale)^(-1/shape)` above the threshold. `scale` is NaN where no
    tail was fitted. The column of xor holds scores of "and", that of negation those of xor: see `search`. Scores are
    in units of `spread` from `center`: 1 and 0 but for models that keep something of each output, and then the standard
    deviation and mean of the output's own draws, of all others for a draw itself.
    """

    name: str
    motifs: tuple[str, ...]
    scores: Float[Tensor, "null motif"]
    threshold: Float[Tensor, " motif"]
    scale: Float[Tensor, " motif"]
    shape: Float[Tensor, " motif"]
    center: Float[Tensor, "#out motif"]
    spread: Float[Tensor, "#out motif"]

    def __repr__(self) -> str:
        return f"Null({self.name!r}, {len(self.scores)} outputs × {len(self.motifs)} motifs)"

    def p(self, scores: Float[Tensor, "out motif"]) -> Float[Tensor, "out motif"]:
        """Return p-values of scores, `(1 + #{null ≥ score}) / (1 + n)`, or from the tail if fewer than 10 are above."""
        scores = (scores.double() - self.center) / self.spread
        ordered = self.scores.T.sort(1).values.contiguous()
        above = len(self.scores) - torch.searchsorted(ordered, scores.T.contiguous()).T
        p = (1 + above).double() / (1 + len(self.scores))
        excess = (scores - self.threshold).clamp(min=0) / self.scale
        heavy = _TAIL * (1 + self.shape * excess).pow(-1 / self.shape.clamp(min=1e-6))
        tail = torch.where(self.shape > 1e-6, heavy, _TAIL * torch.exp(-excess))
        return torch.where((above < _EXCEEDANCES) & self.scale.isfinite(), tail, p)


@dataclass(frozen=True, repr=False, eq=False)
class Discoveries:
    """Scores, p- and q-values of all outputs and motifs, and those found at the wanted false discovery rate."""

    motifs: tuple[str, ...]
    score: Float[Tensor, "out motif"]
    p: Float[Tensor, "out motif"]  # the largest over the null models
    q: Float[Tensor, "out motif"]  # Benjamini-Hochberg over all outputs and motifs
    nulls: tuple[Null, ...]
    fdr: float
    found: tuple[Discovery, ...]  # lowest q first, then lowest p, ties by output

    def __repr__(self) -> str:
        first = f"; first: {self.found[0].motif} in #{self.found[0].out}" if self.found else ""
        tested = f"{len(self.score)} outputs × {len(self.motifs)} motifs"
        return f"Discoveries({len(self.found)} of {tested} at FDR {self.fdr:g}{first})"

    def of(self, motif: str) -> tuple[Discovery, ...]:
        """Return the discoveries of one motif, the most significant first."""
        _check_names("motif", [motif], self.motifs)
        return tuple(one for one in self.found if one.motif == motif)


# -- the search -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def search(
    layer: Layer | tuple[BilinearTensor, Float[Tensor, "n_out out"], Float[Tensor, "n_in inp"]],
    motifs: Sequence[str] | None = None,
    *,
    generator: torch.Generator,
    null: str | Sequence[str] = "readers",
    n: int = 2048,
    fdr: float = 0.05,
    features: int = 64,
    group: int = 8,
    tail: bool = True,
) -> Discoveries:
    """Score motifs in every output feature of a layer from its weights, and keep those that null models do not show.

    With `t`, `x±` as in the module's notation and groups of at most `group` features, disjoint, found by coordinate
    ascent from a few strong features (as in biclustering by large average submatrices, Shabalin et al. 2009):

    - outlier: `|λ₂| / edge`, the second eigenvalue of `M` over the bulk edge of the others (see `circuits.outliers`).
    - and: `max_{s,A,B} Σ_{a,b} x^s_ab / sqrt(|A||B|)`: large cross terms of one sign, small self terms
      (2410.08417, section 5.1 and figure 8).
    - xor: `max_{C,A,B} min(P, N)`, `P = Σ_{c,a} x⁺_ca / sqrt(|C||A|)`, `N = Σ_{c,b} x⁻_cb / sqrt(|C||B|)`: what the
      one group does to the output with C, the other undoes.
    - negation: the same of `y⁺_cp = min(e_p, -t_cp) - |t_cc|` and `y⁻_cp = min(-e_p, t_cp) - |t_cc|`: negators C
      flip the effects `e` of two opposite polarities. `e_p` is the self term `t_pp` or the coupling to a reference
      feature r, then as `y⁺_cp = min(x⁺_rp, x⁻_cp)` and `y⁻_cp = min(x⁻_rp, x⁺_cp)`; whichever scores higher.
    - copy: `max_k |d_kᵀ M d_k| / (|d_k|² ‖M‖_F)`, the cosine of `M` and the square of one feature.

    What the weights say of features that are never active together does not matter to the model, and this search
    cannot know: test what it finds with `circuits.predict` and `circuits.remove`, or search among fewer writers.

    Half of an xor may be there without the other, and the effects of a negation without negators. So xor scores are
    compared with what null models score for "and", a single block, and negation with what they score for xor.

    All scores are free of scale, so that null outputs are pooled. Rotation and signs keep something of each output, so
    there each is first compared with its own draws: scores become their distance from those in standard deviations.
    Null models:

    - readers: random directions in place of the readers. Is the output more structured than any direction?
    - rotation: `D → D R`, R random orthogonal: keeps `D Dᵀ` and the spectrum of `M`. Is the structure aligned with the
      features? Outliers do not change.
    - signs: the signs of all entries of `T` at random. Is the pattern of signs more than its magnitudes? A block of few
      coefficients can be no more surprising than their signs. Only beside another null model: similar features of an
      overcomplete dictionary have similar coefficients, which this one takes for a pattern. Alone it finds something in
      9 of 10 layers of random weights; the other three in 1 or 2 of 100.
    - untrained: Gaussian factors of the same norms. Is the output more structured than before training?

    Args:
        layer: A layer between two SAEs, or `(B, readers, writers)`. A constant leg is left out: no interaction.
        motifs: Which; all that every null model can test if `None`.
        generator: Source of the random numbers.
        null: Null model, or several: then a p-value is the largest of theirs.
        n: Number of null outputs for each null model; at least 8 for each output for rotation and signs.
        fdr: Wanted false discovery rate, over outputs × motifs (Benjamini-Hochberg).
        features: How many input features of each output are looked at for groups: those with the largest coefficient.
        group: Largest size of a group; a third of the features looked at if that is less.
        tail: Where fewer than 10 null scores reach a score, take its p-value from a generalised-Pareto tail
            (Knijnenburg et al. 2009), shape at least zero and scale one standard error up, which makes it conservative.
            Without it no p-value is below `1 / (n + 1)`.

    Returns:
        The discoveries, and all scores. Cost `n_in · d_model · (n_in + d_model)` multiplications for each output and
        null output, but for the signs, which cost little: 18 ms on one core for 1024 features of width 256, a minute
        for 1024 outputs and 2048 null outputs. 64 MiB (float32) of matrices at a time, and `n_out · features²` numbers
        for the signs.

    Raises:
        ValueError: An unknown motif or null model, one the other cannot test, a count below 1 or too low for a tail,
            readers or writers of another width, or numbers that are not finite.
    """
    null = (null,) if isinstance(null, str) else tuple(null)
    _check_names("null", null, tuple(NULLS))
    testable = tuple(motif for motif in MOTIFS if all(motif in NULLS[name] for name in null))
    motifs = testable if motifs is None else tuple(motifs)
    _check_names("motifs", motifs, MOTIFS)
    if untestable := [motif for motif in motifs if motif not in testable]:
        raise ValueError(f"motifs must be among {testable} for null={null}, got {untestable}")
    _check_counts(n, fdr, features, group, tail)
    B, readers, writers = layer if isinstance(layer, tuple) else (layer.tensor, layer.readers, layer.writers)
    _check_layer(B, readers, writers)
    B = _without_constant(B.detach())
    task = _Task(B, readers.detach().to(B.down), writers.detach().to(B.down), motifs, features, group)
    observed, strongest = task.observe("signs" in null)
    nulls = tuple(_fit(name, motifs, task.null(name, n, generator, strongest), len(readers), tail) for name in null)
    p = torch.stack([one.p(observed) for one in nulls]).amax(0)
    q = benjamini_hochberg(p)
    order = sorted((q <= fdr).nonzero().tolist(), key=lambda at: (q[at[0], at[1]].item(), p[at[0], at[1]].item(), at))
    groups = task.groups(order)
    found = tuple(
        Discovery(o, motifs[m], observed[o, m].item(), p[o, m].item(), q[o, m].item(), members)
        for (o, m), members in zip(order, groups, strict=True)
    )
    return Discoveries(motifs, observed, p, q, nulls, fdr, found)


def benjamini_hochberg(p: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return q-values of all p-values together, `q_(i) = min_{j ≥ i} N p_(j) / j` (Benjamini and Hochberg 1995)."""
    values, order = p.reshape(-1).sort()
    scaled = values * len(values) / torch.arange(1, len(values) + 1, device=p.device)
    q = scaled.flip(0).cummin(0).values.flip(0).clamp(max=1)
    return torch.empty_like(q).scatter(0, order, q).reshape(p.shape)


def split(Q: Float[Tensor, "n n"]) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Divide features into the two factors of their matrix's two strongest eigenvalues.

    If these have different signs, `λ₊ (v₊·z)² + λ₋ (v₋·z)² = (l·z)(r·z)` with `l, r = sqrt(λ₊) v₊ ± sqrt|λ₋| v₋`; for
    equal signs `l, r` are the two squares' own directions. A feature belongs to the factor on which it weighs more.

    Returns:
        For each feature 0 or 1, and its signed weight on that factor.
    """
    values, vectors = torch.linalg.eigh(Q)
    order = (
        values.abs().argsort(descending=True, stable=True)[:2].sort(descending=True).values
    )  # the larger value first
    one, two = (values[order].abs().sqrt() * vectors[:, order]).unbind(1)
    factors = torch.stack((one + two, one - two) if values[order].prod() < 0 else (one, two))
    side = factors.abs().argmax(0)
    return side, factors.gather(0, side[None])[0]


# -- scores -----------------------------------------------------------------------------------------------------------


class _Strongest(NamedTuple):
    """The features of each output with the strongest coefficients."""

    features: Int[Tensor, "out m"]
    T: Float[Tensor, "out m m"]
    unit: Float[Tensor, " out"]
    own: Float[Tensor, "out n"]  # self terms of all features


class _Found(NamedTuple):
    """Groups of a motif for each output as masks over its strongest features, and what they score.

    And: the two sides. Xor: C, A, B. Negation: C, A, B and the reference, empty where the self terms are the effects.
    """

    score: Float[Tensor, " out"]
    masks: tuple[Bool[Tensor, "out m"], ...]


@dataclass(frozen=True)
class _Task:
    B: BilinearTensor
    readers: Tensor
    writers: Tensor
    motifs: tuple[str, ...]
    features: int
    most: int

    @property
    def group(self) -> int:
        """Largest size of a group, so that three groups and a reference always find place."""
        return min(self.most, (min(self.features, len(self.writers)) - 1) // 3)

    @property
    def chunk(self) -> int:
        """How many outputs are dealt with at once."""
        n, d = self.writers.shape
        return max(1, min(64, _NUMBERS // max(n * n, d * d, self.B.hidden * d)))

    def observe(self, keep: bool) -> tuple[Tensor, Tensor]:
        """Score every output; keep the strongest coefficients too if they are wanted."""
        scores, kept = [], []
        for readers in self.readers.split(self.chunk):
            one, strongest = self._score(self.B.matrix(readers), self.writers)
            scores.append(one)
            kept += [strongest.T] if keep else []
        return torch.cat(scores), torch.cat(kept) if keep else scores[0]

    def null(self, name: str, n: int, generator: torch.Generator, T: Tensor) -> Float[Tensor, "null motif"]:
        """Score n outputs of a null model, or somewhat more to divide them evenly over the outputs."""
        if name in _OWN:
            n = len(self.readers) * max(_DRAWS, math.ceil(n / len(self.readers)))
        draws = self._draws(name, n, generator, T)
        null = replace(self, motifs=tuple(_PART.get(motif, motif) for motif in self.motifs))
        return torch.cat([null._grouped(*draw) if name == "signs" else null._score(*draw)[0] for draw in draws])

    def _draws(self, name: str, n: int, generator: torch.Generator, T: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield matrices and writers of null outputs, `(M, D)`; for the signs only `(T,)`."""
        D, B = self.writers, self.B
        passes = torch.arange(len(self.readers), device=D.device).repeat(math.ceil(n / len(self.readers)))[:n]
        for i in (i for once in passes.split(len(self.readers)) for i in once.split(self.chunk)):  # no output twice
            if name == "readers":
                noise = _normal(self.readers[i].shape, D, generator)
                yield B.matrix(noise * (self.readers[i].norm(dim=1) / noise.norm(dim=1))[:, None]), D
            elif name == "rotation":
                yield B.matrix(self.readers[i]), D @ _rotation(D, generator)
            elif name == "untrained":
                yield _untrained(B, generator).matrix(self.readers[i]), D
            else:
                signs = _normal(T[i].shape, D, generator).sign().triu()
                yield (T[i] * (signs + signs.triu(1).mT),)

    def _score(self, M: Float[Tensor, "out d d"], D: Float[Tensor, "n d"]) -> tuple[Tensor, _Strongest]:
        strongest = _strongest(M, D, min(self.features, len(D)))
        parts = {"outlier": lambda: _outlier(M), "copy": lambda: _squares(M, D, strongest.own).amax(1)}
        columns = [
            parts[motif]() if motif in parts else _GROUPED[motif](strongest.T, self.group).score
            for motif in self.motifs
        ]
        return torch.stack(columns, 1), strongest

    def _grouped(self, T: Float[Tensor, "out m m"]) -> Float[Tensor, "out motif"]:
        return torch.stack([_GROUPED[motif](T, self.group).score for motif in self.motifs], 1)

    def groups(self, found: Sequence[Sequence[int]]) -> list[tuple[Group, ...]]:
        """Name the features of each `(output, motif)`."""
        done: dict[tuple[int, int], tuple[Group, ...]] = {}
        for column, motif in enumerate(self.motifs):
            outs = [o for o, m in found if m == column]
            for i in range(0, len(outs), self.chunk):
                some = outs[i : i + self.chunk]
                M = self.B.matrix(self.readers[some])
                strongest = _strongest(M, self.writers, min(self.features, len(self.writers)))
                members = _members(motif, M, self.writers, strongest, self.group)
                done |= {(o, column): each for o, each in zip(some, members, strict=True)}
        return [done[o, m] for o, m in found]


def _strongest(M: Float[Tensor, "out d d"], D: Float[Tensor, "n d"], m: int) -> _Strongest:
    """Find the m features with the largest coefficient in each output, and the coefficients among them over their σ."""
    n, c = len(D), len(M)
    largest, own, start = [], [], 0
    for rows in D.split(max(1, _NUMBERS // (n * c))):
        S = ((rows @ M).flatten(0, 1) @ D.T).unflatten(0, (c, len(rows)))
        diagonal = S.diagonal(start, 1, 2)
        own.append(diagonal.clone())
        diagonal.div_(2)  # a self term counts once, a cross term twice
        low, high = S.aminmax(dim=-1)
        largest.append(torch.maximum(high, -low))
        start += len(rows)
    features = torch.cat(largest, 1).topk(m, dim=1).indices
    image, own = (D.T @ D) @ M, torch.cat(own, 1)
    cross = ((image * image.mT).sum((1, 2)) - own.pow(2).sum(1)) / (n * (n - 1))
    unit = 2 * cross.clamp(min=0).sqrt().clamp(min=torch.finfo(D.dtype).tiny)
    few = D[features]
    T = 2 * (few @ M @ few.mT) / unit[:, None, None]
    T.diagonal(dim1=1, dim2=2).div_(2)
    return _Strongest(features, T, unit, own)


def _outlier(M: Float[Tensor, "out d d"]) -> Float[Tensor, " out"]:
    """Return `|λ₂|` over the edge `2 sqrt(mean_{i>2} λ_i²)` of the other eigenvalues if they were a random matrix's."""
    values = torch.linalg.eigvalsh(M).abs().sort(dim=1, descending=True).values
    return values[:, 1] / (2 * values[:, 2:].pow(2).mean(1).sqrt()).clamp(min=torch.finfo(M.dtype).tiny)


def _squares(M: Float[Tensor, "out d d"], D: Float[Tensor, "n d"], own: Float[Tensor, "out n"]) -> Tensor:
    """Return the cosine of each matrix and the square of each feature, `|d_kᵀ M d_k| / (|d_k|² ‖M‖_F)`."""
    return own.abs() / (D.pow(2).sum(1) * M.norm(dim=(1, 2))[:, None]).clamp(min=torch.finfo(M.dtype).tiny)


def _pair_scores(T: Float[Tensor, "out m m"]) -> tuple[Tensor, Tensor]:
    """Return `x±_ij = ± t_ij - |t_ii| - |t_jj|`."""
    own = T.diagonal(dim1=1, dim2=2).abs()
    small = own[:, :, None] + own[:, None, :]
    return tuple(X.masked_fill(_eye(T), -math.inf) for X in (T - small, -T - small))


def _eye(T: Tensor) -> Bool[Tensor, "m m"]:
    return torch.eye(T.shape[-1], dtype=torch.bool, device=T.device)


def _and(T: Float[Tensor, "out m m"], group: int) -> _Found:
    X = torch.stack(_pair_scores(T), 1)  # [out, sign, m, m]
    B = _one_hot(X.amax(-1).topk(min(_SEEDS, X.shape[-1]), dim=-1).indices, X.shape[-1])
    X = X.masked_fill(_eye(T), 0)
    for _ in range(_ROUNDS):
        A, _ = _grow(_sums(X, B), B, group)
        B, score = _grow(_sums(X, A), A, group)
    score, at = score.flatten(1).max(1)  # over signs and seeds
    return _Found(score, tuple(_take(mask.flatten(1, 2), at) for mask in (A, B)))


def _xor(T: Float[Tensor, "out m m"], group: int) -> _Found:
    plus, minus = _pair_scores(T)
    seeds = torch.minimum(plus.amax(-1), minus.amax(-1)).topk(min(_SEEDS, T.shape[-1]), dim=-1).indices
    eye = _eye(T)
    never = torch.zeros_like(seeds[:, :1], dtype=torch.bool).expand(T.shape[:2])
    return _oppose(plus.masked_fill(eye, 0), minus.masked_fill(eye, 0), seeds, never, group)


def _negation(T: Float[Tensor, "out m m"], group: int) -> _Found:
    found = []
    eye = _eye(T)
    for Y_plus, Y_minus, reference in _flips(T):
        strength = torch.minimum(*(Y.masked_fill(eye, -math.inf).amax(-1) for Y in (Y_plus, Y_minus)))
        seeds = strength.masked_fill(reference, -math.inf).topk(min(_SEEDS, T.shape[-1]), dim=-1).indices
        score, masks = _oppose(Y_plus.masked_fill(eye, 0), Y_minus.masked_fill(eye, 0), seeds, reference, group)
        found.append(_Found(score, (*masks, reference)))
    score, best = torch.stack([one.score for one in found], 1).max(1)
    masks = zip(*(one.masks for one in found), strict=True)
    return _Found(score, tuple(_take(torch.stack(parts, 1), best) for parts in masks))


def _flips(T: Float[Tensor, "out m m"]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield `y±` and the reference: the effects are the self terms, then the couplings to each of a few features."""
    own = T.diagonal(dim1=1, dim2=2)
    guard, effect = own.abs()[:, :, None], own[:, None, :]
    nothing = torch.zeros_like(own, dtype=torch.bool)
    yield torch.minimum(effect, -T) - guard, torch.minimum(-effect, T) - guard, nothing
    plus, minus = _pair_scores(T)
    for r in _references(plus, minus).unbind(1):
        reference = _one_hot(r, T.shape[-1])
        x_plus, x_minus = (_take(X, r)[:, None].clamp(min=-1e6) for X in (plus, minus))
        yield torch.minimum(x_plus, minus), torch.minimum(x_minus, plus), reference


def _references(plus: Tensor, minus: Tensor) -> Int[Tensor, "out r"]:
    """Return the features that couple most strongly with both signs."""
    return torch.minimum(plus.amax(-1), minus.amax(-1)).topk(min(_REFERENCES, plus.shape[-1]), dim=-1).indices


_GROUPED: dict[str, Callable[[Tensor, int], _Found]] = {"and": _and, "xor": _xor, "negation": _negation}


# -- growing groups ---------------------------------------------------------------------------------------------------


def _oppose(
    plus: Float[Tensor, "out m m"],
    minus: Float[Tensor, "out m m"],
    seeds: Int[Tensor, "out seed"],
    blocked: Bool[Tensor, "out m"],
    group: int,
) -> _Found:
    """Find C, A and B with large `min(Σ_{c,a} plus, Σ_{c,b} minus)`, each over the root of its number of terms."""
    C = _one_hot(seeds, plus.shape[-1])
    never, best = blocked[:, None].expand_as(C), None
    for _ in range(_ROUNDS):
        A, positive = _grow(_sums(plus, C), C | never, group)
        B, negative = _grow(_sums(minus, C), C | A | never, group)
        score = torch.minimum(positive, negative)
        if best is None:
            best = score, (C, A, B)
        else:
            better = score > best[0]
            masks = tuple(torch.where(better[..., None], new, old) for new, old in zip((C, A, B), best[1], strict=True))
            best = torch.where(better, score, best[0]), masks
        C, _ = _grow(_sums(plus.mT, A) + _sums(minus.mT, B), A | B | never, group)
    score, at = best[0].max(1)
    return _Found(score, tuple(_take(mask, at) for mask in best[1]))


def _sums(X: Float[Tensor, "*n m m"], mask: Bool[Tensor, "*n seed m"]) -> Float[Tensor, "*n seed m"]:
    """Return `Σ_{i in mask} x_ij / sqrt(|mask|)` for every j."""
    return einsum(mask.to(X), X, "... s i, ... i j -> ... s j") / mask.sum(-1, keepdim=True).sqrt()


def _grow(sums: Float[Tensor, "*n m"], blocked: Bool[Tensor, "*n m"], most: int) -> tuple[Tensor, Tensor]:
    """Choose the features that are not blocked with the largest `Σ sums / sqrt(count)`, at most so many; and that."""
    values, order = sums.masked_fill(blocked, -math.inf).topk(min(most, sums.shape[-1]), dim=-1)
    counts = torch.arange(1, values.shape[-1] + 1, device=sums.device)
    score, last = (values.cumsum(-1) / counts.sqrt()).max(-1)
    return torch.zeros_like(blocked).scatter(-1, order, counts <= last[..., None] + 1), score


def _one_hot(index: Int[Tensor, "*n"], m: int) -> Bool[Tensor, "*n m"]:
    return torch.nn.functional.one_hot(index, m).bool()


def _take(rows: Tensor, at: Int[Tensor, " out"]) -> Tensor:
    """Pick one row for each output, `[out, k, m] -> [out, m]`."""
    return rows.gather(1, repeat(at, "out -> out 1 m", m=rows.shape[-1]))[:, 0]


# -- naming groups ----------------------------------------------------------------------------------------------------


def _members(motif: str, M: Tensor, D: Tensor, strongest: _Strongest, group: int) -> list[tuple[Group, ...]]:
    """Return the groups of a motif in each output; weights are coefficients of Q, not in units of σ."""
    if motif == "copy":
        best = _squares(M, D, strongest.own).argmax(1, keepdim=True)
        return [(Group("source", *parts),) for parts in zip(best, strongest.own.gather(1, best), strict=True)]
    if motif == "outlier":
        return [_halves(*parts, group) for parts in zip(*strongest[:3], strict=True)]
    found = _GROUPED[motif](strongest.T, group)
    T = strongest.T * strongest.unit[:, None, None]
    named = {"and": _named_and, "xor": _named_xor, "negation": _named_negation}[motif]
    return [
        named(T[o], [mask[o].nonzero()[:, 0] for mask in found.masks], features)
        for o, features in enumerate(strongest.features)
    ]


def _halves(features: Tensor, T: Tensor, unit: Tensor, group: int) -> tuple[Group, ...]:
    """Divide the features of an outlier with `split`, the strongest few of either factor."""
    Q = T * unit / 2
    Q.diagonal().mul_(2)
    side, weights = split(Q)
    halves = []
    for i, role in enumerate(("left", "right")):
        at = (side == i).nonzero()[:, 0]
        at = at[weights[at].abs().argsort(descending=True, stable=True)][:group]
        halves.append(Group(role, features[at], weights[at]))
    return tuple(halves)


def _group(role: str, features: Tensor, at: Tensor, weights: Tensor) -> Group:
    """Sort a group by weight, and leave out the weak."""
    order = weights.abs().argsort(descending=True, stable=True)
    order = order[weights[order].abs() >= _SHARE * weights.abs().max()]
    return Group(role, features[at[order]], weights[order])


def _named_and(T: Tensor, groups: Sequence[Tensor], features: Tensor) -> tuple[Group, ...]:
    a, b = groups
    block = T[a][:, b]
    return _group("left", features, a, block.mean(1)), _group("right", features, b, block.mean(0))


def _named_xor(T: Tensor, groups: Sequence[Tensor], features: Tensor) -> tuple[Group, ...]:
    c, a, b = groups
    with_a, with_b = T[c][:, a], T[c][:, b]
    return (
        _group("shared", features, c, (with_a.mean(1) - with_b.mean(1)) / 2),
        _group("for", features, a, with_a.mean(0)),
        _group("against", features, b, with_b.mean(0)),
    )


def _named_negation(T: Tensor, groups: Sequence[Tensor], features: Tensor) -> tuple[Group, ...]:
    c, a, b, r = groups
    effect = T[r[0]] if len(r) else T.diagonal()
    named = (
        _group("negators", features, c, (T[c][:, a].mean(1) - T[c][:, b].mean(1)) / 2),
        _group("positive", features, a, effect[a]),
        _group("negative", features, b, effect[b]),
    )
    if not len(r):
        return named
    return (*named, _group("reference", features, r, (effect[a].mean() - effect[b].mean())[None] / 2))


# -- null models ------------------------------------------------------------------------------------------------------


def _normal(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def _untrained(B: BilinearTensor, generator: torch.Generator) -> BilinearTensor:
    """Return Gaussian factors of the same norms."""
    noise = [(old, _normal(old.shape, old, generator)) for old in (B.down, B.left, B.right)]
    return BilinearTensor(*(new * (old.norm() / new.norm()) for old, new in noise))


def _rotation(D: Float[Tensor, "n d"], generator: torch.Generator) -> Float[Tensor, "d d"]:
    """Draw an orthogonal matrix uniformly (Mezzadri 2007: QR of a Gaussian, signs of R's diagonal put back)."""
    Q, R = torch.linalg.qr(_normal((D.shape[1], D.shape[1]), D, generator))
    return Q * R.diagonal().sign()


def _fit(name: str, motifs: tuple[str, ...], scores: Float[Tensor, "null motif"], n_out: int, tail: bool) -> Null:
    """Fit the tails by moments: with mean m and variance s² of the excess, `shape = ½ (1 - m²/s²)`, kept in [0, ½).

    `scale = m (1 - shape)`, raised by one standard error of m.
    """
    scores = scores.double()
    center, spread = torch.zeros_like(scores[:1]), torch.ones_like(scores[:1])
    if name in _OWN:
        scores, center, spread = _standardized(scores.unflatten(0, (-1, n_out)))
    threshold = scores.quantile(1 - _TAIL, dim=0)
    shape = scale = torch.full_like(threshold, math.nan)
    if tail:
        above = scores > threshold
        excess = (scores - threshold).clamp(min=0)
        count = above.sum(0)
        mean = excess.sum(0) / count
        variance = ((excess - mean).pow(2) * above).sum(0) / (count - 1)
        shape = ((1 - mean.pow(2) / variance) / 2).clamp(0, 0.49)
        scale = mean * (1 - shape) * (1 + count.rsqrt())
    return Null(name, motifs, scores, threshold, scale, shape, center, spread)


def _standardized(draws: Float[Tensor, "draw out motif"]) -> tuple[Tensor, Tensor, Tensor]:
    """Measure each draw against the other draws of its output; and return the mean and deviation of all of them."""
    n, center = len(draws), draws.mean(0)
    squares = (draws - center).pow(2)
    others = (squares.sum(0) - squares * n / (n - 1)) / (n - 2)  # variance without the draw itself
    least = 1e-6 * center.abs() + torch.finfo(draws.dtype).tiny
    away = (draws - center) * n / (n - 1)
    scores = away / torch.maximum(others.clamp(min=0).sqrt(), least)
    return scores.flatten(0, 1), center, torch.maximum(draws.std(0), least)


# -- checks -----------------------------------------------------------------------------------------------------------


def _without_constant(B: BilinearTensor) -> BilinearTensor:
    """Drop the constant leg: what it adds is linear or constant, so no interaction."""
    return replace(B, left=B.left[:, :-1], right=B.right[:, :-1], constant=False) if B.constant else B


def _check_names(argument: str, names: Sequence[str], valid: Sequence[str]) -> None:
    if not names or any(name not in valid for name in names):
        raise ValueError(f"{argument} must be among {tuple(valid)}, got {list(names)}")
    if len(set(names)) < len(names):
        raise ValueError(f"{argument} must be named once each, got {list(names)}")


def _check_counts(n: int, fdr: float, features: int, group: int, tail: bool) -> None:
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if tail and n < _LEAST_FOR_TAIL:
        raise ValueError(f"n must be at least {_LEAST_FOR_TAIL} to fit a tail (or tail=False), got {n}")
    if not 0 < fdr < 1:
        raise ValueError(f"fdr must lie between 0 and 1, got {fdr}")
    if features < 4:
        raise ValueError(f"features must be at least 4, got {features}")
    if group < 1:
        raise ValueError(f"group must be at least 1, got {group}")


def _check_layer(B: BilinearTensor, readers: Tensor, writers: Tensor) -> None:
    inp = B.inp - B.constant
    if readers.ndim != 2 or readers.shape[1] != B.out or not len(readers):
        raise ValueError(f"readers must have shape [n, {B.out}], got {list(readers.shape)}")
    if writers.ndim != 2 or writers.shape[1] != inp or len(writers) < 4:
        raise ValueError(f"writers must have shape [n, {inp}] with n at least 4, got {list(writers.shape)}")
    if inp < 4:
        raise ValueError(f"B must have at least 4 inputs, got {inp}")
    named = {"B.down": B.down, "B.left": B.left, "B.right": B.right, "readers": readers, "writers": writers}
    if infinite := [name for name, tensor in named.items() if not tensor.isfinite().all()]:
        raise ValueError(f"all numbers must be finite, got others in {', '.join(infinite)}")
