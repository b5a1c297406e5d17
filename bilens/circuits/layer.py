"""Circuits of one MLP between two SAEs: read off the weights, then tested by running the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from bilens import saes as _saes
from bilens.models.transformer import BilinearTransformer
from bilens.saes.cards import FILE, FeatureCards
from bilens.saes.collecting import auroc
from bilens.saes.directions import check_sae, offsets, readers, writers
from bilens.saes.rows import activations, to_rows
from bilens.saes.stored import SAE
from bilens.tensor.bilinear import BilinearTensor, homogeneous
from bilens.tensor.decompositions import Eigen, eigen
from bilens.tensor.interactions import Interactions, top_interactions


@dataclass(frozen=True, repr=False)
class FeatureLayer:
    """One bilinear MLP between an SAE at its input and an SAE at its output.

    `pre_f = readers_f · MLP(x) + offset_f` with `x = z · writers + b_dec + error` (2410.08417, section 3.1): output
    features are read with the encoder, input features written with the decoder.
    """

    model: BilinearTransformer
    layer: int
    inp: SAE
    out: SAE
    inp_cards: FeatureCards | None = None
    out_cards: FeatureCards | None = None

    @classmethod
    def load(cls, model: BilinearTransformer, layer: int, saes: str | Path = "bilens-mini") -> "FeatureLayer":
        """Put a layer between the SAEs stored under `saes`, with their feature cards if they have been stored too.

        Args:
            model: The model.
            layer: Which block.
            saes: `"bilens-mini"`, or a folder that `bilens.saes.fit` wrote.

        Raises:
            ValueError: No such layer; or SAEs that were fitted elsewhere, or to a model with other weights.
        """
        if not 0 <= layer < model.cfg.n_layers:
            raise ValueError(f"layer must lie between 0 and {model.cfg.n_layers - 1}, got {layer}")
        hooks = [f"blocks.{layer}.hook_mlp_in", f"blocks.{layer}.hook_mlp_out"]
        loaded = [_saes.load(saes, hook) for hook in hooks]
        for sae, hook in zip(loaded, hooks, strict=True):
            check_sae(model, sae, hook)
        stored = [
            FeatureCards.load(saes, hook, model) if (_saes.sae_folder(saes, hook) / FILE).exists() else None
            for hook in hooks
        ]
        return cls(model, layer, *loaded, *stored)

    def __repr__(self) -> str:
        n_in, n_out = self.inp.cfg.d_sae, self.out.cfg.d_sae
        return f"FeatureLayer(layer={self.layer}, {n_in} input features, {n_out} output features)"

    @property
    def hook_in(self) -> str:
        """Name of the hook point the input SAE reads."""
        return f"blocks.{self.layer}.hook_mlp_in"

    @property
    def hook_out(self) -> str:
        """Name of the hook point the output SAE reads."""
        return f"blocks.{self.layer}.hook_mlp_out"

    @cached_property
    def tensor(self) -> BilinearTensor:
        """The layer in the residual basis."""
        return self.model.blocks[self.layer].mlp.tensor().detach()

    @cached_property
    def readers(self) -> Float[Tensor, "feature d_model"]:
        """Encoder rows of the output features."""
        return readers(self.out)

    @cached_property
    def writers(self) -> Float[Tensor, "feature d_model"]:
        """Decoder rows of the input features."""
        return writers(self.inp)

    def coefficients(self, feature: int) -> Float[Tensor, "feature feature"]:
        """Return `Q` of one output feature among the input features, `writers · B.matrix(reader) · writersᵀ`."""
        return self.writers @ self._matrix(self.readers[feature]) @ self.writers.T

    def _matrix(self, directions: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model d_model"]:
        """Interaction matrices in the residual basis; what biases add is linear or constant, so no interaction."""
        matrix = self.tensor.matrix(directions)
        return matrix[..., :-1, :-1] if self.tensor.constant else matrix

    def label(
        self,
        side: Literal["inp", "out"],
        features: int | Sequence[int],
        weights: Sequence[float] | None = None,
    ) -> str:
        """Name a feature, or a group with weights, by the tokens at which it is most active (`saes.Contexts.label`)."""
        cards = self.inp_cards if side == "inp" else self.out_cards
        if side == "inp" and features == len(self.writers):
            return "(constant)"
        if cards is not None:
            return cards.contexts.label(features, self.model, weights=weights)
        return ", ".join(f"#{feature}" for feature in ([features] if isinstance(features, int) else features))


# -- from the weights -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Outliers:
    """Output features of a layer, the one with the strongest spectral outliers first."""

    feature: Int[Tensor, " feature"]
    values: Float[Tensor, "feature 2"]  # the two eigenvalues of largest magnitude
    bulk: Float[Tensor, " feature"]  # edge of the other eigenvalues' spectrum if they were a random matrix's

    @property
    def strength(self) -> Float[Tensor, " feature"]:
        """Sum of the magnitudes of the two strongest eigenvalues, the published ranking."""
        return self.values.abs().sum(1)

    @property
    def ratio(self) -> Float[Tensor, " feature"]:
        """How far the second outlier lies outside the bulk: `|λ₂| / edge`, about 1 for a random matrix."""
        return self.values[:, 1].abs() / self.bulk

    def __repr__(self) -> str:
        top = ", ".join(map(str, self.feature[:5].tolist()))
        return f"Outliers({len(self.feature)} features; first: {top} ...)"


def outliers(lens: FeatureLayer, by: Literal["strength", "ratio"] = "strength") -> Outliers:
    """Rank all output features of a layer by their spectral outliers, from the weights alone.

    `strength` is `|λ₁| + |λ₂|` (2410.08417, tutorial and section 5.2); `ratio` is `|λ₂|` over the edge
    `2 sqrt(Σ_{i>2} λ_i² / (n-2))` that the other eigenvalues would have as a random symmetric matrix (Wigner), so it
    finds features whose two outliers stand out whatever their scale. Cost: one `d_model × d_model`
    eigenvalue problem per feature.
    """
    if by not in ("strength", "ratio"):
        raise ValueError(f"by must be 'strength' or 'ratio', got {by!r}")
    values = torch.cat([torch.linalg.eigvalsh(lens.tensor.matrix(some)) for some in lens.readers.split(128)])
    values = values.gather(1, values.abs().argsort(dim=1, descending=True, stable=True))
    bulk = 2 * values[:, 2:].pow(2).mean(1).sqrt()
    found = Outliers(torch.arange(len(values)), values[:, :2], bulk.clamp(min=torch.finfo(bulk.dtype).tiny))
    order = getattr(found, by).argsort(descending=True, stable=True)
    return Outliers(found.feature[order], found.values[order], found.bulk[order])


def pairs(lens: FeatureLayer, feature: int, k: int = 10) -> Interactions:
    """Return the strongest pairs of input features of one output feature, from the weights alone."""
    found = top_interactions(lens.tensor, k, out=lens.readers[feature, None], inp=lens.writers)
    return found._replace(out=torch.full_like(found.out, feature))


def top_eigen(lens: FeatureLayer, feature: int, k: int | None = None) -> Eigen:
    """Return the eigenpairs of one output feature's interaction matrix in the residual basis."""
    return eigen(lens.tensor, lens.readers[feature], k)


