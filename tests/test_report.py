"""The report in a real browser: it loads nothing, fits a phone, draws its figures, and can be clicked through."""

import json
import re
import shutil
from html import escape
from itertools import pairwise

import pytest
import torch

import bilens
from bilens import circuits, report
from bilens.circuits import negating
from bilens.circuits.marks import mark
from bilens.report.negation import halves

SAID = [("like", "movie", "good"), ("hate", "film", "bad"), ("see", "story", "great"), ("watch", "plot", "awful")]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SENTENCE = "the movie was not very good verdict :"
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
READY = "document.documentElement.dataset.ready === 'true'"


@pytest.fixture(scope="module")
def lens():
    return circuits.FeatureLayer.load(bilens.load("bilens-mini"), 2)


@pytest.fixture(scope="module")
def findings(lens):
    generator = torch.Generator().manual_seed(0)
    texts = ["the movie was not very good , but i liked the actors .", "once upon a time there was a big dog ."] * 3
    found = circuits.search((lens.tensor, lens.readers[:128], lens.writers), generator=generator, n=200)
    first = found.found[0]
    circuit = circuits.Circuit(2, first.out, *_active_pair(lens, texts))
    protocol = circuits.Protocol(n_pairs=5, n_directions=3, n_bootstrap=50)
    tested = circuits.test(lens, circuit, texts, protocol, generator=generator)
    return found, circuits.describe(lens, [first.out, 887], texts, found, [tested])


def _active_pair(lens, texts):
    tokens = lens.model.to_tokens(texts[0])
    _, cache = lens.model.run_with_cache(tokens, names_filter=lens.hook_in)
    return lens.inp.encode(cache[lens.hook_in][0, 5]).nonzero()[:2, 0].tolist()


@pytest.fixture(scope="module")
def negation(lens):
    """Verdicts with and without the layer's products; what they say of the model is not looked at here."""
    generator = torch.Generator().manual_seed(0)
    found = negating.negation({2: lens}, generator=generator, n_controls=1, n_null=200)
    assert found.search.groups
    return found, [mark(lens, SENTENCE, halves(found.search.groups[0]))]


@pytest.fixture(scope="module")
def flips(lens):
    """Negators and sentiment as groups, tested on a few sentences."""
    generator = torch.Generator().manual_seed(0)
    found = bilens.circuits.couplings.negation_couplings({2: lens}, generator=generator, n=200)
    texts = [
        f"i {verb} not {verb} that {noun} , it was not {kind} and never {kind} , no ." for verb, noun, kind in SAID
    ]
    return found, bilens.circuits.couplings.test_coupling(
        lens, found.layers[0], texts, generator=generator, n_controls=3
    )


