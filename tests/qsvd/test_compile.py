"""`torch.compile(fullgraph=True)`: one graph, the same values, and no compilation that is not needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.qsvd.build import (
    DTYPES,
    KINDS,
    PARAMETERS,
    assert_within,
    expected,
    gradients,
    layer,
    randomised,
)


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    """All layers share one `forward`, and dynamo keeps eight compilations of a function."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Compiled:
    """A compiled layer that counts its compilations."""

    def __init__(self, adapted: Any, **options: Any) -> None:
        # bitsandbytes settles a 4-bit layer's compute dtype in its first call.
        adapted(torch.randn(1, 64))
        self.counter = CompileCounterWithBackend("aot_eager")
        self.layer = torch.compile(adapted, fullgraph=True, backend=self.counter, **options)
        self.adapted = adapted

    def __call__(self, rows: int, dtype: torch.dtype = torch.float32) -> None:
        """A forward and a backward; values and gradients have the bits of the layer as it is.

        So they have with fewer elements than `_products._MANY_ELEMENTS`.
        """
        x, dy = torch.randn(rows, 64).to(dtype), torch.randn(rows, 32).to(dtype)
        self.adapted.zero_grad()
        dx, want = gradients(self.adapted, x, dy)
        self.adapted.zero_grad()
        leaf = x.requires_grad_(True)
        y = self.layer(leaf)
        y.backward(dy)
        assert torch.equal(y, self.adapted(x))
        assert torch.equal(leaf.grad, dx)
        for p in PARAMETERS:
            assert torch.equal(getattr(self.adapted, p)["default"].grad, want[p])

    def within_bounds(self, rows: int) -> None:
        """A forward and a backward; values and gradients are right."""
        x, dy = torch.randn(rows, 64), torch.randn(rows, 32)
        want = expected(self.adapted, x, dy)
        self.adapted.zero_grad()
        leaf = x.clone().requires_grad_(True)
        y = self.layer(leaf)
        y.backward(dy)
        assert_within(y, want.y, want.y_bound)
        assert_within(leaf.grad, want.dx, want.dx_bound)
        for p in PARAMETERS:
            assert_within(getattr(self.adapted, p)["default"].grad, *want.gradients[p])

    @property
    def times(self) -> int:
        return self.counter.frame_count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [7, 40])
def test_there_is_no_graph_break_and_values_are_right(kind, dtype, rows):
    adapted = randomised(layer(kind))
    compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(rows, 64).to(dtype), torch.randn(rows, 32).to(dtype)
    dx, bits = gradients(adapted, x, dy)
    want = expected(adapted, x, dy)
    adapted.zero_grad()
    x = x.requires_grad_(True)
    y = compiled(x)
    y.backward(dy)
    found = {p: getattr(adapted, p)["default"].grad for p in PARAMETERS}

    assert_within(y, want.y, want.y_bound)
    assert_within(x.grad, want.dx, want.dx_bound)
    for p in PARAMETERS:
        assert_within(found[p], *want.gradients[p])
    # Of few rows, not compiled, c scales the update instead of E.
    if rows > 32:
        assert torch.equal(x.grad, dx)
        assert all(torch.equal(found[p], bits[p]) for p in PARAMETERS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [7, 40])
def test_with_dropout_there_is_no_graph_break(kind, rows):
    adapted = randomised(layer(kind, lora_dropout=0.5))
    compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
    x = torch.randn(rows, 64, requires_grad=True)
    compiled(x).sum().backward()

    assert x.grad.isfinite().all()
    assert all(getattr(adapted, p)["default"].grad.isfinite().all() for p in PARAMETERS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_numbers_of_rows_are_no_compilation(kind, dtype):
    adapted = layer(kind)
    adapted.update_layer("other", 3)
    adapted.set_adapter(["default", "other"])
    compiled = Compiled(randomised(adapted), dynamic=True)
    compiled(40, dtype)
    first = compiled.times
    for rows in (41, 67, 1000):
        compiled(rows, dtype)

    assert compiled.times == first


def test_other_numbers_of_rows_are_no_compilation_where_they_are_many(monkeypatch):
    monkeypatch.setattr("qsvd._products._MANY_ELEMENTS", 0)
    compiled = Compiled(randomised(layer("4bit")), dynamic=True)
    # In bounds, not in bits: not compiled, the layer multiplies a quarter of the rows at a time.
    for rows in (40, 41, 42, 43):
        compiled.within_bounds(rows)

    assert compiled.times == 1


def test_another_mask_is_no_compilation():
    adapted = randomised(layer("4bit", r=12))
    compiled = Compiled(adapted)
    for live in (range(12), (0, 3), (1,)):
        with torch.no_grad():
            adapted.lora_E["default"].zero_()[list(live)] = 1.0
        # In bounds, not in bits: not compiled, the layer leaves masked ranks out.
        compiled.within_bounds(40)

    assert compiled.times == 1


def test_a_set_of_active_adapters_is_compiled_once():
    adapted = layer("4bit")
    adapted.update_layer("other", 3)
    compiled = Compiled(randomised(adapted))
    for active in (["default"], ["default", "other"], ["default"], ["default", "other"]):
        adapted.set_adapter(active)
        compiled(40)

    assert compiled.times == 2
