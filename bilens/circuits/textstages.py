"""Where what a layer does on text is kept while it is computed, for the same call to go on from there after a kill."""

import os
from typing import Any

import torch

from bilens.models.files import fingerprint
from bilens.models.windows import Windows
from bilens.tensor.keeping import fingerprint_of, user_path
from bilens.tensor.resuming import Stages

from .layer import FeatureLayer


def text_stages(
    lens: FeatureLayer,
    windows: Windows,
    folder: str | os.PathLike[str] | None,
    progress: bool,
    said: Any,
    generator: torch.Generator | None = None,
) -> Stages:
    """Return the stages of a call: of this model, these SAEs and texts, and all that was said, drawn from here on.

    Weights are known whatever their dtype, so the model's is said too; the shapes hold what no weight tells: of the
    positions, of norms, how many features a TopK SAE keeps.

    Args:
        lens: The layer.
        windows: The text.
        folder: Where they are kept; nowhere if `None`.
        progress: Whether each shows a bar.
        said: The other arguments, such that `repr` tells all of them; of a tensor its `fingerprint_of`.
        generator: Where what is random comes from.
    """
    if folder is None:
        return Stages(progress=progress)
    drawn = None if generator is None else generator.get_state()
    of = [fingerprint(module) for module in (lens.model, lens.inp, lens.out)]
    shapes = (lens.model.W_E.dtype, lens.model.cfg, lens.inp.cfg, lens.out.cfg)
    tensors = (windows.tokens, windows.counts, windows.attend, lens.readers, lens.writers, drawn)
    depends = fingerprint_of(tensors, lens.layer, of, shapes, said)
    return Stages(user_path(folder), depends, progress, lens.readers.device)
