"""The published models that `reproduce.py published` looks at: which layer, between which SAEs, on what text."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

import bilens
from bilens import saes
from bilens.models.files import fingerprint
from bilens.models.windows import Windows

NEGATION = {  # 2410.08417, figure 8: input features of layer 4
    "bad": (326, 1376, 1636, 123, 990, 1929, 491, 947),
    "good": (882, 1395),
    "not": (240, 766, 1604),
}
NOT_GOOD, NOT_BAD = 1882, 1179


class Study(NamedTuple):
    """A published model, and the layer that the paper looks at."""

    repo: str
    layer: int
    corpus: str
    out: str  # SAE at the MLP's output
    ranked: tuple[int, str]  # layer and SAE of the ranking
    claimed: tuple[int, ...]  # that ranking, as published
    layers: int = 0  # whose SAEs' losses the paper has
    inp: str | None = None  # SAE before the MLP, where the paper has the negation circuit
    scaled: tuple[str, ...] = ()  # SAEs of appendix H

    @property
    def scope(self) -> str:
        """The repository of its SAEs."""
        return f"{self.repo}-scope"


X4 = "4-mlp-out-x4-k30"
STUDIES = {
    "ts-medium": Study(
        "tdooms/ts-medium", 4, "tinystories", X4, (4, X4), (1179, 1882, 461, 111, 1219), 6, "4-resid-mid-x4-k30"
    ),
    "fw-small": Study("tdooms/fw-small", 8, "fineweb", "8-mlp-out-x4-k30", (8, "8-mlp-out-x4-k30"), ()),
    "fw-medium": Study(
        *("tdooms/fw-medium", 12, "fineweb", "12-mlp-out-x4-k30", (7, "7-mlp-out-x8-k30")),
        (3834, 751, 7068, 3697, 1063, 4917, 6714, 586, 3156, 3561),
        scaled=tuple(f"12-mlp-out-x16-k30-v{i}" for i in range(5)),
    ),
}


@dataclass(eq=False)
class Subject:
    """A model that is being looked at, its SAEs, and text for it."""

    study: Study
    texts: Sequence[str]
    sequences: int
    device: str
    revisions: dict[str, str]
    _loaded: dict[str, saes.SAE] = field(default_factory=dict, init=False)

    @cached_property
    def model(self) -> bilens.BilinearTransformer:
        """The model."""
        return bilens.load(self.study.repo, revision=self.revisions.get(self.study.repo), device=self.device)

    def sae(self, name: str) -> saes.SAE:
        """Return one of its SAEs; the latest is kept."""
        scope = self.study.scope
        if name not in self._loaded:
            loaded = saes.load_scope(scope, name, revision=self.revisions.get(scope)).to(self.device)
            self._loaded = {name: loaded}
        return self._loaded[name]

    @cached_property
    def windows(self) -> Windows:
        """The first windows of the text."""
        return Windows.of(self.model, self.texts)[: self.sequences]

    def provenance(self, names: Sequence[str]) -> dict[str, Any]:
        """Return what a measurement with these SAEs depends on."""
        text = fingerprint_of(self.windows.tokens)
        about = {"model": fingerprint(self.model), "text": text, "sequences": self.sequences}
        return about | {"saes": {name: fingerprint(self.sae(name)) for name in names}, "bilens": bilens.__version__}


def fingerprint_of(tokens: Tensor) -> str:
    """Return a hash of windows of tokens."""
    holder = torch.nn.Module()
    holder.register_buffer("tokens", tokens.double())
    return fingerprint(holder)
