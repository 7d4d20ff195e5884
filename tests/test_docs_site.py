"""The docs as pages that link to each other: every page is in the site's navigation, and every link leads to a file."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CATALOGUES = ("models", "data", "evaluation", "prompts")
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
DOCS = sorted((ROOT / "docs").rglob("*.md"))
FROM_ELSEWHERE = {"index.md", "changes.md", *(f"catalogue/{name}.md" for name in CATALOGUES)}  # made by the site's hook
PAGES = [*DOCS, ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / name / "README.md" for name in CATALOGUES)]

_CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def navigation(entry) -> list[str]:
    """The pages of a part of the navigation, in its order."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in navigation(part)]


def links(page: Path) -> list[str]:
    """What the links and pictures of a page lead to inside the project."""
    targets = re.findall(r"\]\(([^()\s]+)\)", _CODE.sub("`code`", page.read_text(encoding="utf-8")))
    return [target.partition("#")[0] for target in targets if not re.match(r"\w+:|#", target)]


def test_every_page_is_in_the_navigation_once():
    pages = navigation(SITE["nav"])
    assert len(pages) == len(set(pages))
    assert set(pages) == {page.relative_to(ROOT / "docs").as_posix() for page in DOCS} | FROM_ELSEWHERE


def test_every_link_leads_to_a_file():
    assert sum(len(links(page)) for page in PAGES) > 100
    lost = [f"{page.relative_to(ROOT)}: {link}" for page in PAGES for link in links(page) if not (page.parent / link).exists()]
    assert not lost


def test_no_link_leaves_the_project_or_names_a_place_on_a_disk():
    for page in PAGES:
        for link in links(page):
            assert not link.startswith("/") and (page.parent / link).resolve().is_relative_to(ROOT), f"{page}: {link}"


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material, which makes the site, is not installed")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger("mkdocs").addHandler(handler)
    try:
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path)))
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
    assert not warned
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    made = {page.replace("README.md", "index.md").removesuffix(".md") + ".html" for page in navigation(SITE["nav"])}
    assert pages == made | {"404.html"}
    for page in tmp_path.rglob("*.html"):
        if page.name == "404.html":
            continue
        targets = re.findall(r'(?:href|src)="?([^\s">]+)', page.read_text(encoding="utf-8"))
        for target in targets:
            if not re.match(r"\w+:|#", target):
                assert (page.parent / target.partition("#")[0]).exists(), f"{page}: {target}"