# -- weights against the running model --------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Prediction:
    """What a few eigenvectors say an output feature does, against what it does on text."""

    actual: Float[Tensor, " position"]  # activation, zero where the feature is not among the k largest
    predicted: Float[Tensor, " position"]  # Σ_i λ_i (v_i · x)² over the chosen eigenpairs
    pearson: float  # over all positions
    pearson_active: float  # over the positions where the feature is active
    n_active: int

    def __repr__(self) -> str:
        return (
            f"Prediction(pearson={self.pearson:.3f}, active only {self.pearson_active:.3f} at {self.n_active} of "
            f"{len(self.actual)} positions)"
        )


def predict(
    lens: FeatureLayer, feature: int, dataset: Sequence[str] | Int[Tensor, "row seq"], k: int = 2
) -> Prediction:
    """Predict an output feature's activation from its k strongest eigenvectors, and correlate with the real one.

    `ŷ = Σ_{i≤k} λ_i (v_i · x)²` with x what enters the MLP (2410.08417, section 5.2 and figure 9). BOS and padding are
    left out. A correlation over fewer than three positions is NaN.
    """
    return predict_all(lens, [feature], dataset, k)[0]


@torch.no_grad()
def predict_all(
    lens: FeatureLayer, features: Sequence[int], dataset: Sequence[str] | Int[Tensor, "row seq"], k: int = 2
) -> list[Prediction]:
    """Do what `predict` does for several output features, in one pass over the dataset."""
    x, y = _inputs_and_outputs(lens, dataset)
    activations_, x = lens.out.encode(y), homogeneous(x, lens.tensor)
    return [_predict(x, activations_[:, feature], top_eigen(lens, feature, k)) for feature in features]


def _predict(x: Float[Tensor, "position inp"], actual: Float[Tensor, " position"], top: Eigen) -> Prediction:
    predicted = (x @ top.vectors.T).pow(2) @ top.values
    active = actual != 0
    overall, alone = _pearson(predicted, actual), _pearson(predicted[active], actual[active])
    return Prediction(actual, predicted, overall, alone, int(active.sum()))


