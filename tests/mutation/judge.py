"""The judge: each mutant in a process of its own, forked from one in which everything is warm.

Two courts, one after the other. The first is the conformance suite, all clauses in the quick profile; the
second, for what no port owes anybody, is tests/qsvd. Only what reaches the mutated statement is
asked: a clause that never runs it cannot tell the mutant from the original.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from coverage import Coverage

from conformance.port import Port, load_port
from conformance.spec import clauses
from tests.mutants.asking import ON_REAL_WEIGHTS, findings
from tests.mutation.mutants import PACKAGE, Mutant
from tests.mutation.results import Verdict

# The tests of the layer's own files: those of whole models, files and processes would take minutes a mutant.
TESTS = tuple(
    f"tests/qsvd/test_{name}.py"
    for name in (
        "adapters",
        "dropout",
        "forward",
        "gradients",
        "identity",
        "masked_ranks",
        "private_base",
        "products",
        "refusals",
        "state",
        "transforms",
        "traps",
    )
)
TESTS_PACKAGE = "tests.qsvd"
# Starts threads; after a fork OpenMP would wait for those of the parent for ever, so it must not have any.
THREADED = ("DTYPE-9",)
# And for a child that was forked off, a module's backward hook may never return.
HOOKED = "register_full_backward"
# Of the processor's time, which a busy machine does not take away; REAL times as many for who sleeps.
SECONDS, TIMES, REAL = 20, 5, 20
TESTS_SECONDS = 180
# What ran a line: (file, line) to the clauses, or the tests, in which it ran.
Reach = Mapping[tuple[str, int], set[str]]
Rows = list[tuple[str, int, list[str]]]


class Judge:
    """Asks the original once, to learn what reaches which line, and then mutants."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.kills: Counter[str] = Counter()
        self._passed: defaultdict[str, set[str]] = defaultdict(set)
        self._by_clause = self._learn_clauses()
        self._by_test = _learn_tests()

    def judge(
        self, mutant: Mutant, suspected: str = "", within: float = float("inf")
    ) -> Verdict | None:
        """What the courts say; `suspected` killed it before, and is asked first.

        None if no clause has noticed by `within` seconds and some are still to be asked: ask again
        later, and the others are.
        """
        asked = [c for c in self.seconds if self._reaches(mutant, c)]
        # The cheapest way to a kill comes first.
        waiting = [c for c in asked if c not in self._passed[mutant.name]]
        waiting.sort(
            key=lambda c: (c != suspected, -(self.kills[c] + 1) / (self.seconds[c] + 0.02))
        )
        sums = accumulate(self.seconds[c] for c in waiting)
        now = [c for c, seconds in zip(waiting, sums, strict=True) if seconds <= within]
        limit = SECONDS + TIMES * sum(self.seconds[c] for c in now)
        clause = _in_child(lambda: _first_finding(mutant, now), limit) if now else ""
        if clause:
            self.kills[clause] += 1
            return Verdict(clause=clause, asked=len(asked))
        self._passed[mutant.name] |= set(now)
        if len(now) < len(waiting):
            return None
        return self.judge_survivor(mutant, len(asked))

    def judge_survivor(self, mutant: Mutant, asked: int) -> Verdict:
        """What the second court says of a mutant that `asked` clauses let live."""
        tests = None if mutant.at_import else sorted(_reaching(self._by_test, mutant))
        test = (
            "" if tests == [] else _in_child(lambda: _first_failure(mutant, tests), TESTS_SECONDS)
        )
        return Verdict(test=test, asked=asked)

    def _reaches(self, mutant: Mutant, clause: str) -> bool:
        return mutant.at_import or clause in _reaching(self._by_clause, mutant)

    def _learn_clauses(self) -> Reach:
        """Here, so that whatever they set up is set up in every child; but for those with threads."""
        port = load_port("qsvd")
        asked = [c for c in clauses() if c not in ON_REAL_WEIGHTS]
        apart = json.loads(
            _in_child(lambda: json.dumps(_learned(port, [c for c in asked if c in THREADED])))
        )
        found: defaultdict[tuple[str, int], set[str]] = defaultdict(set)
        for seconds, reach in (_learned(port, [c for c in asked if c not in THREADED]), apart):
            self.seconds |= seconds
            for file, line, names in reach:
                found[file, line] |= set(names)
        return found


