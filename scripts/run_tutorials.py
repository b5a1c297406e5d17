"""Run the tutorials and store their outputs, figures as small pictures that show where no script runs.

    python scripts/run_tutorials.py               # all of them
    python scripts/run_tutorials.py 3 5           # by number

In a notebook a figure is an interactive one; what is stored beside the code is a picture of it, drawn by Chromium, so
that the notebook stays small and shows on a page that runs no script. Cells run in this process, each notebook in names
of its own. Needs the `dev` extra and a Chromium browser.
"""

import argparse
import ast
import base64
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from IPython.lib.pretty import pretty
from PIL import Image

FOLDER = Path(__file__).parents[1] / "tutorials"
COLORS = 96  # of a picture's palette
SCALE = 1.5  # pixels of a picture for one of the page


def main() -> None:
    """Run those that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, help="which tutorials; all if none is named")
    numbers = parser.parse_args().numbers
    paths = [path for path in sorted(FOLDER.glob("*.ipynb")) if not numbers or int(path.stem.split("_")[0]) in numbers]
    if not paths:
        parser.error(f"no tutorial has one of the numbers {numbers}")
    with drawing() as page:
        for path in paths:
            store(path, page)
            print(f"{path.name}: {path.stat().st_size / 1024:.0f} kB")


# -- running ----------------------------------------------------------------------------------------------------------


def run(source: str, names: dict[str, Any], where: str) -> tuple[str, Any]:
    """Run a cell as a notebook does; return what it printed, and the value of its last line or None."""
    tree = ast.parse(TransformerManager().transform_cell(source))
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, where, "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), where, "eval"), names)
    return printed.getvalue(), value


def shown(value: Any) -> dict[str, Any]:
    """Return what a notebook shows of a value, by kind; a figure as plotly's JSON."""
    if hasattr(value, "to_plotly_json"):
        return {"figure": value.to_json()}
    html = value._repr_html_() if hasattr(value, "_repr_html_") else None
    return ({} if html is None else {"text/html": html}) | {"text/plain": pretty(value)}


@contextmanager
def elsewhere() -> Iterator[None]:
    """Work in an empty folder."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def store(path: Path, page: Any) -> None:
    """Run one tutorial and write it back with its outputs."""
    notebook, names, count = nbformat.read(path, as_version=4), {"__name__": "__main__"}, 0
    with elsewhere():
        for number, cell in enumerate(notebook.cells):
            if cell.cell_type == "code":
                count += 1
                printed, value = run(cell.source, names, f"{path.stem}[{number}]")
                cell.execution_count, cell.outputs = count, outputs(printed, value, count, page)
    nbformat.write(notebook, path)


def outputs(printed: str, value: Any, count: int, page: Any) -> list[nbformat.NotebookNode]:
    """Return a cell's outputs as a notebook holds them."""
    found = [nbformat.v4.new_output("stream", name="stdout", text=printed)] if printed else []
    if value is not None:
        data = shown(value)
        if "figure" in data:
            data = {"image/png": picture(data["figure"], page)}
        found.append(nbformat.v4.new_output("execute_result", data=data, execution_count=count))
    return found


# -- drawing ----------------------------------------------------------------------------------------------------------


@contextmanager
def drawing() -> Iterator[Any]:
    """Open a page that knows plotly, without a network."""
    import plotly
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    script = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(device_scale_factor=SCALE, viewport={"width": 1280, "height": 900})
        page.set_content("<body style='margin:0'><div id='figure' style='display:inline-block'></div></body>")
        page.add_script_tag(path=script)
        yield page
        browser.close()


def picture(figure: str, page: Any) -> str:
    """Draw a figure, as a PNG of few colours in base64."""
    page.evaluate("f => { f = JSON.parse(f); return Plotly.newPlot('figure', f.data, f.layout).then(_ => 0) }", figure)
    drawn = Image.open(io.BytesIO(page.locator("#figure .svg-container").screenshot())).convert("RGB")
    buffer = io.BytesIO()
    drawn.quantize(COLORS).save(buffer, "png", optimize=True)
    page.evaluate("Plotly.purge('figure')")
    return base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    main()
