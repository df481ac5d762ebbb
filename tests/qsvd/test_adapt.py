"""`adapt` puts layers in place, or leaves the model as it was; `remove` undoes it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

import qsvd
from qsvd import AdaLoraConfig
from tests.qsvd.build import KINDS, Kind
from tests.qsvd.models import WIDTH, Stack, stack

ALL = {f"layers.{i}.{p}" for i in range(3) for p in ("q_proj", "v_proj")}


def config(target_modules: Any = ("q_proj", "v_proj"), **given: Any) -> AdaLoraConfig:
    return AdaLoraConfig(
        **{"total_step": 10, "init_r": 4, "target_r": 2, "target_modules": target_modules, **given}
    )


def described(model: nn.Module) -> dict[str, object]:
    """All that must not change when a model is refused: modules, parameters, who is trainable."""
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "parameters": [
            (n, id(p), p.requires_grad, p._version) for n, p in model.named_parameters()
        ],
        "random": torch.get_rng_state().tolist(),
        "repacking": repacking(model),
        "record": model.__dict__.get("_qsvd"),
    }


def repacking(model: nn.Module) -> list[bool]:
    """Of its 4-bit layers, as bitsandbytes asks it."""
    linears = [m for m in model.modules() if isinstance(m, Linear4bit)]
    return [bool(m.support_avx512bf16_for_cpu) for m in linears]


def repackable() -> Stack:
    """What bitsandbytes makes on a CPU with AVX512-BF16, on any CPU."""
    model = stack()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = True
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_model_computes_what_it_computed(kind: Kind) -> None:
    model, x = stack(kind), torch.randn(3, WIDTH)
    before = model(x)

    assert qsvd.adapt(model, config()) is model

    assert torch.equal(model(x), before)
    assert {type(layer) for layer in qsvd.adapted_layers(model).values()} == {
        qsvd.SVDLinear4bit if kind == "4bit" else qsvd.SVDLinear8bitLt
    }


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({}, ALL),
        ({"target_modules": "all-linear"}, ALL),
        ({"target_modules": ["q_proj"]}, {n for n in ALL if n.endswith("q_proj")}),
        ({"target_modules": ["layers.1.q_proj"]}, {"layers.1.q_proj"}),
        ({"target_modules": r"layers\.[12]\.q_proj"}, {"layers.1.q_proj", "layers.2.q_proj"}),
        ({"exclude_modules": ["v_proj"]}, {n for n in ALL if n.endswith("q_proj")}),
        ({"exclude_modules": r"layers\.0\..*"}, {n for n in ALL if ".0." not in n}),
        ({"layers_to_transform": 1}, {"layers.1.q_proj", "layers.1.v_proj"}),
        (
            {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
            {n for n in ALL if ".1." not in n},
        ),
        ({"target_modules": ["lm_head"]}, {"lm_head"}),
    ],
)
def test_it_adapts_the_modules_that_are_meant(given: dict[str, Any], names: set[str]) -> None:
    assert set(qsvd.adapted_layers(qsvd.adapt(stack(), config(**given)))) == names


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"target_modules": ["layers.1.q_proj"]},
        {"target_modules": ["model.layers.1.q_proj"]},
        {"target_modules": r".*\.2\.v_proj"},
        {"exclude_modules": ["layers.0.q_proj"]},
        {"exclude_modules": r".*\.q_proj"},
        {"layers_to_transform": [1, 2]},
        {"layers_to_transform": [0], "layers_pattern": ["layers"]},
    ],
)
def test_peft_means_the_same_modules(given: dict[str, Any]) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    # Below a prefix: PEFT finds no layer number in a list of blocks at the top.
    model, settings = nn.ModuleDict({"model": stack()}), config(**given)
    theirs = {
        name
        for name, _ in model.named_modules()
        if (found := check_target_module_exists(_peft(settings), name))
        and "Excluded" not in type(found).__name__
    }

    assert set(qsvd.adapted_layers(qsvd.adapt(model, settings))) == theirs != set()


def _peft(settings: AdaLoraConfig) -> Any:
    from peft import AdaLoraConfig as PeftConfig

    fields = settings.to_dict()
    del fields["peft_type"]
    return PeftConfig(
        **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items() if v is not None}
    )


def test_only_the_adapters_are_trainable() -> None:
    model = qsvd.adapt(stack(), config())

    trainable = {name for name, p in model.named_parameters() if p.requires_grad}

    assert len(trainable) == 3 * len(ALL)
    assert all(".lora_" in name for name in trainable)


def test_inference_mode_freezes_the_adapters_too() -> None:
    model = qsvd.adapt(stack(), config(inference_mode=True))
    assert not any(p.requires_grad for p in model.parameters())


def test_remove_gives_the_original_modules_back() -> None:
    model, x = stack(), torch.randn(3, WIDTH)
    model.layers[0].norm.requires_grad_(False)
    before, y = described(model), model(x)
    qsvd.adapt(model, config(init_lora_weights=False))
    assert not torch.equal(model(x), y)

    torch.manual_seed(0)
    random = torch.get_rng_state().tolist()
    assert qsvd.remove(model) is model

    assert torch.equal(model(x), y)
    assert described(model) == {**before, "random": random}


def test_it_adapts_again_what_was_removed() -> None:
    model = qsvd.remove(qsvd.adapt(stack(), config()))
    assert set(qsvd.adapted_layers(qsvd.adapt(model, config()))) == ALL


def test_a_copy_of_an_adapted_model_can_be_removed() -> None:
    model = qsvd.adapt(stack(), config())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not qsvd.adapted_layers(qsvd.remove(twin))
    assert set(qsvd.adapted_layers(model)) == ALL


def _tied(model: Stack) -> None:
    model.layers[1].q_proj = model.layers[0].q_proj


def _shared_weight(model: Stack) -> None:
    model.layers[1].q_proj.weight = model.layers[0].q_proj.weight


def _dense(model: Stack) -> None:
    model.layers[2].v_proj = nn.Linear(WIDTH, WIDTH)


def _adapted(model: Stack) -> None:
    model.layers[0].v_proj = qsvd.SVDLinear4bit(model.layers[0].v_proj, "default", r=2)


def _nothing(model: Stack) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "given", "error", "message"),
    [
        (_nothing, {"target_modules": None}, ValueError, "`target_modules` is needed"),
        (
            _nothing,
            {"target_modules": ["q_prj"]},
            ValueError,
            "'q_prj'. Did you mean 'q_proj'",
        ),
        (
            _nothing,
            {"target_modules": ["q_proj", "zzzz"]},
            ValueError,
            "'zzzz'. There are: ['layers'",
        ),
        (
            _nothing,
            {"target_modules": "q_proj"},
            ValueError,
            "'q_proj' matches no module's whole name",
        ),
        (_nothing, {"exclude_modules": ["q_proj", "v_proj"]}, ValueError, "leaves none of them"),
        (_nothing, {"layers_to_transform": 7}, ValueError, "leaves none of them"),
        (_nothing, {"target_modules": ["norm"]}, TypeError, "layers.0.norm is a torch.nn"),
        (_dense, {}, TypeError, "layers.2.v_proj is a torch.nn.modules.linear.Linear"),
        (_adapted, {}, ValueError, "Adapted already: layers.0.v_proj"),
        (
            _adapted,
            {"target_modules": "all-linear"},
            ValueError,
            "Adapted already: layers.0.v_proj",
        ),
        (_tied, {}, ValueError, "layers.0.q_proj is shared with layers.1.q_proj"),
        (_shared_weight, {}, ValueError, "layers.0.q_proj is shared with layers.1.q_proj"),
    ],
)
def test_a_refused_model_is_as_it_was(
    change: Any, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = stack()
    change(model)
    before = described(model)

    with pytest.raises(error) as refused:
        qsvd.adapt(model, config(**given))

    assert message in str(refused.value)
    assert described(model) == before


def test_a_model_without_quantised_layers_has_nothing_to_adapt() -> None:
    with pytest.raises(ValueError, match="no bitsandbytes Linear4bit or Linear8bitLt"):
        qsvd.adapt(nn.Sequential(nn.Linear(4, 4)), config("all-linear"))


def test_a_model_is_adapted_once() -> None:
    model = qsvd.adapt(stack(), config(["q_proj"]))
    with pytest.raises(ValueError, match="adapted already"):
        qsvd.adapt(model, config(["v_proj"]))


def test_there_is_nothing_to_remove_from_a_model_that_is_not_adapted() -> None:
    with pytest.raises(ValueError, match="not adapted"):
        qsvd.remove(stack())


def test_no_4bit_layer_is_repacked_while_the_model_is_adapted() -> None:
    model = repackable()
    qsvd.adapt(model, config(["layers.1.q_proj"]))
    assert repacking(model) == [False] * 7

    qsvd.remove(model)
    assert repacking(model) == [True] * 7


def test_an_interrupted_adaptation_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = repackable()
    before = described(model)
    built = []

    def interrupted(*args: Any) -> None:
        built.append(args)
        if len(built) == 4:
            raise MemoryError

    monkeypatch.setattr(qsvd.SVDLinear4bit, "reset_lora_parameters", interrupted)
    with pytest.raises(MemoryError):
        qsvd.adapt(model, config())

    assert len(built) == 4
    assert described(model) == before


@pytest.mark.parametrize(("depth", "terminal"), [(16, True), (16, False), (3, True)])
def test_many_layers_on_a_terminal_show_their_progress(
    depth: int,
    terminal: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)

    qsvd.adapt(stack(depth=depth), config())

    told = capsys.readouterr().err
    assert ("adapting" in told and "32/32" in told) == (depth == 16 and terminal)
    assert terminal or not told
