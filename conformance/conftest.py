"""The suite's side of pytest: options, one item per clause, port and layer, the verdict."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance import __version__
from conformance.case import Case
from conformance.port import DEFAULT_PORT, Port, PortError, load_port
from conformance.profile import PROFILES, Profile
from conformance.report import FORMATS, write_report
from conformance.spec import KINDS, clause_of, clauses, kinds_of, spec_version
from conformance.terminal import render
from conformance.trial import NotApplicable, Trial, run_clause
from conformance.verdict import Outcome, PortVerdict, Status
from conformance.violation import Violation
from conformance.xfails import Xfail, XfailError, load_xfails


@dataclass
class Session:
    """What the command line decided, and what was found so far."""

    ports: dict[str, Port]
    device: torch.device
    profile: Profile
    seed: int
    case: Case | None
    reports: list[Path]
    xfails: tuple[Xfail, ...]
    narrowed_by: list[str]
    started: datetime.datetime
    outcomes: list[Outcome] = field(default_factory=list)

    def verdicts(self) -> list[PortVerdict]:
        return [
            PortVerdict(port.name, port.version, [o for o in self.outcomes if o.port == port.name])
            for port in self.ports.values()
        ]

    def settings(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "spec_version": spec_version(),
            "seed": self.seed,
            "profile": self.profile.name,
            "max_examples": self.profile.max_examples,
            "device": _device_name(self.device),
            "versions": _versions(),
            "narrowed_by": self.narrowed_by,
            "stale_xfails": [],
            "time": _time_since(self.started),
        }


SESSION = pytest.StashKey[Session]()
_SHOULD = "a SHOULD clause"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance", "AdaLoRA conformance")
    group.addoption(
        "--port",
        action="append",
        metavar="MODULE",
        help=f"the implementation to judge: a dotted name or a .py file; repeatable "
        f"(default: {DEFAULT_PORT})",
    )
    group.addoption("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    group.addoption(
        "--profile",
        default="quick",
        choices=list(PROFILES),
        help="how long to look for bad cases; standard adds a real model (default: quick)",
    )
    group.addoption("--seed", type=int, default=0, help="decides every random case (default: 0)")
    group.addoption("--max-examples", type=int, help="random cases a search, over the profile's")
    group.addoption(
        "--report",
        action="append",
        metavar="PATH",
        help="write the verdict to PATH (.json or .html); repeatable",
    )
    group.addoption(
        "--xfails-file",
        action="append",
        metavar="TOML",
        help="known failures, with a reason, a link and an expiry date; repeatable",
    )
    group.addoption(
        "--clause", action="append", metavar="ID", help="ask these clauses only; repeatable"
    )
    group.addoption("--layer", choices=KINDS, help="ask one of the two layers only")
    group.addoption("--case", metavar="JSON", help="run this case only, as a failure printed it")


def pytest_configure(config: pytest.Config) -> None:
    ports = _load_ports(config.getoption("--port") or [DEFAULT_PORT])
    device = _device(config.getoption("--device"))
    config.stash[SESSION] = Session(
        ports=ports,
        device=device,
        profile=_profile(config),
        seed=config.getoption("--seed"),
        case=_case(config.getoption("--case")),
        reports=_report_paths(config.getoption("--report") or []),
        xfails=_xfails(config.getoption("--xfails-file") or [], ports, device),
        narrowed_by=_narrowed_by(config),
        started=datetime.datetime.now(datetime.timezone.utc),
    )
    for identifier in config.getoption("--clause") or []:
        if identifier not in clauses():
            raise pytest.UsageError(f"--clause {identifier}: SPEC.md has no such clause.")
    # fp32 products are to be fp32 products: the bounds count fp32 accumulation.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "trial" not in metafunc.fixturenames:
        return
    session = metafunc.config.stash[SESSION]
    asked = [
        (port.name, kind)
        for port in session.ports.values()
        for kind in kinds_of(metafunc.function)
        if metafunc.config.getoption("--layer") in (None, kind)
        and (session.case is None or session.case.kind == kind)
    ]
    metafunc.parametrize("trial", asked, indirect=True, ids=[f"{p}-{k}" for p, k in asked])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--clause")
    if not wanted:
        return
    chosen = [i for i in items if isinstance(i, pytest.Function) and _clause_id(i) in wanted]
    config.hook.pytest_deselected(items=[i for i in items if i not in chosen])
    items[:] = chosen


@pytest.fixture
def trial(request: pytest.FixtureRequest) -> Trial:
    """One clause, asked of one layer of one port."""
    session = request.config.stash[SESSION]
    name, kind = request.param
    return Trial(
        port=session.ports[name],
        kind=kind,
        device=session.device,
        profile=session.profile,
        seed=session.seed,
        only=session.case,
    )


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    asked = pyfuncitem.funcargs.get("trial")
    if not isinstance(asked, Trial):
        return None
    if not asked.port.provides(asked.kind):
        pytest.skip("not provided")
    try:
        run_clause(pyfuncitem.obj, asked)
    except NotApplicable as reason:
        pytest.skip(str(reason))
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    asked = getattr(item, "funcargs", {}).get("trial")
    if call.when != "call" or not isinstance(asked, Trial) or not isinstance(item, pytest.Function):
        return report
    outcome = _outcome(item, asked, call)
    # On the item, because JUnit files read the properties off the teardown's report.
    item.user_properties.extend(outcome.for_junit())
    report.user_properties = [*report.user_properties, *outcome.as_properties()]
    if outcome.status in ("fail", "xpass"):
        # A port's author needs the finding, not the suite's stack.
        report.outcome = "failed"
        report.longrepr = f"{outcome.message}\n  again: {outcome.reproduce}"
    if outcome.status == "xfail" or (
        outcome.status == "fail" and clause_of(item.obj).level == "SHOULD"
    ):
        report.outcome = "skipped"
        report.wasxfail = "known" if outcome.status == "xfail" else _SHOULD
    return report


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    if getattr(report, "wasxfail", None) == _SHOULD:
        return "should", "s", "SHOULD"
    return None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    outcome = Outcome.from_properties(report.user_properties) if report.when == "call" else None
    if outcome is not None and _session is not None:
        _session.outcomes.append(outcome)


# `pytest_runtest_logreport` is given no config: it reports to the session that is running.
_session: Session | None = None


def pytest_sessionstart(session: pytest.Session) -> None:
    global _session
    _session = session.config.stash[SESSION]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    state = session.config.stash[SESSION]
    if hasattr(session.config, "workerinput") or session.config.getoption("collectonly"):
        return
    verdicts = state.verdicts()
    for path in state.reports:
        write_report(path, verdicts, state.settings())
    if exitstatus == pytest.ExitCode.OK and not all(v.green for v in verdicts):
        # No test failed, and yet a port was never asked anything.
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    state = config.stash[SESSION]
    if not state.outcomes:
        return
    terminal = terminalreporter._tw
    terminalreporter.write_line("")
    terminalreporter.write(
        render(state.verdicts(), width=terminal.fullwidth, colour=terminal.hasmarkup)
    )


def pytest_report_header(config: pytest.Config) -> str:
    state = config.stash[SESSION]
    ports = ", ".join(f"{p.name} {p.version}" for p in state.ports.values())
    return (
        f"conformance: {ports}; specification {spec_version()}, profile {state.profile.name}, "
        f"seed {state.seed}, {_device_name(state.device)}"
    )


def _outcome(item: pytest.Function, asked: Trial, call: pytest.CallInfo[None]) -> Outcome:
    """What became of one clause, known failures taken into account."""
    found = _found(item, asked, call)
    known = next(
        (
            entry
            for entry in item.config.stash[SESSION].xfails
            if entry.covers(found.port, found.clause, found.kind)
        ),
        None,
    )
    if known is None or found.status not in ("pass", "fail"):
        return found
    if found.status == "fail":
        message = f"{found.message}\n  known: {known.reason} ({known.link})"
        return replace(found, status="xfail", message=message)
    return replace(
        found,
        status="xpass",
        message=f"{found.kind}: {found.clause} passes, although the xfails file says: "
        f"{known.reason}. Remove the entry.",
        reproduce=_reproduce(item, asked, None),
    )


def _found(item: pytest.Function, asked: Trial, call: pytest.CallInfo[None]) -> Outcome:
    outcome = Outcome(
        port=asked.port.name,
        clause=_clause_id(item),
        kind=asked.kind,
        status="pass",
        examples=asked.examples,
        compared=asked.compared,
        worst_ratio=asked.worst_ratio,
        margins=asked.margins,
    )
    if call.excinfo is None:
        return outcome
    error = call.excinfo.value
    if isinstance(error, pytest.skip.Exception):
        reason = error.msg or ""
        status: Status = "not-provided" if reason == "not provided" else "skip"
        return replace(outcome, status=status, message=reason)
    case = error.case if isinstance(error, Violation) else None
    return replace(
        outcome,
        status="fail",
        message=f"{asked.kind}: {error}",
        reproduce=_reproduce(item, asked, case),
    )


def _reproduce(item: pytest.Function, asked: Trial, case: Case | None) -> str:
    """One line that runs the failing case again."""
    config = item.config
    folder = os.path.relpath(Path(__file__).parent, config.invocation_params.dir)
    words = ["pytest", folder, f"--port={_port_spec(config, asked.port)}"]
    words += [f"--clause={_clause_id(item)}", f"--device={asked.device}", f"--seed={asked.seed}"]
    if case is None:
        words += [f"--layer={asked.kind}", f"--profile={asked.profile.name}"]
    else:
        words.append(f"--case={case.to_json()}")
    return shlex.join(words)


def _port_spec(config: pytest.Config, port: Port) -> str:
    """The port as it was spelled on the command line."""
    given: list[str] = config.getoption("--port") or [DEFAULT_PORT]
    return next((g for g in given if g == port.name or Path(g).stem == port.name), port.name)


def _clause_id(item: pytest.Function) -> str:
    return clause_of(item.obj).id


def _load_ports(specs: list[str]) -> dict[str, Port]:
    ports: dict[str, Port] = {}
    for spec in specs:
        try:
            port = load_port(spec)
        except PortError as error:
            raise pytest.UsageError(str(error)) from None
        if port.name in ports:
            raise pytest.UsageError(f"--port {spec}: a port named `{port.name}` is given already.")
        ports[port.name] = port
    return ports


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise pytest.UsageError(f"--device {name} cannot be used: {reason}") from None
    return device


def _profile(config: pytest.Config) -> Profile:
    profile = PROFILES[config.getoption("--profile")]
    examples = config.getoption("--max-examples")
    if examples is None:
        return profile
    if examples < 1:
        raise pytest.UsageError(f"--max-examples must be at least 1, got {examples}.")
    return replace(profile, max_examples=examples)


def _case(text: str | None) -> Case | None:
    if text is None:
        return None
    try:
        return Case.from_json(text)
    except (ValueError, TypeError) as error:
        raise pytest.UsageError(f"--case: {error}") from None


def _xfails(files: list[str], ports: dict[str, Port], device: torch.device) -> tuple[Xfail, ...]:
    try:
        return tuple(
            entry
            for file in files
            for entry in load_xfails(Path(file), ports, datetime.date.today())
            if entry.applies(device)
        )
    except XfailError as error:
        raise pytest.UsageError(str(error)) from None


def _report_paths(given: list[str]) -> list[Path]:
    paths = [Path(text) for text in given]
    for path in paths:
        if path.suffix not in FORMATS:
            endings = " or ".join(FORMATS)
            raise pytest.UsageError(f"--report {path}: the name must end in {endings}.")
        if not path.absolute().parent.is_dir():
            raise pytest.UsageError(f"--report {path}: its folder does not exist.")
    return paths


def _narrowed_by(config: pytest.Config) -> list[str]:
    """The options that ask for less than the whole suite, as they were typed."""
    given = [f"--clause={clause}" for clause in config.getoption("--clause") or []]
    for option in ("--layer", "--case", "-k", "-m"):
        if value := config.getoption(option):
            given.append(f"{option}={value}" if option.startswith("--") else f"{option} {value}")
    return given


def _time_since(started: datetime.datetime) -> dict[str, Any]:
    """When a run started and how long it took: what two runs of one seed do not share."""
    seconds = (datetime.datetime.now(datetime.timezone.utc) - started).total_seconds()
    return {"started": started.strftime("%Y-%m-%dT%H:%M:%SZ"), "seconds": round(seconds, 3)}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("torch", "bitsandbytes", "numpy", "hypothesis", "pytest", "peft"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
