"""Records in, one self-contained HTML file out: it loads nothing, and reads with a keyboard or a screen reader."""

import base64
import gzip
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import jinja2
import torch
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from bilens.circuits.couplings import CouplingTest, NegationCouplings
from bilens.circuits.discovery import Discoveries
from bilens.circuits.findings import Finding
from bilens.circuits.layer import FeatureLayer
from bilens.circuits.marks import Marked
from bilens.circuits.negating import Negation
from bilens.circuits.spectral import Outliers
from bilens.tensor.interactions import Interactions
from bilens.tensor.keeping import atomic_write, user_path

from . import groups, sections
from . import negation as first
from .cards import cards

_FOLDER = "assets/report"


# eleven parameters: one for each thing that a report may show
def write_report(
    path: str | Path,
    lens: FeatureLayer,
    findings: Sequence[Finding],
    *,
    discoveries: Discoveries | None = None,
    ranking: Outliers | None = None,
    strongest: Interactions | None = None,
    negation: Negation | None = None,
    marked: Sequence[Marked] = (),
    couplings: NegationCouplings | None = None,
    coupling_test: CouplingTest | None = None,
    generator: torch.Generator | None = None,
    title: str = "bilens report",
    note: str = "",
) -> Path:
    """Write one HTML file of under 5 MB that needs nothing else.

    It holds what the model does with negators, then the findings in the order given, each with the graph of its
    strongest pairs, heat map, spectrum against random output directions, plane of the two strongest eigenvectors,
    predictions and tests; the cards of all features in them; and tables of the whole layer.

    Args:
        path: The file; it is replaced.
        lens: The layer.
        findings: What to show in detail, from `circuits.describe`.
        discoveries: What the search found. Where it looked at some output features only, so must `ranking` and
            `strongest`: captions say so of all three.
        ranking: Output features by spectral outliers.
        strongest: The strongest pairs of the layer.
        negation: What the model does with negators; it comes first.
        marked: Sentences in which the features of negators and sentiment are marked.
        couplings: Of a model that gives no verdicts: negators and sentiment as groups, layer by layer.
        coupling_test: Their products taken out of the running model.
        generator: Of the random output directions whose spectra are drawn; no such band if `None`.
        title: Heading.
        note: A sentence on where the numbers come from.

    Returns:
        The path, absolute.
    """
    null = None if generator is None else sections.null_spectrum(lens, generator)
    named = [] if negation is None else first.members(lens, negation)
    named += [] if couplings is None else groups.members(lens, couplings)
    shown = {
        "title": title,
        "note": note,
        "summary": sections.summary(findings),
        "discoveries": discoveries,
        "negation": None if negation is None else first.section(lens, negation, marked),
        "groups": None if couplings is None else groups.groups(lens, couplings, coupling_test),
        "findings": [sections.finding(lens, one, number, null) for number, one in enumerate(findings, 1)],
        "cards": cards(lens, findings, named),
        "layer": {"number": lens.layer, "tables": sections.tables(lens, ranking, strongest, discoveries)},
    }
    with atomic_write(path) as partial:
        partial.write_text(_page(shown), encoding="utf-8")
    return user_path(path).resolve()


def _page(shown: dict[str, object]) -> str:
    """Fill the templates, and put all that the page needs into it."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bilens", _FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    assets = resources.files("bilens").joinpath(_FOLDER)
    style, script = (Markup(assets.joinpath(name).read_text(encoding="utf-8")) for name in ("style.css", "page.js"))
    library = base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()
    return environment.get_template("page.html").render(shown, style=style, script=script, plotly=library)
