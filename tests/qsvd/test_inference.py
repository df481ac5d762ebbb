"""Packed copies answer evaluation on a CPU, and nothing of the layers changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

import qsvd
from tests.qsvd.build import (
    DTYPES,
    UNIT_ROUNDOFF,
    assert_within,
    avx512bf16,
    base_layer,
    layer,
    randomised,
    step,
)
from tests.qsvd.language import config, quantised, sequences, write_model

U16 = UNIT_ROUNDOFF[torch.bfloat16]


def adapted_layer(n_in: int = 128, n_out: int = 64, **options: Any) -> Any:
    return randomised(layer("4bit", base=base_layer("4bit", n_in, n_out, **options))).eval()


def evaluated(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)


def packed(module: nn.Module, x: Tensor) -> Tensor:
    with qsvd.packed_for_inference(module):
        return evaluated(module, x)


@avx512bf16
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(), (1,), (2, 20), (70,)])
@pytest.mark.parametrize("how", [{}, {"compress_statistics": False}, {"quant_type": "fp4"}])
def test_outputs_are_the_layers_own_but_for_bf16s_roundings(dtype, rows, how):
    """
    x, a block's scale, the codebook's value and the product of the two are rounded to bf16, and y.
    """
    base = base_layer("4bit", 128, 64, **how)
    x = torch.randn(*rows, 128).to(dtype)
    W = dequantize_4bit(base.weight.data, base.weight.quant_state).double()
    size = x.double().abs() @ W.abs().T
    want = x.double() @ W.T + base.bias.double()
    adapted = randomised(layer("4bit", base=base)).eval()
    exact, found = evaluated(adapted, x), packed(adapted, x)
    adapted.enable_adapters(False)
    of_base = packed(adapted, x)

    assert_within(of_base, want, 4.1 * U16 * size + 2 * U16 * (size + want.abs()))
    assert found.dtype == exact.dtype
    assert not torch.equal(found, exact)  # the kernel answered
    apart = (found.double() - exact.double()).norm() / exact.double().norm()
    assert apart < 3 * U16


@avx512bf16
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256])
@pytest.mark.parametrize("bias", [True, False])
def test_blocks_of_any_size_that_divides_the_rows(blocksize, bias):
    base = base_layer("4bit", 256, 32, bias=bias)
    base.weight = Params4bit(torch.randn(32, 256), blocksize=blocksize, quant_type="nf4").to("cpu")
    adapted = layer("4bit", base=base).eval()
    x = torch.randn(3, 256)
    exact, found = evaluated(adapted, x), packed(adapted, x)

    assert 0 < (found - exact).norm() < 3 * U16 * exact.norm()


@avx512bf16
def test_all_of_a_models_4bit_layers_answer_so():
    model = nn.Sequential(
        base_layer("4bit", 64, 64), adapted_layer(64, 32), nn.Linear(32, 8)
    ).eval()
    model[0].support_avx512bf16_for_cpu = False
    x = torch.randn(3, 64)
    exact = [evaluated(model[:k], x) for k in (1, 2)]

    with qsvd.packed_for_inference(model):
        assert not torch.equal(evaluated(model[:1], x), exact[0])
        assert not torch.equal(evaluated(model[1:2], exact[0]), exact[1])
    assert [torch.equal(evaluated(model[:k], x), exact[k - 1]) for k in (1, 2)] == [True, True]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_meanwhile_and_afterwards_training_and_state_have_every_bit(mode):
    adapted, x = adapted_layer(), torch.randn(5, 128)
    state = {k: v.clone() for k, v in adapted.state_dict().items()}
    own, before = set(vars(adapted.base_layer)), step(adapted, x)
    weight = adapted.base_layer.weight
    exact = evaluated(adapted, x)
    with qsvd.packed_for_inference(adapted):
        with mode():
            adapted(x)
        during = step(adapted, x)
        state_during = {k: v.clone() for k, v in adapted.state_dict().items()}

    assert torch.equal(evaluated(adapted, x), exact)
    for found in (state_during, adapted.state_dict()):
        assert all(torch.equal(found[k], v) for k, v in state.items())
    for found in (during, step(adapted, x)):
        assert all(torch.equal(a, b) for a, b in zip(found, before, strict=True))
    assert adapted.base_layer.weight is weight
    assert set(vars(adapted.base_layer)) == own


@pytest.mark.parametrize("why", ["training", "grad mode", "vmap", "nothing"])
def test_calls_that_it_does_not_answer_have_every_bit(why):
    adapted, x = adapted_layer(), torch.randn(5, 128)
    ask = adapted
    if why == "training":
        adapted.train()
    elif why == "vmap":
        ask = torch.func.vmap(adapted)
    elif why == "nothing":
        x = x[:0]
    with torch.set_grad_enabled(why == "grad mode"):
        exact = ask(x)
        with qsvd.packed_for_inference(adapted):
            assert torch.equal(ask(x), exact)


def other_forward() -> Any:
    class Other(Linear4bit):
        def forward(self, x):
            return 2 * super().forward(x)

    return Other(128, 64, quant_type="nf4")


@pytest.mark.parametrize("why", ["in", "out", "block", "forward", "8bit", "dense", "another CPU"])
def test_layers_that_the_kernel_cannot_take_compute_as_ever(why, monkeypatch):
    if why == "another CPU":
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    base: Any = {
        "in": lambda: base_layer("4bit", 96, 64),
        "out": lambda: base_layer("4bit", 128, 48),
        "block": lambda: base_layer("4bit", 128, 64),
        "forward": lambda: other_forward().to("cpu"),
        "8bit": lambda: base_layer("8bit", 128, 64),
        "dense": lambda: nn.Linear(128, 64),
        "another CPU": lambda: base_layer("4bit", 128, 64),
    }[why]()
    if why == "block":
        weight = torch.randn(64, 128)
        base.weight = Params4bit(weight, blocksize=256, quant_type="nf4").to("cpu")
    if why in ("in", "out", "block", "forward"):
        base.support_avx512bf16_for_cpu = False
    x = torch.randn(3, base.in_features)
    exact = evaluated(base.eval(), x)

    assert torch.equal(packed(base, x), exact)


@avx512bf16
def test_a_layer_that_bitsandbytes_packed_for_good_stays_as_it_is():
    base = base_layer("4bit", 128, 64).eval()
    x = torch.randn(3, 128)
    exact = evaluated(base, x)
    assert vars(base.weight.quant_state)["packing_format_for_cpu"]

    assert torch.equal(packed(base, x), exact)


def test_an_unquantised_layer_is_left_to_say_so():
    base = Linear4bit(128, 64).eval()
    with qsvd.packed_for_inference(base), pytest.raises(AssertionError):
        evaluated(base, torch.randn(3, 128))
    assert "forward" not in vars(base)


@avx512bf16
def test_weights_that_are_loaded_meanwhile_answer():
    adapted, other, x = adapted_layer(), adapted_layer(), torch.randn(3, 128)
    want = packed(other, x)
    with qsvd.packed_for_inference(adapted):
        assert not torch.equal(evaluated(adapted, x), want)
        adapted.load_state_dict(other.state_dict())
        assert torch.equal(evaluated(adapted, x), want)


@avx512bf16
def test_a_bias_that_is_trained_meanwhile_answers():
    adapted, x = adapted_layer(), torch.randn(3, 128)
    with qsvd.packed_for_inference(adapted):
        before = evaluated(adapted, x)
        with torch.no_grad():
            adapted.base_layer.bias += 1
        assert (evaluated(adapted, x) - before - 1).abs().max() < 1e-4


def test_an_error_inside_ends_it():
    adapted = adapted_layer()
    with pytest.raises(ZeroDivisionError), qsvd.packed_for_inference(adapted):
        _ = 1 / 0
    assert "forward" not in vars(adapted.base_layer)


@avx512bf16
def test_one_inside_another_ends_with_the_outer_one():
    adapted, x = adapted_layer(), torch.randn(3, 128)
    exact, want = evaluated(adapted, x), packed(adapted, x)
    with qsvd.packed_for_inference(adapted):
        assert torch.equal(packed(adapted, x), want)
        assert torch.equal(evaluated(adapted, x), want)
    assert torch.equal(evaluated(adapted, x), exact)


@avx512bf16
def test_a_copy_that_is_made_meanwhile_computes_the_same():
    adapted, x = adapted_layer(), torch.randn(3, 128)
    with qsvd.packed_for_inference(adapted):
        want = evaluated(adapted, x)
        twin = copy.deepcopy(adapted)
        adapted.base_layer.weight = None
        assert torch.equal(evaluated(twin, x), want)


@avx512bf16
def test_what_is_called_in_inference_mode_can_be_called_again_without():
    adapted, x = adapted_layer(), torch.randn(3, 128)
    with qsvd.packed_for_inference(adapted):
        with torch.inference_mode():
            first = adapted(x)
        assert torch.equal(evaluated(adapted, x), first)


def test_a_model_of_transformers_generates(tmp_path: Path):
    model = qsvd.adapt(quantised(write_model(tmp_path)), config(init_r=3)).eval()
    prompt = sequences(1)[0]["input_ids"][None, :5]
    want = model(prompt).logits
    with torch.no_grad(), qsvd.packed_for_inference(model):
        logits = model(prompt).logits
        tokens = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)

    assert tokens.shape == (1, 9)
    assert (logits - want).norm() < 0.05 * want.norm()
    assert torch.equal(logits, want) != has_avx512bf16()
    assert torch.equal(model(prompt).logits, want)


def test_what_is_no_model_is_refused():
    with (
        pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module, got 'model' \(str\)"),
        qsvd.packed_for_inference("model"),
    ):
        pass
