"""The vectors bite: the example's port passes them, and with one planted fault it does not."""

from __future__ import annotations

import ast
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conformance.vectors.checking import judge
from conformance.vectors.loading import VectorSet, load_outputs
from tests.vectors.conftest import PORT

# The bug, as one would say it; the line of the port; what is planted there; clauses that must notice.
FAULTS = [
    (
        "no 1e-5 beside ranknum",
        '(np.float32(spec["ranknum"]) + np.float32(1e-5))',
        'np.float32(spec["ranknum"])',
        {"SCALE-1", "FWD-2", "GRAD-5"},
    ),
    (
        "1e-4 in place of 1e-5",
        "np.float32(1e-5)",
        "np.float32(1e-4)",
        {"SCALE-1", "FWD-2", "GRAD-5"},
    ),
    (
        "alpha / r",
        "np.float32(scaling) /",
        'np.float32(scaling / max(spec["r"], 1)) /',
        {"SCALE-2"},
    ),
    (
        "a negative alpha is the scaling, too",
        'if spec["lora_alpha"] > 0 else spec["r"]',
        'if spec["lora_alpha"] else spec["r"]',
        {"SCALE-3"},
    ),
    (
        "divides by the rank",
        'np.float32(spec["ranknum"]) +',
        'np.float32(spec["r"]) +',
        {"SCALE-4", "SCALE-8"},
    ),
    (
        "E on the wrong axis",
        "self.h = self.x @ (self.A * self.E).T",
        "self.h = self.x @ (self.A * np.resize(self.E, self.A.shape[1])).T if self.E.size else "
        "self.x @ self.A.T",
        {"FWD-1", "FWD-3", "GRAD-4"},
    ),
    (
        "the absolute value of E",
        "self.h = self.x @ (self.A * self.E).T",
        "self.h = self.x @ (self.A * np.abs(self.E)).T",
        {"FWD-7"},
    ),
    ("dA without E", "dA = dfolded * self.E", "dA = dfolded", {"GRAD-2", "GRAD-15"}),
    ("dE without A", "(dfolded * self.A).sum", "dfolded.sum", {"GRAD-3"}),
    ("dB from x without E", "dy.T @ self.h *", "dy.T @ (self.x @ self.A.T) *", {"GRAD-4"}),
    (
        "dx without E",
        "dx = dh @ (self.A * self.E) * self.keep",
        "dx = dh @ self.A * self.keep",
        {"GRAD-1"},
    ),
    (
        "survivors are not scaled up",
        '/ np.float32(1 - spec["dropout"])',
        "/ np.float32(1)",
        {"DROP-1", "DROP-3", "DROP-10"},
    ),
    (
        "backward without the mask",
        "dx = dh @ (self.A * self.E) * self.keep",
        "dx = dh @ (self.A * self.E)",
        {"DROP-3"},
    ),
    ("inactive adapters count", 'if spec["active"]:', "if True:", {"ADPT-3"}),
    (
        "the last adapter alone",
        "y = y + adapter.forward(x)",
        'y = adapter.forward(x) + (y if spec is v["adapters"][0] else 0)',
        {"ADPT-1"},
    ),
    (
        "rounds the update to bfloat16 too early",
        "return self.h @ self.B.T * self.c",
        "d = (to_bfloat16(self.h @ self.B.T).astype(np.uint32) << 16).view(np.float32)\n"
        "        return d * self.c",
        {"FWD-1", "FWD-3"},
    ),
    (
        "truncates to bfloat16",
        "return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype",
        "return (bits >> 16).astype",
        {"FWD-1", "GRAD-1"},
    ),
    (
        "low nibble first",
        '[t["packed"] >> 4, t["packed"] & 15]',
        '[t["packed"] & 15, t["packed"] >> 4]',
        {"FWD-4"},
    ),
    (
        "the offset of nested scales is left out",
        '[t["absmax_codes"]] * outer + t["absmax_offset"]',
        '[t["absmax_codes"]] * outer',
        {"FWD-4"},
    ),
    (
        "scales by 1/128 in train",
        'W = t["CB"] * (t["SCB"][:, None] / np.float32(127))',
        'W = t["CB"] * (t["SCB"][:, None] / np.float32(128))',
        {"FWD-4", "GRAD-1"},
    ),
    (
        "scales by 1/128 in eval",
        "/ np.float32(127 * 127)",
        "/ np.float32(127 * 128)",
        {"FWD-21", "FWD-22"},
    ),
    (
        "codes round half away, by truncation",
        "codes = np.rint(kept * (127 / scale))",
        "codes = np.trunc(kept * (127 / scale))",
        {"FWD-21", "FWD-22"},
    ),
    (
        "outliers are quantised with the rest",
        ">= threshold).any(axis=0) if threshold else",
        ">= threshold).any(axis=0) if False else",
        {"FWD-21"},
    ),
    (
        "the bias twice",
        'y + t.get("bias", np.float32(0))',
        'y + 2 * t.get("bias", np.float32(0))',
        {"FWD-18"},
    ),
    (
        "accumulates in float16",
        "self.h = self.x @ (self.A * self.E).T",
        "self.h = (self.x.astype(np.float16) @ (self.A * self.E).T.astype(np.float16)).astype("
        "np.float32)",
        {"FWD-1"},
    ),
    (
        "packs the low nibble first",
        "padded[::2] << 4 | padded[1::2]",
        "padded[1::2] << 4 | padded[::2]",
        {"FWD-4"},
    ),
]


