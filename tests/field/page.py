"""docs/field.md: the tables, and what every rule lets through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from conformance.case import DType
from tests.field.measure import VISIBLE
from tests.field.ours import LANES, OURS, SECOND
from tests.field.results import Found, Results, Score
from tests.field.rules import RULES

SHORT: dict[DType, str] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
CLAUSES = "**ours: the whole clause set**"
# So many names tell what kind of fault a rule lets through; field.json has all of them.
EXAMPLES = 8


def page(results: Results) -> str:
    """The whole page, in Markdown."""
    parts = [
        _head(results),
        _summary(results),
        _nominal(results),
        *(_dtype(dtype, found) for dtype, found in results.found.items()),
        _second(results),
        _uncounted(results),
        _sources(),
    ]
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _head(results: Results) -> str:
    settings = results.settings
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    seeds, layers = settings["seeds"], settings["layers"]
    options = f"--seeds {seeds} --random {settings['random']}"
    options += f" --layer {layers[0]}" if len(layers) == 1 else ""
    options += "" if results.clauses.killed else " --no-clauses"
    played = " and ".join(f"the {layer.replace('bit', '-bit')} layer" for layer in layers)
    return f"""# The field, measured

How other projects decide that a result is right, side by side, on the same faults. This page is written by

    python -m tests.field {options}     # whole: tox -e field

and never by hand; `field.json` beside it holds every name. Measured on the CPU with {versions}.

The layers are real: bitsandbytes' `Linear4bit` and `Linear8bitLt`, with our planted faults
(`tests/mutants`) and with our honest variants, `qsvd` and PEFT over them; this run plays {played}.
Every rule sees the same cases: the suite's own probes, in training and in evaluation, with one adapter
and with two; batches of 17, 33, 65 and 129 rows; dyadic data; and random cases of the suite's own
strategy. Of each it sees y and the gradients of x, A, E and B, beside what its own project would
compare them with.

A fault is killed by a rule that rejects it in at least one case, **surely** if that happens under each
of the {seeds} seeds. An alarm is an honest layer that is rejected in a case."""


def _cell(score: Score | None, plays: int) -> str:
    if score is None:
        return "not used"
    return f"{len(score.killed)} ({len(score.sure)}), {_alarms(score.alarms, plays)}"


def _alarms(alarms: int, plays: int) -> str:
    if not alarms:
        return "0 alarms"
    return f"**{alarms}** alarm{'s' * (alarms > 1)} ({100.0 * alarms / plays:.1f} %)"


def _rows(results: Results, cell: Callable[[Found, str], str]) -> list[list[str]]:
    return [
        [f"**{name}**" if name in OURS else name]
        + [cell(found, name) for found in results.found.values()]
        for name in (*RULES, *OURS)
    ]


def _summary(results: Results) -> str:
    header = [
        "rule",
        *(
            f"{SHORT[dtype]}: of {len(found.visible)} faults, {found.plays} honest plays"
            for dtype, found in results.found.items()
        ),
    ]
    rows = _rows(results, lambda found, name: _cell(found.scores.get(name), found.plays))
    text = f"""## Kills and alarms

Faults killed, in brackets those killed surely, and alarms.

{table(header, rows)}

A rule that cries wolf proves nothing, so here are those that never blame an honest layer, by kills:

{_silent(results)}"""
    return text + "\n\n" + _clauses(results) if results.clauses.killed else text


def _silent(results: Results) -> str:
    """By dtype, the rules without alarms, the most powerful first."""
    lines = []
    for dtype, found in results.found.items():
        silent = [
            (name, s) for name, s in found.scores.items() if name not in SECOND and not s.alarms
        ]
        ranked = sorted(silent, key=lambda pair: -len(pair[1].killed))
        told = "; ".join(f"{name} **{len(score.killed)}**" for name, score in ranked)
        lines.append(f"- {SHORT[dtype]}, of {len(found.visible)}: {told}.")
    return "\n".join(lines)


def _clauses(results: Results) -> str:
    asked, seeds = results.clauses, results.settings["seeds"]
    survivors = [name for name, under in asked.killed.items() if not under]
    total, killed = len(asked.killed), len(asked.killed) - len(survivors)
    return f"""{CLAUSES} is no rule for a tensor, and asks of a fault in all dtypes