def _inputs_and_outputs(lens: FeatureLayer, dataset: Sequence[str] | Tensor) -> tuple[Tensor, Tensor]:
    """Return what enters and what leaves the MLP at every position that counts, `[position, d_model]`."""
    rows = to_rows(lens.model, dataset)
    found = activations(lens.model, rows, [lens.hook_in, lens.hook_out])
    return found[lens.hook_in][rows.counts], found[lens.hook_out][rows.counts]


def _pearson(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack((a, b)))[0, 1].item() if len(a) > 2 else float("nan")


@dataclass(frozen=True, repr=False)
class Removal:
    """What happens to an output feature's pre-activation when an input feature is taken out of the MLP's input."""

    inp: int
    before: Float[Tensor, "*batch"]
    predicted: Float[Tensor, "*batch"]  # after the removal, computed from the weights
    measured: Float[Tensor, "*batch"]  # after the removal, by running the model
    activation_before: Float[Tensor, "*batch"]
    activation: Float[Tensor, "*batch"]  # after the removal, top-k included

    def __repr__(self) -> str:
        error = (self.predicted - self.measured).abs().max() / self.before.abs().max()
        return (
            f"Removal(input feature {self.inp}: mean pre-activation {self.before.mean():.3f} -> "
            f"{self.measured.mean():.3f}, predicted from the weights with relative error {error:.1e})"
        )


@torch.no_grad()
def remove(lens: FeatureLayer, inp: int, feature: int, tokens: Int[Tensor, "batch seq"], position: int = -1) -> Removal:
    """Take one input feature out of what enters the MLP at a position, and see what an output feature does.

    `x' = x - z_i d_i`, for which the weights predict exactly `Δpre = -2 z_i d_iᵀ Q x + z_i² d_iᵀ Q d_i` (biases of the
    layer included). The model is really run with the edit: prediction and measurement must agree to rounding.
    An activation of zero there removes nothing.

    Args:
        lens: The layer.
        inp: Input feature to remove.
        feature: Output feature to watch.
        tokens: Token ids without padding.
        position: Where, the last position by default.
    """
    found = activations(lens.model, to_rows(lens.model, tokens), [lens.hook_in, lens.hook_out])
    x, y = found[lens.hook_in][:, position], found[lens.hook_out][:, position]
    removed = lens.inp.encode(x)[:, inp, None] * lens.writers[inp]

    def edit(value: Tensor, hook: object) -> Tensor:
        value = value.clone()
        value[:, position] -= removed
        return value

    with lens.model.hooks(fwd_hooks=[(lens.hook_in, edit)]):
        _, cache = lens.model.run_with_cache(tokens, names_filter=lens.hook_out, stop_at_layer=lens.layer + 1)
    after = cache[lens.hook_out][:, position]
    reader, offset = lens.readers[feature], offsets(lens.out)[feature]
    before, measured = y @ reader + offset, after @ reader + offset
    matrix, full, gone = lens.tensor.matrix(reader), x, removed
    if lens.tensor.constant:
        full, gone = torch.cat((x, x.new_ones(len(x), 1)), 1), torch.cat((removed, x.new_zeros(len(x), 1)), 1)
    predicted = before + einsum(gone, matrix, gone - 2 * full, "b i, i j, b j -> b")
    encoded = (lens.out.encode(part)[:, feature] for part in (y, after))
    return Removal(inp, before, predicted, measured, *encoded)


# -- the sentiment-negation circuit -----------------------------------------------------------------------------------

SUBJECTS = ("the movie", "this film", "the acting", "the story", "the ending", "the plot", "the script", "the music")
VERBS = {"plain": ("was", "is", "was very", "is really"), "negated": ("was not", "is not", "was never", "wasn't very")}
ADJECTIVES = {
    "positive": ("good", "great", "funny", "interesting", "beautiful", "entertaining", "convincing", "believable"),
    "negative": ("bad", "boring", "terrible", "awful", "stupid", "predictable", "horrible", "ridiculous"),
}
CELLS = [(verb, adjective) for verb in VERBS for adjective in ADJECTIVES]


def negation_sentences() -> dict[tuple[str, str], list[str]]:
    """Return sentences that end in an adjective, for each of plain or negated × positive or negative."""
    return {
        (verb, adjective): [f"{s} {v} {a}" for s in SUBJECTS for v in VERBS[verb] for a in ADJECTIVES[adjective]]
        for verb, adjective in CELLS
    }


