"""What the site's build adds: a page of reference for each wing, and notebooks that fetch nothing from elsewhere."""

import ast
import re
from pathlib import Path

from mkdocs.structure.files import File

PACKAGE = Path(__file__).parents[2] / "bilens"
WINGS = ("tensor", "models", "saes", "circuits", "images", "report")
REMOTE = re.compile(r'<script[^>]*(?:src="https?:[^"]*"|type="text/x-mathjax-config")[^>]*>.*?</script>', re.DOTALL)
MERMAID = re.compile(r'<script type="module">(?:(?!</script>).)*mermaid.*?</script>', re.DOTALL)

PICTURE = re.compile(r'<img(?=[^>]*\ssrc="https?:)[^>]*?(?:\salt="([^"]*)"[^>]*)?/?>')


def on_config(config):
    """List the notebooks that there are in the navigation, in the order of their numbers."""
    notebooks = sorted(path.name for path in Path(config.docs_dir).glob("*.ipynb"))
    config.nav = [{"Tutorials": notebooks} if entry == "Tutorials" else entry for entry in config.nav]
    return config


def on_files(files, config):
    """Add the pages of reference: a wing's modules in the order of its table of contents."""
    for name, content in reference().items():
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def on_page_content(html, page, config, files):
    """Take out of notebooks what the network would be asked for: scripts for formulas and diagrams, badges."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    return PICTURE.sub(lambda picture: picture[1] or "", MERMAID.sub("", REMOTE.sub("", html)))


def reference() -> dict[str, str]:
    """Return the pages of reference by name, as mkdocstrings reads them."""
    pages = {wing: _wing(wing) for wing in WINGS}
    return {"index": _index(pages), **pages}


def _index(pages: dict[str, str]) -> str:
    top = ", ".join(f"[`bilens.{name}`][bilens.{module}.{name}]" for module, name in names_of(PACKAGE))
    wings = "".join(
        f"- [`bilens.{wing}`]({wing}.md): {_first_line(PACKAGE / wing / '__init__.py')}\n" for wing in pages
    )
    return f"# Reference\n\nGenerated from the docstrings. At the top level: {top}.\n\n{wings}"


def _wing(wing: str) -> str:
    folder = PACKAGE / wing
    parts = [f"# bilens.{wing}\n\n{_first_line(folder / '__init__.py')}\n"]
    rooms = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    if names := names_of(folder):
        linked = ", ".join(f"[`{name}`][bilens.{wing}.{module}.{name}]" for module, name in names)
        parts.append(f"Names of the wing itself: {linked}.\n")
    return "\n".join(parts + [f"::: bilens.{wing}.{room}\n" for room in rooms])


def names_of(folder: Path) -> list[tuple[str, str]]:
    """Return module and name of the functions and classes that a table of contents lists beside modules."""
    tree = ast.parse((folder / "__init__.pyi").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
    listed = [(node.module, alias.name) for node in imports for alias in node.names]
    return [(module, name) for module, name in listed if name in _defined(folder.joinpath(*module.split(".")))]


def _defined(path: Path) -> set[str]:
    """Return the functions and classes of a module: constants and what others made are not in the reference."""
    tree = ast.parse(path.with_suffix(".py").read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
