"""Boolean toys: layers that have to learn gates, whose interaction matrices are known before training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .bilinear import BilinearTensor

# Each gate on bits a, b: coefficients of 1, a + b and a·b.
GATES: dict[str, tuple[float, float, float]] = {
    "and": (0, 0, 1),
    "or": (0, 1, -1),
    "xor": (0, 1, -2),
    "nand": (1, 0, -1),
    "nor": (1, -1, 1),
    "xnor": (1, -1, 2),
}


@dataclass(frozen=True)
class Gate:
    """One output: a boolean operation on two inputs, or a mixture of operations with their weights."""

    op: str | Mapping[str, int | float]
    first: int
    second: int

    @property
    def weights(self) -> dict[str, float]:
        """The operations and their weights."""
        return {self.op: 1.0} if isinstance(self.op, str) else {op: float(weight) for op, weight in self.op.items()}

    def __str__(self) -> str:
        op = self.op if isinstance(self.op, str) else " + ".join(f"{w:g} {name}" for name, w in self.op.items())
        return f"{op}(x{self.first}, x{self.second})"


@dataclass(frozen=True)
class Toy:
    """Gates to learn from their truth table, with or without biases.

    In `"bits"` false is 0 and true is 1; in `"signs"` false is -1 and true is 1, for inputs and outputs alike. A layer
    without biases is a quadratic form, so on bits it gives 0 where all inputs are 0 (no `nand`, `nor`, `xnor`), and on
    signs it is even (only `xor`, `xnor`). On bits `xor` is one square, `(a - b)²`; on signs it is `-ab`: two
    eigenvectors of opposite sign.

    Args:
        gates: One output each.
        n_inputs: How many inputs there are, at most 16.
        encoding: `"bits"` or `"signs"`.
        bias: Whether the layer has biases.

    Raises:
        ValueError: An unknown operation, a gate on an input that is not there or on one input twice, or one that no
            layer of this kind can compute.
    """

    gates: Sequence[Gate]
    n_inputs: int
    encoding: Literal["bits", "signs"] = "bits"
    bias: bool = False

    def __post_init__(self):
        if self.encoding not in ("bits", "signs"):
            raise ValueError(f"encoding must be 'bits' or 'signs', got {self.encoding!r}")
        if not 2 <= self.n_inputs <= 16:
            raise ValueError(f"n_inputs must lie between 2 and 16 (2^n rows are listed), got {self.n_inputs}")
        if not self.gates:
            raise ValueError("gates must hold at least one gate, got none")
        for gate in self.gates:
            self._check(gate)

    def _check(self, gate: Gate) -> None:
        unknown = [op for op in gate.weights if op not in GATES]
        if unknown or not gate.weights:
            raise ValueError(f"op must be one of {', '.join(GATES)}, got {unknown[0] if unknown else 'none'!r}")
        inputs = (gate.first, gate.second)
        if gate.first == gate.second or not all(0 <= i < self.n_inputs for i in inputs):
            raise ValueError(f"a gate must be on two different inputs from 0 to {self.n_inputs - 1}, got {inputs}")
        constant, linear, _ = self._coefficients(gate)
        needs = constant if self.encoding == "bits" else linear
        if not self.bias and abs(needs) > 1e-12:
            reason = "is not 0 where all inputs are" if self.encoding == "bits" else "is not even"
            raise ValueError(f"{gate} {reason}, so on {self.encoding} it needs bias=True, got bias=False")

    def _coefficients(self, gate: Gate) -> tuple[float, float, float]:
        """Return the coefficients of 1, a + b and ab in this encoding."""
        parts = [[weight * part for part in GATES[op]] for op, weight in gate.weights.items()]
        constant, linear, product = (sum(part) for part in zip(*parts, strict=True))
        if self.encoding == "bits":
            return constant, linear, product
        # With bits a = (1 + s)/2 and the output 2y - Σ weights, so that each gate's own output is 2y - 1.
        mean = sum(gate.weights.values())
        return 2 * constant + 2 * linear + product / 2 - mean, linear + product / 2, product / 2

    def inputs(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "rows n"]:
        """Return all `2^n` inputs."""
        rows = torch.arange(2**self.n_inputs)
        bits = (rows[:, None] >> torch.arange(self.n_inputs) & 1).to(dtype)
        return bits if self.encoding == "bits" else 2 * bits - 1

    def outputs(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch gates"]:
        """Return what the gates give, a logic table that knows nothing of matrices."""
        true = x > (0.5 if self.encoding == "bits" else 0)
        columns = []
        for gate in self.gates:
            a, b = true[..., gate.first], true[..., gate.second]
            table = {"and": a & b, "or": a | b, "xor": a ^ b, "nand": ~(a & b), "nor": ~(a | b), "xnor": ~(a ^ b)}
            values = (weight * table[op].to(x.dtype) for op, weight in gate.weights.items())
            bits = sum(values)
            columns.append(bits if self.encoding == "bits" else 2 * bits - sum(gate.weights.values()))
        return torch.stack(columns, -1)

    def matrices(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "gates inp inp"]:
        """Return the interaction matrix that each gate must have, `y = xᵀ Q x`, a constant 1 last if there are biases.

        Unique for bits without biases. Elsewhere `x_i² = x_i` (or 1) lets a diagonal stand for linear terms (or a
        constant); the form returned is that of `canonical`.
        """
        n, inp = self.n_inputs, self.n_inputs + self.bias
        Q = torch.zeros(len(self.gates), inp, inp, dtype=dtype)
        for number, gate in enumerate(self.gates):
            (constant, linear, product), i, j = self._coefficients(gate), gate.first, gate.second
            Q[number, i, j] = Q[number, j, i] = product / 2
            if self.bias:
                Q[number, [i, j], n] = Q[number, n, [i, j]] = linear / 2
                Q[number, n, n] = constant
            elif self.encoding == "bits":
                Q[number, i, i] = Q[number, j, j] = linear
            else:
                Q[number].diagonal().fill_(constant / n)
        return Q

    def canonical(self, Q: Float[Tensor, "*n inp inp"]) -> Float[Tensor, "*n inp inp"]:
        """Return the one matrix that stands for all that agree with Q on every input of the truth table.

        On bits with biases the diagonal goes into the linear terms; on signs it goes into the constant, or, without
        biases, is spread evenly.
        """
        n, Q = self.n_inputs, (Q + Q.mT) / 2
        if self.encoding == "bits" and not self.bias:
            return Q
        diagonal = Q.diagonal(dim1=-2, dim2=-1)[..., :n].clone()
        Q.diagonal(dim1=-2, dim2=-1)[..., :n] = 0
        if self.encoding == "bits":
            Q[..., :n, n] += diagonal / 2
            Q[..., n, :n] += diagonal / 2
        elif self.bias:
            Q[..., n, n] += diagonal.sum(-1)
        else:
            Q.diagonal(dim1=-2, dim2=-1)[...] = diagonal.mean(-1, keepdim=True)
        return Q


def train(
    toy: Toy,
    hidden: int | None = None,
    *,
    steps: int = 1000,
    lr: float = 0.01,
    weight_decay: float = 0.1,
    generator: torch.Generator,
) -> BilinearTensor:
    """Train a layer on the whole truth table by the mean squared error (2410.08417's code: Adam, 0.01, decay 0.1).

    AdamW, its rate a cosine to zero over the steps; each step sees all `2^n` rows.

    Args:
        toy: The gates.
        hidden: Number of hidden units; four for each gate if `None` (a symmetric matrix of rank r takes at most r).
        steps: How many.
        lr: Initial rate.
        weight_decay: Decoupled, as AdamW's.
        generator: Draws the initial weights.

    Returns:
        The trained layer, biases as its constant leg.

    Raises:
        ValueError: `hidden` or `steps` below 1.
    """
    hidden = 4 * len(toy.gates) if hidden is None else hidden
    for name, value in (("hidden", hidden), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    n, outputs = toy.n_inputs, len(toy.gates)
    shapes = [(outputs, hidden), (hidden, n), (hidden, n), *([(hidden,), (hidden,), (outputs,)] if toy.bias else [])]
    weights = [torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes]
    weights = [weight.requires_grad_() for weight in weights]
    optimiser = torch.optim.AdamW(weights, lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    x = toy.inputs()
    y = toy.outputs(x)
    for _ in range(steps):
        optimiser.zero_grad()
        (BilinearTensor.from_weights(*weights).apply(x) - y).pow(2).mean().backward()
        optimiser.step()
        schedule.step()
    return BilinearTensor.from_weights(*weights).detach()
