"""The table and the page of `reproduce.py published`: claimed, measured, and why they may differ."""

import base64
import gzip
import math
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

import jinja2
import plotly.graph_objects as go
import torch
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from published_measures import ENOUGH, KS, LEAST
from published_studies import NEGATION, NOT_BAD, NOT_GOOD, Study

from bilens.report import figures, plots
from bilens.report.parts import Figure, Table
from bilens.tensor.keeping import atomic_write

ADDED = {  # 2410.08417's code: relative loss added by the SAEs of layers 1 to 6
    "mlp-out": (0.0119, 0.0205, 0.0379, 0.0487, 0.0593, 0.0868),
    "resid-mid": (0.0173, 0.0278, 0.0878, 0.165, 0.220, 0.286),
}
SCALED = {  # appendix H, table 5
    "nmse": (0.17, 0.16, 0.16, 0.15, 0.15),
    "recovered": (0.60, 0.61, 0.65, 0.65, 0.66),
    "pearson": (0.17, 0.28, 0.42, 0.52, 0.59),
}
SHARES = {"ts-medium": "0.32", "fw-small": "0.65", "fw-medium": "0.45"}  # of r > .75 at k = 2, a reproduction's
NAMES = {NOT_GOOD: "not good", NOT_BAD: "not bad"}
TEXT = "other text than theirs: duplicates, split and cleaning are not published"
OTHER_SAE = "the SAEs of the paper's figure may not be the published ones"


class Row(NamedTuple):
    """One number of the paper and the one measured."""

    model: str
    what: str
    claimed: str
    measured: str
    why: str = ""


def rows_of(model: str, study: Study, name: str, found: Any) -> Iterator[Row]:
    """Yield the rows of one measurement."""
    kind, _, sae = name.partition("-")
    if name == "loss":
        said = "1.337" if model == "ts-medium" else "not found"
        yield Row(model, "loss, nats per token (appendices G, I)", said, f"{found['loss']:.4f}", TEXT)
    elif kind == "added":
        layer, point = int(sae[0]), sae[2:].rsplit("-x", 1)[0]
        added = found["spliced"] / found["loss"] - 1
        yield Row(model, f"relative loss added by {sae}", f"{ADDED[point][layer]:.4f}", f"{added:.4f}", TEXT)
    elif name == "circuit":
        yield from circuit_rows(model, found)
    elif name == "low-rank":
        yield from low_rank_rows(model, found)
    elif name == "ranking":
        yield from ranking_rows(model, study, found)
    elif kind == "scaled":
        at = study.scaled.index(sae)
        for part in ("nmse", "recovered"):
            yield Row(model, f"{part}, {sae}", f"{SCALED[part][at]:.2f}", number(found[part]), TEXT)
        for least in (LEAST, 10 * ENOUGH):
            what = f"mean r, k = 2, {sae}, {found[f'features at {least}']} features active at {least} or more"
            why = "the paper is of two minds about how often a feature must be active"
            yield Row(model, what, f"{SCALED['pearson'][at]:.2f}", number(found[f"pearson at {least}"]), why)


def number(value: float | None, spec: str = ".3f") -> str:
    """Format a number that may not be there."""
    return "none" if value is None else format(value, spec)


