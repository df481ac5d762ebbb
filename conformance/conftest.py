"""The suite's side of pytest: options, one item per clause, port and layer, the verdict."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
from collections.abc import Collection, Generator
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance import __version__
from conformance.case import Case
from conformance.devices import device_name, device_of_worker, resolve_device
from conformance.judge import Answer
from conformance.port import DEFAULT_PORT, PortError, port_name
from conformance.profile import PROFILES, Profile
from conformance.report import FORMATS, write_report
from conformance.settings import Settings
from conformance.spec import KINDS, Kind, clause_of, clauses, kinds_of, spec_version
from conformance.terminal import render
from conformance.trial import fp32_products_in_fp32
from conformance.verdict import Outcome, PortVerdict
from conformance.violation import Violation
from conformance.warden import Host, SameProcess, Warden
from conformance.xfails import Xfail, XfailError, load_xfails, refuse_overlaps, stale


@dataclass
class Session:
    """What the command line decided, and what was found so far."""

    ports: dict[str, Host]
    device: torch.device
    profile: Profile
    seed: int
    case: Case | None
    reports: list[Path]
    xfails: tuple[Xfail, ...]
    narrowed_by: list[str]
    started: datetime.datetime
    outcomes: list[Outcome] = field(default_factory=list)
    stale_xfails: tuple[str, ...] = ()

    def verdicts(self) -> list[PortVerdict]:
        return [
            PortVerdict(name, host.version, [o for o in self.outcomes if o.port == name])
            for name, host in self.ports.items()
        ]

    def settings(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "spec_version": spec_version(),
            "seed": self.seed,
            "profile": self.profile.name,
            "max_examples": self.profile.max_examples,
            "device": device_name(self.device),
            "versions": _versions(),
            "narrowed_by": self.narrowed_by,
            "stale_xfails": list(self.stale_xfails),
            "time": _time_since(self.started),
        }


@dataclass(frozen=True)
class Question:
    """One clause, asked of one layer of one port: what a test's `trial` is in pytest's process."""

    port: str
    kind: Kind


SESSION = pytest.StashKey[Session]()
ANSWER = pytest.StashKey[Answer]()
_SHOULD = "a SHOULD clause"
# A first compilation takes about 20 s on an idle machine; a hang is rare, and a false one is worse.
PATIENCE = 120.0
# Measured, not judged, and only for those who name the folder: see its own conftest.
_BENCHMARKS = Path(__file__).parent / "benchmarks"


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
    group.addoption(
        "--patience",
        type=float,
        default=PATIENCE,
        metavar="SECONDS",
        help="a port that gives no sign of life for so long has hung, and is ended "
        f"(default: {PATIENCE:g})",
    )
    group.addoption(
        "--in-process",
        action="store_true",
        help="judge in pytest's own process, for debuggers and coverage: "
        "a port that hangs, dies or tampers takes the run with it",
    )
    group.addoption("--case", metavar="JSON", help="run this case only, as a failure printed it")


def pytest_configure(config: pytest.Config) -> None:
    device = _device(config.getoption("--device"))
    ports = _ports(config, device)
    config.stash[SESSION] = Session(
        ports=ports,
        device=device,
        profile=_profile(config),
        seed=config.getoption("--seed"),
        case=_case(config.getoption("--case")),
        reports=_report_paths(config.getoption("--report") or []),
        xfails=_xfails(config.getoption("--xfails-file") or [], ports, device, _profile(config)),
        narrowed_by=_narrowed_by(config),
        started=datetime.datetime.now(datetime.timezone.utc),
    )
    for identifier in config.getoption("--clause") or []:
        if identifier not in clauses():
            raise pytest.UsageError(f"--clause {identifier}: SPEC.md has no such clause.")
    fp32_products_in_fp32()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path == _BENCHMARKS and not any(_benchmarks(config)) else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "trial" not in metafunc.fixturenames:
        return
    session = metafunc.config.stash[SESSION]
    asked = [
        (port, kind)
        for port in session.ports
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
def trial(request: pytest.FixtureRequest) -> Question:
    """What the clause's test is asked about; the trial itself is made where the port lives."""
    return Question(*request.param)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    question = pyfuncitem.funcargs.get("trial")
    if not isinstance(question, Question):
        return None
    host = pyfuncitem.config.stash[SESSION].ports[question.port]
    answer = pyfuncitem.stash[ANSWER] = host.ask(pyfuncitem.obj, question.kind)
    if answer.status in ("skip", "not-provided"):
        pytest.skip(answer.message)
    if answer.status == "fail":
        raise answer.error or Violation(answer.message)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    answer = item.stash.get(ANSWER, None)
    if call.when != "call" or answer is None or not isinstance(item, pytest.Function):
        return report
    outcome = _outcome(item, answer)
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
    config = session.config
    if config.getoption("collectonly") or hasattr(config, "workerinput"):
        return  # a worker of pytest-xdist starts the ports that it is asked about, when it is
    for host in _session.ports.values():
        host.start()
    if config.getoption("dist", "no") != "no":
        # The workers ask. This process wants to know who the ports are, and whether they load.
        _introductions(config)
        for host in _session.ports.values():
            host.stop()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    if not (session.config.getoption("collectonly") or hasattr(session.config, "workerinput")):
        _introductions(session.config)


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    if config.getoption("collectonly"):
        return []
    return [f"port: {name} {host.version}" for name, host in _hosts(config)]


