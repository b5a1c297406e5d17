"""Draw the site's figures: python tutorials/site/draw.py [page ...] [--report bilens-report.html].

A Python block of a page that leaves a `figure` behind, and is followed by an image, is what that image shows: the page
is run, the figure drawn by Chromium, and written as SVG. With `--report` the pictures of a report are taken too, and
that of negation, from a report that `bilens` wrote on bilens-mini.
"""

import argparse
import os
import re
import tempfile
from html import escape
from pathlib import Path
from urllib.parse import unquote

import blocks
from playwright.sync_api import Page, sync_playwright
from plotly.offline import get_plotlyjs

from bilens.report.figures import NEGATIVE, POSITIVE

SOURCE = Path(__file__).parents[1]
IMAGE = re.compile(r"```(?:\n*```text\n[^`]*```)?\n+!\[[^\]]*\]\(([^)]+\.svg)\)")
CHROMIUM = "/usr/bin/chromium"
TALL = 760  # pixels of a report's section that are shown
SLOW = 300_000  # milliseconds
SHOTS = {"report.png": "#negation", "report-circuit.png": "#finding-4"}
NEGATOR, WORDS, VERDICTS = 7, (151, 388), (417, 197)  # features of layer 3, as `bilens` names them


def main() -> None:
    """Draw what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pages", nargs="*", type=Path, help="which (default: all)")
    parser.add_argument("--report", type=Path, help="a report to take pictures of")
    args = parser.parse_args()
    pages = [page.resolve() for page in args.pages] or sorted(SOURCE.rglob("*.md"))
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        if args.report is not None:
            (SOURCE / "figures" / "negation.svg").write_text(negation())
            photograph(browser.new_page(viewport={"width": 1120, "height": 900}), args.report.resolve())
        canvas = browser.new_page()
        canvas.set_default_timeout(SLOW)
        canvas.set_content("<div id=figure></div>")
        canvas.add_script_tag(content=get_plotlyjs())
        os.chdir(folder)
        for page in pages:
            draw_page(canvas, page)


def draw_page(canvas: Page, page: Path) -> None:
    """Run a page, and write each figure that it shows."""
    text, space = page.read_text(), {"__name__": "__page__"}
    wanted = {}
    for match in IMAGE.finditer(text):
        wanted[text[: match.start()].count("\n")] = (page.parent / unquote(match[1])).resolve()
    if not wanted:
        return
    for block in blocks.blocks_of(page):
        if block.kind != "python":
            continue
        blocks.run_python(block, page, space)
        end = block.line + block.text.count("\n")
        if end in wanted:
            write(canvas, space.pop("figure"), wanted[end])


def write(canvas: Page, figure, path: Path) -> None:
    """Write a figure as SVG."""
    layout = figure.layout
    script = "([f, o]) => Plotly.toImage(JSON.parse(f), o)"
    size = {"format": "svg", "width": layout.width, "height": layout.height}
    url = canvas.evaluate(script, [figure.to_json(), size])
    path.write_text(unquote(url.partition(",")[2]) + "\n")
    print(f"{path.relative_to(SOURCE)}: {path.stat().st_size // 1024} KiB")


def photograph(page: Page, report: Path) -> None:
    """Take the pictures of a report."""
    page.set_default_timeout(SLOW)
    page.goto(report.as_uri())
    for name, where in SHOTS.items():
        box = page.locator(where).bounding_box()
        clip = {"x": box["x"], "y": box["y"], "width": box["width"], "height": min(box["height"], TALL)}
        page.screenshot(path=SOURCE / "figures" / name, full_page=True, clip=clip)


def negation() -> str:
    """Draw the single products by which "not" turns a verdict in layer 3 of bilens-mini, from the weights."""
    import bilens
    from bilens import circuits

    lens = circuits.FeatureLayer.load(bilens.load("bilens-mini"), 3)
    left, middle, right, wide = 8, 360, 560, 290
    rows = {WORDS[0]: 40, NEGATOR: 120, WORDS[1]: 200, VERDICTS[0]: 70, VERDICTS[1]: 170}
    inputs = (WORDS[0], NEGATOR, WORDS[1])
    edges, nodes = [], [_box(left, rows[i], wide, f"input feature {i}", lens.name("inp", i)) for i in inputs]
    for word, y in zip(WORDS, (70, 170), strict=True):
        edges += [_edge(left + wide, rows[i], middle, y, "#9aa5b1", 1.5) for i in (word, NEGATOR)]
        nodes.append(f'<circle cx="{middle}" cy="{y}" r="13" fill="#fff" stroke="#1f2933"/>')
        nodes.append(f'<text x="{middle}" y="{y + 5}" text-anchor="middle" font-size="16">×</text>')
        outside = -9 if y < 120 else 19  # of the lines that cross: where labels have room
        for out in VERDICTS:
            value = 2 * lens.coefficients(out)[NEGATOR, word].item()
            color = POSITIVE if value > 0 else NEGATIVE
            edges.append(_edge(middle + 13, y, right, rows[out], color, 12 * abs(value)))
            x, lift = (middle + 100, outside) if rows[out] == y else (middle + 24, 27 if y < 120 else -18)
            nodes.append(f'<text x="{x}" y="{y + lift:.0f}" fill="{color}">{value:+.2f}</text>')
    nodes += [_box(right, rows[out], 190, f"output feature {out}", lens.name("out", out)) for out in VERDICTS]
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 240" width="760" height="240" role="img" '
    head += 'font-family="system-ui, sans-serif" font-size="13"><rect width="760" height="240" fill="#fff"/>'
    return head + "".join(edges + nodes) + "</svg>\n"


def _box(x: int, y: int, wide: int, what: str, name: str) -> str:
    name = escape(name if len(name) <= 44 else f"{name[:43]}…")
    box = f'<rect x="{x}" y="{y - 23}" width="{wide}" height="46" rx="6" fill="#f5f7fa" stroke="#9aa5b1"/>'
    told = f'<text x="{x + 10}" y="{y - 5}" fill="#52606d">{what}</text>'
    return f'{box}{told}<text x="{x + 10}" y="{y + 13}" fill="#1f2933">{name}</text>'


def _edge(x: float, y: float, to_x: float, to_y: float, color: str, width: float) -> str:
    bend = (x + to_x) / 2
    path = f"M{x:.0f},{y:.0f} C{bend:.0f},{y:.0f} {bend:.0f},{to_y:.0f} {to_x:.0f},{to_y:.0f}"
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{width:.1f}"/>'


if __name__ == "__main__":
    main()
