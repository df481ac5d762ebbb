"""What bitsandbytes 0.50.2 does to its layers on a CPU, and that it does not reach a wrapped one."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import qsvd
from tests.qsvd.build import (
    DTYPES,
    KINDS,
    avx512bf16,
    base_layer,
    layer,
    randomised,
    step,
    unquantised_base,
)

avx512 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs a CPU with AVX-512"
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluating_changes_no_bit_of_training_or_of_the_state(kind, double_quant, mode):
    chosen = {"compress_statistics": double_quant} if kind == "4bit" else {}
    adapted = randomised(layer(kind, base=base_layer(kind, 128, 64, **chosen)))
    x = torch.randn(5, 128)
    before = step(adapted, x)
    state = {k: v.clone() for k, v in adapted.state_dict().items()}
    with mode():
        adapted.eval()(x)
        adapted(x.bfloat16())

    after = adapted.state_dict()
    assert all(torch.equal(after[k], v) for k, v in state.items())
    assert all(torch.equal(a, b) for a, b in zip(step(adapted, x), before, strict=True))


@avx512bf16
def test_unwrapped_the_same_evaluation_repacks_the_weight():
    """
    The test above can fail: this is what it would see.
    """
    base = base_layer("4bit", 128, 64)
    shape = base.weight.shape
    base.eval()(torch.randn(5, 128))

    assert base.weight.shape != shape


@avx512bf16
def test_a_repacked_base_layer_is_refused():
    base = base_layer("4bit", 128, 64)
    base.eval()(torch.randn(5, 128))

    with pytest.raises(ValueError, match=r"AVX512-BF16.*wrap it before it is evaluated"):
        qsvd.SVDLinear4bit(base, "default", r=4)
    assert base.support_avx512bf16_for_cpu


@avx512bf16
def test_a_base_layer_switched_back_to_repacking_is_switched_off_again():
    adapted = layer("4bit", base=base_layer("4bit", 128, 64)).eval()
    adapted.base_layer.support_avx512bf16_for_cpu = True
    shape = adapted.weight.shape
    adapted(torch.randn(5, 128))

    assert adapted.weight.shape == shape


@avx512bf16
def test_a_base_layer_repacked_behind_our_back_is_noticed():
    adapted = layer("4bit", base=base_layer("4bit", 128, 64)).eval()
    adapted.base_layer.support_avx512bf16_for_cpu = True
    adapted.base_layer(torch.randn(5, 128))

    with pytest.raises(RuntimeError, match=r"After it was wrapped.*AVX512-BF16"):
        adapted(torch.randn(5, 128))


@avx512bf16
def test_loading_a_checkpoint_repairs_a_repacked_base_layer():
    adapted = randomised(layer("4bit", base=base_layer("4bit", 128, 64))).eval()
    state = {k: v.clone() for k, v in adapted.state_dict().items()}
    x = torch.randn(5, 128)
    y = adapted(x)
    adapted.base_layer.support_avx512bf16_for_cpu = True
    adapted.base_layer(x)
    adapted.load_state_dict(state)

    assert torch.equal(adapted(x), y)


@pytest.mark.parametrize(("kind", "wide_input"), [("4bit", False), ("4bit", True), ("8bit", False)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_call_does_not_round_the_bias(kind, training, dtype, wide_input):
    compute = {"compute_dtype": dtype} if kind == "4bit" else {}
    adapted = layer(kind, base=base_layer(kind, **compute)).train(training)
    bias, x = adapted.bias.clone(), torch.randn(3, 64, dtype=torch.float32 if wide_input else dtype)
    twin = copy.deepcopy(adapted.base_layer)
    y = adapted(x)

    assert adapted.bias.dtype == torch.float32
    assert torch.equal(adapted.bias, bias)
    assert torch.equal(y, twin(x))
    assert twin.bias.dtype == dtype  # the base layer alone rounds it


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", DTYPES)
def test_an_undecided_compute_dtype_rounds_no_bias_either(dtype, first):
    """
    Without a compute dtype a 4-bit layer takes that of its first input, unless it is fp16.
    """
    adapted = layer("4bit")
    bias, twin = adapted.bias.clone(), copy.deepcopy(adapted.base_layer)
    for x in (torch.randn(3, 64, dtype=first), torch.randn(3, 64, dtype=dtype)):
        twin.bias.data = bias.clone()
        assert torch.equal(adapted(x), twin(x))
        assert torch.equal(adapted.bias, bias)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_that_is_trained_gets_its_gradient_in_its_own_dtype(kind):
    adapted = layer(kind)
    adapted.bias.requires_grad_(True)
    adapted(torch.randn(3, 64, dtype=torch.bfloat16)).sum().backward()

    assert adapted.bias.grad.dtype == torch.float32
    assert torch.equal(adapted.bias.grad, torch.full((32,), 3.0))


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_layer_is_called_once_with_x_itself(kind):
    adapted = randomised(layer(kind))
    seen = []
    adapted.base_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    adapted(x)

    assert len(seen) == 1
    assert seen[0] is x


def test_an_8bit_layer_with_one_input_is_refused_where_it_reads_uninitialised_memory():
    adapted = layer("8bit", base=base_layer("8bit", 1, 8))
    adapted(torch.randn(3, 1))

    with pytest.raises(RuntimeError, match="in_features = 1"):
        adapted.eval()(torch.randn(3, 1))


@pytest.mark.parametrize("shape", [(5, 64), (2, 5, 64)])
@pytest.mark.parametrize("threshold", [0.5, 2.0])
def test_an_outlier_threshold_does_not_write_into_an_fp16_input(shape, threshold):
    """
    Written to and restored, x would still fail the backward of whoever saved it, here `exp`.
    """
    adapted = randomised(layer("8bit", base=base_layer("8bit", threshold=threshold))).eval()
    leaf = torch.randn(shape, dtype=torch.float16, requires_grad=True)
    x = leaf.exp()
    version = x._version
    adapted(x).sum().backward()

    assert x._version == version
    assert leaf.grad.isfinite().all()


@avx512
@pytest.mark.parametrize("n_in", [16, 32, 96, 112])
def test_a_shape_that_is_dequantised_wrongly_is_warned_of(n_in):
    message = rf"Linear4bit\({n_in}, 32\).*AVX-512"
    with pytest.warns(qsvd.BitsandbytesWarning, match=message) as record:
        layer("4bit", base=base_layer("4bit", n_in, 32))
    assert record[0].filename.endswith("build.py")  # where the layer was built


@avx512
@pytest.mark.parametrize(
    ("n_in", "n_out"), [(64, 32), (128, 3), (33, 8), (24, 8), (16, 4), (32, 2)]
)
def test_a_shape_that_is_dequantised_rightly_is_not_warned_of(n_in, n_out):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer("4bit", base=base_layer("4bit", n_in, n_out))


def test_a_layer_still_to_be_moved_elsewhere_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer("4bit", base=unquantised_base("4bit", 96, 32))


@pytest.mark.parametrize("kind", KINDS)
def test_an_unquantised_base_layer_says_what_to_do_and_works_once_moved(kind):
    adapted = randomised(layer(kind, base=unquantised_base(kind)))
    x = torch.randn(3, 64)
    with pytest.raises(RuntimeError, match=r"not quantised: move it .*`layer.to\(device\)`"):
        adapted(x)
    adapted.to("cpu")
    adapted.enable_adapters(False)

    assert torch.equal(adapted(x), adapted.base_layer(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_8bit_layer_that_has_run_can_be_moved_and_cast(dtype):
    adapted = randomised(layer("8bit", base=base_layer("8bit", bias=False)))
    x = torch.randn(3, 64, dtype=dtype)
    y = adapted(x)
    adapted.to("cpu").to(dtype)

    assert torch.equal(adapted(x), y)


def test_moving_takes_the_8bit_scales_along():
    """
    On one device a move is seen by what it is given: codes and scales must be on the weight then.
    """
    adapted = layer("8bit")
    adapted(torch.randn(3, 64))
    seen = []

    def move(t):
        if t.dtype == torch.int8:
            seen.append((t.CB is not None, t.SCB is not None))
        return t

    adapted._apply(move)
    assert seen == [(True, True)]
    assert adapted.weight.CB is None
    assert adapted.base_layer.state.CB is not None
