"""What bitsandbytes' layers can and cannot shard: the table of docs/guides/distributed.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

import qsvd
from qsvd._distributed import local
from tests.distributed.processes import run
from tests.distributed.runs import Plan, part, sharded
from tests.qsvd.build import Kind, base_layer
from tests.qsvd.models import WIDTH, Stack

CONFIG = Plan().config


def _model(kind: Kind, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    base = Stack(lambda: base_layer(kind, WIDTH, WIDTH, bias=False, **options), depth=2)
    return qsvd.adapt(base, CONFIG).train()


def _outputs(
    kind: Kind, options: dict[str, Any], how: dict[str, Any], dtype: torch.dtype
) -> tuple[Tensor, Tensor, int, int]:
    """Before sharding and after, and how many bytes of codes and scales of a layer are held then."""
    model = _model(kind, **options)
    x = part(0, 1, 1)[0].to(dtype)
    with torch.no_grad():
        before = model.to(dtype)(x) if dtype != torch.float32 else model(x)
        sharded(model, **how)
        after = model(x)
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    base: Any = qsvd.adapted_layers(model)["layers.0.q_proj"].base_layer
    codes = local(base.weight)
    scales = base.quant_state.absmax if kind == "4bit" else base.state.SCB
    return before, after, codes.nbytes, scales.numel()


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit_codes_are_sharded_in_any_storage(quant_type: str, storage: torch.dtype) -> None:
    """Of 64 x 64 weights in 2048 bytes each process holds 1024; the scales all hold."""
    options = {"quant_type": quant_type, "quant_storage": storage}
    for before, after, codes, scales in run(2, _outputs, "4bit", options, {}, torch.float32):
        assert torch.equal(before, after)
        assert (codes, scales) == (1024, 64)


@pytest.mark.parametrize(
    ("storage", "dtype", "right"),
    [
        (torch.uint8, torch.bfloat16, True),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.bfloat16, torch.float16, False),
    ],
    ids=str,
)
def test_mixed_precision_rounds_codes_that_claim_to_be_numbers(
    storage: torch.dtype, dtype: torch.dtype, right: bool
) -> None:
    """`param_dtype` turns codes that are stored as another floating dtype into garbage, silently."""
    how = {"mp_policy": MixedPrecisionPolicy(param_dtype=dtype)}
    options = {"quant_storage": storage}
    before, after, *_ = run(2, _outputs, "4bit", options, how, torch.float32)[0]
    off = float((before - after.float()).norm() / before.norm())
    assert (off < 0.02) is right


def _halved() -> str:
    model = _model("4bit", quant_storage=torch.float32)
    sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(RuntimeError) as caught:
        model(part(0, 1, 1)[0])
    return str(caught.value)


def test_mixed_precision_halves_codes_in_a_wider_storage() -> None:
    assert run(1, _halved) == ["shape '[64, 32]' is invalid for input of size 1024"]


def _sharded_8bit() -> str:
    model = _model("8bit")
    sharded(model)
    with pytest.raises(AttributeError) as caught:
        model(part(0, 1, 1)[0])
    return str(caught.value)


def test_8bit_codes_cannot_be_sharded() -> None:
    """bitsandbytes keeps codes and scales on the parameter's object, which `fully_shard` replaces."""
    assert run(1, _sharded_8bit) == ["'Parameter' object has no attribute 'CB'"]
    whole = run(2, _outputs, "8bit", {}, {"keep_whole": True}, torch.float32)
    for before, after, codes, scales in whole:
        assert torch.equal(before, after)
        assert (codes, scales) == (4096, 64)


def _different_bases(kind: Kind) -> tuple[bool, bool]:
    """Whether the codes, and the scales, are the first process' after DDP has taken over."""
    torch.manual_seed(dist.get_rank())
    base = Stack(lambda: base_layer(kind, WIDTH, WIDTH, bias=False), depth=1)
    model = qsvd.adapt(base, CONFIG)
    DistributedDataParallel(model)
    layer: Any = qsvd.adapted_layers(model)["layers.0.q_proj"].base_layer
    scales = layer.weight.quant_state.absmax if kind == "4bit" else layer.weight.SCB
    same = []
    for held in (layer.weight.data, scales):
        firsts = held.detach().clone()
        dist.broadcast(firsts, 0)
        same.append(torch.equal(firsts, held))
    return same[0], same[1]


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_ddp_takes_over_codes_and_not_scales(kind: Kind) -> None:
    """So every process must load the same base model: DDP's own broadcast is not enough."""
    assert run(2, _different_bases, kind)[1] == (True, False)


def _state_of_shards() -> list[str]:
    model = _model("4bit")
    sharded(model)
    return [key for key in model.state_dict() if "q_proj.base_layer" in key]


def test_a_sharded_base_model_does_not_save_its_scales() -> None:
    assert all(not key.endswith("absmax") for key in run(2, _state_of_shards)[0])
    assert any(key.endswith("absmax") for key in _model("4bit").state_dict())
