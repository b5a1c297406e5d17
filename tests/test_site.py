"""The documentation site: every block of its pages runs, it builds without warnings or a network, no link is broken."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import twin

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "tutorials"
sys.path.insert(0, str(SOURCE / "site"))
import blocks  # noqa: E402
import hooks  # noqa: E402

sys.path.remove(str(SOURCE / "site"))

PAGES = sorted(SOURCE.rglob("*.md"))


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """The files of a planted twin of ts-medium and of its SAEs, by repository and name."""
    return twin.files(tmp_path_factory.mktemp("twin"))


@pytest.fixture
def served(hub, twins):
    """A Hub on this machine with the twin on it."""
    hub.serve(twins)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(SOURCE).with_suffix("").as_posix())
def test_the_blocks_of_a_page_run(page, served, tmp_path, monkeypatch, unchecked):
    """Models of the Hub are a planted twin's, served on this machine; what a page says it prints, it prints."""
    monkeypatch.chdir(tmp_path)
    for block, said, printed in blocks.run_page(page):
        blocks.assert_prints(printed, said.text, f"{page.name}:{block.line}")


# -- the built site ---------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page is made of: the names of its places, and what it refers to, each with the tag that does."""

    def __init__(self, path):
        super().__init__()
        self.places, self.refers = set(), []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.places.add(value)
            elif name in ("href", "src") and value:
                self.refers.append((tag, value))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; whoever asks for the network on the way fails."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", SOURCE / "site" / "mkdocs.yml"]
    done = subprocess.run(
        [*command, "--site-dir", folder], capture_output=True, text=True, env={**os.environ, **nowhere}, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


def test_no_link_is_broken(site, pages):
    broken = []
    for path, page in pages.items():
        for _, url in page.refers:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            target = target / "index.html" if target.is_dir() else target
            if not (target.is_file() and _has_place(pages.get(target), unquote(parts.fragment))):
                broken.append(f"{path.relative_to(site)}: {url}")
    assert not broken, broken[:20]


def _has_place(page, name):
    return page is None or not name or name in page.places or name.startswith("__")  # those the theme's script makes


def test_nothing_is_loaded_from_elsewhere(pages):
    remote = {
        (path.name, tag, url)
        for path, page in pages.items()
        for tag, url in page.refers
        if tag != "a" and urlsplit(url).netloc
    }
    assert not remote
    for path in pages:
        assert not re.search(r"(?:import|import\(|@import)\s*[\"'(]https?:", path.read_text()), path


@pytest.mark.parametrize("wing", hooks.WINGS)
def test_the_reference_holds_every_public_name(wing, pages, site):
    folder = hooks.PACKAGE / wing
    there = pages[site / "reference" / f"{wing}.html"].places
    names = {f"bilens.{wing}.{module}.{name}" for module, name in hooks.names_of(folder)}
    names |= {f"bilens.{wing}.{path.stem}" for path in folder.glob("*.py") if path.stem != "__init__"}
    assert not names - there


def test_every_notebook_and_page_is_reached(site, pages):
    first = pages[site / "index.html"]
    reached = {(site / unquote(urlsplit(url).path)).resolve() for tag, url in first.refers if tag == "a"}
    wanted = {site / path.relative_to(SOURCE).with_suffix(".html") for path in [*PAGES, *SOURCE.glob("*.ipynb")]}
    assert not {path.name for path in wanted - reached - {site / "index.html"}}


def test_the_list_for_agents_names_pages_that_are_there(site):
    listed = re.findall(r"\]\(([^)]+)\)", (site / "llms.txt").read_text())
    assert len(listed) > 20
    assert all((site / url).is_file() for url in listed)


def test_figures_are_small_and_shown():
    shown = "".join(page.read_text() for page in [*PAGES, ROOT / "README.md"])
    for path in (SOURCE / "figures").iterdir():
        assert path.stat().st_size < 400_000, path
        assert path.suffix == ".css" or path.name in shown, path