@pytest.fixture(scope="module")
def path(lens, findings, negation, flips, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "report.html"
    options = {"discoveries": findings[0], "ranking": circuits.outliers(lens, k=12), "title": "A <title> & more"}
    options["strongest"] = bilens.top_interactions(lens.tensor, 10, out=lens.readers[:64], inp=lens.writers)
    options |= {"negation": negation[0], "marked": negation[1], "couplings": flips[0], "coupling_test": flips[1]}
    return report.write_report(out, lens, findings[1], generator=torch.Generator().manual_seed(0), **options)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs a Chromium browser on the path")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=[(1280, 900), (390, 844)], ids=["desktop", "phone"])
def page(request, browser, path):
    """The report, opened once for all that look at it: drawing it takes seconds."""
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    page.problems, page.asked = [], []
    page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_function(READY, timeout=60_000)
    yield page
    page.close()


def test_the_file_is_small_and_escapes_what_it_is_told(path):
    html = path.read_text()
    assert len(html.encode()) < 5e6
    assert "A &lt;title&gt; &amp; more" in html
    assert "A <title>" not in html


def test_nothing_is_loaded_and_nothing_fails(page, path):
    page.wait_for_timeout(500)
    assert [url for url in page.asked if not url.startswith("data:")] == [path.as_uri()]
    assert page.problems == []


def test_every_figure_is_drawn_and_fits(page):
    for plot in page.query_selector_all(".plot"):
        plot.scroll_into_view_if_needed()
        page.wait_for_function("plot => plot.querySelector('.main-svg') !== null", arg=plot, timeout=60_000)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate("[...document.querySelectorAll('.main-svg')].every(s => s.clientWidth <= window.innerWidth)")


def test_every_link_of_the_graph_leads_to_a_card(page):
    nodes = page.query_selector_all(".graph a")
    assert len(nodes) > 10
    targets = {node.get_attribute("href") for node in page.query_selector_all("a[href^='#']")}
    assert all(page.query_selector(f"[id='{target[1:]}']") for target in targets)
    nodes[0].scroll_into_view_if_needed()
    nodes[0].click()
    card = page.query_selector("article:target")
    assert card.get_attribute("id") == nodes[0].get_attribute("href")[1:]
    page.wait_for_function("card => Math.abs(card.getBoundingClientRect().top) < window.innerHeight", arg=card)


def test_it_can_be_used_with_a_keyboard(page, path):
    page.goto(path.as_uri())  # as nobody has touched it
    page.wait_for_function(READY, timeout=60_000)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the findings"
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#findings"
    page.query_selector(".graph a").focus()
    page.keyboard.press("Enter")
    assert page.query_selector("article:target") is not None


def test_a_screen_reader_is_told_what_there_is(page):
    assert page.evaluate("document.documentElement.lang") == "en"
    unnamed = "[...document.querySelectorAll('[role=img], [role=region], .graph a, section')].filter(e => " \
        "!(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby')))"  # fmt: skip
    assert page.evaluate(f"{unnamed}.length") == 0
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert page.evaluate(
        "[...document.querySelectorAll('table')].every(t => t.caption && t.querySelector('th[scope]'))"
    )


LABELS = """plot => [...plot.querySelectorAll('.annotation')].filter(e => e.style.display !== 'none')
    .map(e => e.querySelector('text').getBoundingClientRect()).map(b => [b.left, b.top, b.right, b.bottom])"""


def test_labels_do_not_overlap_and_stay_inside(page):
    """What the browser has drawn: also on a phone, where those that find no place are left out."""
    planes = [
        plot for plot in page.query_selector_all(".plot") if "plane of the two" in plot.get_attribute("aria-label")
    ]
    assert planes
    for plane in planes:
        plane.scroll_into_view_if_needed()
        page.wait_for_function("plot => plot.querySelector('.annotation') !== null", arg=plane, timeout=60_000)
        page.wait_for_timeout(200)
        boxes = page.evaluate(LABELS, plane)
        assert len(boxes) >= (6 if page.viewport_size["width"] > 1000 else 1)
        over = [
            (a, b)
            for i, a in enumerate(boxes)
            for b in boxes[:i]
            if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
        ]
        assert not over
        around = plane.bounding_box()
        assert all(around["x"] <= a[0] and a[2] <= around["x"] + around["width"] for a in boxes)


def test_every_figure_has_a_title_that_is_not_cut(page):
    titles = page.query_selector_all("figure .title")
    assert len(titles) == len(page.query_selector_all(".plot"))
    assert all(title.inner_text() for title in titles)
    assert page.evaluate("[...document.querySelectorAll('figure .title')].every(t => t.scrollWidth <= t.clientWidth)")


def test_groups_are_named_and_tested(page, flips):
    found, test = flips
    section = page.query_selector("section[aria-labelledby='h-groups']")
    text = section.inner_text()
    for group in (found.layers[0].left, found.layers[0].right):
        assert group.role in text
        strongest = group.features[group.weights.abs().argmax()].item()
        assert section.query_selector(f"a[href='#inp-{strongest}']") is not None
    assert f"at {len(test.measured)} positions" in text
    assert found.to_dict()["layers"][0]["q"] == pytest.approx(found.q[0].item())
    assert test.to_dict()["correlation"] == test.correlation


def test_verdicts_and_negation_come_first(page, negation):
    found, _ = negation
    section = page.query_selector("main section")
    assert section.get_attribute("id") == "negation"
    text = section.inner_text()
    assert all(statement in text for statement in found.behaviour.statements)
    for group in halves(found.search.groups[0]):
        assert group.role in text
        strongest = group.features[group.weights.abs().argmax()].item()
        assert section.query_selector(f"a[href='#inp-{strongest}']") is not None
    assert f"{100 * found.test.before.all:.3g}" in text
    assert f"over {len(found.test.measured)} negated statements" in text


def test_a_sentence_is_marked_where_the_groups_are_active(page, negation):
    marked = negation[1][0]
    lines = page.query_selector_all("#negation .contexts li")
    assert len(lines) == len(marked.roles)
    for line, role, values in zip(lines, marked.roles, marked.values, strict=True):
        marks = line.query_selector_all("mark")
        assert len(marks) == int((values > 0.02 * values.max()).sum())
        assert all(one.get_attribute("title").startswith(f"{role} ") for one in marks)
        shades = [float(one.evaluate("e => e.style.getPropertyValue('--a')")) for one in marks]
        assert max(shades, default=1.0) == 1.0
    text = " ".join(
        lines[0]
        .evaluate("e => [...e.childNodes].map(n => n.firstChild?.textContent ?? n.textContent).join('')")
        .split()
    )
    assert text.endswith(SENTENCE)


def test_findings_hold_what_the_page_shows(lens, findings):
    found, described = findings
    first = described[0]
    assert first.discoveries[0].out == first.feature
    assert first.tested is not None
    assert described[1].tested is None
    data = json.loads(json.dumps([one.to_dict() for one in described], allow_nan=False))
    assert data[0]["motifs"][0]["q"] == found.found[0].q
    assert [group["name"] for group in data[0]["motifs"][0]["groups"]] == list(first.names[0])
    assert [pair["left"] for pair in data[0]["pairs"]] == first.pairs.left.tolist()
    assert data[0]["test"]["positions"] == first.tested.n_pair
    assert data[1]["test"] is None
    assert str(first.feature) in repr(first)


def test_a_report_needs_neither_cards_nor_text_that_activates(lens, tmp_path):
    bare = circuits.FeatureLayer(lens.model, 2, lens.inp, lens.out)
    described = circuits.describe(bare, [3], ["once"])
    html = report.write_report(tmp_path / "bare.html", bare, described, note="a < b").read_text()
    assert f"Output feature 3: {escape(bare.name('out', 3))}" in re.sub(r"\s+", " ", html)  # from the weights
    assert "a &lt; b" in html
    assert "No motif beyond the null models." in html
    assert "The whole layer" not in html
    assert "What the model does" not in html
    assert "–" in html  # a correlation over fewer than three positions
    assert [path.name for path in tmp_path.iterdir()] == ["bare.html"]
