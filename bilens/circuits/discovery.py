"""A search for motifs among the outputs of a layer, from weights alone, with p-values against null models."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens.tensor.bilinear import BilinearTensor
from bilens.tensor.keeping import fingerprint_of, user_path
from bilens.tensor.records import Record
from bilens.tensor.resuming import Stages

from .groups import Group, name_groups
from .nulls import LEAST_FOR_TAIL, NULLS, Null, fit, null_scores
from .records import plain
from .scoring import MOTIFS, Ends, Scoring, Strongest


@runtime_checkable
class Layer(Protocol):
    """What a search reads of a layer between two dictionaries; `circuits.FeatureLayer` is one."""

    tensor: BilinearTensor
    readers: Tensor
    writers: Tensor


@dataclass(frozen=True, repr=False, eq=False)
class Discovery(Record, names={"out": "out"}):
    """One motif of one output feature."""

    out: int
    motif: str
    score: float
    p: float
    q: float
    groups: tuple[Group, ...]
    name: Callable[[str, int], str] | None = None  # of a feature, by its side and number

    def __repr__(self) -> str:
        groups = " × ".join(map(repr, self.groups))
        return f"Discovery({self.motif} in #{self.out}, score={self.score:.3g}, q={self.q:.2g}: {groups})"

    def to_dict(self) -> dict[str, Any]:
        """Return motif, numbers and groups."""
        about = {name: getattr(self, name) for name in ("out", "motif", "score", "p", "q")}
        return plain(about | {"groups": [group.to_dict() for group in self.groups]})


@dataclass(frozen=True, repr=False, eq=False)
class Discoveries(Record, held="found"):
    """Scores, p- and q-values of all outputs and motifs, and those found at the wanted false discovery rate."""

    motifs: tuple[str, ...]
    score: Float[Tensor, "out motif"]
    p: Float[Tensor, "out motif"]  # the largest over the null models
    q: Float[Tensor, "out motif"]  # Benjamini-Hochberg over all outputs and motifs
    nulls: tuple[Null, ...]
    fdr: float
    found: tuple[Discovery, ...]  # lowest q first, then lowest p, ties by output
    ends: Ends | None = None  # of these outputs' spectra, for `circuits.outliers`; None where they were not asked for
    outputs: Int[Tensor, " out"] | None = None  # the output features that were looked at; None for all
    n_outputs: int | None = None  # of the layer

    def __repr__(self) -> str:
        first = f"; first: {self.found[0].motif} in #{self.found[0].out}" if self.found else ""
        tested = f"{self.looked_at} outputs × {len(self.motifs)} motifs"
        return f"Discoveries({len(self.found)} of {tested} at FDR {self.fdr:g}{first})"

    @property
    def looked_at(self) -> str:
        """How many outputs were looked at, in words: `"256"`, or `"128 of 8192"` where others were left out."""
        return f"{len(self.score)}" if self.outputs is None else f"{len(self.score)} of {self.n_outputs}"

    def of(self, motif: str) -> tuple[Discovery, ...]:
        """Return the discoveries of one motif, the most significant first."""
        check_names("motif", [motif], self.motifs)
        return tuple(one for one in self.found if one.motif == motif)

    def to_dict(self) -> dict[str, Any]:
        """Return what was found, and what was looked at, without the scores of all outputs."""
        left_out = {} if self.outputs is None else {"left_out": self.n_outputs - len(self.score)}
        about = {
            "outputs": len(self.score),
            **left_out,
            "motifs": self.motifs,
            "nulls": [null.name for null in self.nulls],
        }
        return plain(about | {"fdr": self.fdr, "found": [one.to_dict() for one in self.found]})


# twelve parameters: what is asked, of what, against what, how finely, and how it is run; no two of them go together
@torch.no_grad()
def search(
    layer: Layer | tuple[BilinearTensor, Float[Tensor, "n_out out"], Float[Tensor, "n_in inp"]],
    motifs: Sequence[str] | None = None,
    *,
    generator: torch.Generator,
    null: str | Sequence[str] = "readers",
    n: int = 2048,
    fdr: float = 0.05,
    features: int | Int[Tensor, "n_out m"] = 64,
    group: int = 8,
    tail: bool = True,
    outputs: Int[Tensor, " some"] | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
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
    cannot know: test what it finds with `circuits.predict` and `circuits.test`, or search among fewer writers.

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
            Or those features themselves, as `bilens.top_interactions(..., features=64).features` has found them: then
            most of the search's products are there already.
        group: Largest size of a group; a third of the features looked at if that is less.
        tail: Where fewer than 10 null scores reach a score, take its p-value from a generalised-Pareto tail
            (Knijnenburg et al. 2009), shape at least zero and scale one standard error up, which makes it conservative.
            Without it no p-value is below `1 / (n + 1)`.
        outputs: Look only at these output features, by number: all others are as if the layer did not have them, and
            the false discovery rate is that among these. `circuits.strongest_outputs` chooses some.
        progress: Show a progress bar for the outputs, and one for each null model.
        checkpoint: Folder to keep the scores in, those of the outputs and of each null model. A search that was killed
            goes on from there, with the same result; the state of another search is refused.

    Returns:
        The discoveries, and all scores. Cost `m · (m / 2 + d_model) · d_model` multiplications with
        `m = n_in - d_model` for each output and null output, twice to three times that for rotation and untrained,
        little for the signs. 64 MiB (float32) of matrices at a time, half the cube twice if that fits, and
        `n_out · (features² + n_in)` numbers. The search for groups decides between sums that may nearly tie: a score
        in some hundreds hangs on the last bits.

    Raises:
        ValueError: An unknown motif or null model, one the other cannot test, a count below 1 or too low for a tail,
            readers or writers of another width, numbers that are not finite, outputs that are none, or a checkpoint
            that is damaged or of another search.
    """
    null = (null,) if isinstance(null, str) else tuple(null)
    check_names("null", null, tuple(NULLS))
    testable = tuple(motif for motif in MOTIFS if all(motif in NULLS[name] for name in null))
    motifs = testable if motifs is None else tuple(motifs)
    check_names("motifs", motifs, MOTIFS)
    if untestable := [motif for motif in motifs if motif not in testable]:
        raise ValueError(f"motifs must be among {testable} for null={null}, got {untestable}")
    known = features if isinstance(features, Tensor) else None
    features = features if known is None else known.shape[-1]
    _check_counts(n, fdr, features, group, tail)
    B, readers, writers = layer if isinstance(layer, tuple) else (layer.tensor, layer.readers, layer.writers)
    _check_layer(B, readers, writers)
    n_outputs = len(readers)
    if outputs is not None:
        readers = readers[_checked_outputs(outputs, n_outputs).to(readers.device)]
    _check_known(known, readers, writers)
    B = B.detach().without_constant()
    B = B.to(torch.promote_types(B.down.dtype, torch.float32))
    task = Scoring(B, readers.detach().to(B.down), writers.detach().to(B.down), motifs, features, group)
    stages = _stages(task, known, checkpoint, progress)
    observed, strongest, ends = _observed(task, known, stages)
    nulls = tuple(
        fit(name, motifs, null_scores(task, name, n, generator, strongest.T, stages), len(readers), tail)
        for name in null
    )
    p = torch.stack([one.p(observed) for one in nulls]).amax(0)
    q = q_values(p)
    order = sorted((q <= fdr).nonzero().tolist(), key=lambda at: (q[at[0], at[1]].item(), p[at[0], at[1]].item(), at))
    name = getattr(layer, "name", None)  # a layer that is matrices, or of another kind, has no names
    groups = [[replace(one, name=name) for one in each] for each in name_groups(task, strongest, order)]
    number = range(n_outputs) if outputs is None else outputs.tolist()
    found = tuple(
        Discovery(number[o], motifs[m], observed[o, m].item(), p[o, m].item(), q[o, m].item(), tuple(members), name)
        for (o, m), members in zip(order, groups, strict=True)
    )
    return Discoveries(motifs, observed, p, q, nulls, fdr, found, ends, outputs, n_outputs)