at once: the clauses that claim it kill **{killed}** of the {total} that are visible in some dtype,
**{len(asked.sure(seeds))}** of them surely, in the quick profile. That no clause blames an honest
variant is a test (`tests/mutants/test_variants.py`).{_list(" Survivors: ", survivors)}"""


def _nominal(results: Results) -> str:
    header = [
        "rule",
        *(
            f"{SHORT[dtype]}: {found.nominal_cases} cases, {found.nominal_plays} honest plays"
            for dtype, found in results.found.items()
        ),
    ]

    def cell(found: Found, name: str) -> str:
        score = found.scores.get(name)
        if score is None:
            return "not used"
        return f"{len(score.nominal)}, {_alarms(score.nominal_alarms, found.nominal_plays)}"

    return f"""## On ordinary random inputs alone

Most suites draw normal numbers of order one, and nothing else. Of the same cases, those alone show how
much of a rule's power is in its inputs, whichever rule it is.

{table(header, _rows(results, cell))}"""


def _dtype(dtype: DType, found: Found) -> str:
    rows = []
    for name in (*RULES, *OURS):
        score = found.scores.get(name)
        if score is not None:
            missed = [n for n in found.visible if n not in score.killed]
            rows.append(
                [name, str(len(missed)), _some(missed), _some(score.alarmed, none="nobody")]
            )
    header = ["rule", "missed", "lets through", "blames"]
    return f"""## What each rule lets through: {SHORT[dtype]}

{table(header, rows)}"""


def _second(results: Results) -> str:
    header = ["rule", "dtype", "kills", "it adds", "alarms"]
    rows, added, alarms = [], set(), 0
    for dtype, found in results.found.items():
        for name in SECOND:
            score = found.scores.get(name)
            if score is None:
                continue
            more = [n for n in score.killed if n not in found.scores[LANES].killed]
            count = _alarms(score.alarms, found.plays)
            rows.append([name, SHORT[dtype], str(len(score.killed)), _some(more), count])
            if not score.alarms:
                added |= set(more)
            alarms += score.alarms
    if not rows:
        return ""
    text = f"""## A second rule for 16 bits

Proposed: on top of bounds and exact lane, the root mean square of a tensor's errors may not exceed a
multiple of what a simulated pipeline (`tests/reference/pipelines.py`), of the arithmetic that the port
declares, loses on the same data.

{table(header, rows)}"""
    return text + "\n\n" + _decision(results, added)


def _decision(results: Results, added: set[str]) -> str:
    """Whether the second rule is worth having: what it adds without alarms, and to what."""
    if not results.clauses.killed:
        return "The clause set was not asked in this run, so nothing is decided."
    gained = sorted(name for name in added if not results.clauses.killed[name])
    if gained:
        return f"Without an alarm it kills {_some(gained)}, which no clause does: it belongs into the suite."
    kept = _list(" What it adds to the two lanes has clauses of its own: ", sorted(added))
    return (
        "It is not part of the suite: where it raises no alarm it kills nothing that the clause set "
        f"lets through.{kept}"
    )


def _uncounted(results: Results) -> str:
    rows = [
        [SHORT[dtype], str(len(found.equivalent)), _some(found.equivalent, len(found.equivalent))]
        for dtype, found in results.found.items()
    ]
    skipped = sum(found.out_of_range for found in results.found.values())
    return f"""## What does not count

A fault counts on a dtype only if it is visible there: if in some case its largest error in some tensor
exceeds {VISIBLE:g} times the largest error of all honest layers in that tensor, an eager layer in the
input's dtype included. The criterion knows nothing of bounds: it is closest to flash-attention's rule,
and so kindest to it. The following change bits on the dtype, but stay as near to the truth as honest
layers do; no rule gains or loses by them. All other mutants of the gallery give the bits of the eager
layer in every case: they break something else than numbers.

{table(["dtype", "faults", "which"], rows)}

Cases in which a conforming layer may leave the range of its format were left out: {skipped}."""


def _sources() -> str:
    rules = "\n".join(f"- **{r.name}**: {r.source}." for r in (*RULES.values(), *OURS.values()))
    return f"""## Where the rules come from

Suites that compare with an eager run get the layer as everybody writes it, in the same dtypes and over
the same base layer; those with a better reference get the float64 truth. Many look at outputs alone;
here each is asked about the gradients, too, with the same tolerance. Values are compared, not dtypes. A
rule is counted for the dtypes that its project has a tolerance for.

{rules}"""


def _some(names: Sequence[str], limit: int = EXAMPLES, none: str = "nothing") -> str:
    if not names:
        return none
    shown = "; ".join(names[:limit])
    return f"{shown}; and {len(names) - limit} more" if len(names) > limit else shown


def _list(head: str, names: Sequence[str]) -> str:
    return f"{head}{_some(names)}." if names else ""