def pytest_unconfigure(config: pytest.Config) -> None:
    for _, host in _hosts(config):
        host.stop()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    state = session.config.stash[SESSION]
    if hasattr(session.config, "workerinput") or session.config.getoption("collectonly"):
        return
    verdicts = state.verdicts()
    if not (session.shouldstop or session.shouldfail):
        by_clause = all(option.startswith("--clause") for option in state.narrowed_by)
        state.stale_xfails = stale(state.xfails, state.outcomes, all_layers=by_clause)
    for path in state.reports:
        write_report(path, verdicts, state.settings())
    green = all(v.green for v in verdicts) and not state.stale_xfails
    if exitstatus == pytest.ExitCode.OK and not green:
        # No test failed, and yet a port was never asked anything, or a known failure is unknown.
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
    for entry in state.stale_xfails:
        terminalreporter.write_line(entry, red=True)


def pytest_report_header(config: pytest.Config) -> str:
    state = config.stash[SESSION]
    if not state.ports:
        return ""
    return (
        f"conformance: {', '.join(state.ports)}; specification {spec_version()}, "
        f"profile {state.profile.name}, seed {state.seed}, {device_name(state.device)}"
    )


def _outcome(item: pytest.Function, answer: Answer) -> Outcome:
    """What became of one clause, known failures taken into account."""
    found = _found(item, answer)
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
    if found.status == "pass" and item.config.stash[SESSION].case is not None:
        return found  # one case says nothing of the others
    if found.status == "fail":
        message = f"{found.message}\n  known: {known.reason} ({known.link})"
        return replace(found, status="xfail", message=message)
    return replace(
        found,
        status="xpass",
        message=f"{found.kind}: {found.clause} passes, although {known.place} says: "
        f"{known.reason}. Remove the entry.",
        reproduce=_reproduce(item, None),
    )


def _found(item: pytest.Function, answer: Answer) -> Outcome:
    asked = _question(item)
    failed = answer.status == "fail"
    return Outcome(
        port=asked.port,
        clause=_clause_id(item),
        kind=asked.kind,
        status=answer.status,
        message=f"{asked.kind}: {answer.message}" if failed else answer.message,
        reproduce=_reproduce(item, answer.case) if failed else "",
        **answer.measured,
    )


def _reproduce(item: pytest.Function, case: str | None) -> str:
    """One line that runs the failing case again."""
    config, asked = item.config, _question(item)
    session = config.stash[SESSION]
    folder = os.path.relpath(Path(__file__).parent, config.invocation_params.dir)
    words = ["pytest", folder, f"--port={_port_spec(config, asked.port)}"]
    words += [f"--clause={_clause_id(item)}", f"--device={session.device}"]
    words.append(f"--seed={session.seed}")
    if case is None:
        words += [f"--layer={asked.kind}", f"--profile={session.profile.name}"]
    else:
        words.append(f"--case={case}")
    return shlex.join(words)


def _question(item: pytest.Function) -> Question:
    question = item.funcargs["trial"]
    assert isinstance(question, Question)
    return question


def _port_spec(config: pytest.Config, name: str) -> str:
    """The port as it was spelled on the command line."""
    return next(spec for spec in _port_specs(config) if port_name(spec) == name)


def _clause_id(item: pytest.Function) -> str:
    return clause_of(item.obj).id


def _port_specs(config: pytest.Config) -> list[str]:
    return config.getoption("--port") or [DEFAULT_PORT]


def _ports(config: pytest.Config, device: torch.device) -> dict[str, Host]:
    """Where each port lives; nothing is started yet. None if only benchmarks are asked for."""
    if not config.getoption("--patience") > 0:
        patience = config.getoption("--patience")
        raise pytest.UsageError(f"--patience must be more than 0 seconds, got {patience:g}.")
    if all(_benchmarks(config)):
        return {}
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    own_device = device_of_worker(device, worker, torch.cuda.device_count())
    kept_in = SameProcess if config.getoption("--in-process") else Warden
    ports: dict[str, Host] = {}
    for spec in _port_specs(config):
        name = port_name(spec)
        if name in ports:
            raise pytest.UsageError(f"--port {spec}: a port named `{name}` is given already.")
        ports[name] = kept_in(
            Settings(
                spec=spec,
                device=str(own_device),
                profile=_profile(config),
                seed=config.getoption("--seed"),
                case=config.getoption("--case"),
                patience=config.getoption("--patience"),
            )
        )
    return ports


def _hosts(config: pytest.Config) -> list[tuple[str, Host]]:
    # pytest calls its last hooks although the command line was refused, and there is no session.
    state = config.stash.get(SESSION, None)
    return list(state.ports.items()) if state else []


def _benchmarks(config: pytest.Config) -> list[bool]:
    """For each argument of the command line, whether it is in the folder of benchmarks."""
    here = config.invocation_params.dir
    paths = [(here / argument.partition("::")[0]).resolve() for argument in config.args]
    return [path.is_relative_to(_BENCHMARKS) for path in paths]


def _introductions(config: pytest.Config) -> None:
    """Wait until all the ports are loaded; one that is no port ends the run here."""
    for _, host in _hosts(config):
        try:
            host.introduce()
        except PortError as error:
            raise pytest.UsageError(str(error)) from None


def _device(name: str) -> torch.device:
    try:
        return resolve_device(name)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


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


def _xfails(
    files: list[str], ports: Collection[str], device: torch.device, profile: Profile
) -> tuple[Xfail, ...]:
    try:
        entries = tuple(
            entry
            for file in files
            for entry in load_xfails(Path(file), ports, datetime.date.today())
            if entry.applies(device, real_model=profile.real_model)
        )
        refuse_overlaps(entries)
    except XfailError as error:
        raise pytest.UsageError(str(error)) from None
    return entries


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


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("torch", "bitsandbytes", "numpy", "hypothesis", "pytest", "peft"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
