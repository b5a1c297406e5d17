"""Anybody's dictionary as an SAE: plain arrays of what its features read and write."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from sae_lens import SAE, SAEConfig, register_sae_class
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor, nn

ACTIVATIONS = ("identity", "relu")


@dataclass
class ArraySAEConfig(SAEConfig):
    """The shape of a dictionary of arrays."""

    activation: str = "identity"
    k: int | None = None  # how many of the largest are kept at each position; all if `None`

    def __post_init__(self):
        super().__post_init__()
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")

    @classmethod
    def architecture(cls) -> str:
        """Return the name SAELens registers the architecture by."""
        return "bilens_arrays"


class ArraySAE(SAE[ArraySAEConfig]):
    """A dictionary of arrays: `z = act(readers · x + offsets)`, `x̂ = z · writers + bias`."""

    b_enc: nn.Parameter

    def initialize_weights(self) -> None:
        """Make room for the arrays."""
        super().initialize_weights()
        self.b_enc = nn.Parameter(self.W_enc.new_zeros(self.cfg.d_sae))

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch feature"]:
        """Return the activations."""
        z = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        z = z.relu() if self.cfg.activation == "relu" else z
        if self.cfg.k is not None:
            top = z.topk(self.cfg.k, dim=-1, sorted=False)
            z = torch.zeros_like(z).scatter_(-1, top.indices, top.values)
        return self.hook_sae_acts_post(z)

    def decode(self, feature_acts: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch d_in"]:
        """Return what the activations write."""
        return self.run_time_activation_norm_fn_out(self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec))


register_sae_class("bilens_arrays", ArraySAE, ArraySAEConfig)


# eight parameters: two arrays, their biases, and what is done between them
def of_arrays(
    readers: Float[Tensor, "feature d"] | None = None,
    writers: Float[Tensor, "feature d"] | None = None,
    *,
    hook: str | None = None,
    offsets: Float[Tensor, " feature"] | None = None,
    bias: Float[Tensor, " d"] | None = None,
    activation: Literal["identity", "relu"] = "identity",
    k: int | None = None,
) -> ArraySAE:
    """Make an SAE of plain arrays, `z = act(readers · x + offsets)` and `x̂ = z · writers + bias`, to use as any other.

    Principal components, probes, a dictionary of somebody's: rows are features. Of readers and writers one may be left
    out: it is the pseudo-inverse of the other, so that `x̂` is x projected on the span.

    Args:
        readers: What each feature reads.
        writers: What each feature writes.
        hook: Where it belongs, e.g. `"blocks.2.hook_resid_mid"`.
        offsets: Added to what is read; `-readers · bias` if `None`, that is, x is read relative to the bias.
        bias: What is written without any feature; nothing if `None`.
        activation: `"identity"` or `"relu"`.
        k: How many of the largest activations are kept at each position; all if `None`.

    Raises:
        ValueError: No array, arrays that do not fit together, or another activation.
    """
    readers, writers = _completed(readers, writers)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    n, d = writers.shape
    if k is not None and not 1 <= k <= n:
        raise ValueError(f"k must lie between 1 and {n}, the number of features, got {k}")
    for name, one, shape in (("offsets", offsets, (n,)), ("bias", bias, (d,))):
        if one is not None and one.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(one.shape)}")
    dtype = str(writers.dtype).removeprefix("torch.")
    about = SAEMetadata(hook_name=hook, model_name="arrays")
    options = {"apply_b_dec_to_input": offsets is None, "activation": activation, "k": k, "metadata": about}
    with torch.random.fork_rng(devices=[]):  # SAELens draws weights, which are overwritten
        sae = ArraySAE(ArraySAEConfig(d_in=d, d_sae=n, dtype=dtype, device=str(writers.device), **options))
    offsets, bias = (writers.new_zeros(m) if one is None else one for one, m in ((offsets, n), (bias, d)))
    state = {"W_enc": readers.T, "W_dec": writers, "b_enc": offsets, "b_dec": bias}
    sae.load_state_dict({name: one.detach().to(writers) for name, one in state.items()})
    return sae.eval()


def _completed(readers: Tensor | None, writers: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return both arrays, the missing one as the pseudo-inverse of the other."""
    given = {name: one for name, one in (("readers", readers), ("writers", writers)) if one is not None}
    if not given:
        raise ValueError("readers or writers must be given, got neither")
    for name, one in given.items():
        if one.ndim != 2 or not one.is_floating_point():
            raise ValueError(f"{name} must be floating point [feature, d], got {one.dtype} of shape {list(one.shape)}")
    if len(given) == 2 and readers.shape != writers.shape:
        shapes = f"{list(readers.shape)} and {list(writers.shape)}"
        raise ValueError(f"readers and writers must have one shape, got {shapes}")
    other = torch.linalg.pinv(next(iter(given.values())).detach()).T
    return given.get("readers", other), given.get("writers", other)
