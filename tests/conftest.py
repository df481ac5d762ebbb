"""Which tests pytest-xdist keeps in one process: those that share what takes long to make."""

from __future__ import annotations

from typing import Any

import pytest

# The fixture of wide scope that a file's tests ask for. The other tests go wherever there is time.
# (xdist's marks for this do nothing under pytest 9.2: its issue 1386.)
SHARED = {
    "conformance/test_browser.py": "reported",
    "conformance/test_hostile.py": "reported",
    "conformance/test_junit.py": "reported",
    "conformance/test_page.py": "reported",
    "conformance/test_report.py": "reported",
    "conformance/test_scale.py": "reported",
    "conformance/test_command_line.py": "two_ports",
    "distributed/test_resume.py": "uninterrupted",
    "docs/test_defects.py": "outcomes",
    "docs/test_upstream.py": "outputs",
    "examples/test_finetune.py": "folder",
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """xdist's own scheduler of groups of tests, with our groups."""
    from xdist.scheduler import LoadScopeScheduling

    class Sharing(LoadScopeScheduling):  # type: ignore[misc, unused-ignore]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0].removeprefix("tests/")
            return SHARED.get(file, nodeid)

    return Sharing(config, log)
