"""A circuit that was read off the weights, put on trial: predictions on text, edits against controls, steering."""

# `test` is what users call it, not a test of ours
# ruff: noqa: PT028

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from bilens.models.texts import Texts
from bilens.models.windows import Windows
from bilens.tensor.bilinear import homogeneous
from bilens.tensor.records import Record
from bilens.tensor.resuming import Stages

from .circuit import Circuit
from .controls import Edit, MatchedPairs, matched_pairs, run_edits
from .effects import Baseline, percentiles
from .layer import FeatureLayer
from .lowrank import LowRank, Predictions, low_rank
from .records import plain
from .steering import Steering, steering
from .textstages import text_stages

KS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Protocol:
    """How a circuit is tested: how many of everything, and what to steer.

    Raises:
        ValueError: A number out of range, or prompts without words.
    """

    ks: Sequence[int] | None = None  # numbers of eigenvectors; 1, 2, 4, ..., 64 as far as there are so many if `None`
    min_active: int = 10  # correlations over fewer positions are NaN
    n_bootstrap: int = 1000  # resamples of the texts
    confidence: float = 0.95  # of the bootstrap intervals
    n_pairs: int = 100  # matched pairs, fewer if there are not so many
    n_directions: int = 20  # random directions, for each edit and for steering
    max_windows: int = 32  # windows of text with the pair active that are edited
    prompts: Sequence[str] = ()  # for steering: texts to continue
    words: tuple[Sequence[str], Sequence[str]] | None = None  # for steering: positive and negative next tokens
    multiples: Sequence[float] = (-2.0, -1.0, 1.0, 2.0)  # for steering: how much to add, of the mean activation

    def __post_init__(self):
        if bool(len(self.prompts)) != (self.words is not None):
            raise ValueError("prompts and words go together: steering needs both")
        for name in ("max_windows", "n_bootstrap"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1, got {self.confidence}")


STANDARD = Protocol()


@dataclass(frozen=True, repr=False, eq=False)
class CircuitTest(Record, held="edits", tells=("percentile", "percentile_rescaled")):
    """A circuit against the running model.

    Edits are made at once at all positions where the pair is active, in the first `n_windows` windows of text in which
    it is, and measured at those `n_pair` positions.
    """

    circuit: Circuit
    low_rank: LowRank
    edits: dict[str, Edit]  # "left", "right", "pair", "eigenvector"
    matched: MatchedPairs
    n_windows: int
    n_pair: int
    n_pair_all: int  # positions with the pair active in all of the text
    steering: Steering | None = None

    @property
    def percentile(self) -> dict[str, float]:
        """Share, in percent, of the matched pairs whose removal has a smaller effect than that of the circuit's pair.

        The change of the loss is compared with its sign: a high one means that the model predicts worse without.
        """
        return percentiles(self.edits["pair"].effect, self.matched.effects)

    @property
    def percentile_rescaled(self) -> dict[str, float]:
        """The same among the matched pairs at the circuit's strength."""
        return percentiles(self.edits["pair"].effect, self.matched.rescaled)

    def __repr__(self) -> str:
        c, p = self.circuit, self.percentile
        return (
            f"CircuitTest({c.left} × {c.right} -> {c.feature} in layer {c.layer}, {self.n_pair} positions: predicted "
            f"{self.edits['pair'].correlation:.3f}, percentile among {len(self.matched.left)} pairs: "
            f"KL {p['kl']:.0f}, loss {p['loss']:.0f})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the pair, what its removal does and how that ranks, and the curve of `low_rank`."""
        pair = self.edits["pair"]
        about = {"left": self.circuit.left, "right": self.circuit.right, "positions": self.n_pair}
        about |= {"correlation": pair.correlation, "percentile": self.percentile}
        about |= {"effect": {name: value[0] for name, value in pair.effect._asdict().items()}}
        about |= {"percentile_rescaled": self.percentile_rescaled, "matched_pairs": len(self.matched.left)}
        return plain(about | {"low_rank": self.low_rank.to_dict()})


@torch.no_grad()
def test(
    lens: FeatureLayer,
    circuit: Circuit,
    texts: Texts,
    protocol: Protocol = STANDARD,
    *,
    generator: torch.Generator,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> CircuitTest:
    """Test a circuit on text: low-rank prediction, interventions against their controls, and steering.

    (i) `LowRank`: the k strongest eigenvectors against the real activation (2410.08417, section 5.2 and figure 9).
    (ii) Each input feature, the pair's product, and the top eigenvector are taken out of the running model; the change
    of the output feature's pre-activation is predicted from the weights: `-2 z_i d_iᵀQx + z_i² d_iᵀQd_i`,
    `-2 z_i z_j d_iᵀQd_j` and `-λ (v·x)²`. The effects on logits and loss are compared with random directions of
    matched norm and with `MatchedPairs`. (iii) With prompts and words, `steering` with the output feature, in multiples
    of its mean activation where active.

    Cost: one pass over the texts up to the layer; then `2 n_pairs + 4 n_directions` passes of at most `max_windows`
    windows through the layers after it: some two minutes for the embedded model on one core.

    Args:
        lens: The layer between its SAEs.
        circuit: What is tested.
        texts: Texts, or windows of token ids.
        protocol: How many positions, controls and resamples, and what to steer.
        generator: Source of randomness of the bootstrap and the random directions.
        progress: Show how far each part is.
        checkpoint: Folder to keep in what was measured, of this circuit alone: the same call goes on from there after a
            kill, with the same result.

    Raises:
        ValueError: No text, or none in which the pair is active; an index out of range; a circuit of another layer; a
            checkpoint that is damaged or of another call.
        TypeError: The layer is not bilinear.
    """
    circuit.check(lens)
    if isinstance(texts, str):
        raise ValueError(f"texts must be a list of texts, got one string: {texts[:40]!r}")
    windows = Windows.of(lens.model, texts)
    stages = text_stages(lens, windows, checkpoint, progress, (circuit, protocol), generator)
    found, together = _scan(lens, circuit, windows, _ks(lens, protocol), stages)
    options = {"min_active": protocol.min_active, "confidence": protocol.confidence, "generator": generator}
    predicted = low_rank(found, n_bootstrap=protocol.n_bootstrap, **options)
    if not together.any():
        raise ValueError(
            f"texts must hold a position where input features {circuit.left} and {circuit.right} are both active, "
            f"none of {len(found.actual)} is one"
        )
    base = Baseline.run(lens, lens.readers[circuit.feature], windows, together, protocol.max_windows)
    edits = run_edits(base, circuit, protocol.n_directions, protocol.min_active, generator, stages)
    steered = None if protocol.words is None else _steer(lens, circuit, found, protocol, generator)
    matched = matched_pairs(base, circuit, protocol.n_pairs, stages)
    n_all = int(together.sum())
    return CircuitTest(circuit, predicted, edits, matched, len(base.windows), len(base.x), n_all, steered)


def _ks(lens: FeatureLayer, protocol: Protocol) -> tuple[int, ...]:
    most = lens.tensor.inp
    ks = tuple(k for k in KS if k <= most) if protocol.ks is None else tuple(protocol.ks)
    if not ks or min(ks) < 1 or max(ks) > most:
        raise ValueError(f"ks must lie between 1 and {most}, got {ks}")
    return ks


def _scan(
    lens: FeatureLayer, circuit: Circuit, windows: Windows, ks: tuple[int, ...], stages: Stages
) -> tuple[Predictions, Bool[Tensor, "row seq"]]:
    """Run the texts as far as the layer: the output feature, its predictions, and where the pair is active."""
    if not windows.counts.any():
        raise ValueError("texts must hold at least one token besides BOS and padding, got none")
    top = lens.eigen(circuit.feature, max(ks))

    def columns(x: Tensor, y: Tensor) -> Tensor:
        entering = homogeneous(lens.entering(x), lens.tensor)
        parts = ((entering @ top.vectors.T).pow(2) * top.values).cumsum(1) * lens.out_factor(y)
        both = (lens.codes(x)[:, [circuit.left, circuit.right]] != 0).all(1, keepdim=True)
        actual = lens.outputs(x, y)[:, [circuit.feature]]
        return torch.cat((actual, both.to(actual), parts[:, [k - 1 for k in ks]]), 1)

    found = lens.at_positions(windows, columns, stages)
    together = torch.zeros_like(windows.counts)
    together[windows.counts] = found[:, 1] != 0
    text = windows.text[:, None].expand_as(windows.counts)[windows.counts]
    return Predictions(ks, found[:, 0], found[:, 2:], text), together


def _steer(
    lens: FeatureLayer, circuit: Circuit, found: Predictions, protocol: Protocol, generator: torch.Generator
) -> Steering:
    """Steer with the output feature, in multiples of its mean activation where it is active."""
    active = found.actual[found.actual != 0]
    if not len(active):
        raise ValueError(f"texts must activate output feature {circuit.feature} to scale steering by, none does")
    amounts = [multiple * active.mean().item() for multiple in protocol.multiples]
    options = {"n_directions": protocol.n_directions, "generator": generator}
    return steering(lens, circuit.feature, protocol.prompts, protocol.words, amounts, **options)