def broken_clauses(source: str, folder: Path, vectors: VectorSet, tmp_path: Path) -> set[str]:
    """The clauses that a port, given as its source, breaks."""
    port, outputs = tmp_path / "port.py", tmp_path / "outputs.safetensors"
    port.write_text(source)
    with np.errstate(all="ignore"):  # a fault may well divide by zero
        runpy.run_path(str(port))["main"](folder, outputs)
    verdict = judge(vectors, load_outputs(outputs, vectors), "float32")
    broken = {c.clause.id for c in verdict.clauses if c.status == "fail"}
    assert verdict.passed == (not broken)
    return broken


def test_the_port_imports_numpy_and_safetensors_alone() -> None:
    nodes = list(ast.walk(ast.parse(PORT.read_text())))
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    names |= {str(n.module) for n in nodes if isinstance(n, ast.ImportFrom)}
    assert names - set(sys.stdlib_module_names) == {"numpy", "safetensors"}


def test_the_port_breaks_nothing(folder: Path, vectors: VectorSet, tmp_path: Path) -> None:
    assert broken_clauses(PORT.read_text(), folder, vectors, tmp_path) == set()


@pytest.mark.parametrize(
    ("line", "planted", "clauses"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS]
)
def test_a_planted_fault_is_named(
    folder: Path, vectors: VectorSet, tmp_path: Path, line: str, planted: str, clauses: set[str]
) -> None:
    source = PORT.read_text()
    assert source.count(line) == 1

    broken = broken_clauses(source.replace(line, planted), folder, vectors, tmp_path)
    assert clauses <= broken


def test_a_fault_of_the_weight_is_not_blamed_on_the_adapter(
    folder: Path, vectors: VectorSet, tmp_path: Path
) -> None:
    """Vectors that give the base layer's output judge the adapter alone."""
    faulty = PORT.read_text().replace(
        '[t["packed"] >> 4, t["packed"] & 15]', '[t["packed"] & 15, t["packed"] >> 4]'
    )
    broken = broken_clauses(faulty, folder, vectors, tmp_path)
    assert not broken & {"FWD-1", "FWD-3", "SCALE-2", "SCALE-3", "SCALE-4", "DROP-3", "ADPT-1"}


def test_the_verdict_names_clause_key_and_element(folder: Path, tmp_path: Path) -> None:
    """From the command line, as a port's author meets it."""
    port, outputs = tmp_path / "port.py", tmp_path / "outputs.safetensors"
    port.write_text(PORT.read_text().replace("+ np.float32(1e-5))", ")"))
    subprocess.run([sys.executable, port, folder, outputs], check=True)
    report = tmp_path / "verdict.json"
    done = subprocess.run(
        [sys.executable, "-m", "conformance.vectors", "check", folder, outputs, "--json", report],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "SCALE-1 MUST: The update is divided by ranknum + 1e-5" in done.stdout
    assert f"{outputs}: given-float32-exact-4x3/y[" in done.stdout
    verdict = json.loads(report.read_text())
    assert {"SCALE-1", "FWD-2"} <= {c["id"] for c in verdict["clauses"] if c["status"] == "fail"}
