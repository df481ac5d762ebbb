"""The site has every page in its navigation, and every public name in its API reference."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import qsvd
from tests.docs.blocks import ROOT

SITE = ROOT / "docs" / "site" / "mkdocs.yml"


def pages_of(entry: Any) -> list[str]:
    """The files of a navigation, or of a part of it."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in pages_of(part)]


NAVIGATION = pages_of(yaml.safe_load(SITE.read_text(encoding="utf-8"))["nav"])


@pytest.mark.parametrize("page", NAVIGATION)
def test_a_page_of_the_navigation_is_there(page: str) -> None:
    assert (ROOT / page).is_file()


def test_every_guide_is_in_the_navigation() -> None:
    guides = {p.relative_to(ROOT).as_posix() for p in Path(ROOT, "docs/guides").glob("*.md")}
    assert guides <= set(NAVIGATION)


def test_the_api_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: qsvd\.(\w+)$", page, re.MULTILINE)
    assert {*shown, "__version__"} == set(qsvd.__all__)
