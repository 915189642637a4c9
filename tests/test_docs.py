# SPDX-License-Identifier: Apache-2.0
"""The pages of docs/ and the site that they become."""

from __future__ import annotations

import html
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import documents
import pytest
import torch

import fastvit

DOCS = documents.ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def name(page: Path) -> str:
    return str(page.relative_to(DOCS))


@pytest.fixture(autouse=True)
def kept_settings() -> Iterator[None]:
    """Whatever a page sets."""
    with fastvit.backend("auto"):
        yield
    torch.use_deterministic_algorithms(False)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", [p for p in PAGES if documents.examples(p)], ids=name)
def test_the_examples_of_a_page_run(page: Path) -> None:
    documents.run(page)


def test_pages_have_examples() -> None:
    with_examples = {name(page) for page in PAGES if documents.examples(page)}
    assert with_examples >= {"index.md", "quickstart.md", "layers.md", "accelerate.md"}


def messages(page: str, heading: str) -> list[str]:
    """What stands in code in the first column of a table."""
    section = documents.text_of(DOCS / page).split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.*?) \| ", section, flags=re.MULTILINE)
    return [message for row in rows for message in re.findall(r"`([^`]+ [^`]+)`", row)]


@pytest.fixture(scope="module")
def sources() -> str:
    """The package's text, with the parts of a long string joined."""
    files = [documents.ROOT / "setup.py", *(documents.ROOT / "fastvit").rglob("*.py")]
    text = "\n".join(documents.text_of(file) for file in files)
    return re.sub(r'"\s*\n\s*f?"', "", text)


@pytest.mark.parametrize(
    ("page", "heading"),
    [("install.md", "When something fails"), ("accelerate.md", "Reasons in the report")],
)
def test_quoted_messages_are_those_of_the_package(page: str, heading: str, sources: str) -> None:
    found = messages(page, heading)
    assert len(found) > 10
    for message in found:
        for part in message.split("..."):
            assert part.strip() in sources, f"{page} quotes {message!r}"


def test_the_picture_of_the_stem_is_what_the_example_draws(tmp_path: Path) -> None:
    path = documents.ROOT / "examples" / "stem_traffic.py"
    spec = importlib.util.spec_from_file_location("example_stem_traffic", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    drawn = documents.text_of(example.main(["--out", str(tmp_path / "stem.svg")]))
    labels = r">([^<]*(?:MB|layer)[^<]*)<"
    kept = documents.text_of(DOCS / "stem_traffic.svg")
    assert re.findall(labels, drawn) == re.findall(labels, kept)
    assert len(re.findall(labels, drawn)) >= 5

    # By hand, for two layers: 2 bytes of 3 x 8 x 8 in, 4 x 4 x 4 between, 8 x 2 x 2 out.
    layers = [example.Layer(384, 128), example.Layer(128, 64)]
    assert example.separate(layers) == [384 + 5 * 128, 128 + 64]
    assert example.one_kernel_a_layer(layers) == [384 + 128, 128 + 64]
    assert sum(example.first_two_together(layers)) == 384 + 64


class Resources(HTMLParser):
    """What a page loads by itself: scripts, styles, images, fonts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if "id" in attributes:
            self.ids.add(attributes["id"] or "")
        address = attributes.get("src") if tag != "link" else attributes.get("href")
        if address and attributes.get("rel") != "canonical":
            self.found.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="the extra docs needs Python 3.11")
    pytest.importorskip("mkdocstrings")
    out = tmp_path_factory.mktemp("site")
    # From elsewhere and with -P: the checkout must not come onto the path.
    command = [sys.executable, "-P", "-m", "mkdocs", "build", "--strict"]
    arguments = ["--config-file", str(documents.ROOT / "mkdocs.yml"), "--site-dir", str(out)]
    done = subprocess.run(
        [*command, *arguments], cwd=out.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


def parsed(page: Path) -> Resources:
    found = Resources()
    found.feed(documents.text_of(page))
    return found


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        for address in parsed(page).found:
            assert not re.match(r"(https?:)?//", address), f"{page.name} loads {address}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", documents.text_of(style))


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    pages = {page.stem: parsed(page).ids for page in (site / "api").glob("*.html")}
    names = {f"fastvit.{n}" for n in fastvit.__all__ if not n.startswith("_")}
    for module in ("functional", "models", "reference"):
        names |= {f"fastvit.{module}.{n}" for n in getattr(fastvit, module).__all__}
    # These modules are pages, in parts, and two functions have a shorter name.
    names -= {"fastvit.layers", "fastvit.models"}
    names -= {"fastvit.models.create_model", "fastvit.models.list_models"}
    assert sorted(names - set().union(*pages.values())) == []


@pytest.mark.parametrize("layer", fastvit.layers.__all__)
def test_layers_have_the_docstrings_of_their_references(site: Path, layer: str) -> None:
    page = html.unescape(re.sub(r"<[^>]+>", "", documents.text_of(site / "api" / "layers.html")))
    lines = inspect.cleandoc(getattr(fastvit, layer).__doc__).splitlines()
    for line in (lines[0], lines[-1]):
        plain = re.sub(r":\w+:`|`", "", line)
        assert plain in page


def test_docstrings_become_sections(site: Path) -> None:
    """No role, section or list is left as text."""
    for page in (site / "api").glob("*.html"):
        text = documents.text_of(page)
        assert not re.search(r":(func|class|meth|mod|attr):", text), page.name
        assert not re.search(r"<p>(Args|Returns|Raises|Attributes):", text), page.name
