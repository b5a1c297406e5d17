"""The package as a whole: imports point one way, heavy libraries load late, everything public is documented."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bilens

PACKAGE = Path(bilens.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
ORDER = [
    *("tensor", "decompositions", "spectra", "factorizations", "interactions", "comparison", "polynomials"),
    *("rotary", "layers", "transformer", "formats", "llama", "checkpoints", "saes", "attribution", "paths"),
    *("modifiers", "cards", "circuits", "motifs", "interventions", "couplings"),
    *("toys", "imagesets", "classifiers", "images", "adversarial", "annealing"),
    *("plots", "imageplots", "report", "__init__", "__main__"),
]
HOMES = {  # third parties that stay in one place
    "transformer_lens": {"layers", "transformer", "classifiers"},
    "sae_lens": {"saes"},
    "huggingface_hub": {"checkpoints", "saes"},
    "plotly": {"plots", "imageplots", "report"},
}


def parse(module):
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def imported(module):
    """Yield the full name of everything a module imports, wherever in the file."""
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ("bilens" if node.level else None, node.module)))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def siblings(module):
    """Yield the modules of this package that a module imports; the package itself is `__init__`."""
    for name in imported(module):
        first, *rest = name.split(".")
        if first == "bilens":
            yield rest[0] if rest and rest[0] in MODULES else "__init__"


def test_every_module_has_its_place():
    assert set(MODULES) <= set(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_up_the_list_only(module):
    later = ORDER[ORDER.index(module) :]
    assert not set(siblings(module)) & set(later)


def test_the_import_reader_sees_every_kind_of_import():
    assert {"tensor"} <= set(siblings("layers"))
    assert {"transformer"} <= set(siblings("checkpoints"))  # under TYPE_CHECKING and within functions
    assert {"tensor", "checkpoints", "circuits"} <= set(siblings("__init__"))


@pytest.mark.parametrize("module", MODULES)
def test_third_parties_stay_in_their_modules(module):
    libraries = {name.split(".")[0] for name in imported(module)}
    assert not [library for library, homes in HOMES.items() if library in libraries and module not in homes]


def test_importing_bilens_is_light():
    heavy = ["transformer_lens", "sae_lens", "transformers", "datasets", "plotly", "huggingface_hub", "sklearn"]
    code = f"import sys, bilens; print([name for name in {heavy} if name in sys.modules], 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (run.stdout.strip(), run.stderr) == ("[] True", "")


@pytest.mark.parametrize("name", bilens.__all__)
def test_every_public_name_is_there(name):
    assert getattr(bilens, name) is not None


def test_names_are_listed_once_and_others_are_refused():
    assert len(set(bilens.__all__)) == len(bilens.__all__)
    assert dir(bilens) == sorted(bilens.__all__)
    with pytest.raises(AttributeError, match="module 'bilens' has no attribute 'lod'"):
        bilens.lod  # noqa: B018


@pytest.mark.parametrize("module", MODULES)
def test_no_device_is_named(module):
    assert "cuda" not in (PACKAGE / f"{module}.py").read_text().lower()


def public(body, prefix=""):
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{node.name}.")


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_has_a_docstring(module):
    tree = parse(module)
    assert ast.get_docstring(tree)
    assert not [name for name, node in public(tree.body) if not ast.get_docstring(node)]


@pytest.mark.parametrize("module", MODULES)
def test_no_star_imports_and_no_hidden_switches(module):
    source = (PACKAGE / f"{module}.py").read_text()
    assert "import *" not in source
    assert "set_grad_enabled" not in source