def _stages(task: Scoring, known: Tensor | None, folder: str | os.PathLike[str] | None, progress: bool) -> Stages:
    """Return where the scores are kept: for all that they depend on, but for what is drawn."""
    if folder is None:
        return Stages(progress=progress)
    B, said = task.B, (task.motifs, task.features, task.most)
    depends = fingerprint_of((B.down, B.left, B.right, task.readers, task.writers, known), *said)
    return Stages(user_path(folder), depends, progress, B.down.device)


def _observed(task: Scoring, known: Tensor | None, stages: Stages) -> tuple[Tensor, Strongest, Ends | None]:
    """Score the layer's own outputs."""

    def scored(start: int) -> Iterator[dict[str, Tensor]]:
        for score, strongest, ends in task.observe(task.readers, task.motifs, known, start):
            yield {"score": score} | strongest._asdict() | ({} if ends is None else ends._asdict())

    rows = stages.run("outputs", len(task.readers), scored, unit="output")
    strongest = Strongest(*(rows[name] for name in Strongest._fields))
    return rows["score"], strongest, Ends(*(rows[name] for name in Ends._fields)) if "others" in rows else None


def q_values(p: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return q-values of all p-values together, `q_(i) = min_{j ≥ i} N p_(j) / j` (Benjamini and Hochberg 1995)."""
    from scipy.stats import false_discovery_control  # takes a second to import

    return torch.from_numpy(false_discovery_control(p.cpu().numpy(), axis=None)).to(p).reshape(p.shape)


def check_names(argument: str, names: Sequence[str], valid: Sequence[str]) -> None:
    """Make sure that there are names, each once, and all of them valid.

    Raises:
        ValueError: There are not; the message names the argument.
    """
    if not names or any(name not in valid for name in names):
        raise ValueError(f"{argument} must be among {tuple(valid)}, got {list(names)}")
    if len(set(names)) < len(names):
        raise ValueError(f"{argument} must be named once each, got {list(names)}")


def _check_counts(n: int, fdr: float, features: int, group: int, tail: bool) -> None:
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if tail and n < LEAST_FOR_TAIL:
        raise ValueError(f"n must be at least {LEAST_FOR_TAIL} to fit a tail (or tail=False), got {n}")
    if not 0 < fdr < 1:
        raise ValueError(f"fdr must lie between 0 and 1, got {fdr}")
    if features < 4:
        raise ValueError(f"features must be at least 4, got {features}")
    if group < 1:
        raise ValueError(f"group must be at least 1, got {group}")


def _checked_outputs(outputs: Tensor, n: int) -> Tensor:
    whole = isinstance(outputs, Tensor) and outputs.ndim == 1 and outputs.dtype in (torch.int64, torch.int32)
    if not whole or not len(outputs):
        raise ValueError(f"outputs must be a list of output features, a tensor of whole numbers, got {outputs!r:.80}")
    if outputs.min() < 0 or outputs.max() >= n or len(outputs.unique()) < len(outputs):
        raise ValueError(f"outputs must be different numbers from 0 to {n - 1}, got {outputs.tolist()!s:.80}")
    return outputs


def _check_known(known: Tensor | None, readers: Tensor, writers: Tensor) -> None:
    if known is None:
        return
    if known.ndim != 2 or len(known) != len(readers):
        raise ValueError(f"features must have shape [{len(readers)}, m], got {list(known.shape)}")
    if known.min() < 0 or known.max() >= len(writers):
        raise ValueError(f"features must lie between 0 and {len(writers) - 1}, got {known.min()} to {known.max()}")


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
