"""The one noun of this library: a bilinear layer as a third-order tensor, kept in factors."""

from dataclasses import dataclass, replace

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, repr=False, eq=False)
class BilinearTensor:
    """A bilinear map in factors, `B[o,i,j] = Σ_h down[o,h] left[h,i] right[h,j]`, acting as `Σ_ij B[o,i,j] x_i x_j`.

    Source: 2410.08417, section 3. Only the part symmetric in (i, j) acts on `x`, so the symmetric part is the object:
    every matrix, norm and dense cube below is symmetrised. Axes are always (out, inp, inp). Every operation returns the
    same type; nothing but `dense()` builds the cube.

    With `constant`, the last input leg is a constant 1 (the homogeneous coordinate), which carries linear terms and
    constants: `inp` counts it, `apply` appends it, `project` passes it through.

    Args:
        down: `[out, hidden]`.
        left: `[hidden, inp]`.
        right: `[hidden, inp]`.
        constant: Whether the last input leg is the constant 1.

    Raises:
        ValueError: The factors do not fit together, or are not torch tensors of one floating dtype on one device.
    """

    down: Float[Tensor, "out hidden"]
    left: Float[Tensor, "hidden inp"]
    right: Float[Tensor, "hidden inp"]
    constant: bool = False

    def __post_init__(self):
        _check_kind({name: getattr(self, name) for name in ("down", "left", "right")})
        shapes = {name: tuple(getattr(self, name).shape) for name in ("down", "left", "right")}
        fits = all(len(shape) == 2 for shape in shapes.values()) and (
            shapes["left"] == shapes["right"] and shapes["down"][1] == shapes["left"][0]
        )
        if not fits:
            got = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise ValueError(f"factors must be down [out, hidden], left and right [hidden, inp], got {got}")

    @classmethod
    def from_weights(
        cls,
        down: Float[Tensor, "out hidden"],
        left: Float[Tensor, "hidden inp"],
        right: Float[Tensor, "hidden inp"],
        left_bias: Float[Tensor, " hidden"] | None = None,
        right_bias: Float[Tensor, " hidden"] | None = None,
        out_bias: Float[Tensor, " out"] | None = None,
    ) -> "BilinearTensor":
        """Build the tensor of `down((left x + left_bias) ⊙ (right x + right_bias)) + out_bias` (2410.08417, section 2).

        Biases become the constant leg: `left` and `right` gain a column, and an output bias gains a hidden unit that is
        the constant squared. Without biases this is the plain constructor.
        """
        if left_bias is None and right_bias is None and out_bias is None:
            return cls(down, left, right)
        zeros = left.new_zeros(len(left))
        left = torch.cat((left, (zeros if left_bias is None else left_bias)[:, None]), 1)
        right = torch.cat((right, (zeros if right_bias is None else right_bias)[:, None]), 1)
        if out_bias is not None:
            one = left.new_zeros(1, left.shape[1])
            one[0, -1] = 1
            down, left, right = torch.cat((down, out_bias[:, None]), 1), torch.cat((left, one)), torch.cat((right, one))
        return cls(down, left, right, constant=True)

    @property
    def out(self) -> int:
        """Size of the output leg."""
        return self.down.shape[0]

    @property
    def hidden(self) -> int:
        """Number of rank-one terms."""
        return self.down.shape[1]

    @property
    def inp(self) -> int:
        """Size of each input leg, the constant included."""
        return self.left.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sizes of the legs, `(out, inp, inp)`."""
        return self.out, self.inp, self.inp

    def __repr__(self) -> str:
        constant = ", last inp constant" if self.constant else ""
        dtype = str(self.down.dtype).removeprefix("torch.")
        return f"BilinearTensor(out={self.out}, inp={self.inp}, hidden={self.hidden}{constant}, {dtype})"

    def apply(self, x: Float[Tensor, "*batch inp"]) -> Float[Tensor, "*batch out"]:
        """Evaluate the map, `y_o = Σ_ij B[o,i,j] x_i x_j`, which equals the layer.

        Args:
            x: Inputs, without the constant coordinate.
        """
        expected = self.inp - self.constant
        if x.shape[-1] != expected:
            raise ValueError(f"x must have {expected} features on its last axis, got shape {list(x.shape)}")
        x = homogeneous(x, self)
        return (x @ self.left.T * (x @ self.right.T)) @ self.down.T

    def polar(self, a: Float[Tensor, "*#batch inp"], b: Float[Tensor, "*#batch inp"]) -> Float[Tensor, "... out"]:
        """Evaluate the symmetric bilinear form, `B(a, b)_o = Σ_ij B[o,i,j] a_i b_j` (2410.08417, section 3).

        Two inputs interact by `2 B(a, b)`, and a layer without biases has `apply(x) = B(x, x)`. Arguments are
        differences of inputs, such as what two features write: the constant cancels in a difference, so the constant
        leg counts 0.

        Args:
            a: Differences of inputs, without the constant coordinate.
            b: As many others, or one of each axis for all.
        """
        B = self.without_constant()
        for name, x in (("a", a), ("b", b)):
            if x.shape[-1] != B.inp:
                raise ValueError(f"{name} must have {B.inp} features on its last axis, got shape {list(x.shape)}")
        straight, crossed = (a @ B.left.T) * (b @ B.right.T), (b @ B.left.T) * (a @ B.right.T)
        return (straight + crossed) @ B.down.T / 2

    def without_constant(self) -> "BilinearTensor":
        """Return the purely quadratic part: the same tensor without the constant leg, if it has one.

        What the constant leg adds is linear or constant in the input, so it is no interaction of two inputs.
        """
        if not self.constant:
            return self
        return replace(self, left=self.left[:, :-1], right=self.right[:, :-1], constant=False)

    def matrix(self, u: Float[Tensor, "*n out"]) -> Float[Tensor, "*n inp inp"]:
        """Return the interaction matrix of an output direction, symmetrised: `u·y = xᵀ Q x`.

        `Q = ½ Σ_h (u·down_h) (left_h right_hᵀ + right_h left_hᵀ)` (2410.08417, section 3). Cost `hidden · inp²` per
        direction; a batch of n directions holds `n · inp²` numbers.

        Args:
            u: One direction `[out]`, or `n` of them `[n, out]`.
        """
        if u.shape[-1] != self.out:
            raise ValueError(f"u must have {self.out} entries on its last axis (out), got shape {list(u.shape)}")
        weighted = (u @ self.down)[..., :, None] * self.left
        half = einsum(weighted, self.right, "... hidden i, hidden j -> ... i j") / 2
        return half + half.mT

    def project(
        self,
        out: Float[Tensor, "n_out out"] | None = None,
        inp: Float[Tensor, "n_in inp"] | None = None,
        *,
        out_bias: Float[Tensor, " n_out"] | None = None,
        inp_bias: Float[Tensor, " inp"] | None = None,
    ) -> "BilinearTensor":
        """Change the bases: read the output with the rows of `out`, write the input as a sum of the rows of `inp`.

        The new tensor maps `z` to `out · y + out_bias` with `x = z · inp + inp_bias`; a bias makes a constant leg, or
        uses the one that is there. Multiplies one thin factor per leg: cost `hidden · (out · n_out + 2 inp · n_in)`.

        Args:
            out: Readers, e.g. SAE encoder rows. `None` keeps the output basis.
            inp: Writers, e.g. SAE decoder rows. `None` keeps the input basis.
            out_bias: Added to what the readers read.
            inp_bias: The point that `z = 0` stands for.
        """
        width = self.inp - self.constant
        for name, basis, size in (("out", out, self.out), ("inp", inp, width)):
            if basis is not None and (basis.ndim != 2 or basis.shape[1] != size):
                raise ValueError(f"{name} must have shape [n, {size}], got {list(basis.shape)}")
        n_out = self.out if out is None else len(out)
        for name, bias, size in (("out_bias", out_bias, n_out), ("inp_bias", inp_bias, width)):
            if bias is not None and bias.shape != (size,):
                raise ValueError(f"{name} must have shape [{size}], got {list(bias.shape)}")
        down = self.down if out is None else out @ self.down
        left, left_bias = _change_input(self.left, inp, inp_bias, self.constant)
        right, right_bias = _change_input(self.right, inp, inp_bias, self.constant)
        return self.from_weights(down, left, right, left_bias, right_bias, out_bias)

    def inner(self, other: "BilinearTensor") -> Float[Tensor, ""]:
        """Return the Frobenius inner product of the symmetric parts, `Σ_oij B[o,i,j] B'[o,i,j]`, without the cube.

        `½ Σ_gh (down'ᵀ down)_gh [(left' leftᵀ)(right' rightᵀ) + (left' rightᵀ)(right' leftᵀ)]_gh`. Cost
        `hidden · hidden' · (out + 4 inp)`.
        """
        if self.shape != other.shape or self.constant != other.constant:
            raise ValueError(f"other must have the same legs {self!r}, got {other!r}")
        down = self.down.T @ other.down
        straight = (self.left @ other.left.T) * (self.right @ other.right.T)
        crossed = (self.left @ other.right.T) * (self.right @ other.left.T)
        return (down * (straight + crossed)).sum() / 2

    def norm(self) -> Float[Tensor, ""]:
        """Return the Frobenius norm of the symmetric part, `sqrt(inner(self, self))`."""
        return self.inner(self).clamp(min=0).sqrt()

    def diagonal(self) -> Float[Tensor, "{self.out} {self.inp}"]:
        """Return the self-interactions `B[o,i,i]`."""
        return self.down @ (self.left * self.right)

    def dense(self) -> Float[Tensor, "{self.out} {self.inp} {self.inp}"]:
        """Build the symmetric cube `[out, inp, inp]`: `out · inp²` numbers, 4 GiB in float32 at 1024."""
        return self.matrix(torch.eye(self.out, dtype=self.down.dtype, device=self.down.device))

    def to(self, *args, **kwargs) -> "BilinearTensor":
        """Return the tensor on another device or in another dtype; arguments as for `torch.Tensor.to`."""
        return replace(self, **{name: getattr(self, name).to(*args, **kwargs) for name in ("down", "left", "right")})

    def detach(self) -> "BilinearTensor":
        """Return the same tensor outside the autograd graph."""
        return replace(self, **{name: getattr(self, name).detach() for name in ("down", "left", "right")})


def homogeneous(x: Float[Tensor, "*batch d"], B: BilinearTensor) -> Float[Tensor, "*batch inp"]:
    """Append the constant 1 to inputs, if the layer has that leg."""
    return torch.cat((x, x.new_ones(*x.shape[:-1], 1)), -1) if B.constant else x


def with_constant(writers: Float[Tensor, "n_in d"], B: BilinearTensor) -> Float[Tensor, "rows inp"]:
    """Give writers the constant as one more leg and as one more writer, if the layer has one."""
    return torch.block_diag(writers, writers.new_ones(1, 1)) if B.constant else writers


def _check_kind(factors: dict[str, Tensor]) -> None:
    """Refuse arrays of other libraries, integers and mixtures, which would fail later and say less."""
    for name, factor in factors.items():
        if not isinstance(factor, Tensor):
            raise ValueError(f"{name} must be a torch tensor, got {type(factor).__name__}; see torch.as_tensor")
        if not factor.is_floating_point():
            raise ValueError(f"{name} must hold floating point numbers, got {factor.dtype}")
    if len({(factor.dtype, factor.device) for factor in factors.values()}) > 1:
        got = ", ".join(f"{name} {factor.dtype} on {factor.device}" for name, factor in factors.items())
        raise ValueError(f"factors must have one dtype and one device, got {got}")


def _change_input(factor: Tensor, inp: Tensor | None, inp_bias: Tensor | None, constant: bool) -> tuple:
    """Return one input factor in a new basis, and its new constant column if there is one."""
    linear, bias = (factor[:, :-1], factor[:, -1]) if constant else (factor, None)
    if inp_bias is not None:
        shift = linear @ inp_bias
        bias = shift if bias is None else bias + shift
    return (linear if inp is None else linear @ inp.T), bias
