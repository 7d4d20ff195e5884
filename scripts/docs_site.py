"""Hook of mkdocs: pages of the site that do not lie in docs/, and links that lead out of it.

The README becomes the home page, the catalogues' READMEs and the changelog become pages. A link to any other file of the project
leads to a copy of it in the site, as there is no host whose address could be given. A link to a folder becomes plain text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {  # file of the project -> page of the site
    "README.md": "index.md",
    "CHANGELOG.md": "changes.md",
    **{f"{name}/README.md": f"catalogue/{name}.md" for name in ("models", "data", "evaluation", "prompts")},
}
_LINK = re.compile(r"(?P<mark>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^()\s]+)\)")
_BLOCK = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that do not lie in docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the project into links between pages and files of the site."""
    here = _origin(page.file.src_uri)

    def link(match: re.Match) -> str:
        target, hash_, anchor = match["target"].partition("#")
        if not target or re.match(r"\w+:", target):
            return match[0]
        wanted = os.path.normpath(PurePosixPath(here).parent / target)
        if (ROOT / wanted / "README.md").is_file():
            wanted += "/README.md"
        if (ROOT / wanted).is_dir():
            return match["text"]
        if not (ROOT / wanted).is_file():
            return match[0]  # mkdocs says that it leads nowhere
        there = os.path.relpath(_page(wanted, config, files), PurePosixPath(page.file.src_uri).parent)
        return f"{match['mark']}[{match['text']}]({there}{hash_}{anchor})"

    pieces = _BLOCK.split(markdown)  # code stays as it is
    return "".join(piece if n % 2 else _LINK.sub(link, piece) for n, piece in enumerate(pieces))


def _origin(page: str) -> str:
    """The file of the project that a page of the site is made from."""
    return next((source for source, made in PAGES.items() if made == page), f"docs/{page}")


def _page(source: str, config: MkDocsConfig, files: Files) -> str:
    """Where a file of the project lies in the site; it is added there if it is no page."""
    if source in PAGES:
        return PAGES[source]
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    place = f"source/{source}"
    if files.get_file_from_path(place) is None:
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return place