@dataclass(frozen=True)
class NegationCircuit:
    """A pair negation × sentiment that drives an output feature, and what the model does without either.

    `means` holds the output feature's mean pre-activation at the adjective, for each kind of sentence; `removals` its
    mean pre-activation in the sentences it stands for, as they are and without a feature.
    """

    layer: int
    target: tuple[str, str]  # the sentences the output feature stands for, e.g. ("negated", "positive"): not good
    feature: int
    negation: int
    sentiment: int
    coefficient: float  # 2 Q_ij of negation × sentiment in the output feature
    rank: int  # of |coefficient| among all pairs of that output feature, 1 = strongest
    coverage: float  # fraction of the target sentences in which both features are active; all below is over those
    contribution: float  # mean coefficient · z_negation · z_sentiment
    auroc: dict[str, float]  # of each feature's activation for what it stands for
    means: dict[tuple[str, str], float]
    removals: dict[str, float]
    prediction_error: float  # largest difference of predicted and measured removal, relative to the pre-activation
    decoder_cosine: float | None = None  # with the feature of the opposite target in the same layer
    labels: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def find_negation(lenses: Mapping[int, FeatureLayer], target: tuple[str, str] | None = None) -> NegationCircuit:
    """Locate the pair negation × sentiment that does most for a negated-sentiment feature, over all given layers.

    In each layer, at the adjective of template sentences: negation and sentiment features are those input features
    whose activation best separates negated from plain and the target's sentiment from the other (AUROC at least 0.7);
    output features are active in at least 30 % of the target sentences, and their pre-activation separates those from
    each of the other three kinds (AUROC at least 0.7). Among them the circuit is the triple with the largest mean
    contribution `2 Q_ij z_i z_j` where both are active, at least a tenth of the target sentences; `Q` comes from the
    weights. Then each feature is removed from the running model, in those sentences.

    Args:
        lenses: Layers to search.
        target: What the output feature should stand for, `("negated", "positive")` (not good) or
            `("negated", "negative")` (not bad); the stronger of the two if `None`.

    Raises:
        ValueError: No layer has such features.
    """
    targets = [cell for cell in CELLS if cell[0] == "negated"]
    if target is not None and target not in targets:
        raise ValueError(f"target must be one of {targets} or None, got {target!r}")
    tokens = _negation_tokens(next(iter(lenses.values())).model)
    found = [
        (lens, triple, cell)
        for lens in lenses.values()
        for cell in (targets if target is None else [target])
        if (triple := _best_triple(lens, tokens, cell)) is not None
    ]
    if not found:
        raise ValueError(f"no layer of {sorted(lenses)} has features that tell negated-sentiment sentences apart")
    lens, triple, cell = max(found, key=lambda one: one[1].contribution)
    return _test_triple(lens, triple, tokens, cell)


def _negation_tokens(model: BilinearTransformer) -> dict[tuple[str, str], list[Tensor]]:
    """Tokenise the template sentences, grouped by length so that no padding is needed."""
    grouped = {}
    for cell, sentences in negation_sentences().items():
        by_length: dict[int, list[Tensor]] = {}
        for sentence in sentences:
            row = model.to_tokens(sentence)[0]
            by_length.setdefault(len(row), []).append(row)
        grouped[cell] = [torch.stack(rows) for rows in by_length.values()]
    return grouped


@dataclass(frozen=True)
class _Triple:
    feature: int
    negation: int
    sentiment: int
    coverage: float
    contribution: float
    auroc: dict[str, float]
    means: dict[tuple[str, str], float]


