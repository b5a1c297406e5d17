"""What an attention head is made of, in factors: the bilinear form of its scores, and the linear map of its values."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from .bilinear import BilinearTensor
from .records import tabular


@tabular(rows="k")
class Singular(NamedTuple):
    """The k largest singular values of a matrix in factors, and their vectors as unit rows."""

    left: Float[Tensor, "k left"]
    values: Float[Tensor, " k"]
    right: Float[Tensor, "k right"]


@dataclass(frozen=True, repr=False, eq=False)
class BilinearForm:
    """A bilinear form of two inputs in factors, `F[i,j] = Σ_h query[h,i] key[h,j]`, acting as `Σ_ij F[i,j] x_i y_j`.

    Source: the query-key circuit of A Mathematical Framework for Transformer Circuits (Elhage et al. 2021). The two
    inputs play different parts, so F is not symmetrised: what attends is the query leg, what is attended to the key
    leg. Nothing but `dense()` builds the matrix.

    With `constant`, the last leg on either side is a constant 1, which carries biases: `apply` appends it, `project`
    passes it through.

    Args:
        query: `[hidden, n_query]`.
        key: `[hidden, n_key]`.
        constant: Whether the last leg of both sides is the constant 1.

    Raises:
        ValueError: The factors do not fit together.
    """

    query: Float[Tensor, "hidden n_query"]
    key: Float[Tensor, "hidden n_key"]
    constant: bool = False

    def __post_init__(self):
        _check_factors("query", self.query, "key", self.key)

    @classmethod
    def from_weights(
        cls,
        query: Float[Tensor, "hidden n_query"],
        key: Float[Tensor, "hidden n_key"],
        query_bias: Float[Tensor, " hidden"] | None = None,
        key_bias: Float[Tensor, " hidden"] | None = None,
    ) -> "BilinearForm":
        """Build the form of `(query x + query_bias) · (key y + key_bias)`; biases become the constant legs."""
        if query_bias is None and key_bias is None:
            return cls(query, key)
        return cls(_with_bias(query, query_bias), _with_bias(key, key_bias), constant=True)

    @property
    def hidden(self) -> int:
        """Number of rank-one terms: the width of the head."""
        return self.query.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Sizes of the legs, `(n_query, n_key)`, constants included."""
        return self.query.shape[1], self.key.shape[1]

    def __repr__(self) -> str:
        constant = ", last legs constant" if self.constant else ""
        dtype = str(self.query.dtype).removeprefix("torch.")
        return f"BilinearForm(query={self.shape[0]}, key={self.shape[1]}, hidden={self.hidden}{constant}, {dtype})"

    def apply(self, x: Float[Tensor, "*#batch query"], y: Float[Tensor, "*#batch key"]) -> Float[Tensor, "*batch"]:
        """Evaluate the form, `Σ_ij F[i,j] x_i y_j`.

        Args:
            x: What attends, without the constant.
            y: What is attended to, without the constant; one for each x, or one of either for all of the other.
        """
        for name, value, size in (("x", x, self.shape[0]), ("y", y, self.shape[1])):
            if value.shape[-1] != size - self.constant:
                raise ValueError(
                    f"{name} must have {size - self.constant} entries on its last axis, got {list(value.shape)}"
                )
        if self.constant:
            x, y = (torch.cat((one, one.new_ones(*one.shape[:-1], 1)), -1) for one in (x, y))
        return (x @ self.query.T * (y @ self.key.T)).sum(-1)

    def project(
        self, query: Float[Tensor, "n_query a"] | None = None, key: Float[Tensor, "n_key b"] | None = None
    ) -> "BilinearForm":
        """Write either input as a sum of the rows of a basis, such as SAE decoder rows; `None` keeps a leg.

        Cost `hidden · (n_query · a + n_key · b)`.
        """
        return replace(
            self,
            query=_in_basis("query", self.query, query, self.constant),
            key=_in_basis("key", self.key, key, self.constant),
        )

    def without_constant(self) -> "BilinearForm":
        """Return the same form without the constant legs, if it has them: what two inputs have with each other."""
        return BilinearForm(self.query[:, :-1], self.key[:, :-1]) if self.constant else self

    def inner(self, other: "BilinearForm") -> Float[Tensor, ""]:
        """Return the Frobenius inner product `Σ_ij F[i,j] F'[i,j]`, without the matrices."""
        if self.shape != other.shape or self.constant != other.constant:
            raise ValueError(f"other must have the same legs as {self!r}, got {other!r}")
        return ((self.query @ other.query.T) * (self.key @ other.key.T)).sum()

    def norm(self) -> Float[Tensor, ""]:
        """Return the Frobenius norm, `sqrt(inner(self, self))`."""
        return self.inner(self).clamp(min=0).sqrt()

    def singular(self, k: int | None = None) -> Singular:
        """Return the k strongest pairs of directions, from the factors: `F = Σ_a values_a left_aᵀ right_a`.

        Cost `(n_query + n_key) · hidden²`.

        Args:
            k: How many; as many as `hidden` if `None`.
        """
        return _singular(self.query.T, self.key, k)

    def tensor(self) -> BilinearTensor:
        """Return the form as a `BilinearTensor` of one output on both inputs side by side, query first.

        `F(x, y) = B.apply([x, y])`. The constant, if there is one, is shared: its own term is `F[-1,-1]`.
        """
        query, key = (side[:, :-1] if self.constant else side for side in (self.query, self.key))
        left = torch.cat((query, torch.zeros_like(key)), 1)
        right = torch.cat((torch.zeros_like(query), key), 1)
        down = self.query.new_ones(1, self.hidden)
        biases = (self.query[:, -1], self.key[:, -1]) if self.constant else ()
        return BilinearTensor.from_weights(down, left, right, *biases)

    def dense(self) -> Float[Tensor, "n_query n_key"]:
        """Build the matrix F: `n_query · n_key` numbers."""
        return einsum(self.query, self.key, "hidden i, hidden j -> i j")

    def to(self, *args, **kwargs) -> "BilinearForm":
        """Return the form on another device or in another dtype; arguments as for `torch.Tensor.to`."""
        return replace(self, query=self.query.to(*args, **kwargs), key=self.key.to(*args, **kwargs))

    def detach(self) -> "BilinearForm":
        """Return the same form outside the autograd graph."""
        return replace(self, query=self.query.detach(), key=self.key.detach())


