"""The derivation for CUDA takes the layers' way for CUDA, and counts what is there to count."""

from __future__ import annotations

import torch

from conformance.benchmarks.grid import Scenario
from conformance.benchmarks.limit import least_work
from qsvd import _products
from tests.traffic.__main__ import as_on_cuda, layers_of

SMALL = Scenario(tokens=512, in_features=512, out_features=512, rank=2)


def test_a_half_precision_product_is_one_operation_that_returns_fp32() -> None:
    S, data = torch.randn(3, 5), torch.randn(5, 7).bfloat16()
    with as_on_cuda():
        product = _products.gather(S.T, data)

    assert product.dtype == torch.float32
    assert torch.allclose(product, S.bfloat16().float() @ data.float(), rtol=0, atol=1e-5)


def test_no_layer_does_less_than_the_least_and_peft_moves_more() -> None:
    least, ours, peft, lora = layers_of(SMALL)

    assert [row["name"] for row in (least, ours, peft, lora)] == [
        "the least",
        "qsvd",
        "PEFT AdaLoRA",
        "PEFT LoRA",
    ]
    moved = [sum(row["bytes"].values()) for row in (least, ours, peft)]
    assert moved[0] == least_work(SMALL).bytes
    assert moved == sorted(moved)
    assert least["flops"] == peft["flops"] == ours["flops"]
    # No wide copy of x or dy is made: what is cast is small.
    casts = [row["bytes"]["casts and copies"] for row in (ours, peft)]
    assert casts[0] < 2 * 512 * 512 < casts[1]
