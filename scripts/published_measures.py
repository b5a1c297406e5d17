"""What `reproduce.py published` measures of a model, and how."""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from published_studies import NEGATION, NOT_BAD, NOT_GOOD, Study, Subject
from torch import Tensor

import bilens
from bilens import saes
from bilens.circuits.layer import FeatureLayer
from bilens.circuits.spectral import pairs_of
from bilens.models.logits import logit_directions
from bilens.models.windows import observed
from bilens.tensor.statistics import pearson

CODE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # results of other code are measured again
KS = 64  # eigenvectors of figure 9
BLOCK = 128  # features that are measured, and stored, at a time
LEAST, ENOUGH = 10, 100  # active positions of a feature that counts: the authors', and ours

Once = Callable[[str, Callable[[], Any]], Any]  # a part of a measurement, from the store if it is there


class Measurement(NamedTuple):
    """What is measured, with which SAEs."""

    name: str
    saes: tuple[str, ...]
    run: Callable[[Subject, Once], Any]


def measurements(study: Study) -> Iterator[Measurement]:
    """Yield all that is measured of a model."""
    if study.layers:
        yield Measurement("loss", (), model_loss)
    for layer in range(study.layers):
        for point in ("mlp-out", "resid-mid"):
            name = f"{layer}-{point}-x4-k30"
            yield Measurement(f"added-{name}", (name,), partial(spliced, name))
    if study.inp:
        yield Measurement("circuit", (study.inp, study.out), negation_circuit)
    yield Measurement("low-rank", (study.out,), partial(low_rank, study.out))
    yield Measurement("ranking", (study.ranked[1],), ranking)
    for name in study.scaled:
        yield Measurement(f"scaled-{name}", (name,), partial(scaled, name))


# -- losses -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def model_loss(subject: Subject, once: Once) -> dict[str, float]:
    """Measure the model's loss (appendix G)."""
    total, n = 0.0, 0
    for _, some in subject.windows.batches(32):
        losses = subject.model(some.tokens, "loss", attention_mask=some.attend, loss_per_token=True)
        total += losses.double().sum().item()
        n += int((some.attend[:, 1:] & some.attend[:, :-1]).sum())
    return {"loss": total / n, "tokens": n}


def spliced(name: str, subject: Subject, once: Once) -> dict[str, float]:
    """Measure the loss with an SAE's reconstruction in place of what it reads."""
    found = saes.evaluate(subject.model, subject.sae(name), subject.windows.tokens)
    return {"loss": found.loss, "spliced": found.loss_spliced, "zero": found.loss_zero, "dead": found.dead}


# -- the negation circuit ---------------------------------------------------------------------------------------------


@torch.no_grad()
def negation_circuit(subject: Subject, once: Once) -> dict[str, Any]:
    """Look at the not-good and not-bad features of figure 8, from the weights and on text."""
    study = subject.study
    lens = FeatureLayer.load(
        subject.model, study.layer, study.scope, study.inp, study.out, subject.revisions.get(study.scope)
    )
    parts = (NOT_GOOD, NOT_BAD)
    strongest = pairs_of(lens, parts, 15)
    found = {str(pairs.out[0].item()): one_output(subject, lens, pairs) for pairs in strongest}
    decoder = torch.nn.functional.normalize(lens.out.W_dec[list(parts)], dim=1)
    return {"features": found, "cosine": (decoder[0] @ decoder[1]).item()}


def one_output(subject: Subject, lens: FeatureLayer, pairs: bilens.Interactions) -> dict[str, Any]:
    """Look at one output feature beside its strongest pairs: spectrum, plane, prediction."""
    feature = pairs.out[0].item()
    top = lens.eigen(feature)
    members = [f for group in NEGATION.values() for f in group]
    unit = torch.nn.functional.normalize(lens.writers[members], dim=1)
    Q = lens.coefficients(feature)
    cross = 2 * Q[torch.triu(torch.ones_like(Q), 1) > 0]
    legs = (pairs.left, pairs.right, pairs.value)
    between = Q[list(NEGATION["not"])][:, list(NEGATION["bad"] + NEGATION["good"])]
    return {
        "values": top.values.tolist(),
        "plane": (unit @ top.vectors[:2].T).tolist(),
        "points": landmarks(subject, lens, top.vectors[:2]),
        "pairs": [list(row) for row in zip(*(part.tolist() for part in legs), strict=True)],
        "matrix": Q[members][:, members].tolist(),
        "cross std": cross.std().item(),
        "not x sentiment": (2 * between).flatten().tolist(),
        "self": Q.diagonal()[members].tolist(),
        **predicted(subject, lens, feature),
    }


