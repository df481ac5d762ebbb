"""Real implementations stay within the bounds: PEFT's layer, a plain rewrite, torch's autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from reference import (
    FORMATS,
    Adapter,
    Arithmetic,
    bound_gradients,
    bound_output,
    gradients_in_domain,
    in_domain,
)
from tests.reference.cases import FAMILIES, Case, Family, case
from tests.reference.judging import ratio, worst

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Parameters = Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
Layer = Callable[[torch.Tensor, torch.Tensor, Sequence[Adapter], Parameters], torch.Tensor]


def like_peft(
    x: torch.Tensor, base: torch.Tensor, adapters: Sequence[Adapter], parameters: Parameters
) -> torch.Tensor:
    """PEFT 0.21's arithmetic, with a ranknum that is a tensor of shape (1,) and takes no part."""
    y = base.clone()
    for adapter, (A, E, B) in zip(adapters, parameters, strict=True):
        divisor = torch.full((1,), adapter.ranknum) + 1e-5
        product = _dropped(x.float(), adapter) @ (A * E).T @ B.T
        y += product.to(base.dtype) * adapter.scaling / divisor
    return y


def folded(
    x: torch.Tensor, base: torch.Tensor, adapters: Sequence[Adapter], parameters: Parameters
) -> torch.Tensor:
    """Everything small folded into A, products in x's dtype, the base in the accumulator."""
    for adapter, (A, E, B) in zip(adapters, parameters, strict=True):
        hidden = _dropped(x, adapter) @ (A * E * adapter.c).T.to(x.dtype)
        base = torch.addmm(base, hidden, B.T.to(x.dtype))
    return base


def dense(
    x: torch.Tensor, base: torch.Tensor, adapters: Sequence[Adapter], parameters: Parameters
) -> torch.Tensor:
    """The weight of each adapter formed first."""
    for adapter, (A, E, B) in zip(adapters, parameters, strict=True):
        weight = (B.to(x.dtype) @ (A * E).to(x.dtype)) * adapter.c
        base = base + _dropped(x, adapter) @ weight.T
    return base


def naive(
    x: torch.Tensor, base: torch.Tensor, adapters: Sequence[Adapter], parameters: Parameters
) -> torch.Tensor:
    """Everything cast to x's dtype, E on the hidden vector, c in two steps."""
    for adapter, (A, E, B) in zip(adapters, parameters, strict=True):
        hidden = (_dropped(x, adapter) @ A.T.to(x.dtype)) * E.T.to(x.dtype)
        delta = hidden @ B.T.to(x.dtype)
        base = base + delta * adapter.scaling / (adapter.ranknum + 1e-5)
    return base


def _dropped(x: torch.Tensor, adapter: Adapter) -> torch.Tensor:
    if adapter.keep is None:
        return x
    return x * torch.from_numpy(adapter.keep).to(x.dtype).div_(1.0 - adapter.p)


def judged(layer: Layer, c: Case, arithmetic: Arithmetic) -> float:
    """The worst error / bound of the layer's output and gradients; 0 outside of the domain."""
    x, base, dout = (torch.tensor(a, dtype=TORCH[c.io]) for a in (c.x, c.base, c.dout))
    x.requires_grad_()
    parameters = [
        tuple(torch.tensor(m, dtype=torch.float32, requires_grad=True) for m in (a.A, a.E, a.B))
        for a in c.adapters
    ]
    y = layer(x, base, c.adapters, parameters)
    found = 0.0
    if in_domain(c.x, c.adapters, c.base, arithmetic):
        found = ratio(array(y), bound_output(c.x, c.adapters, c.base, arithmetic))
    if gradients_in_domain(c.x, c.adapters, c.dout, None, arithmetic):
        y.backward(dout)
        dx, leaves = bound_gradients(c.x, c.adapters, c.dout, None, arithmetic)
        pairs = [(array(x.grad), dx)]
        for group, leaf in zip(parameters, leaves, strict=True):
            pairs += zip((array(p.grad) for p in group), leaf[1:], strict=True)
        found = max(found, worst(pairs))
    return found


def array(t: torch.Tensor) -> NDArray[np.float64]:
    return t.detach().double().numpy()


@pytest.mark.parametrize("io", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_torch_layers_stay_within_the_bounds(family: Family, io: str) -> None:
    """Four ways to write the layer, on eight layers each, with autograd's own gradients."""
    seen = []
    for seed in range(100, 108):
        c = case(seed, family, io)
        seen.append(judged(like_peft, c, Arithmetic.strict(io)))
        seen += [judged(f, c, Arithmetic.permissive(io)) for f in (folded, dense, naive)]
        assert max(seen[-4:]) <= 1.0, (seed, seen[-4:])
    assert max(seen) > 0.1


def test_pefts_layer_stays_within_the_strict_bounds() -> None:
    """PEFT's own SVDLinear4bit, two adapters, float32, bfloat16 and float16 in one table."""
    bnb = pytest.importorskip("bitsandbytes")
    adalora = pytest.importorskip("peft.tuners.adalora.bnb")
    config_class = pytest.importorskip("peft").AdaLoraConfig
    rng = np.random.default_rng(0)
    for io, dtype in TORCH.items():
        base = bnb.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")
        base.support_avx512bf16_for_cpu = False
        config = config_class(init_r=4, lora_dropout=0.0, total_step=10)
        layer = adalora.SVDLinear4bit(base, "a", config=config, r=4, lora_alpha=16)
        layer.update_layer("b", 4, 8, config=config)
        layer.set_adapter(["a", "b"])
        adapters = []
        for name in "ab":
            parts = (rng.standard_normal(s).astype(np.float32) for s in ((4, 64), (4, 1), (32, 4)))
            for parameter, value in zip("AEB", parts, strict=True):
                getattr(layer, f"lora_{parameter}")[name].data = torch.from_numpy(value)
            A, E, B = (getattr(layer, f"lora_{p}")[name].detach().double().numpy() for p in "AEB")
            adapters.append(Adapter(A, E, B, layer.scaling[name], layer.ranknum[name].item()))

        x = torch.randn(5, 64, generator=torch.manual_seed(0)).to(dtype).requires_grad_()
        given = base(x)
        dout = torch.randn(5, 32, generator=torch.manual_seed(1)).to(dtype)
        (base_dx,) = torch.autograd.grad(given, x, dout)
        y = layer(x)
        y.backward(dout)

        arithmetic = Arithmetic.strict(io)
        expected = bound_output(array(x), adapters, array(given), arithmetic)
        assert ratio(array(y), expected) <= 1.0
        dx, leaves = bound_gradients(array(x), adapters, array(dout), array(base_dx), arithmetic)
        assert ratio(array(x.grad), dx) <= 1.0
        for name, leaf in zip("ab", leaves, strict=True):
            got = (array(getattr(layer, f"lora_{p}")[name].grad) for p in "AEB")
            assert worst(zip(got, leaf[1:], strict=True)) <= 1.0
