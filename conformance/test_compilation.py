"""Chapter COMP: what `torch.compile` makes of a layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from conformance import oracle
from conformance.case import DTYPES, Case, DType, build_base, exact
from conformance.profile import STANDARD
from conformance.spec import Kind, clause
from conformance.test_gradients import assert_gradients
from conformance.test_state import assert_output
from conformance.trial import Setup, Trial
from conformance.violation import Violation, short_path

# Numbers of rows that a batch may have; some layers treat few rows apart, and that is one graph more.
ROWS = (40, 41, 129, 3, 5)
MORE_GRAPHS = 1


class Compiled:
    """A module under `torch.compile`; `graphs` counts the graphs that a backend was given.

    A function of its own, with code of its own, stands around the module: the compiler keeps what it
    compiles by code object, a handful for each, and other layers of the port have the same `forward`.
    """

    def __init__(self, module: Any, *, backend: str | None = None, **options: Any) -> None:
        self.graphs = 0

        def call(x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = module(x)
            return y

        call.__code__ = call.__code__.replace(co_firstlineno=call.__code__.co_firstlineno)
        self._call = torch.compile(call, backend=backend or self._count, **options)

    def _count(self, graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._call(x)
        return y


def _case(kind: Kind, dtype: DType) -> Case:
    return Case(kind, dtype, 64, 32, (7,), (3, 2), base_scale=2.0**-10)


def _cases(kind: Kind) -> list[Case]:
    return [_case(kind, dtype) for dtype in DTYPES]


@clause("COMP-1")
def test_a_compiled_layer_computes_the_contract(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        compiled = Compiled(setup.layer, backend="aot_eager")
        _assert_run(trial, setup, compiled, "as built")
        changed = _with_masked_ranks(setup)
        changed.install()
        _assert_run(trial, changed, compiled, "with other values in A, E and ranknum")
        last = len(case.names) - 1
        setup.layer.set_adapter(case.names[last])
        x, adapters, base = changed.data.x, changed.adapters()[last:], changed.base_output()
        if oracle.in_domain(x, adapters, base, setup.arithmetic):
            expected = oracle.expected_output(x, adapters, base, setup.arithmetic)
            y = changed.forward(layer=compiled)
            trial.assert_within(f"y of `{case.names[last]}` alone, compiled", y, expected)

    _check(trial, body, [_case(trial.kind, "bfloat16")], _cases(trial.kind))


@clause("COMP-2")
def test_a_layer_is_one_graph(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        setup.forward()  # in the first one bitsandbytes settles what it had left open
        compiled = Compiled(setup.layer, fullgraph=True)
        try:
            run = setup.run(forward=compiled)
        except Exception as error:
            _require_base(trial, setup)
            raise Violation(
                "torch.compile(fullgraph=True) captures the base layer, but not the layer over it: "
                + _reason(error)
            ) from error
        trial.assert_that(run.dx is not None, "No gradient of x came out of the graph.")

    def likely(dtype: DType, training: bool, dropouts: tuple[float, ...] = ()) -> Case:
        case = _case(trial.kind, dtype)
        return replace(case, training=training, dropouts=dropouts)

    _check(
        trial,
        body,
        [likely("bfloat16", True, (0.5, 0.25)), likely("float16", False)],
        [
            likely(dtype, training, dropouts)
            for dtype in DTYPES
            for training in (True, False)
            for dropouts in ((), (0.5, 0.25))
        ],
    )


@clause("COMP-3")
def test_what_changes_from_step_to_step_is_no_compilation(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        setup.forward()
        compiled = Compiled(setup.layer)
        setup.run(forward=compiled)
        first = compiled.graphs

        _with_masked_ranks(setup).install()
        setup.run(forward=compiled)
        _assert_graphs(trial, compiled, first, "other values in A, E and ranknum")

        sets = [list(case.names[:1]), list(case.names)]
        setup.layer.set_adapter(sets[0])
        setup.forward(setup.x.requires_grad_(), compiled)
        both = compiled.graphs
        for names in sets[::-1] * 2:
            setup.layer.set_adapter(names)
            setup.forward(setup.x.requires_grad_(), compiled)
        _assert_graphs(trial, compiled, both, "sets of active adapters that were active before")

    _check(trial, body, [_case(trial.kind, "bfloat16")], _cases(trial.kind))


@clause("COMP-4")
def test_other_numbers_of_rows_are_no_compilation(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        setup.forward()
        compiled = Compiled(setup.layer, dynamic=True)
        graphs = []
        for rows in ROWS:
            x = setup.tensor(np.resize(setup.data.x, (rows, case.in_features)))
            y = setup.forward(x.requires_grad_(), compiled)
            torch.autograd.backward(y, torch.ones_like(y))
            graphs.append(compiled.graphs)
        allowed = graphs[0] + MORE_GRAPHS
        _assert_graphs(trial, compiled, allowed, f"batches of {ROWS} rows, one after the other,")

    _check(trial, body, [_case(trial.kind, "bfloat16")], _cases(trial.kind))


def _check(
    trial: Trial, body: Callable[[Case], None], probes: Sequence[Case], others: Sequence[Case]
) -> None:
    """The probes, and the others where there is time: a compilation takes a second."""
    rest = [case for case in others if case not in probes]
    trial.check(
        body, [*probes, *(rest if trial.profile.max_examples >= STANDARD.max_examples else ())]
    )


def _assert_run(trial: Trial, setup: Setup, compiled: Compiled, when: str) -> None:
    """y and the gradients of a compiled layer are within their bounds."""
    run = setup.run(forward=compiled)
    assert_output(trial, setup, f"y, compiled, {when}", run.y)
    assert_gradients(trial, setup, run, when=f", compiled, {when}")


def _assert_graphs(trial: Trial, compiled: Compiled, allowed: int, what: str) -> None:
    trial.assert_that(
        compiled.graphs <= allowed,
        f"For {what} the layer was compiled anew: {compiled.graphs} graphs, at most {allowed} expected.",
    )


def _require_base(trial: Trial, setup: Setup) -> None:
    """Where the base layer is no graph, no layer over it can be one."""
    base = build_base(setup.case, setup.data, setup.trial.device)
    setup.forward(layer=base)
    try:
        setup.forward(layer=Compiled(base, fullgraph=True))
    except Exception as error:
        trial.require(False, f"the base layer is not captured: {type(error).__name__}")


def _reason(error: Exception) -> str:
    """The compiler's first line, and the last of the port's lines that it names."""
    text = str(error).strip() or type(error).__name__
    frames = re.findall(r'^ *File "(.+)", line (\d+), in (\S+)$', text, re.MULTILINE)
    reason = text.splitlines()[0]
    if frames:
        file, line, function = frames[-1]
        reason += f" ({function}, {short_path(file)}:{line})"
    return reason


def _with_masked_ranks(setup: Setup) -> Setup:
    """The same layer with other values: every second singular value is zero, and ranknum as small."""
    adapters = []
    for values in setup.data.adapters:
        E = exact(values.E * -1.5, torch.float32)
        E[::2] = 0.0
        A = exact(values.A * 0.75, torch.float32)
        adapters.append(replace(values, A=A, E=E))
    ranknums = tuple(float(np.count_nonzero(values.E)) for values in adapters)
    data, case = (
        replace(setup.data, adapters=tuple(adapters)),
        replace(setup.case, ranknums=ranknums),
    )
    return replace(setup, data=data, case=case)
