"""A journal of finished work, so that a campaign can be stopped and goes on where it was."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from conformance.spec import SPEC_PATH

ROOT = SPEC_PATH.parent.parent
PACKAGES = ("torch", "bitsandbytes", "numpy", "hypothesis")


def versions() -> dict[str, str]:
    """What the results depend on, beside our own sources."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python, **{package: metadata.version(package) for package in PACKAGES}}


def fingerprint() -> str:
    """A digest of every source of ours that is loaded, of SPEC.md, and of `versions`.

    Results under another fingerprint are about another suite, and are not used.
    """
    digest = hashlib.sha256(json.dumps(versions()).encode())
    files = {
        Path(module.__file__).resolve()
        for module in list(sys.modules.values())
        if getattr(module, "__file__", None) and module.__file__ is not None
    }
    ours = sorted(f for f in files if f.is_relative_to(ROOT) and f.is_file())
    for path in [*ours, SPEC_PATH]:
        digest.update(str(path.relative_to(ROOT)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Journal:
    """Append-only lines of JSON, each with the fingerprint under which it was written.

    A line that was cut off by a crash is skipped: its work is done again.
    """

    def __init__(self, path: Path, under: str) -> None:
        self.path, self.under = path, under

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The entries written under this journal's fingerprint."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if entry.pop("fingerprint", None) == self.under:
                yield entry

    def append(self, entry: dict[str, Any]) -> None:
        """Write one entry, whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"\n", b"")
        line = json.dumps({"fingerprint": self.under, **entry}, sort_keys=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n" if whole else "\n" + line + "\n")