def _best_triple(lens: FeatureLayer, tokens: Mapping, target: tuple[str, str]) -> _Triple | None:
    """Return the triple of one layer that contributes most, if it has features that separate the sentences."""
    z, pre, active = {}, {}, {}
    for cell, groups in tokens.items():
        ends = [activations(lens.model, to_rows(lens.model, g), [lens.hook_in, lens.hook_out]) for g in groups]
        z[cell] = lens.inp.encode(torch.cat([end[lens.hook_in][:, -1] for end in ends]))
        y = torch.cat([end[lens.hook_out][:, -1] for end in ends])
        pre[cell], active[cell] = y @ lens.readers.T + offsets(lens.out), (lens.out.encode(y) != 0).float()

    def cat(values: Mapping, keep: object) -> Tensor:
        return torch.cat([value for cell, value in values.items() if keep(cell)])

    negated = auroc(cat(z, lambda c: c[0] == "negated"), cat(z, lambda c: c[0] == "plain"))
    feeling = auroc(cat(z, lambda c: c[1] == target[1]), cat(z, lambda c: c[1] != target[1]))
    others = [auroc(pre[target], value) for cell, value in pre.items() if cell != target]
    stands = torch.stack(others).min(0).values
    stands[active[target].mean(0) < 0.3] = 0  # a feature that is hardly ever active there stands for something else
    outs, negations, sentiments = (
        candidates[scores[candidates] >= least]
        for scores, least, n in ((stands, 0.7, 32), (negated, 0.7, 16), (feeling, 0.7, 16))
        for candidates in [scores.topk(n).indices]
    )
    if not (len(outs) and len(negations) and len(sentiments)):
        return None
    matrices = lens._matrix(lens.readers[outs])
    coefficient = 2 * einsum(lens.writers[negations], matrices, lens.writers[sentiments], "n i, o i j, s j -> o n s")
    one, other = z[target][:, negations], z[target][:, sentiments]
    both = einsum((one != 0).to(one), (other != 0).to(one), "b n, b s -> n s")
    contribution = coefficient * einsum(one, other, "b n, b s -> n s") / both.clamp(min=1)
    unfit = (negations[:, None] == sentiments[None, :]) | (both < 0.1 * len(one))
    contribution.masked_fill_(unfit, -torch.inf)
    if not contribution.isfinite().any():
        return None
    o, n, s = (int(i) for i in torch.unravel_index(contribution.argmax(), contribution.shape))
    out, negation, sentiment = int(outs[o]), int(negations[n]), int(sentiments[s])
    separates = {
        "feature": stands[out].item(),
        "negation": negated[negation].item(),
        "sentiment": feeling[sentiment].item(),
    }
    means = {cell: value[:, out].mean().item() for cell, value in pre.items()}
    coverage = both[n, s].item() / len(one)
    return _Triple(out, negation, sentiment, coverage, contribution[o, n, s].item(), separates, means)


def _test_triple(lens: FeatureLayer, triple: _Triple, tokens: Mapping, target: tuple[str, str]) -> NegationCircuit:
    """Measure what the output feature does without each input feature, and without a control."""
    everything = 2 * lens.coefficients(triple.feature)
    everything.diagonal().div_(2)
    value = everything[triple.negation, triple.sentiment].item()
    rank = int((everything.triu().abs() > abs(value)).sum()) + 1
    groups = [kept for group in tokens[target] if len(kept := group[_both_active(lens, triple, group)])]
    removals, error = {}, 0.0
    for name, inp in (("negation", triple.negation), ("sentiment", triple.sentiment)):
        done = [remove(lens, inp, triple.feature, group) for group in groups]
        removals["as it is"] = torch.cat([one.before for one in done]).mean().item()
        removals[f"without {name}"] = torch.cat([one.measured for one in done]).mean().item()
        error = max(error, *(((o.predicted - o.measured).abs().max() / o.before.abs().max()).item() for o in done))
    removals["without another feature"] = _control(lens, triple, groups)
    other = ("negated", "negative" if target[1] == "positive" else "positive")
    opposite = _best_triple(lens, tokens, other)
    cosine = None
    if opposite is not None:
        decoder = lens.out.W_dec.detach()
        cosine = torch.cosine_similarity(decoder[triple.feature], decoder[opposite.feature], dim=0).item()
    labels = {
        "feature": lens.label("out", triple.feature),
        "negation": lens.label("inp", triple.negation),
        "sentiment": lens.label("inp", triple.sentiment),
    }
    return NegationCircuit(
        lens.layer, target, triple.feature, triple.negation, triple.sentiment, value, rank, triple.coverage,
        triple.contribution, triple.auroc, triple.means, removals, error, cosine, labels,
    )  # fmt: skip


def _both_active(lens: FeatureLayer, triple: _Triple, group: Tensor) -> Tensor:
    """Tell in which sentences both the negation and the sentiment feature are active at the adjective."""
    x = activations(lens.model, to_rows(lens.model, group), [lens.hook_in])[lens.hook_in][:, -1]
    return (lens.inp.encode(x)[:, [triple.negation, triple.sentiment]] != 0).all(1)


def _control(lens: FeatureLayer, triple: _Triple, groups: Sequence[Tensor]) -> float:
    """Mean pre-activation without one of the other features that are active there, averaged over up to 8 of them."""
    x = torch.cat(
        [activations(lens.model, to_rows(lens.model, g), [lens.hook_in])[lens.hook_in][:, -1] for g in groups]
    )
    strength = lens.inp.encode(x).mean(0)
    strength[[triple.negation, triple.sentiment]] = 0
    others = strength.topk(8).indices.tolist()
    after = [torch.cat([remove(lens, i, triple.feature, g).measured for g in groups]).mean() for i in others]
    return torch.stack(after).mean().item()
