"""The command line: `python -m conformance.vectors write DIR` and `check DIR OUTPUTS`."""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from conformance.vectors.checking import judge
from conformance.vectors.index import VectorsError
from conformance.vectors.loading import OutputsError, load_outputs, load_vectors
from conformance.vectors.showing import as_json, render
from conformance.vectors.writing import write_vectors

PASSED, FAILED, UNUSABLE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every MUST clause holds, 1 if one does not, 2 if nothing could be decided."""
    options = _parser().parse_args(arguments)
    try:
        return _write(options) if options.command == "write" else _check(options)
    except (VectorsError, OutputsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return UNUSABLE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m conformance.vectors",
        description="Golden vectors: conformance for ports that are not PyTorch (docs/vectors.md).",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="write the vectors into a folder of their own")
    write.add_argument("folder", metavar="DIR", type=Path)
    write.add_argument("--seed", type=_seed, default=0, help="which numbers are drawn (default 0)")
    check = commands.add_parser("check", help="judge a port's outputs")
    check.add_argument("folder", metavar="DIR", type=Path, help="what `write` wrote")
    check.add_argument(
        "outputs", metavar="OUTPUTS", type=Path, help="a safetensors file, or a folder of them"
    )
    check.add_argument("--json", metavar="PATH", type=Path, help="write the verdict there, too")
    check.add_argument(
        "--arithmetic",
        choices=("input", "float32"),
        default="input",
        help="what the adapter path computes half-precision inputs in (default input, the wider)",
    )
    check.add_argument("--kind", action="append", default=[], help="only this kind (repeatable)")
    check.add_argument(
        "--dtype", action="append", default=[], choices=("F32", "BF16", "F16"), help="likewise"
    )
    check.add_argument("--verbose", "-v", action="store_true", help="list every vector")
    return parser


def _seed(text: str) -> int:
    seed = int(text)
    if seed < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {seed}.")
    return seed


def _write(options: argparse.Namespace) -> int:
    for path in write_vectors(options.folder, options.seed):
        print(f"{path}: {path.stat().st_size} bytes")
    return PASSED


def _check(options: argparse.Namespace) -> int:
    vectors = load_vectors(options.folder)
    kinds = {v.kind for v in vectors.index.vectors}
    for kind in options.kind:
        if kind not in kinds:
            raise VectorsError(f"--kind {kind}: the kinds are {', '.join(sorted(kinds))}.")
    outputs = load_outputs(options.outputs, vectors)
    verdict = judge(vectors, outputs, options.arithmetic, options.kind, options.dtype)
    if options.json is not None:
        _write_json(
            options.json, json.dumps(as_json(verdict, vectors.index, outputs), indent=2), options
        )
    width = shutil.get_terminal_size((100, 24)).columns
    print(render(verdict, width=width, colour=sys.stdout.isatty(), verbose=options.verbose), end="")
    return PASSED if verdict.passed else FAILED


def _write_json(path: Path, text: str, options: argparse.Namespace) -> None:
    target = path.resolve()
    for taken in (options.folder.resolve(), options.outputs.resolve()):
        if target.is_relative_to(taken):
            raise OutputsError(f"--json {path}: it would stand in {taken}; choose another place.")
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OutputsError(f"--json {path}: it cannot be written ({reason}).") from None


def _print_anything() -> None:
    """A terminal that lacks a character shows an escape in its place."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    _print_anything()
    sys.exit(main())
