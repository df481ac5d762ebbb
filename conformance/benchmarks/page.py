"""docs/performance.md from the files beside it: the results, the derivation for CUDA, and what was tried."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conformance.benchmarks.contestants import ADALORA, FULL, LORA
from conformance.benchmarks.picture import picture
from conformance.benchmarks.results import AllocatorRecord, Entry, Record, Results, read_results
from conformance.benchmarks.stages import KINDS
from conformance.benchmarks.table import ratio
from conformance.benchmarks.targets import ALLOCATOR_TARGETS, STACK_TARGET, TARGETS, reached

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_HEAD = """# Performance: time and memory beside PEFT's

Written by `python -m conformance.benchmarks`; not by hand.

Each scenario is one quantised layer of one shape. The base layer alone, the layer of `qsvd`, PEFT's AdaLoRA
layer and PEFT's LoRA layer are built over the same weights and run in turns in one process, one turn of each
in a round, in an order that changes with the round. Times are medians over the rounds. *Overhead* is the
time beyond the base layer's; its ratio has half of the width of a 95 % interval beside it, from resampled
rounds. A *step* is forward and backward with a gradient for x, as in the middle of a model.
*Repack*: with AVX512-BF16 bitsandbytes evaluates 4-bit weights in an order of their own, into which it brings
PEFT's and the base layer's in place, for good. `qsvd` computes exactly, or, *packed*, from copies that are.
All scenarios share a process: what malloc still holds of earlier ones spares page faults, most of them where
temporaries are large, as PEFT's are. `--only` measures a scenario alone; see the last ideas below, too.
"""
_PICTURE = "![Time over the base layer's, by scenario](performance/overhead.svg)\n"
_LIMIT = """## The limit

What the contract asks for at the least, at the rates that this machine was seen to reach. The base layer is
called as it is, so nothing of it can be saved, and somebody else has written its output before the
adapter's update is added to it. With n rows, s bytes an element of x and y, rank r, of which l are alive:

| | bytes | flops |
|---|---|---|
| forward: read x and base(x), write y; read A, E, B | \
s n (in + 2 out) + 4 l (in + 1 + out) | 2 n l (in + out) |
| backward: read dy, x and the base's dx, write dx; A, E, B and their gradients | \
s n (out + 3 in) + 8 r (in + 1 + out) + 8 n l | 2 n (r + l) (in + out) |

Checkpointing runs forward twice. Random numbers are not counted. Bytes and flops overlap at best, so that
the limit is the base layer's time plus the larger of both. The bandwidth is a copy's over as many bytes, and
the arithmetic a square product's, which no product with a side of 8 reaches: the share below is what is left
to gain, and more than can be gained.
"""
_STAGES = """## Where the time goes

By kind of operation: what passes torch's dispatcher in forward and backward, timed one by one,
without those that the base layer does. What is left of the overhead is Python, autograd, and what the
caches do to the base layer's own operations; the overhead is a difference of two large times, and so this
column has the noise of both. The last column is the ratio that a layer would reach if its products were all
that took time, as torch multiplies here: less is out of reach of any order of torch's operations.
"""
_STACKS = """The most that torch's allocator holds at once in a step of training, over what was there before;
gradients of parameters were. A frozen layer keeps nothing of its input, and who trains A must: it costs
nothing where somebody else keeps that very tensor, as ReLU keeps its output and attention its operands.
GELU keeps its input, and with nothing in between no one keeps anything.
"""
_CUDA = """## CUDA