def landmarks(subject: Subject, lens: FeatureLayer, vectors: Tensor) -> dict[str, list[float]]:
    """Place the unembedding's bad - good, and what enters the MLP at "not" after BOS, beside the features."""
    model, points = subject.model, {}
    found = {word: model.tokens_of([word]) for word in ("not", "bad", "good")}
    if not all(found.values()):
        return points
    ids = {word: some[0] for word, some in found.items()}
    bad, good = logit_directions(model, [ids["bad"], ids["good"]])
    points["bad - good"] = bad - good
    tokens = torch.tensor([[model.bos_id, ids["not"]]], device=model.W_U.device)
    _, cache = model.run_with_cache(tokens, names_filter=[lens.hook_entering])
    points["[BOS] not"] = cache[lens.hook_entering][0, 1]
    unit = {name: torch.nn.functional.normalize(point.to(vectors), dim=0) for name, point in points.items()}
    return {name: (vectors @ point).tolist() for name, point in unit.items()}


def predicted(subject: Subject, lens: FeatureLayer, feature: int, n_most: int = 500) -> dict[str, Any]:
    """Predict the feature by two eigenvectors: of what enters the MLP, and of the stream that was not normalised."""
    top = lens.eigen(feature, 2)

    def columns(x: Tensor, y: Tensor) -> Tensor:
        both = [(one @ top.vectors.T).pow(2) @ top.values for one in (lens.entering(x), x)]
        return torch.stack((lens.outputs(x, y)[:, feature], *both), 1)

    actual, within, raw = lens.at_positions(subject.windows, columns).cpu().unbind(1)
    active = actual != 0
    shown = active.nonzero()[:, 0]
    shown = shown[:: max(1, len(shown) // n_most)]
    return {
        "active": int(active.sum()),
        "pearson": pearson(within, actual),
        "pearson active": pearson(within[active], actual[active]),
        "pearson raw": pearson(raw, actual),
        "pearson raw active": pearson(raw[active], actual[active]),
        "points shown": torch.stack((within[shown], actual[shown]), 1).tolist(),
    }


# -- a few eigenvectors -----------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What enters an MLP at every position of text, and which features of its output are active there."""

    x: Float[Tensor, "position d_model"]
    position: Int[Tensor, " active"]
    feature: Int[Tensor, " active"]  # in rising order
    value: Float[Tensor, " active"]
    nmse: float  # of the SAE, Σ‖y - ŷ‖² / Σ‖y‖²

    def of(self, feature: int) -> tuple[Tensor, Tensor]:
        """Return the positions where a feature is active, and its activations."""
        start, stop = torch.searchsorted(self.feature, torch.tensor([feature, feature + 1]))
        return self.position[start:stop], self.value[start:stop]


@torch.no_grad()
def look(subject: Subject, layer: int, sae: saes.SAE) -> Seen:
    """Run the text as far as a layer, BOS and padding left out."""
    hooks = [f"blocks.{layer}.{name}" for name in ("hook_mlp_in", "hook_mlp_out")]
    parts, n, error, square = [], 0, 0.0, 0.0
    for _, some, seen in observed(subject.model, subject.windows, hooks):
        x, y = (seen[hook][some.counts].to(sae.W_dec) for hook in hooks)
        z = sae.encode(y)
        error += (y - sae.decode(z)).double().pow(2).sum().item()
        square += y.double().pow(2).sum().item()
        at, feature = z.nonzero(as_tuple=True)
        parts.append((x.cpu(), (at + n).cpu(), feature.cpu(), z[at, feature].cpu()))
        n += len(x)
    x, position, feature, value = (torch.cat(part) for part in zip(*parts, strict=True))
    order = feature.argsort(stable=True)
    return Seen(x, position[order], feature[order], value[order], error / square)


def low_rank(name: str, subject: Subject, once: Once) -> dict[str, Any]:
    """Predict every output feature by its k strongest eigenvectors (figure 9), and take its effective rank."""
    layer, sae = int(name.split("-")[0]), subject.sae(name)
    B = subject.model.blocks[layer].mlp.tensor().detach().to(sae.W_dec.dtype)
    readers = saes.readers(sae)
    seen = look(subject, layer, sae)
    counts = seen.feature.bincount(minlength=len(readers))
    rows = []
    for some in (counts >= LEAST).nonzero()[:, 0].split(BLOCK):
        rows += once(f"from-{some[0]}", lambda some=some: curves(B, readers, seen, some))
    return {"rows": rows, "features": len(readers), "positions": len(seen.x), "nmse": seen.nmse}


@torch.no_grad()
def curves(B: bilens.BilinearTensor, readers: Tensor, seen: Seen, some: Tensor) -> list[dict[str, Any]]:
    """Score the predictions of some features by 1, 2, ... eigenvectors."""
    found, x = bilens.eigen(B, readers[some.to(readers.device)]), seen.x.to(readers)
    rows = []
    for feature, values, vectors in zip(some.tolist(), found.values, found.vectors, strict=True):
        at, actual = seen.of(feature)
        k = min(KS, len(values))
        by_k = ((x[at.to(x.device)] @ vectors[:k].T).pow(2) * values[:k]).cumsum(1).cpu()
        everywhere = ((x @ vectors[:2].T).pow(2) @ values[:2]).cpu()
        y = torch.zeros(len(x)).index_put((at,), actual)
        row = {"feature": feature, "active": len(at), "pearson": [pearson(one, actual) for one in by_k.unbind(1)]}
        row |= {"all": pearson(everywhere, y), "r2": r2(by_k[:, min(2, k) - 1], actual)}
        rows.append(row | {"rank": (values.abs().sum().pow(2) / values.pow(2).sum()).item()})
    return rows


def r2(predicted: Tensor, actual: Tensor) -> float:
    """Return `1 - Var(y - ŷ) / Var(y)`: slope one, the intercept free."""
    return (1 - (actual - predicted).double().var() / actual.double().var()).item()


def scaled(name: str, subject: Subject, once: Once) -> dict[str, Any]:
    """Measure one of the SAEs that were trained ever longer (appendix H)."""
    found = low_rank(name, subject, once)
    two = {row["feature"]: (row["active"], row["pearson"][1]) for row in found["rows"]}
    by_least = {least: [r for n, r in two.values() if n >= least and r == r] for least in (LEAST, 10 * ENOUGH)}
    about = {f"pearson at {n}": sum(some) / len(some) if some else None for n, some in by_least.items()}
    about |= {f"features at {n}": len(some) for n, some in by_least.items()}
    loss = once("spliced", lambda: spliced(name, subject, once))
    recovered = 1 - (loss["spliced"] - loss["loss"]) / (loss["zero"] - loss["loss"])
    return about | {"nmse": found["nmse"], "recovered": recovered}


# -- the ranking ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def ranking(subject: Subject, once: Once) -> dict[str, Any]:
    """Rank all output features by the sum of their two largest |λ|, symmetrised, and as the published code read them.

    That code (tutorial of 2410.08417) left the matrices as they were, of which an eigensolver reads one triangle.
    """
    layer, name = subject.study.ranked
    sae = subject.sae(name)
    B, readers = subject.model.blocks[layer].mlp.tensor().detach().to(sae.W_dec.dtype), saes.readers(sae)
    top = bilens.top_outputs(B, readers, min(10, len(readers)), "top2")
    there = [f for f in subject.study.claimed if f < len(readers)]
    some = list(dict.fromkeys([*top.out.tolist(), *there]))
    whole = B.matrix(readers[some])
    strength = {f: two_largest(one) for f, one in zip(some, whole, strict=True)}
    coded = {f: two_largest(as_coded(B, readers[f])) for f in some}
    unit = torch.nn.functional.normalize(sae.W_dec[there[:2]], dim=1) if len(there) > 1 else None
    return {
        "top": top.out.tolist(),
        "strength": strength,
        "as coded": coded,
        "cosine": None if unit is None else (unit[0] @ unit[1]).item(),
    }


def as_coded(B: bilens.BilinearTensor, u: Tensor) -> Tensor:
    """Return the matrix that an eigensolver makes of the lower triangle of `Σ_h (u·down_h) left_h right_hᵀ`."""
    lower = ((B.left.T * (u @ B.down)) @ B.right).tril()
    return lower + lower.tril(-1).T


def two_largest(M: Tensor) -> float:
    """Return `|λ₁| + |λ₂|`."""
    return torch.linalg.eigvalsh(M).abs().topk(2).values.sum().item()
