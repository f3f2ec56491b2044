"""What contributors are told is so."""

import re
from pathlib import Path

import pytest

from babl import __version__

ROOT = Path(__file__).parent.parent
DOCS = sorted(f"docs/{page.name}" for page in ROOT.glob("docs/*.md"))
PAGES = ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "README.md", *DOCS]


def test_the_citation_names_the_version():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_leads_to_is_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target


def test_files_that_contributors_are_sent_to_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:babl|scripts|tests|docs|\.ci)/[\w./-]+)`", text)
    assert len(named) > 8
    for path in named:
        assert (ROOT / path).exists(), path
