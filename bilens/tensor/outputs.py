"""The output features with the strongest interaction matrices, without decomposing the matrices of all."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .bilinear import BilinearTensor
from .matrices import Matrices, check_directions, frobenius, output_gram
from .precision import working_dtype
from .records import Record
from .schatten import CHUNK_BYTES, Screen

# Squarings, and whether to start from matrices in full precision: S_8 of all finds candidates, up to S_64 excludes most
# of the rest.
_STAGES = ((2, False), (5, True))
_GUARD = 3e-5  # relative; what the exact eigenvalues may be wrong by


@dataclass(frozen=True, repr=False, eq=False)
class TopOutputs(Record, rows="k", unit="features"):
    """The output features that score highest, the highest first, ties by index."""

    out: Int[Tensor, " k"]
    score: Float[Tensor, " k"]
    values: Float[Tensor, "k 2"] | None  # the two eigenvalues of largest magnitude; None where none was needed
    decomposed: int  # how many matrices were decomposed to be sure

    def __repr__(self) -> str:
        top = ", ".join(f"#{out} {score:.3g}" for out, score in zip(self.out[:3].tolist(), self.score, strict=False))
        return f"TopOutputs({len(self.out)} features, {self.decomposed} decomposed; first: {top} ...)"


def top_outputs(
    B: BilinearTensor,
    readers: Float[Tensor, "n out"],
    k: int,
    by: Literal["spectral", "frobenius", "top2"] = "spectral",
) -> TopOutputs:
    """Find the k output features with the strongest interaction matrix, without decomposing them all.

    The score of a matrix Q is `max |λ|` (spectral), `|λ₁| + |λ₂|` of the two largest magnitudes (top2; 2410.08417,
    section 5.2) or `‖Q‖_F`. Schatten norms bound the first two from above, `|λ₁| ≤ S_p` and
    `|λ₁| + |λ₂| ≤ 2^(1-1/p) S_p`, and take matrix products only: `S_2p = ‖Q^p‖_F^(1/p)` by squaring. They are computed
    in bfloat16 where that is fast, with a bound on what rounding adds, so that the result is exact up to the rounding
    of the eigenvalues.

    Args:
        B: The layer.
        readers: Directions `[n, out]` of the output features.
        k: How many to find.
        by: The score.

    Returns:
        The k features, highest score first, ties by index. Cost `out · inp²` and a few `inp³` of matrix products for
        each reader and an eigenvalue problem for those that no bound excludes; `by="frobenius"` only `out²` for each
        reader. Memory: half the cube, one and a half times, if half of it fits into 512 MiB. bfloat16 and float16
        factors are computed in float32.

    Raises:
        ValueError: `k` or `by` out of range, or readers or factors of another width or not finite.
    """
    if by not in ("spectral", "frobenius", "top2"):
        raise ValueError(f"by must be 'spectral', 'frobenius' or 'top2', got {by!r}")
    if readers.ndim != 2:
        raise ValueError(f"readers must have shape [n, {B.out}], got {list(readers.shape)}")
    readers = check_directions("readers", readers, B).detach()
    if not 1 <= k <= len(readers):
        raise ValueError(f"k must lie between 1 and the number of readers, {len(readers)}, got {k}")
    dtype = working_dtype(B.down.dtype)
    B, readers = B.detach().to(dtype), readers.to(dtype)
    different, copy = torch.unique(readers, dim=0, return_inverse=True)  # equal readers tie exactly
    gram = output_gram(B)
    if by == "frobenius":
        score, values, decomposed = frobenius(gram, different).to(dtype), None, 0
    else:
        search = _Search(B, different, gram, copy, k, by)
        search.run()
        score, values, decomposed = search.score, search.values, int(search.score.isfinite().sum())
    order = score[copy].argsort(descending=True, stable=True)[:k]
    return TopOutputs(order, score[copy[order]], None if values is None else values[copy[order]], decomposed)


class _Search:
    """Readers, each excluded by a bound or decomposed, the most promising ones first."""

    def __init__(self, B: BilinearTensor, readers: Tensor, gram: Tensor, copy: Tensor, k: int, by: str):
        self.readers, self.gram, self.copy, self.k, self.by = readers, gram, copy, k, by
        self.frobenius = frobenius(gram, readers)
        self.matrices = Matrices(B, len(readers))
        self.score = torch.full((len(readers),), -torch.inf, dtype=readers.dtype, device=readers.device)
        self.values = readers.new_zeros(len(readers), 2)
        self.bound = self._of_schatten(self.frobenius, 2)

    def run(self) -> None:
        """Decompose until every other reader is bounded below the k-th best score."""
        screen = Screen(self.matrices, self.gram)
        for squarings, exact in _STAGES:
            order = self.bound.argsort(descending=True)
            for part in order[self._may_matter(order)].split(screen.chunk):
                self._tighten(screen, part, squarings, exact)
            if self.score.isinf().all():  # what the others have to reach
                self._decompose_best(self.k)
        while self._decompose_best(max(4, self.k // 4)):
            pass

    def _of_schatten(self, norm: Tensor, p: int) -> Tensor:
        return norm if self.by == "spectral" else norm * 2 ** (1 - 1 / p)

    def _may_matter(self, part: Tensor) -> Tensor:
        floor = self.score[self.copy].topk(self.k).values[-1]
        return self.bound[part] * (1 + _GUARD) >= floor

    def _tighten(self, screen: Screen, part: Tensor, squarings: int, exact: bool) -> None:
        """Lower the bounds of some readers, each until it is excluded or squared that often."""
        screen.start(self.readers[part], self.frobenius[part], exact)
        for _ in range(squarings):
            norm, p = screen.square()
            self.bound[part] = torch.minimum(self.bound[part], self._of_schatten(norm, p))
            keep = self._may_matter(part)
            part = part[keep]
            if not len(part):
                return
            screen.keep(keep)

    def _decompose_best(self, count: int) -> bool:
        """Decompose the readers with the largest bounds, unless they cannot matter; say whether there were any."""
        order = self.bound.masked_fill(self.score.isfinite(), -torch.inf).argsort(descending=True)[:count]
        order = order[~self.score[order].isfinite() & self._may_matter(order)]
        if not len(order):
            return False
        done = 0
        for Q in self.matrices.chunks(self.readers[order], CHUNK_BYTES):
            values = torch.linalg.eigvalsh(Q)
            strongest = values.abs().argsort(dim=1, descending=True, stable=True)[:, :2]
            some = order[done : done + len(Q)]
            self.values[some, : strongest.shape[1]] = values.gather(1, strongest)
            magnitudes = self.values[some].abs()
            self.score[some] = magnitudes[:, 0] if self.by == "spectral" else magnitudes.sum(1)
            done += len(Q)
        return True
