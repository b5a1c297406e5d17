"""The kinds of SAEs that `fit` trains: SAELens' training classes, all asked for a mean number of active features."""

from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.saes.sae import SAEMetadata

KINDS = ("topk", "batchtopk", "matryoshka", "jumprelu")


def untrained(kind: str, d_in: int, d_sae: int, k: int, steps: int) -> TrainingSAE:
    """Return an SAE that is about to be trained, with its initial weights from torch's own generator.

    `topk` keeps the k largest of each position, `batchtopk` those of a batch (2412.06410); `matryoshka` is a batchtopk
    whose first 1/8, 1/4, 1/2 of the features must reconstruct on their own too (2503.17547); `jumprelu` learns a
    threshold per feature and is pulled towards k active ones by `2/k (L0 - k)²` (Gemma Scope 2), faded in over the
    first tenth of the steps; threshold and bandwidth start at half a unit, where activations have norm sqrt(d), and
    the encoder takes part, as short runs must move far. All but topk become JumpReLU SAEs when they are done.
    """
    if kind == "topk":
        return TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k))
    if kind == "batchtopk":
        return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k))
    if kind == "matryoshka":
        widths = [d_sae // 8, d_sae // 4, d_sae // 2, d_sae]
        return MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k, matryoshka_widths=widths)
        )
    return JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            d_in=d_in, d_sae=d_sae, jumprelu_sparsity_loss_mode="quadratic", target_l0=k, l0_warm_up_steps=steps // 10,
            jumprelu_init_threshold=0.5, jumprelu_bandwidth=0.5, jumprelu_ste_to_input=True,
        )
    )  # fmt: skip


def finished(trained: TrainingSAE, metadata: SAEMetadata) -> SAE:
    """Return the inference SAE of a trained one, its decoder rows of norm one."""
    trained.fold_W_dec_norm()
    state = {name: weight.detach().clone() for name, weight in trained.state_dict().items()}
    trained.process_state_dict_for_saving_inference(state)
    config = {**trained.cfg.get_inference_sae_cfg_dict(), "metadata": metadata.to_dict(), "device": "cpu"}
    sae = SAE.from_dict(config).to(trained.W_dec.device)
    sae.load_state_dict(state)
    return sae.eval()
