"""docs/vectors.md says what is so: its code runs, its fields and kinds are the schema's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from conformance.vectors.writing import write_vectors

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "vectors.md").read_text()
SCHEMA = json.loads((ROOT / "conformance" / "schemas" / "vectors.schema.json").read_text())


def test_the_code_block_runs(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    write_vectors(tmp_path / "vectors")

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout.removeprefix("worst error / bound:")) <= 1


def test_every_field_and_kind_of_a_vector_is_explained() -> None:
    layer = SCHEMA["$defs"]["layer"]["properties"]
    for name in (*layer, *SCHEMA["$defs"]["adapter"]["properties"], *layer["kind"]["enum"]):
        assert f"`{name}`" in PAGE, name


def test_links_lead_somewhere() -> None:
    for page in ("docs/vectors.md", "examples/numpy_port/README.md"):
        path = ROOT / page
        for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            assert (path.parent / link).exists(), link