def _learned(port: Port, names: Sequence[str]) -> tuple[dict[str, float], Rows]:
    """How long the original takes for each clause, and the lines that it runs."""
    coverage = _coverage()
    times = {}
    for clause in names:
        coverage.start()
        coverage.switch_context(clause)
        start = time.perf_counter()
        blame = next(findings(clause, port), None)
        times[clause] = time.perf_counter() - start
        coverage.stop()
        if blame is not None:
            raise RuntimeError(f"{clause} fails on the original: {blame}")
    return times, _rows(coverage)


class _Tests:
    """A pytest plugin: remembers the first failure, and tells coverage which test is running."""

    def __init__(self, coverage: Coverage | None = None) -> None:
        self.failed = ""
        self.coverage = coverage

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.coverage is not None:
            self.coverage.switch_context(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid or "collection"


def _learn_tests() -> Reach:
    """In a child, so that the tests are imported anew by every mutant."""

    def learn() -> str:
        coverage = _coverage()
        plugin = _Tests(coverage)
        coverage.start()
        _pytest([*TESTS], plugin)
        coverage.stop()
        if plugin.failed:
            raise RuntimeError(f"{plugin.failed} fails on the original.")
        return json.dumps(_rows(coverage))

    found = json.loads(_in_child(learn, TESTS_SECONDS))
    return {(file, line): set(names) for file, line, names in found}


def _coverage() -> Coverage:
    return Coverage(data_file=None, include=[f"{PACKAGE}/*.py"], config_file=False, messages=False)


def _rows(coverage: Coverage) -> Rows:
    """What ran each line, in a form that JSON has."""
    data = coverage.get_data()
    return [
        (Path(file).name, line, sorted(name for name in names if name))
        for file in data.measured_files()
        for line, names in data.contexts_by_lineno(file).items()
    ]


def _reaching(reach: Reach, mutant: Mutant) -> set[str]:
    first, last = mutant.lines
    found = (reach.get((mutant.file, line), set()) for line in range(first, last + 1))
    return set().union(*found)


def _first_finding(mutant: Mutant, asked: Iterable[str]) -> str:
    """The first clause that blames the mutant."""
    try:
        _install(mutant)
        port = load_port("qsvd")
    except Exception:
        return "import"
    return next((c for c in asked if next(findings(c, port), None) is not None), "")


def _first_failure(mutant: Mutant, tests: list[str] | None) -> str:
    """The first of the tests, or of all tests, that fails on the mutant."""
    _install(mutant)
    plugin = _Tests()
    _pytest(["-x", *(tests if tests is not None else TESTS)], plugin)
    return plugin.failed


def _pytest(arguments: list[str], plugin: _Tests) -> None:
    # Everything that pytest would rewrite was imported long ago.
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    # Hypothesis' plugin wants to be loaded before anybody has searched, and the suite has.
    options += ["-p", "no:hypothesispytest", "-k", f"not {HOOKED}"]
    code = pytest.main([*options, *arguments], plugins=[plugin])
    known = pytest.ExitCode
    if code not in (known.OK, known.TESTS_FAILED, known.INTERRUPTED, known.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest gave up: {code!r}.")


def _install(mutant: Mutant) -> None:
    """Import `qsvd` again, one of its modules from the mutated source."""
    # A test that was imported before would go on with the original.
    stale = ("qsvd", TESTS_PACKAGE)
    for name in [n for n in sys.modules if f"{n}.".startswith(tuple(f"{s}." for s in stale))]:
        del sys.modules[name]
    sys.meta_path.insert(0, _Finder(mutant))  # type: ignore[arg-type]
    importlib.import_module("qsvd")


class _Finder:
    """Finds and loads the one module that the mutant replaces."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant
        self.path = str(PACKAGE / mutant.file)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.mutant.module:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.mutant.source, self.path, "exec"), vars(module))


def _in_child(work: Callable[[], str], seconds: float = SECONDS) -> str:
    """What `work` returns in a forked process; "timeout" or "crash" if it does not come back.

    Raises:
        RuntimeError: what went wrong in the child, when it was Python that said so.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _answer(work, writing, seconds)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "timeout" if os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGPROF) else "crash"
    if os.waitstatus_to_exitcode(status) != 0 or not answer:
        raise RuntimeError(answer or "The judge's child left without an answer.")
    return answer[1:]


def _answer(work: Callable[[], str], writing: int, seconds: float) -> None:
    code = 1
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, REAL * seconds)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        answer = "=" + work()
        code = 0
    except BaseException as error:
        answer = f"{type(error).__name__}: {error}"
    with os.fdopen(writing, "w", encoding="utf-8") as pipe:
        pipe.write(answer)
    os._exit(code)