No GPU was to be had: what is expected is derived, and the columns for what is measured are empty. The
derivation runs the layers' own operations for CUDA, on a CPU, and adds up the bytes that each reads and
writes and the flops that it does, in forward and backward, less the base layer's. At {bandwidth} TB/s and
{flops} TFLOP/s of bf16 (an H100's data sheet) the larger of the two times is the least that these operations
take; launches come on top. *Saved* is kept for backward beyond the base layer's, by one layer: 32 times that
is what a stack of 32 layers holds more. Targets: at most 0.25x the time of PEFT's adapter path, and a stack
of 32 layers whose activations take at most 5 % more than the bare base stack's.
"""

# Headings of columns that hold text.
_TEXT = ("target", "scenario", "stack", "between", "layer", "allocator", "furthest off in")


def write(folder: Path) -> list[Path]:
    """docs/performance.md and its picture, in a folder that has performance/results.json.

    Returns:
        What was written.

    Raises:
        ValueError: for results of another version.
        FileNotFoundError: if they are not there.
    """
    results = read_results(folder / "performance" / "results.json")
    tried = tomllib.loads((folder / "performance" / "tried.toml").read_text(encoding="utf-8"))
    others = {
        heading: read_results(folder / "performance" / name)
        for name, heading in tried.get("others", {}).items()
    }
    cuda = _if_there(folder / "performance" / "cuda.json")
    primitives = _if_there(folder / "performance" / "primitives.json") or {}
    page, image = folder / "performance.md", folder / "performance" / "overhead.svg"
    page.write_text(render(results, tried, cuda, primitives, others), encoding="utf-8")
    image.write_text(picture(results), encoding="utf-8")
    return [page, image]


def render(
    results: Results,
    tried: Mapping[str, Any],
    cuda: Mapping[str, Any] | None,
    primitives: Mapping[str, Mapping[str, float]],
    others: Mapping[str, Results] | None = None,
) -> str:
    """The page's text.

    Args:
        results: of a run.
        tried: tried.toml.
        cuda: what `tests.traffic` derived, if it did.
        primitives: figures of `tests.primitives`, which the ideas' results quote by name.
        others: of other runs, of which the targets are shown, by heading.
    """
    beside = [
        part
        for heading, other in (others or {}).items()
        for part in (f"### {heading}\n", _setting(other), _targets(other))
    ]
    parts = [
        _HEAD,
        _setting(results),
        _PICTURE,
        "## Targets\n",
        _targets(results),
        *beside,
        "## Layers\n",
        _layers(results),
        _LIMIT,
        _rates(results),
        _STAGES,
        _stages(results),
        *(("## Stacks of layers\n", _STACKS, _stacks(results)) if results.stacks else ()),
        "## Rank allocator\n",
        *(_allocators(record) for record in results.allocators),
        _CUDA.format(**cuda["rates"]) + "\n" + _cuda(cuda) if cuda else "",
        "## What was tried\n",
        _tried(tried, primitives),
        "## Again\n",
        "```console",
        *tried["again"],
        "```",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _if_there(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, figures to the right."""
    rules = ["---" if heading in _TEXT else "---:" for heading in headings]
    lines = [
        "| " + " | ".join(headings) + " |",
        "|" + "|".join(rules) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _setting(results: Results) -> str:
    s = results.settings
    versions = ", ".join(
        f"{k} {s[k]}" for k in ("python", "torch", "bitsandbytes", "peft") if k in s
    )
    clock = {
        "wall": "wall clock",
        "cpu": "the processor's own time, since others used the machine, too",
    }[str(s["clock"])]
    threads = "1 thread" if s["threads"] == 1 else f"{s['threads']} threads"
    said = f"{s['device']}: {s['processor']}, {s['cores']} cores, {threads}; {clock}. {versions}.\n"
    if s["clock"] == "cpu":
        said += "The targets are for two threads on an idle machine: here each figure is one thread's.\n"
    return said


def _targets(results: Results) -> str:
    found = reached(results)
    asked: list[tuple[str, float, list[tuple[float, str]]]] = [
        (t.sentence, t.most, [(r.value, r.scenario.id) for r in found if r.target is t])
        for t in TARGETS
    ]
    sentence, most, between = STACK_TARGET
    stacks = [e for r in results.stacks if r.between == between for e in r.entries]
    held = [(e.peak_over["base"], "") for e in stacks if e.role == "port" and "base" in e.peak_over]
    asked.append((sentence, most, held))
    entries = [e for record in results.allocators for e in record.entries]
    for sentence, most, attribute in ALLOCATOR_TARGETS:
        over = [getattr(e, attribute) for e in entries if e.role == "port"]
        asked.append((sentence, most, [(o[ADALORA], "") for o in over if ADALORA in o]))
    rows, everywhere = [], 0
    for sentence, most, values in asked:
        met = sum(value <= most for value, _ in values)
        everywhere += bool(values) and met == len(values)
        worst, where = max(values, default=(0.0, ""))
        rows.append(
            [
                sentence,
                f"{most:g}",
                _spread([value for value, _ in values]),
                f"{met} of {len(values)}" if values else "not measured",
                f"`{where}`" if where and worst > most else "",
            ]
        )
    headings = ("target", "at most", "reached", "met in", "furthest off in")
    said = f"{everywhere} of {len(rows)} are reached everywhere; the others are not, or not yet:\n"
    return f"{said}\n{table(headings, rows)}"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low} to {high}"


def _layers(results: Results) -> str:
    headings = ["scenario", "base, ms", "limit / base"]
    headings += [
        "layer",
        "/ base",
        "overhead / AdaLoRA's",
        "/ LoRA's",
        "saved, MB",
        "peak, MB",
        "of the limit",
    ]
    rows = []
    for record in results.layers:
        base = record.entry("base")
        if base is None:
            continue
        limit = f"{1.0 + record.limit_seconds / base.seconds:.2f}"
        first = [f"`{record.scenario.id}`", f"{base.seconds * 1e3:.3g}", limit]
        for entry in record.entries:
            if entry.role != "base":
                rows.append([*first, entry.contestant, *_figures(record, entry)])
                first = ["", "", ""]
        for name, reason in record.left_out.items():
            rows.append([*first, name, f"left out: {reason}", "", "", "", "", ""])
    return table(headings, rows)


def _figures(record: Record, entry: Entry) -> list[str]:
    saved = record.saved_beyond_base(entry)
    return [
        f"{entry.time_over_base:.2f}",
        ratio(entry.overhead_over.get(ADALORA)),
        ratio(entry.overhead_over.get(LORA)),
        "" if saved is None else _megabytes(saved),
        _megabytes(entry.peak_bytes),
        f"{entry.share_of_limit:.0%}",
    ]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f}" if abs(count) >= 1e4 else f"{count} B"


