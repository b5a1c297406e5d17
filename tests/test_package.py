"""The package as a whole: imports point one way, heavy libraries load late, everything public is documented."""

import ast
import graphlib
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import bilens

PACKAGE = Path(bilens.__file__).parent
WINGS = ["tensor", "models", "saes", "circuits", "images", "report"]
MAY_IMPORT = {  # the wings that a wing stands on
    "tensor": set(),
    "models": {"tensor"},
    "saes": {"tensor", "models"},
    "circuits": {"tensor", "models", "saes"},
    "images": {"tensor", "models"},
    "report": {"tensor", "models", "saes", "circuits", "images"},
}
UPWARD = ("tensor.records", "report.plots")  # the one door: a record's `plot()` opens the wing on top when called
TABLES = ["bilens", *(f"bilens.{wing}" for wing in WINGS)]
MODULES = sorted(".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py"))
ROOMS = [module for module in MODULES if "." in module and not module.endswith("__init__")]
HOMES = {  # third parties that stay in one place
    "transformer_lens": {
        *(f"models.{room}" for room in ("attention", "blocks", "cache", "embedding", "hooks", "layers")),
        *(f"models.{room}" for room in ("lensnames", "mlp", "transformer")),
        "images.classifiers",
    },
    "transformers": {"models.tokenization", "models.text", "models.generation"},
    "sae_lens": {"saes.arrays", "saes.fitting", "saes.kinds", "saes.stored"},
    "huggingface_hub": {"models.sources", "models.modelcards", "saes.listing", "saes.publishing"},
    "plotly": {
        "report.figures",
        "report.generic",
        "report.plots",
        "report.tensorplots",
        "report.imageplots",
        "report.parts",
        "report.page",
    },
}


def path_of(module):
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


def parse(module):
    return ast.parse(path_of(module).read_text())


def imported(module, tree=None):
    """Yield the full name of everything a module imports, wherever in the file, however it is written."""
    inside = ["bilens", *module.split(".")[:-1]]
    for node in ast.walk(tree or parse(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = inside[: len(inside) + 1 - node.level] if node.level else []
            base = ".".join(filter(None, (*above, node.module)))
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):  # `bilens.circuits.search`, written out
            dotted = ast.unparse(node)
            if dotted.startswith("bilens."):
                yield dotted


def rooms(module, tree=None):
    """Yield the modules of this package that a module imports, `wing.room`, or the name of the wing for its table."""
    for name in imported(module, tree):
        first, *rest = name.split(".")
        room = ".".join(rest[:2])
        if first == "bilens" and (module, room) != UPWARD:
            yield room if room in ROOMS else rest[0] if rest and rest[0] in WINGS else "__init__"


def test_every_module_is_in_a_wing():
    assert {module.split(".")[0] for module in MODULES} == {*WINGS, "__init__", "__main__", "arguments"}


@pytest.mark.parametrize("module", ROOMS)
def test_imports_between_wings_point_one_way(module):
    wing = module.split(".")[0]
    others = {name.split(".")[0] for name in rooms(module)} - {wing}
    assert others <= MAY_IMPORT[wing]


def test_rooms_of_a_wing_do_not_import_in_circles():
    order = graphlib.TopologicalSorter({module: set(rooms(module)) & set(ROOMS) for module in ROOMS})
    assert len(list(order.static_order())) == len(ROOMS)


@pytest.mark.parametrize(
    "source",
    [
        "from bilens.circuits.motifs import search",
        "from bilens.circuits import motifs",
        "import bilens.circuits.motifs as m",
        "from ..circuits.motifs import search",
        "from ..circuits import motifs",
        "def f():\n    from bilens.circuits import motifs",
        "import bilens\nbilens.circuits.motifs.search()",
    ],
)
def test_the_import_reader_sees_every_kind_of_import(source):
    assert "circuits.motifs" in set(rooms("saes.cards", ast.parse(source)))


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_imported_behind_the_readers_back(module):
    source = path_of(module).read_text()
    assert "import_module" not in source
    assert "__import__" not in source
    assert ("lazy_loader" in source) == module.endswith("__init__")


@pytest.mark.parametrize("module", MODULES)
def test_no_private_name_crosses_a_module(module):
    tree, names = parse(module), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
            assert not [alias.name for alias in node.names if alias.name.startswith("_")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            assert not node.attr.startswith("_") or node.attr.startswith("__") or node.attr in ("_fields", "_asdict")


def test_files_are_short():
    lines = sorted(len(path_of(module).read_text().splitlines()) for module in ROOMS)
    assert lines[len(lines) // 2] <= 250
    assert lines[-1] <= 600


@pytest.mark.parametrize("module", MODULES)
def test_third_parties_stay_in_their_modules(module):
    libraries = {name.split(".")[0] for name in imported(module)}
    assert not [library for library, homes in HOMES.items() if library in libraries and module not in homes]


def test_importing_bilens_is_light():
    heavy = [
        "transformer_lens",
        "sae_lens",
        "transformers",
        "datasets",
        "plotly",
        "huggingface_hub",
        "sklearn",
        "torch",
    ]
    code = f"import sys, bilens; bilens.saes; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (run.stdout.strip(), run.stderr) == ("[]", "")


@pytest.mark.parametrize("table", TABLES)
def test_every_public_name_is_there(table):
    package = importlib.import_module(table)
    assert dir(package) == sorted(package.__all__)
    assert not [name for name in package.__all__ if getattr(package, name) is None]


def test_every_name_has_one_public_path():
    tables = [importlib.import_module(table) for table in TABLES]
    homes = [(name, getattr(table, name)) for table in tables for name in table.__all__]
    doubles = [name for name, value in homes if sum(value is other for _, other in homes) > 1]
    assert not [name for name in doubles if not isinstance(getattr(bilens, name, None), ModuleType)]


@pytest.mark.parametrize("table", TABLES)
def test_other_names_are_refused(table):
    with pytest.raises(AttributeError, match=f"No {table} attribute lod"):
        importlib.import_module(table).lod  # noqa: B018


@pytest.mark.parametrize("module", MODULES)
def test_no_device_is_named(module):
    assert "cuda" not in path_of(module).read_text().lower()


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
    source = path_of(module).read_text()
    assert "import *" not in source
    assert "set_grad_enabled" not in source
