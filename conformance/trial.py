"""A trial: one clause asked of one port's layer. It calls, compares, counts, and searches."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import UnsatisfiedAssumption
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants
from hypothesis.strategies import SearchStrategy
from torch import nn

from conformance import oracle
from conformance.case import Case, Data, as_dtype, as_float64, build_base
from conformance.devices import seed_generators
from conformance.margin import Margin, margins
from conformance.oracle import Bounded
from conformance.port import Port
from conformance.profile import QUICK, Profile
from conformance.spec import Kind, clause_of
from conformance.surroundings import Watch
from conformance.values import draw
from conformance.violation import NotApplicable as NotApplicable
from conformance.violation import Violation, describe_elements

# One line per forward ("inputs will be cast to float16") would drown every other.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@dataclass
class Run:
    """What one forward, and the backward if there was one, returned."""

    y: torch.Tensor
    dx: torch.Tensor | None = None
    dA: tuple[torch.Tensor | None, ...] = ()
    dE: tuple[torch.Tensor | None, ...] = ()
    dB: tuple[torch.Tensor | None, ...] = ()


@dataclass
class Trial:
    """One clause, one port, one kind of layer: the hand through which a test touches the port.

    `calls` counts calls of the port, `compared` the elements and facts that were compared: a test
    that ends with either at zero has checked nothing, and fails. `ratios` holds, by the case's
    dtype, the largest error / bound of each bounded comparison.
    """

    port: Port
    kind: Kind
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    profile: Profile = QUICK
    seed: int = 0
    only: Case | None = None
    calls: int = 0
    compared: int = 0
    examples: int = 0
    worst_ratio: float = 0.0
    ratios: dict[str, list[float]] = field(default_factory=dict)
    # Told of every case before it runs: a sign of life, and who is to blame if none follows.
    on_example: Callable[[Case], None] | None = None
    _case: Case | None = None

    # --- meeting the port -----------------------------------------------------------------------

    def construct(self, base: nn.Module, name: str = "default", **arguments: Any) -> nn.Module:
        """Call the port's constructor."""
        self.calls += 1
        with _quiet():
            return self.port.constructors[self.kind](base, name, **arguments)

    def build(
        self,
        case: Case,
        *,
        base: nn.Module | None = None,
        data: Data | None = None,
        values: bool = True,
        repackable: bool = False,
    ) -> Setup:
        """A layer of the port over a fresh base layer, with all the case's adapters active.

        With `values` its parameters hold the case's values; without, whatever the port put there.
        torch's generator is seeded, so that a case is the same wherever it runs.
        """
        data = draw(case) if data is None else data
        seed_generators(case.seed, self.device)
        if base is None:
            base = build_base(case, data, self.device, repackable=repackable)
        layer = self.construct(
            base,
            case.names[0],
            r=case.ranks[0],
            lora_alpha=_number(case.alpha(0)),
            lora_dropout=case.dropout(0),
        )
        setup = Setup(self, case, data, base, layer)
        for index, name in enumerate(case.names[1:], start=1):
            setup.add_adapter(name, index)
        layer.train(case.training)
        if len(case.names) > 1:
            layer.set_adapter(list(case.names))  # type: ignore[operator]
        if values:
            setup.install()
        return setup

    def example(self, case: Case, body: Callable[[Case], None]) -> None:
        """Run a test's body on one case; whatever goes wrong names the case."""
        self._case = case
        self.examples += 1
        if self.on_example is not None:
            self.on_example(case)
        try:
            body(case)
        except Violation as violation:
            violation.case = case
            raise
        except (NotApplicable, UnsatisfiedAssumption):
            raise
        except Exception as error:
            raise Violation.from_error(error, case) from error

    def search(
        self,
        cases: SearchStrategy[Case],
        body: Callable[[Case], None],
        probes: Iterable[Case] = (),
        cost: int = 1,
    ) -> None:
        """Run the probes, then look for a case that breaks the body, and shrink it.

        Args:
            cases: where to look, beyond the probes.
            body: the test; it raises `Violation`.
            probes: the sharp cases, run in every profile.
            cost: divides the number of examples, for bodies that cost more than a few milliseconds.
        """
        if self.only is not None:
            self.example(self.only, body)
            return
        for probe in probes:
            self.example(probe, body)

        @seed(self.seed)
        @settings(
            max_examples=max(1, self.profile.max_examples // cost),
            deadline=None,
            # Without a database: a run is decided by its seed, and not by what failed before it.
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            print_blob=False,
        )
        @given(cases)
        def explore(case: Case) -> None:
            self.example(case, body)

        with _quiet(), _same_draws_everywhere():
            explore()

    def check(self, body: Callable[[Case], None], probes: Iterable[Case]) -> None:
        """Run a body on listed cases, where there is nothing to search for."""
        for probe in [self.only] if self.only is not None else probes:
            self.example(probe, body)

    # --- comparing ------------------------------------------------------------------------------

    def assert_within(self, what: str, got: torch.Tensor | None, expected: Bounded) -> None:
        """Every element of `got` is finite and as near to the expected value as its bound says."""
        self._assert_tensor(what, got, expected.value.shape)
        assert got is not None
        observed = as_float64(got)
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.abs(observed - expected.value)
        # `error <= bound` is False for NaN, so a NaN never passes.
        bad = ~(error <= expected.bound)
        self.compared += observed.size
        if observed.size:
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = np.where(error == 0, 0.0, error / expected.bound)
            self._record(got, float(np.nan_to_num(ratio, nan=np.inf).max()))
        if bad.any():
            raise Violation(describe_elements(what, observed, expected.value, expected.bound, bad))

    def _record(self, got: torch.Tensor, ratio: float) -> None:
        """Keep the largest error / bound of one comparison."""
        self.worst_ratio = max(self.worst_ratio, ratio)
        # The case's dtype decides the bound, also that of a gradient which is stored in fp32.
        dtype = self._case.dtype if self._case else str(got.dtype).removeprefix("torch.")
        self.ratios.setdefault(dtype, []).append(ratio)

    @property
    def margins(self) -> tuple[Margin, ...]:
        """How near the bounded comparisons came to their bounds, by dtype."""
        return margins(self.ratios)

    def assert_same_bits(
        self,
        what: str,
        got: torch.Tensor | None,
        expected: torch.Tensor,
        *,
        same_dtype: bool = False,
    ) -> None:
        """Same shape and values; a NaN equals a NaN, and zeros of either sign are equal.

        The dtype of y and of gradients has clauses of its own, so that one wrong cast is blamed
        once; `same_dtype` asks for it here, where state is compared.
        """
        self._assert_tensor(what, got, tuple(expected.shape))
        assert got is not None
        if same_dtype:
            self.assert_that(
                got.dtype == expected.dtype,
                f"{what} has dtype {got.dtype}, expected {expected.dtype}.",
            )
        observed, wanted = as_float64(got), as_float64(expected)
        same = (observed == wanted) | (np.isnan(observed) & np.isnan(wanted))
        self.compared += observed.size
        if not same.all():
            raise Violation(describe_elements(what, observed, wanted, np.zeros_like(wanted), ~same))

    def assert_that(self, condition: bool, otherwise: str) -> None:
        """A fact that holds or does not."""
        self.compared += 1
        if not condition:
            raise Violation(otherwise)

    def assert_refuses(
        self, what: str, call: Callable[[], object], *expected: type[Exception]
    ) -> Exception:
        """The call raises one of the expected exceptions; returns what it raised."""
        self.calls += 1
        names = " or ".join(e.__name__ for e in expected)
        self.compared += 1
        try:
            with _quiet():
                call()
        except expected as error:
            return error
        except Exception as error:
            raise Violation(
                f"{what} raises {type(error).__name__} ({error}); expected {names}."
            ) from error
        raise Violation(f"{what} is accepted; expected {names}.")

    def _assert_tensor(self, what: str, got: torch.Tensor | None, shape: tuple[int, ...]) -> None:
        """There is something to compare: not counted, since it compares nothing yet."""
        if got is None:
            raise Violation(f"{what} is None: it was not computed.")
        require_plain(what, got)
        if tuple(got.shape) != tuple(shape):
            raise Violation(f"{what} has shape {tuple(got.shape)}, expected {tuple(shape)}.")

    def require(self, condition: bool, reason: str) -> None:
        """Ask the clause only where it can be asked.

        Raises:
            NotApplicable: when the condition does not hold here; the clause is then skipped.
        """
        if not condition:
            raise NotApplicable(reason)


@dataclass
class Setup:
    """A layer of the port, its base layer, and the case's data on the trial's device."""

    trial: Trial
    case: Case
    data: Data
    base: nn.Module
    layer: Any  # the port's module: its attributes are what the clauses ask about

    @property
    def x(self) -> torch.Tensor:
        """A fresh copy of the input, so that nothing a port does to it lasts."""
        return self.tensor(self.data.x)

    @property
    def dout(self) -> torch.Tensor:
        """A fresh copy of the incoming gradient."""
        return self.tensor(self.data.dout)

    def tensor(self, values: np.ndarray) -> torch.Tensor:
        """Values in the case's dtype, on the trial's device."""
        return as_dtype(values, self.case.torch_dtype).to(self.trial.device)

    def add_adapter(self, name: str, index: int) -> None:
        """`update_layer` with the case's settings of its adapter `index`."""
        self.trial.calls += 1
        with _quiet():
            self.layer.update_layer(
                name,
                self.case.ranks[index],
                _number(self.case.alpha(index)),
                lora_dropout=self.case.dropout(index),
                init_lora_weights=True,
            )

    def install(self, layer: Any = None) -> None:
        """Write the case's A, E, B and ranknum into a layer."""
        layer = self.layer if layer is None else layer
        with torch.no_grad():
            for index, (name, values) in enumerate(
                zip(self.case.names, self.data.adapters, strict=True)
            ):
                for parameters, array in (
                    (layer.lora_A, values.A),
                    (layer.lora_E, values.E),
                    (layer.lora_B, values.B),
                ):
                    parameters[name].copy_(torch.from_numpy(array))
                if self.case.ranknums:
                    layer.ranknum[name].fill_(self.case.ranknum(index))

    def adapters(self, keep: dict[str, np.ndarray] | None = None) -> list[oracle.Adapter]:
        """The case's adapters as the reference wants them, with their dropout masks if known."""
        return [
            oracle.Adapter(
                values.A,
                values.E,
                values.B,
                scaling=_scaling(self.case, index),
                ranknum=self.case.ranknum(index),
                keep=None if keep is None else keep[name],
                p=0.0 if keep is None else self.case.dropout(index),
            )
            for index, (name, values) in enumerate(
                zip(self.case.names, self.data.adapters, strict=True)
            )
        ]

    @property
    def arithmetic(self) -> oracle.Arithmetic:
        return oracle.arithmetic_for(self.trial.port, self.case.dtype, self.trial.device)

    def forward(self, x: torch.Tensor | None = None, layer: Any = None) -> torch.Tensor:
        """Call the port's layer."""
        self.trial.calls += 1
        target = self.layer if layer is None else layer
        with _quiet():
            y: torch.Tensor = target(self.x if x is None else x)
        if not isinstance(y, torch.Tensor):
            raise Violation(f"y is a {type(y).__name__}, expected a tensor.")
        require_plain("y", y)
        return y

    def run(
        self,
        x: torch.Tensor | None = None,
        dout: torch.Tensor | None = None,
        layer: Any = None,
        forward: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Run:
        """Forward and backward through the port's layer, from clean gradients.

        `forward` stands in for the plain call, to wrap it (checkpointing, a write into y).
        """
        target = self.layer if layer is None else layer
        x = (self.x if x is None else x).detach().requires_grad_()
        for parameter in target.parameters():
            parameter.grad = None
        if forward is None:
            y = self.forward(x, target)
        else:
            self.trial.calls += 1
            with _quiet():
                y = forward(x)
            require_plain("y", y)
        with _quiet():
            torch.autograd.backward(y, (self.dout if dout is None else dout).to(y.dtype))
        return Run(
            y.detach(),
            x.grad,
            *(
                tuple(parameters[name].grad for name in self.case.names)
                for parameters in (target.lora_A, target.lora_E, target.lora_B)
            ),
        )

    def base_run(self, x: torch.Tensor | None = None, dout: torch.Tensor | None = None) -> Run:
        """The same forward and backward through a twin of the base layer, unseen by the port."""
        twin = build_base(self.case, self.data, self.trial.device)
        x = (self.x if x is None else x).detach().requires_grad_()
        with _quiet():
            y = twin(x)
            if y.requires_grad:
                torch.autograd.backward(y, (self.dout if dout is None else dout).to(y.dtype))
        return Run(y.detach(), x.grad)

    def nested_offset(self) -> float | None:
        """What double quantisation took off the scales of the 4-bit weight; None without it."""
        if not self.case.double_quant:
            return None
        twin: Any = build_base(self.case, self.data, self.trial.device)
        return float(twin.weight.quant_state.offset)

    def base_output(self, x: torch.Tensor | None = None) -> torch.Tensor:
        """base(x) by a twin of the base layer, without a graph."""
        twin = build_base(self.case, self.data, self.trial.device)
        with torch.no_grad(), _quiet():
            y: torch.Tensor = twin(self.x if x is None else x)
        return y


def run_clause(test: Callable[[Trial], None], trial: Trial) -> None:
    """Ask one clause of one port.

    Raises:
        Violation: when the port breaks it, or when the test called or compared nothing.
        NotApplicable: when it cannot be asked here.
    """
    clause = clause_of(test)
    try:
        devices = [trial.device] if trial.device.type == "cuda" else []
        with Watch() as watch, torch.random.fork_rng(devices=devices):
            test(trial)
    except Violation as violation:
        violation.clause = clause
        raise
    except NotApplicable:
        raise
    except Exception as error:
        raised = Violation.from_error(error, trial._case)
        raised.clause = clause
        raise raised from error
    if trial.calls == 0 or trial.compared == 0:
        empty = "called the port" if trial.calls == 0 else "compared anything"
        raise Violation(f"The test never {empty}: it has checked nothing.", clause=clause)
    if found := watch.findings():
        # Put back by now, so that no other clause is disturbed.
        raise Violation(found, clause=clause)


def require_plain(what: str, tensor: torch.Tensor | None) -> None:
    """Refuse a tensor that answers for itself: a subclass decides what `==` and `abs` say of it.

    Raises:
        Violation: unless it is None, or a strided tensor of torch's or bitsandbytes' own types.
    """
    if tensor is None:
        return
    if type(tensor) not in _plain_types():
        raise Violation(f"{what} is a {type(tensor).__name__}, expected a plain torch.Tensor.")
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        raise Violation(f"{what} is not strided but {tensor.layout}.")


@cache
def _plain_types() -> tuple[type, ...]:
    """Exact types: anything derived from them may override what they do."""
    from bitsandbytes.nn import Int8Params, Params4bit

    return (torch.Tensor, nn.Parameter, Params4bit, Int8Params)


def _number(alpha: float) -> float | int:
    """3.0 as 3, the way users and PEFT's configuration write it."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _scaling(case: Case, index: int) -> float:
    alpha = case.alpha(index)
    return alpha if alpha > 0 else float(case.ranks[index])


def fp32_products_in_fp32() -> None:
    """Products of fp32 matrices are to be fp32 products: the bounds count fp32 accumulation."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


@contextlib.contextmanager
def _same_draws_everywhere() -> Iterator[None]:
    """Let the seed alone decide what is drawn.

    Hypothesis also draws numbers that it finds in the source of local modules. A port's source, or a
    neighbour's in the same process, would so decide which cases are tried.
    """
    found = getattr(providers, "_get_local_constants", None)
    if found is None:  # another release, that has no such thing
        yield
        return
    none = Constants()
    providers.CONSTANTS_CACHE.cache.clear()
    with mock.patch.object(providers, "_get_local_constants", return_value=none):
        yield
    providers.CONSTANTS_CACHE.cache.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A port's and bitsandbytes' warnings are not the suite's findings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