def _rates(results: Results) -> str:
    rates = results.rates
    copies = [
        f"{v / 1e9:.1f} GB/s over {int(k) // 2**20} MiB" for k, v in rates["bandwidth"].items()
    ]
    products = [f"{v / 1e9:.0f} GFLOP/s in {k}" for k, v in rates["matmul"].items()]
    return f"Seen here: {', '.join(copies)}; {', '.join(products)}.\n"


def _stages(results: Results) -> str:
    rows = []
    for record in results.layers:
        base, s = record.entry("base"), record.scenario
        if base is None or s.mode != "step" or s.kind != "4bit" or s.checkpoint or s.adapters > 1:
            continue
        first = f"`{s.id}`"
        peft = record.entry(ADALORA)
        for entry in record.entries:
            if entry.role == "base" or entry.contestant.endswith(FULL) or not entry.stages:
                continue
            more = {stage.kind: stage.seconds for stage in entry.stages}
            overhead = entry.seconds - base.seconds
            rest = overhead - sum(more.values())
            parts = [f"{more[kind] * 1e3:.2f}" for kind in KINDS[1:]]
            bare = ""
            if peft is not None and peft.seconds > base.seconds:
                bare = f"{more['products'] / (peft.seconds - base.seconds):.2f}"
            took, left = f"{overhead * 1e3:.2f}", f"{rest * 1e3:.2f}"
            rows.append([first, entry.contestant, took, *parts, left, bare])
            first = ""
    headings = (
        "scenario",
        "layer",
        "overhead, ms",
        *KINDS[1:-1],
        "other operations",
        "left",
        "bare products / AdaLoRA's overhead",
    )
    return table(headings, rows)


def _stacks(results: Results) -> str:
    rows = []
    for record in results.stacks:
        first = (f"{record.layers} x `{record.scenario.id}`", record.between)
        for e in record.entries:
            over = (f"{e.peak_over[o]:.3f}" if o in e.peak_over else "" for o in ("base", ADALORA))
            rows.append([*first, e.contestant, f"{e.peak_bytes / 1e6:.1f}", *over])
            first = ("", "")
    headings = ("stack", "between", "layer", "peak, MB", "/ base layers'", "/ PEFT AdaLoRA's")
    return table(headings, rows)


def _allocators(record: AllocatorRecord) -> str:
    rows = [
        [
            e.contestant,
            f"{e.step_seconds * 1e3:.0f}",
            f"{e.allocating_step_seconds * 1e3:.0f}",
            f"{e.penalty_seconds * 1e3:.0f}",
            f"{e.state_bytes / 1e6:.0f}",
        ]
        for e in record.entries
    ]
    said = (
        f"{record.adapters} adapters of rank {record.rank}, real layers of a 7 billion weight model's "
        "shapes that share their quantised weights. A step takes the gradients into account; a masking "
        "step also chooses the triplets and masks the others; the penalty is the orthogonal one, forward "
        "and backward.\n"
    )
    headings = ("allocator", "step, ms", "masking step, ms", "penalty, ms", "state, MB")
    return said + "\n" + table(headings, rows)


def _cuda(cuda: Mapping[str, Any]) -> str:
    rows = []
    for scenario in cuda["scenarios"]:
        first = scenario["name"]
        for layer in scenario["layers"]:
            rows.append(
                [
                    first,
                    layer["name"],
                    *(f"{layer['bytes'][kind] / 1e6:.0f}" for kind in cuda["kinds"]),
                    f"{sum(layer['bytes'].values()) / 1e6:.0f}",
                    _megabytes(layer["saved"]),
                    f"{layer['flops'] / 1e9:.1f}",
                    str(layer["operations"]),
                    f"{layer['microseconds']:.0f}",
                    *(["", ""]),
                ]
            )
            first = ""
    headings = [
        "scenario",
        "layer",
        *(f"{kind}, MB" for kind in cuda["kinds"]),
        "all, MB",
        "saved",
        "GFLOP",
        "operations",
        "at least, µs",
        "measured, µs",
        "measured peak, MB",
    ]
    return table(headings, rows)


def _tried(tried: Mapping[str, Any], primitives: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        [t["idea"], t["prediction"], t["result"].format_map(primitives), t["kept"]]
        for t in tried["tried"]
    ]
    lines = ["| idea | expected | result | kept |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([tried["about"], "", *lines]) + "\n"
