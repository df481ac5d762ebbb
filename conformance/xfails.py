"""Known failures: a TOML file of what a port is known to get wrong, each with a reason and an end.

    [[xfail]]
    port = "conformance.ports.peft"
    clause = "DTYPE-1"
    layer = "8bit"                       # optional: both layers without it
    only_on = "cpu"                      # optional: one of PLACES; everywhere without it
    reason = "returns fp32 for bf16 and fp16 inputs"
    link = "docs/defects/peft_8bit_returns_float32_for_half_inputs.py"
    expires = 2027-06-30

`link` is an address (https://...), or a path from the file's folder or from one above it, such as the
root of the repository that the file is in. A known failure does not fail the run; one that passes, has
expired, or is about nothing, does, and is named by its file and number.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from conformance.spec import KINDS, Kind, clauses
from conformance.verdict import Outcome

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


PLACES = ("cpu", "cuda", "avx512_bf16", "real_model")
_NEEDED = {"port", "clause", "reason", "link", "expires"}


class XfailError(Exception):
    """An xfails file that cannot be used: the message names the entry and the remedy."""


@dataclass(frozen=True)
class Xfail:
    """One known failure; `place` is the file and the number in it, for messages."""

    port: str
    clause: str
    reason: str
    link: str
    expires: datetime.date
    layer: Kind | None = None
    only_on: Literal["cpu", "cuda", "avx512_bf16", "real_model"] | None = None
    place: str = field(default="", compare=False)

    def __str__(self) -> str:
        layer = f", {self.layer}" if self.layer else ""
        return f"{self.place} ({self.clause} of {self.port}{layer})"

    def applies(self, device: torch.device, *, real_model: bool = True) -> bool:
        """Whether the failure is known on this machine, and in a profile with real weights or not."""
        if self.only_on == "avx512_bf16":
            from bitsandbytes.functional import has_avx512bf16

            return device.type == "cpu" and bool(has_avx512bf16())
        if self.only_on == "real_model":
            return real_model
        return self.only_on in (None, device.type)

    def covers(self, port: str, clause: str, kind: Kind) -> bool:
        return (self.port, self.clause) == (port, clause) and self.layer in (None, kind)


def load_xfails(path: Path, ports: Collection[str], today: datetime.date) -> tuple[Xfail, ...]:
    """Read an xfails file.

    Raises:
        XfailError: when it is not such a file, or when an entry is malformed, expired, leads nowhere,
            or is about a port or a clause that is not.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise XfailError(f"{path}: {error}") from None
    unknown = set(content) - {"xfail"}
    raw = content.get("xfail", [])
    if unknown or not isinstance(raw, list) or not all(isinstance(r, dict) for r in raw):
        tables = sorted(unknown or {"xfail"})
        raise XfailError(f"{path}: unknown tables {tables}; entries are [[xfail]].")
    entries = tuple(_entry(path, number, given) for number, given in enumerate(raw, 1))
    for entry in entries:
        if entry.clause not in clauses():
            raise XfailError(f"{entry}: SPEC.md has no such clause.")
        if entry.port not in ports:
            raise XfailError(f"{entry}: no such port in this run; give it with --port.")
        if entry.expires < today:
            raise XfailError(f"{entry}: expired on {entry.expires}; check it again, or remove it.")
        if not _leads_somewhere(entry.link, path):
            raise XfailError(
                f"{entry}: its link `{entry.link}` is no https:// address, and no file from "
                f"{path.absolute().parent} or a folder above it."
            )
    return entries


def refuse_overlaps(entries: Sequence[Xfail]) -> None:
    """Refuse two entries about one clause of one layer of one port, in whichever files.

    Raises:
        XfailError: naming both.
    """
    seen: dict[tuple[str, str, Kind], Xfail] = {}
    for entry in entries:
        for kind in KINDS if entry.layer is None else (entry.layer,):
            first = seen.setdefault((entry.port, entry.clause, kind), entry)
            if first is not entry:
                raise XfailError(
                    f"{entry}: is there twice, first as {first.place}; keep one for {kind}."
                )


def stale(
    entries: Iterable[Xfail], outcomes: Sequence[Outcome], *, all_layers: bool
) -> tuple[str, ...]:
    """The entries that were about nothing, each with why and what to do.

    An entry whose clause its port was not asked in this run is left alone, and so, unless the run
    asked `all_layers` of what it asked, is one about a layer that was not asked.
    """
    found = []
    for entry in entries:
        asked = [o for o in outcomes if (o.port, o.clause) == (entry.port, entry.clause)]
        about = [o for o in asked if entry.covers(o.port, o.clause, o.kind)]
        if about and all(o.status in ("skip", "not-provided") for o in about):
            reasons = "; ".join(dict.fromkeys(f"{o.kind}: {o.message or o.status}" for o in about))
            found.append(
                f"{entry}: is stale, its clause was not decided ({reasons}). Remove it, or say with "
                f"`only_on` where it holds: one of {', '.join(PLACES)}."
            )
        elif asked and not about and all_layers:
            found.append(f"{entry}: is stale, its clause is not asked of {entry.layer}. Remove it.")
    return tuple(found)


def _entry(path: Path, number: int, raw: dict[str, Any]) -> Xfail:
    where = f"{path}: entry {number}"
    if missing := _NEEDED - set(raw):
        raise XfailError(f"{where} lacks {sorted(missing)}.")
    if unknown := set(raw) - _NEEDED - {"layer", "only_on"}:
        raise XfailError(f"{where} has unknown keys {sorted(unknown)}.")
    if raw.get("layer", KINDS[0]) not in KINDS:
        raise XfailError(f"{where}: `layer` is {raw['layer']!r}; it must be one of {KINDS}.")
    if raw.get("only_on", PLACES[0]) not in PLACES:
        raise XfailError(f"{where}: `only_on` is {raw['only_on']!r}; it must be one of {PLACES}.")
    expires = raw["expires"]
    if not isinstance(expires, datetime.date) or isinstance(expires, datetime.datetime):
        raise XfailError(f"{where}: `expires` must be a date such as 2027-06-30, got {expires!r}.")
    for key in sorted(_NEEDED - {"expires"}):
        if not isinstance(raw[key], str) or not raw[key].strip():
            raise XfailError(f"{where}: `{key}` must be a text that is not empty.")
    return Xfail(**raw, place=where)


def _leads_somewhere(link: str, path: Path) -> bool:
    """An address is believed, a path must be there: a reader without a network follows it."""
    if link.startswith(("https://", "http://")):
        return True
    target = link.partition("#")[0]
    return bool(target) and any((folder / target).exists() for folder in path.absolute().parents)
