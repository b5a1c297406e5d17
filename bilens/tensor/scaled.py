"""A layer prepared for screening: scaled so that nothing over- or underflows, and rounded with known errors."""

import math
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .bilinear import BilinearTensor, with_constant
from .frames import Frame

WIDTHS = 32  # matrix products in bfloat16 want legs that are a multiple of this
_ENOUGH = 64  # outputs for which a basis made of features pays
FLOAT32_ROUNDOFF = 2.0**-24
_NORM = 1 + 1e-6  # a norm in float32 may come out smaller than it is by less than this


@dataclass(frozen=True, eq=False)
class Scaled:
    """The factors of a layer between two bases, each divided by a power of two, which loses nothing.

    Input legs are padded with zeros to a multiple of `WIDTHS`. Screening in low precision multiplies the rounded
    `writers`; `writer_norm` and `writer_error` are what its bound needs to know of them. They stand in the order of
    `features`; the last `n_base` of them are unit vectors where the layer is in a basis made of features (`Frame`).
    What such a basis takes is known too, beside `Σ_h |weight_h| terms_h` of an output: of a coefficient of writers i
    and j at most `residual_i length_j + (length_i + residual_i) residual_j`, of the base's matrix `base_error`.
    Both are zero without one.
    """

    exponent: int  # exact value = 2 ** exponent · scaled value
    scale: Float[Tensor, " n_out"]  # of each output feature's coefficients beside those of the others
    readers: Float[Tensor, "n_out out"] | None
    down: Float[Tensor, "rows hidden"]
    left: Float[Tensor, "hidden width"]
    right: Float[Tensor, "hidden width"]
    features: Int[Tensor, " n_in"]  # which each writer is of
    n_base: int
    writers: Float[Tensor, "n_in width"]  # in the screening dtype
    writer_norm: Float[Tensor, " n_in"]  # of each row of the rounded writers
    writer_error: Float[Tensor, " n_in"]  # norm of what the rounding took from each row
    fine_writers: Float[Tensor, "n_in width"]  # in float32, in the order that the features have by themselves
    terms: Float[Tensor, " hidden"]  # |left_h| |right_h| before the change of basis, in float64
    base_error: float  # of the projected factors, beside `terms`
    residual: Float[Tensor, " n_in"]  # norm of what each writer differs from its sum of the base, in float64
    length: Float[Tensor, " n_in"]  # norm of each writer itself

    @classmethod
    def of(cls, B: BilinearTensor, out: Tensor | None, inp: Tensor | None, dtype: torch.dtype) -> "Scaled":
        """Prepare a layer to be screened in some dtype."""
        D = torch.eye(B.inp, dtype=B.down.dtype, device=B.down.device) if inp is None else with_constant(inp, B)
        D, e_inp = _scaled("inp", D)
        frame, (residual, length, base_error) = _frame(D, B.out if out is None else len(out), dtype)
        terms = residual.new_zeros(B.hidden)
        if frame.n_base:
            left_norm, right_norm = (torch.linalg.vector_norm(f.double(), dim=1) for f in (B.left, B.right))
            terms = left_norm * right_norm
            B = BilinearTensor(B.down.double(), *(f.double() @ frame.base.T for f in (B.left, B.right)))
        width = -(-B.inp // WIDTHS) * WIDTHS
        if out is None:
            readers, e_out = None, 0
            down, scale, e_down = _scaled_rows("B.down", B.down)
        else:
            readers, scale, e_out = _scaled_rows("out", out)
            down, e_down = _scaled("B.down", B.down)
        (left, e_left), (right, e_right) = _scaled("B.left", B.left), _scaled("B.right", B.right)
        eye = torch.eye(frame.n_base, dtype=frame.rest.dtype, device=down.device)
        exact = torch.cat((frame.rest, eye)) if frame.n_base else frame.rest
        features = frame.order.roll(-frame.n_base)  # the base last
        rounded = _padded(exact, width).to(dtype)
        norm = torch.linalg.vector_norm(rounded.to(exact.dtype), dim=1) * _NORM
        error = torch.linalg.vector_norm(rounded[:, : B.inp].to(exact.dtype) - exact, dim=1) * _NORM
        return cls(
            exponent=e_down + e_left + e_right + e_out + 2 * e_inp,
            scale=scale,
            readers=None if readers is None else readers.float(),
            down=down.float(),
            left=_padded(left, width).float(),
            right=_padded(right, width).float(),
            features=features,
            n_base=frame.n_base,
            writers=rounded,
            writer_norm=norm.float(),
            writer_error=error.float(),
            fine_writers=_padded(exact, width).float()[features.argsort()],
            terms=terms * 2.0**-e_left * 2.0**-e_right,
            base_error=base_error,
            residual=residual[features],
            length=length[features],
        )

    @cached_property
    def place(self) -> Int[Tensor, " n_in"]:
        """Where each feature stands: `features`, the other way round."""
        return self.features.argsort()

    @property
    def n_out(self) -> int:
        """Number of output features."""
        return len(self.scale)

    @property
    def n_in(self) -> int:
        """Number of input features, the constant included."""
        return len(self.writers)

    @property
    def hidden(self) -> int:
        """Number of rank-one terms of the layer."""
        return len(self.left)

    @property
    def width(self) -> int:
        """Size of the padded input leg."""
        return self.writers.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """What is screened in."""
        return self.writers.dtype

    @property
    def device(self) -> torch.device:
        """Where the layer is."""
        return self.writers.device

    @property
    def roundoff(self) -> float:
        """Largest relative error of rounding a number to the screening dtype."""
        return torch.finfo(self.dtype).eps / 2

    @property
    def bytes(self) -> int:
        """Size of the scaled copies."""
        kept = (getattr(self, part.name) for part in fields(self) if part.name != "scale")
        return sum(part.nbytes for part in kept if isinstance(part, Tensor))


def _frame(D: Tensor, n_out: int, dtype: torch.dtype) -> tuple[Frame, tuple[Tensor, Tensor, float]]:
    """Return the basis to screen in, and its `residual`: that of the writers pays in float32 and for enough outputs.

    Its weights are a few times as long as the writers, which the bounds of lower precision feel. It must hold each
    writer as exactly as float32 does.
    """
    if dtype == torch.float32 and n_out >= _ENOUGH and len(D):
        frame = Frame.of(D.double())
        residual, length, base_error = frame.residual(D)
        if (residual <= FLOAT32_ROUNDOFF * length).all():
            return frame, (residual, length, base_error)
    plain = Frame.plain(D)
    return plain, plain.residual(D)


def _scaled(name: str, tensor: Tensor) -> tuple[Tensor, int]:
    """Return a tensor divided by a power of two, so that its largest entry is about 1, and that power's exponent."""
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    largest = tensor.abs().max().item() if tensor.numel() else 0.0
    exponent = math.frexp(largest)[1]
    if abs(exponent) > 160:
        raise ValueError(f"the largest entry of {name} must lie between 2^-160 and 2^160, got {largest:.3g}")
    # in two steps, since the power itself may be no float32
    return tensor * 2.0 ** -(exponent // 2) * 2.0 ** -(exponent - exponent // 2), exponent


def _scaled_rows(name: str, tensor: Tensor) -> tuple[Tensor, Tensor, int]:
    """Scale each row to a largest entry of about 1; return also the rows' scales and the exponent of all."""
    tensor, exponent = _scaled(name, tensor)
    largest = tensor.abs().amax(1).double() if tensor.numel() else tensor.new_zeros(len(tensor)).double()
    scale = torch.where(largest > 0, largest.clamp(min=2.0**-100).log2().floor().exp2(), 1.0)
    return tensor / scale.to(tensor.dtype)[:, None], scale, exponent


def _padded(tensor: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))