def circuit_rows(model: str, found: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows of figure 8."""
    yield Row(model, "decoder cosine of not good and not bad", "-0.975", f"{found['cosine']:+.3f}", OTHER_SAE)
    members = {f for group in NEGATION.values() for f in group}
    for feature, name in NAMES.items():
        one, good = found["features"][str(feature)], feature == NOT_GOOD
        what = f"{feature} ({name}): "
        high, low = (pick(one["values"][:2]) for pick in (max, min))
        yield Row(
            model, f"{what}top eigenvalues", "+0.622, -0.663" if good else "not found", f"{high:+.5f}, {low:+.5f}"
        )
        inside = sum({i, j} <= members for i, j, _ in one["pairs"])
        said = "15" if good else "not found"
        yield Row(model, f"{what}of the 15 strongest pairs, among the 13 features", said, str(inside), OTHER_SAE)
        said = "0.004" if good else "not found"
        yield Row(model, f"{what}standard deviation of cross terms", said, f"{one['cross std']:.4f}")
        ratio = fmean(map(abs, one["not x sentiment"])) / fmean(map(abs, one["self"]))
        yield Row(model, f"{what}|negation × sentiment| over |self|, means", "large", f"{ratio:.1f}")
        for key, said in (("pearson", "0.66"), ("pearson active", "0.76")):
            where = "where active" if "active" in key else "everywhere"
            why = f"{TEXT}; {one['active']} active positions"
            yield Row(
                model, f"{what}r of two eigenvectors, {where}", said if good else "not found", number(one[key]), why
            )
        why = "what a reproduction got, which left the norm out"
        said = "0.535" if good else "not found"
        yield Row(model, f"{what}the same, input not normalised", said, number(one["pearson raw"]), why)


def mean_by_k(rows: Sequence[dict[str, Any]], least: int) -> list[float]:
    """Average the correlations of features that are active often enough, for each k."""
    some = [row["pearson"] for row in rows if row["active"] >= least]
    by_k = zip(*some, strict=True)
    return [fmean(one) if (one := [r for r in column if not math.isnan(r)]) else math.nan for column in by_k]


def low_rank_rows(model: str, found: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows of figure 9, by the authors' protocol and by ours."""
    rows, why = found["rows"], f"{TEXT}; {OTHER_SAE}"
    if not rows:
        yield Row(model, "mean r by eigenvectors (figure 9)", "0.65", "no feature is active often enough", why)
        return
    theirs = [row["pearson"] for row in rows if row["active"] > LEAST]
    means = mean_by_k(rows, LEAST)
    yield Row(model, "mean r, one eigenvector (figure 9)", "about 0.65", number(means[0]), why)
    share = fmean(row[1] > 0.75 for row in theirs) if theirs else None
    said = f"most; {SHARES[model]} in a reproduction"
    yield Row(model, f"share of {len(theirs)} features with r > 0.75, k = 2", said, number(share), why)
    for k in (2, 4, 16, KS):
        said = "0.595 to 1 over k" if k == KS else "not found"
        yield Row(model, f"mean r, k = {k}", said, number(means[min(k, len(means)) - 1]), why)
    ours = [row for row in rows if row["active"] >= ENOUGH]
    what = f"ours, {len(ours)} features active at {ENOUGH} or more, k = 2: "
    parts = {"mean r everywhere, nothing set to zero": "all", "median 1 - Var(y - ŷ) / Var(y), slope one": "r2"}
    for name, key in parts.items():
        some = [row[key] for row in ours if not math.isnan(row[key])]
        value = median(some) if some and key == "r2" else fmean(some) if some else None
        yield Row(model, what + name, "not found", number(value), "stricter: what is not predicted to be silent counts")
    both = [row["pearson"][1] for row in ours]
    half = 1.96 * stdev(both) / math.sqrt(len(both)) if len(both) > 1 else None
    value = "none" if half is None else f"{fmean(both):.3f} ± {half:.3f}"
    yield Row(model, what + "mean r where active, 95 % interval", "not found", value, "features are not independent")
    ranks = [row["rank"] for row in rows]
    yield Row(model, f"effective rank, median of {len(ranks)} features", "not found", f"{median(ranks):.1f}")


def ranking_rows(model: str, study: Study, found: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows of the ranking."""
    layer, name = study.ranked
    said = ", ".join(map(str, study.claimed)) or "not found"
    n = len(study.claimed) or 10
    what = f"features of {name} by |λ₁| + |λ₂|, symmetrised"
    yield Row(model, what, said, ", ".join(map(str, found["top"][:n])), "their code read one triangle")
    coded = sorted(found["as coded"], key=lambda f: -found["as coded"][f])
    yield Row(model, "the same features, one triangle read", said, ", ".join(coded[:n]), "among those named alone")
    strengths = ", ".join(f"{found['strength'][str(f)]:.3f}" for f in found["top"][:n])
    yield Row(model, "their |λ₁| + |λ₂|", "not found", strengths)
    if layer != study.layer and found["cosine"] is not None:
        yield Row(model, "decoder cosine of the first two claimed", "-0.73", f"{found['cosine']:+.3f}")


# -- figures ----------------------------------------------------------------------------------------------------------


def figures_of(model: str, results: dict[str, Any]) -> Iterator[Figure]:
    """Yield the figures of one model."""
    if "circuit" in results:
        for feature in NAMES:
            yield from circuit_figures(feature, results["circuit"]["features"][str(feature)])
    if rows := results.get("low-rank", {}).get("rows"):
        ks = list(range(1, len(rows[0]["pearson"]) + 1))
        lines = [
            (mean_by_k(rows, least), color) for least, color in ((LEAST, figures.POSITIVE), (ENOUGH, figures.NEGATIVE))
        ]
        traces = [go.Scatter(x=ks, y=mean, mode="lines", line={"color": color}) for mean, color in lines if mean]
        drawn = figures.draw(*traces, title=f"{model}: mean correlation by number of eigenvectors (figure 9)")
        drawn.update_xaxes(type="log", title="k")
        yield Figure.of(drawn, f"Features active at {LEAST} or more positions (orange), at {ENOUGH} or more (blue)")
        two = go.Histogram(x=[row["pearson"][1] for row in rows], marker_color=figures.NEUTRAL, nbinsx=40)
        drawn = figures.draw(
            two, title=f"{model}: correlation with two eigenvectors", xaxis_title="r", yaxis_title="features"
        )
        yield Figure.of(drawn, f"{len(rows)} output features, where they are active")
    versions = {name: one for name, one in results.items() if name.startswith("scaled-")}
    if versions:
        values = {name[-2:]: one[f"pearson at {LEAST}"] or 0.0 for name, one in versions.items()}
        drawn = figures.bars(values, f"{model}: SAEs trained ever longer (appendix H)", "mean r, k = 2")
        yield Figure.of(drawn, f"Claimed: {', '.join(map(str, SCALED['pearson']))}")


def circuit_figures(feature: int, one: dict[str, Any]) -> Iterator[Figure]:
    """Draw plane, spectrum, interactions and prediction of a feature of figure 8."""
    title = f"{feature}, {NAMES[feature]}"
    labels = [f"{f} {group}" for group, some in NEGATION.items() for f in some] + list(one["points"])
    first, second = one["values"][:2]
    axes = (f"v1 (λ = {first:+.2f})", f"v2 (λ = {second:+.2f})")
    plane = torch.tensor(one["plane"] + list(one["points"].values()))
    drawn = plots.cosine_plane(plane, labels, axes, n_labels=len(labels))
    yield Figure.of(drawn, f"{title}: input features, and what the head and the stream say, in the plane (figure 8B)")
    values = torch.tensor(one["values"])
    yield Figure.of(plots.spectrum(values), f"{title}: all eigenvalues; {first:+.4f} and {second:+.4f} stand out")
    matrix = torch.tensor(one["matrix"])
    yield Figure.of(
        plots.interaction_matrix(matrix, labels[: len(matrix)]), f"{title}: the 13 input features (figure 8A)"
    )
    points = torch.tensor(one["points shown"]).reshape(-1, 2)
    drawn = plots.prediction(points[:, 1], points[:, 0], "Prediction by two eigenvectors")
    yield Figure.of(drawn, f"{title}: r = {number(one['pearson active'])} where active (figure 8C)")


# -- the page ---------------------------------------------------------------------------------------------------------


def write_page(path: Path, table: Sequence[Row], results: dict[str, dict[str, Any]]) -> Path:
    """Write one HTML file that loads nothing; the same results give the same file."""
    folder = resources.files("bilens").joinpath("assets/report")
    loader = jinja2.ChoiceLoader(
        [jinja2.FileSystemLoader(Path(__file__).parent), jinja2.PackageLoader("bilens", "assets/report")]
    )
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style, script = (Markup(folder.joinpath(name).read_text(encoding="utf-8")) for name in ("style.css", "page.js"))
    library = base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()
    sections = [
        {
            "name": model,
            "table": Table("Claimed and measured", Row._fields[1:], [row[1:] for row in table if row.model == model]),
            "figures": list(figures_of(model, found)),
        }
        for model, found in results.items()
    ]
    page = environment.get_template("published.html").render(
        sections=sections, style=style, script=script, plotly=library
    )
    with atomic_write(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path.resolve()