@dataclass(frozen=True, repr=False, eq=False)
class LinearMap:
    """A linear map in factors, `M[o,i] = Σ_h out[o,h] inp[h,i]`: what a head writes of what it attends to.

    Source: the output-value circuit of Elhage et al. 2021. With `constant`, the last input leg is a constant 1, which
    carries the bias of the values.

    Args:
        out: `[n_out, hidden]`.
        inp: `[hidden, n_inp]`.
        constant: Whether the last input leg is the constant 1.

    Raises:
        ValueError: The factors do not fit together.
    """

    out: Float[Tensor, "n_out hidden"]
    inp: Float[Tensor, "hidden n_inp"]
    constant: bool = False

    def __post_init__(self):
        _check_factors("out", self.out.mT, "inp", self.inp)

    @classmethod
    def from_weights(
        cls,
        out: Float[Tensor, "n_out hidden"],
        inp: Float[Tensor, "hidden n_inp"],
        inp_bias: Float[Tensor, " hidden"] | None = None,
    ) -> "LinearMap":
        """Build the map `out (inp x + inp_bias)`; the bias becomes the constant leg."""
        return cls(out, inp) if inp_bias is None else cls(out, _with_bias(inp, inp_bias), constant=True)

    @property
    def hidden(self) -> int:
        """Largest rank that the map can have: the width of the head."""
        return self.inp.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Sizes of the legs, `(n_out, n_inp)`, the constant included."""
        return self.out.shape[0], self.inp.shape[1]

    def __repr__(self) -> str:
        constant = ", last inp constant" if self.constant else ""
        dtype = str(self.out.dtype).removeprefix("torch.")
        return f"LinearMap(out={self.shape[0]}, inp={self.shape[1]}, hidden={self.hidden}{constant}, {dtype})"

    def apply(self, x: Float[Tensor, "*batch inp"]) -> Float[Tensor, "*batch out"]:
        """Return the image of x, given without the constant."""
        expected = self.shape[1] - self.constant
        if x.shape[-1] != expected:
            raise ValueError(f"x must have {expected} entries on its last axis, got {list(x.shape)}")
        hidden = x @ self.inp[:, :expected].T
        return (hidden + self.inp[:, -1] if self.constant else hidden) @ self.out.T

    def project(
        self, out: Float[Tensor, "n_out a"] | None = None, inp: Float[Tensor, "n_inp b"] | None = None
    ) -> "LinearMap":
        """Read the output with the rows of `out`, write the input as a sum of the rows of `inp`; `None` keeps a leg."""
        if out is not None and (out.ndim != 2 or out.shape[1] != self.shape[0]):
            raise ValueError(f"out must have shape [n, {self.shape[0]}], got {list(out.shape)}")
        return replace(
            self,
            out=self.out if out is None else out @ self.out,
            inp=_in_basis("inp", self.inp, inp, self.constant),
        )

    def norm(self) -> Float[Tensor, ""]:
        """Return the Frobenius norm, without the matrix."""
        return ((self.out.T @ self.out) * (self.inp @ self.inp.T)).sum().clamp(min=0).sqrt()

    def singular(self, k: int | None = None) -> Singular:
        """Return the k strongest pairs of directions: the map takes `right_a` to `values_a left_a`."""
        return _singular(self.out, self.inp, k)

    def dense(self) -> Float[Tensor, "n_out n_inp"]:
        """Build the matrix M: `n_out · n_inp` numbers."""
        return self.out @ self.inp

    def to(self, *args, **kwargs) -> "LinearMap":
        """Return the map on another device or in another dtype; arguments as for `torch.Tensor.to`."""
        return replace(self, out=self.out.to(*args, **kwargs), inp=self.inp.to(*args, **kwargs))

    def detach(self) -> "LinearMap":
        """Return the same map outside the autograd graph."""
        return replace(self, out=self.out.detach(), inp=self.inp.detach())


def _check_factors(left_name: str, left: Tensor, right_name: str, right: Tensor) -> None:
    """Make sure that two factors `[hidden, n]` fit together."""
    got = f"{left_name} {list(left.shape)} {left.dtype}, {right_name} {list(right.shape)} {right.dtype}"
    if left.ndim != 2 or right.ndim != 2 or len(left) != len(right):
        raise ValueError(f"{left_name} and {right_name} must be matrices that share their hidden axis, got {got}")
    if not left.is_floating_point() or (left.dtype, left.device) != (right.dtype, right.device):
        raise ValueError(f"{left_name} and {right_name} must have one floating dtype and one device, got {got}")


def _with_bias(factor: Tensor, bias: Tensor | None) -> Tensor:
    bias = factor.new_zeros(len(factor)) if bias is None else bias
    return torch.cat((factor, bias[:, None]), 1)


def _in_basis(name: str, factor: Tensor, basis: Tensor | None, constant: bool) -> Tensor:
    """Return a factor `[hidden, n]` with its leg written in the rows of a basis."""
    if basis is None:
        return factor
    width = factor.shape[1] - constant
    if basis.ndim != 2 or basis.shape[1] != width:
        raise ValueError(f"{name} must have shape [n, {width}], got {list(basis.shape)}")
    changed = factor[:, :width] @ basis.T
    return torch.cat((changed, factor[:, width:]), 1)


def _singular(left: Float[Tensor, "a hidden"], right: Float[Tensor, "hidden b"], k: int | None) -> Singular:
    """Decompose `left @ right` through two thin QR factorisations."""
    most = min(*left.shape, right.shape[1])
    k = most if k is None else k
    if not 1 <= k <= most:
        raise ValueError(f"k must lie between 1 and {most}, got {k}")
    (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, values, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return Singular((q_left @ u).T[:k], values[:k], (v @ q_right.T)[:k])
