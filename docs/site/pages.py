"""The site's files: the repository's pages under their own paths, and what these link to.

mkdocs knows one folder of documentation. Ours are beside the code that they are about, and link to it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CHANGELOG.md", "docs/**/*.md", "conformance/SPEC.md", "examples/**/*.md")
# The theme frames a block of code and what is around it.
_ONE_FRAME = ".rst-content div.highlight { border: 0; padding: 0; margin: 0; }"
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)[^)]*\)")


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Put the repository's pages, and the files that they link to, in the place of mkdocs' own find."""
    theirs = [file for file in files if not file.src_uri or not _is_ours(file, config)]
    pages = sorted({path for pattern in PAGES for path in ROOT.glob(pattern)})
    linked = {target for page in pages for target in links(page) if target.is_file()}
    ours = [_file(path, config) for path in [*pages, *sorted(linked - set(pages))]]
    style = HtmlFormatter().get_style_defs(".highlight") + "\n" + _ONE_FRAME
    return Files([*theirs, *ours, File.generated(config, "code.css", content=style)])


def links(page: Path) -> list[Path]:
    """What a page links to inside the repository."""
    text = page.read_text(encoding="utf-8")
    targets = [(page.parent / target).resolve() for target in _LINK.findall(text)]
    return [target for target in targets if target.is_relative_to(ROOT)]


def _is_ours(file: File, config: MkDocsConfig) -> bool:
    return file.src_dir == config.docs_dir


def _file(path: Path, config: MkDocsConfig) -> File:
    name = path.relative_to(ROOT).as_posix()
    return File(name, str(ROOT), config.site_dir, config.use_directory_urls)
