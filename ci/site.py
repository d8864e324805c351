"""What MkDocs does not know of this repository: pages outside ``docs``, and the repository's address.

A hook of ``mkdocs.yml``. Pages link to each other by the paths that they have in the repository. On the
site a link leads to the page if the site has it, and to the repository if not.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

import tomllib
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
#: Page of the repository outside ``docs`` -> its path on the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}
#: Pictures outside ``docs``: those of the benchmarks.
PICTURES = tuple(
    path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "benchmarks").rglob("*.svg"))
)
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Set the addresses of the repository and of the site, from pyproject.toml."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    config.repo_url = urls["Repository"]
    config.repo_name = urls["Repository"].rpartition("/")[2]
    config.site_url = f"{urls['Documentation']}/"
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures outside ``docs``."""
    for source, path in {**PAGES, **{picture: picture for picture in PICTURES}}.items():
        files.append(File.generated(config, path, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page's text with the links of the repository turned into links of the site."""
    sources = {path: source for source, path in PAGES.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return _LINK.sub(
        lambda link: f"{link[1]}{place(link[2], source, page.file.src_uri, str(config.repo_url))}{link[3]}",
        markdown,
    )


def place(link: str, source: str, page: str, repository: str) -> str:
    """Return where a link leads on the site.

    Args:
        link: an address, or a path relative to ``source``.
        source: the path in the repository of the page that has the link.
        page: the path of that page on the site.
        repository: the address of the repository.
    """
    path, hash_, anchor = link.partition("#")
    if not path or ":" in path:
        return link
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if target in PAGES:
        target = PAGES[target]
    elif target.startswith("docs/"):
        target = target.removeprefix("docs/")
    elif target not in PICTURES:
        return f"{repository}/blob/main/{target}{hash_}{anchor}"
    return posixpath.relpath(target, posixpath.dirname(page) or ".") + hash_ + anchor
