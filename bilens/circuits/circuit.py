"""The smallest circuit: two input features whose product drives an output feature."""

from dataclasses import dataclass

import torch

from bilens.tensor.records import Record

from .discovery import Discovery
from .layer import FeatureLayer


@dataclass(frozen=True)
class Circuit(Record):
    """Two input features whose product drives an output feature of one layer."""

    layer: int
    feature: int
    left: int
    right: int

    def __post_init__(self):
        if self.left == self.right:
            raise ValueError(f"left and right must be two different input features, got {self.left} twice")

    @classmethod
    def of(cls, lens: FeatureLayer, discovery: Discovery) -> "Circuit":
        """Return the pair of a motif with the largest coefficient: between its first two groups, or with its source.

        Args:
            lens: The layer that was searched.
            discovery: What `circuits.search` found.
        """
        strength = lens.coefficients(discovery.out).abs().fill_diagonal_(-1)
        left = discovery.groups[0].features
        right = discovery.groups[1].features if len(discovery.groups) > 1 else torch.arange(len(strength))
        i, j = divmod(int(strength[left][:, right].argmax()), len(right))
        return cls(lens.layer, discovery.out, int(left[i]), int(right[j]))

    def check(self, lens: FeatureLayer) -> None:
        """Make sure that a layer is the circuit's and has its features.

        Raises:
            ValueError: Another layer, or a feature that does not exist.
            TypeError: The layer is not bilinear.
        """
        if lens.layer != self.layer:
            raise ValueError(f"circuit must be one of layer {lens.layer}, where the lens is, got one of {self.layer}")
        lens.check_feature("out", self.feature)
        lens.check_feature("inp", self.left, "left")
        lens.check_feature("inp", self.right, "right")
        _ = lens.tensor  # raises if the layer has none
