"""bilens: hooked bilinear transformers and the circuits in their weights.

The table of contents, in reading order. The algebra imports at once; what needs transformer_lens, sae_lens or plotly is
imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .comparison import frobenius_similarity as frobenius_similarity
from .comparison import gaussian_inner as gaussian_inner
from .comparison import quadratic_form_similarity as quadratic_form_similarity
from .comparison import similarity as similarity
from .comparison import similarity_matrix as similarity_matrix
from .decompositions import Eigen as Eigen
from .decompositions import TopOutputs as TopOutputs
from .decompositions import eigen as eigen
from .decompositions import spectrum_in_basis as spectrum_in_basis
from .decompositions import top_outputs as top_outputs
from .factorizations import CP as CP
from .factorizations import HOSVD as HOSVD
from .factorizations import cp as cp
from .factorizations import hosvd as hosvd
from .factorizations import recompose as recompose
from .interactions import Certificate as Certificate
from .interactions import Interactions as Interactions
from .interactions import top_interactions as top_interactions
from .polynomials import Degree as Degree
from .polynomials import check_quadratic as check_quadratic
from .polynomials import degree as degree
from .polynomials import recover_tensor as recover_tensor
from .spectra import Eigenspace as Eigenspace
from .spectra import eigenspaces as eigenspaces
from .spectra import entropy_rank as entropy_rank
from .spectra import l1l2_rank as l1l2_rank
from .spectra import participation_ratio as participation_ratio
from .tensor import BilinearTensor as BilinearTensor

if TYPE_CHECKING:
    from . import adversarial as adversarial
    from . import annealing as annealing
    from . import attribution as attribution
    from . import cards as cards
    from . import circuits as circuits
    from . import classifiers as classifiers
    from . import couplings as couplings
    from . import imageplots as imageplots
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
    "adversarial",
    "annealing",
    "attribution",
    "cards",
    "checkpoints",
    "circuits",
    "classifiers",
    "couplings",
    "imageplots",
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
    "CP",
    "Certificate",
    "Degree",
    "Eigen",
    "Eigenspace",
    "HOSVD",
    "Interactions",
    "TopOutputs",
    "check_quadratic",
    "cp",
    "degree",
    "eigen",
    "eigenspaces",
    "entropy_rank",
    "frobenius_similarity",
    "gaussian_inner",
    "hosvd",
    "l1l2_rank",
    "participation_ratio",
    "quadratic_form_similarity",
    "recompose",
    "recover_tensor",
    "similarity",
    "similarity_matrix",
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
