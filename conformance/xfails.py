"""Known failures: a TOML file of what a port is known to get wrong, each with a reason and an end.

    [[xfail]]
    port = "conformance.ports.peft"
    clause = "DTYPE-1"
    layer = "8bit"                       # optional: both layers without it
    only_on = "cpu"                      # optional: or "cuda", or "avx512_bf16"; everywhere without it
    reason = "returns fp32 for bf16 and fp16 inputs"
    link = "docs/defects/peft_8bit_returns_float32_for_half_inputs.py"
    expires = 2027-06-30

A known failure does not fail the run; one that passes, is expired, or is about nothing that is there,
does.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from bitsandbytes.functional import has_avx512bf16

from conformance.spec import KINDS, Kind, clauses

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


PLACES = ("cpu", "cuda", "avx512_bf16")


class XfailError(Exception):
    """An xfails file that cannot be used: the message names the entry and the remedy."""


@dataclass(frozen=True)
class Xfail:
    """One known failure."""

    port: str
    clause: str
    reason: str
    link: str
    expires: datetime.date
    layer: Kind | None = None
    only_on: Literal["cpu", "cuda", "avx512_bf16"] | None = None

    def applies(self, device: torch.device) -> bool:
        """Whether the failure is known on this machine."""
        if self.only_on == "avx512_bf16":
            return device.type == "cpu" and bool(has_avx512bf16())
        return self.only_on in (None, device.type)

    def covers(self, port: str, clause: str, kind: Kind) -> bool:
        return (self.port, self.clause) == (port, clause) and self.layer in (None, kind)


def load_xfails(path: Path, ports: Collection[str], today: datetime.date) -> tuple[Xfail, ...]:
    """Read an xfails file.

    Raises:
        XfailError: when it is not such a file, or when an entry is malformed, expired, twice there,
            or about a port or a clause that is not.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise XfailError(f"{path}: {error}") from None
    unknown = set(content) - {"xfail"}
    if unknown:
        raise XfailError(f"{path}: unknown tables {sorted(unknown)}; entries are [[xfail]].")
    entries = tuple(
        _entry(path, number, raw) for number, raw in enumerate(content.get("xfail", []), 1)
    )
    for entry in entries:
        where = f"{path}: {entry.clause} of {entry.port}"
        if entry.clause not in clauses():
            raise XfailError(f"{where}: SPEC.md has no such clause.")
        if entry.port not in ports:
            raise XfailError(f"{where}: no such port in this run; give it with --port.")
        if entry.expires < today:
            raise XfailError(f"{where}: expired on {entry.expires}; check it again, or remove it.")
    _refuse_overlaps(path, entries)
    return entries


def _entry(path: Path, number: int, raw: dict[str, Any]) -> Xfail:
    where = f"{path}: entry {number}"
    needed = {"port", "clause", "reason", "link", "expires"}
    if missing := needed - set(raw):
        raise XfailError(f"{where} lacks {sorted(missing)}.")
    if unknown := set(raw) - needed - {"layer", "only_on"}:
        raise XfailError(f"{where} has unknown keys {sorted(unknown)}.")
    if raw.get("layer", KINDS[0]) not in KINDS:
        raise XfailError(f"{where}: `layer` is {raw['layer']!r}; it must be one of {KINDS}.")
    if raw.get("only_on", PLACES[0]) not in PLACES:
        raise XfailError(f"{where}: `only_on` is {raw['only_on']!r}; it must be one of {PLACES}.")
    expires = raw["expires"]
    if not isinstance(expires, datetime.date) or isinstance(expires, datetime.datetime):
        raise XfailError(f"{where}: `expires` must be a date such as 2027-06-30, got {expires!r}.")
    for key in needed - {"expires"}:
        if not isinstance(raw[key], str) or not raw[key]:
            raise XfailError(f"{where}: `{key}` must be a text that is not empty.")
    return Xfail(**raw)


def _refuse_overlaps(path: Path, entries: Sequence[Xfail]) -> None:
    seen: set[tuple[str, str, Kind]] = set()
    for entry in entries:
        for kind in KINDS if entry.layer is None else (entry.layer,):
            key = (entry.port, entry.clause, kind)
            if key in seen:
                raise XfailError(f"{path}: {entry.clause} of {entry.port} ({kind}) is there twice.")
            seen.add(key)
