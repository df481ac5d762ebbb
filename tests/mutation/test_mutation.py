"""The mutation run itself: its operators, its judge in small, and the list of reasons it insists on."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from cosmic_ray.mutating import mutate_code

from tests.mutation import judge
from tests.mutation.classified import ClassificationError, Judged, load
from tests.mutation.mutants import FILES, PACKAGE, Mutant, mutants_of
from tests.mutation.operators import operators
from tests.mutation.results import Results, Verdict

SOURCE = '''"""A file."""


class Scale:
    size: int | None = 1

    def twice(self, x: int | None) -> int | None:
        self.last = dict(
            a=x,
            b=2,
        )
        return x + x
'''


@pytest.fixture
def mutants(tmp_path: Path) -> list[Mutant]:
    path = tmp_path / "scale.py"
    path.write_text(SOURCE)
    return mutants_of(path)


@pytest.mark.parametrize("name", ["RemoveStatement", "RemoveKeywordArgument", "ReplaceDtype"])
def test_an_operator_does_what_its_examples_say(name: str) -> None:
    operator = operators()[name]
    for example in operator.examples():
        assert mutate_code(example.pre_mutation_code, operator, 0) == example.post_mutation_code


def test_a_mutant_is_named_by_its_place_and_change(mutants: list[Mutant]) -> None:
    names = [m.name for m in mutants]
    assert "scale.py: Scale.twice: return x + x → return x - x" in names
    assert "scale.py: Scale.twice: self.last = dict( … → pass" in names
    assert "scale.py: Scale.twice: b=2, → nothing" in names
    assert len(set(names)) == len(names)


def test_every_file_that_a_layer_imports_is_mutated_and_no_other() -> None:
    assert {"_dispatch.py", "_layer.py", "_products.py", "_dropout.py"} <= set(FILES)
    assert not {"_allocator.py", "_model.py", "__init__.py"} & set(FILES)


def test_annotations_are_not_mutated(mutants: list[Mutant]) -> None:
    assert not [m for m in mutants if "&" in m.change]


def test_a_mutant_knows_its_statement_and_whether_import_runs_it(mutants: list[Mutant]) -> None:
    inside = next(m for m in mutants if m.change == "b=2, → nothing")
    outside = next(m for m in mutants if "size" in m.change)
    assert (inside.lines, inside.at_import) == ((8, 11), False)
    assert outside.at_import


def test_a_child_that_dies_or_hangs_is_told_apart_from_one_that_answers() -> None:
    def dies() -> str:
        faulthandler.disable()  # its last words would look like this run's own
        os.kill(os.getpid(), signal.SIGSEGV)
        return "alive"

    def hangs() -> str:
        time.sleep(60)
        return "awake"

    assert judge._in_child(lambda: "answer") == "answer"
    assert judge._in_child(dies) == "crash"
    assert judge._in_child(hangs, seconds=0.1) == "timeout"
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        judge._in_child(lambda: str(1 / 0))


@pytest.fixture(scope="module")
def small_judge() -> judge.Judge:
    """A judge of two clauses and one file of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "clauses", lambda: ("MERGE-6", "SCALE-1"))
        patch.setattr(judge, "TESTS", ("tests/qsvd/test_refusals.py",))
        return judge.Judge()


def test_the_judge_finds_who_notices(small_judge: judge.Judge) -> None:
    formula, checks = mutants_of(PACKAGE / "_arithmetic.py"), mutants_of(PACKAGE / "_checks.py")

    def verdict(mutants: list[Mutant], change: str) -> Verdict:
        return small_judge.judge(next(m for m in mutants if change in m.change))

    by_suite = verdict(formula, "adapter.ranknum - 1e-5)")
    assert (by_suite.clause, by_suite.test) == ("SCALE-1", "")
    by_tests = verdict(checks, 'raise TypeError(f"Unknown keyword `{key}`. {hint}") → pass')
    assert (by_tests.clause, by_tests.asked) == ("", 0)
    assert "test_refusals.py::" in by_tests.test


def test_results_go_on_where_they_stopped_and_forget_nothing(
    mutants: list[Mutant], tmp_path: Path
) -> None:
    path, name = tmp_path / "deep.jsonl", mutants[-1].name
    verdict = Verdict(clause="FWD-1", asked=3)
    Results(mutants, path).add(name, verdict)
    again = Results(mutants, path)
    assert (again.current, again.exact) == ({name: verdict}, {name})
    path.write_text(path.read_text().replace(again.sources, "others"))
    later = Results(mutants, path)
    assert (later.current, later.exact) == ({name: verdict}, set())
    anew = Results(mutants, path, anew=True)
    assert (anew.current, anew.former) == ({}, {name: verdict})
    changed = [replace(m, original="changed") for m in mutants]
    assert Results(changed, path).former == {name: verdict}
    later.add(mutants[0].name, verdict)
    later.tidy()
    assert list(Results(mutants, path).current) == [mutants[0].name, name]


def test_a_function_around_a_mutant_is_told_from_another(tmp_path: Path) -> None:
    found = {}
    for change in ("x + x", "x + x + 0"):
        path = tmp_path / "scale.py"
        path.write_text(SOURCE.replace("x + x", change))
        of = {m.change: m.original for m in mutants_of(path)}
        found[change] = (of["b=2, → nothing"], next(v for k, v in of.items() if "size" in k))
    (one, alike), (other, same) = found.values()
    assert one != other
    assert alike == same


ENTRY = """
[[survivors]]
file = "scale.py"
function = "Scale.twice"
changes = [{changes}]
kind = "{kind}"
because = "it is so"
"""
CHANGE = "return x + x → return x - x"


@pytest.mark.parametrize(
    ("clause", "test", "changes", "kind", "message"),
    [
        ("", "", "", "equivalent", "has no reason"),
        ("FWD-1", "", f'"{CHANGE}"', "equivalent", "dies of FWD-1"),
        ("", "", f'"{CHANGE}"', "own", "no test of tests/qsvd fails"),
        ("", "", f'"{CHANGE}", "x → y"', "equivalent", "no such mutant"),
        ("", "", f'"{CHANGE}"', "because", "`kind` must be one of"),
    ],
)
def test_reasons_out_of_step_are_an_error(
    mutants: list[Mutant],
    tmp_path: Path,
    clause: str,
    test: str,
    changes: str,
    kind: str,
    message: str,
) -> None:
    path = tmp_path / "survivors.toml"
    path.write_text(ENTRY.format(changes=changes, kind=kind), encoding="utf-8")
    one = next(m for m in mutants if m.change == CHANGE)
    with pytest.raises(ClassificationError, match=message):
        load([Judged(one, clause, test, asked=1)], complete=True, path=path)


def test_reasons_in_step_are_found(mutants: list[Mutant], tmp_path: Path) -> None:
    path = tmp_path / "survivors.toml"
    path.write_text(ENTRY.format(changes=f'"{CHANGE}"', kind="own"), encoding="utf-8")
    one = next(m for m in mutants if m.change == CHANGE)
    found = load([Judged(one, "", "test_scale.py::test_twice", asked=1)], complete=True, path=path)
    assert found.reasons[one.name].kind == "own"
