"""bilens: hooked bilinear transformers and the circuits in their weights.

The table of contents, in reading order. The algebra imports at once; what needs transformer_lens, sae_lens or plotly is
imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .decompositions import Eigen as Eigen
from .decompositions import TopOutputs as TopOutputs
from .decompositions import eigen as eigen
from .decompositions import spectrum_in_basis as spectrum_in_basis
from .decompositions import top_outputs as top_outputs
from .interactions import Certificate as Certificate
from .interactions import Interactions as Interactions
from .interactions import top_interactions as top_interactions
from .polynomials import Degree as Degree
from .polynomials import check_quadratic as check_quadratic
from .polynomials import degree as degree
from .polynomials import recover_tensor as recover_tensor
from .tensor import BilinearTensor as BilinearTensor

if TYPE_CHECKING:
    from . import annealing as annealing
    from . import attribution as attribution
    from . import cards as cards
    from . import circuits as circuits
    from . import classifiers as classifiers
    from . import couplings as couplings
    from . import images as images
    from . import imagesets as imagesets
    from . import interventions as interventions
    from . import modifiers as modifiers
    from . import motifs as motifs
    from . import paths as paths
    from . import plots as plots
    from . import polynomials as polynomials
    from . import report as report
    from . import saes as saes
    from . import toys as toys
    from .attribution import attribute as attribute
    from .checkpoints import CheckpointError as CheckpointError
    from .checkpoints import load as load
    from .checkpoints import save as save
    from .transformer import BilinearConfig as BilinearConfig
    from .transformer import BilinearTransformer as BilinearTransformer

__version__ = "0.1.0"

_LATER = {
    "load": "checkpoints",
    "save": "checkpoints",
    "CheckpointError": "checkpoints",
    "BilinearConfig": "transformer",
    "BilinearTransformer": "transformer",
    "attribute": "attribution",
}
_MODULES = (
    "annealing",
    "attribution",
    "cards",
    "checkpoints",
    "circuits",
    "classifiers",
    "couplings",
    "images",
    "imagesets",
    "interventions",
    "layers",
    "modifiers",
    "motifs",
    "paths",
    "plots",
    "polynomials",
    "report",
    "saes",
    "toys",
    "transformer",
)

__all__ = [
    "BilinearTensor",
    "Certificate",
    "Degree",
    "Eigen",
    "Interactions",
    "TopOutputs",
    "check_quadratic",
    "degree",
    "eigen",
    "recover_tensor",
    "spectrum_in_basis",
    "top_interactions",
    "top_outputs",
    *_LATER,
    *_MODULES,
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f".{_LATER[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module 'bilens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
