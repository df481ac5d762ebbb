"""Adapter files: PEFT reads ours, we read PEFT's, a bad one is refused, a kill leaves a whole pair."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qsvd
from qsvd import AdaLoraConfig, RankAllocator
from tests.qsvd.build import KINDS, Kind
from tests.qsvd.models import WIDTH, Stack, stack
from tests.qsvd.test_adapt import described

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def config(**given: Any) -> AdaLoraConfig:
    defaults: dict[str, Any] = {
        "total_step": 10,
        "init_r": 4,
        "target_r": 2,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj"],
        "init_lora_weights": False,
    }
    return AdaLoraConfig(**{**defaults, **given})


def trained(kind: Kind = "4bit", pruned: bool = True, **given: Any) -> Stack:
    """An adapted model with random triplets, half of them masked by an allocation."""
    settings = config(**given)
    model = qsvd.adapt(stack(kind, depth=2), settings)
    if pruned:
        allocator = RankAllocator(model, settings)
        for number, layer in enumerate(qsvd.adapted_layers(model).values()):
            for parameters in (layer.lora_A, layer.lora_E, layer.lora_B):
                weight = parameters["default"]
                weight.grad = torch.randn_like(weight) * 10.0 ** (2 * number)
        allocator.step(0)
        allocator.step(10)
    return model


def x() -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(9))


def peft_model(
    kind: Kind,
    settings: AdaLoraConfig | None = None,
    folder: Path | None = None,
    adapter_name: str = "default",
) -> Any:
    """A PEFT model over the same base model: new from a configuration, or loaded from a folder."""
    import peft

    base: Any = stack(kind, depth=2)
    base.is_loaded_in_4bit, base.is_loaded_in_8bit = kind == "4bit", kind == "8bit"
    for module in base.modules():
        if isinstance(module, nn.Linear):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if folder is not None:
            return peft.PeftModel.from_pretrained(base, str(folder), adapter_name)
        assert settings is not None
        fields = {k: v for k, v in settings.to_dict().items() if v is not None and k != "peft_type"}
        fields["target_modules"] = list(fields["target_modules"])
        return peft.get_peft_model(base, peft.AdaLoraConfig(**fields), adapter_name)


def assert_same_output(ours: nn.Module, theirs: nn.Module) -> None:
    """Two fp32 evaluations of one model: three blocks, each of a few hundred roundings."""
    one, two = ours(x()), theirs(x())
    assert (one - two).abs().max() <= 2048 * 2.0**-24 * one.abs().max()


@pytest.mark.parametrize("pruned", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_loaded(kind: Kind, pruned: bool, tmp_path: Path) -> None:
    model = trained(kind, pruned)
    qsvd.save_adapter(model, tmp_path)
    base, random_state = stack(kind, depth=2), torch.get_rng_state()

    loaded = qsvd.load_adapter(base, tmp_path)

    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same_output(loaded, model)
    assert not any(p.requires_grad for p in loaded.parameters())
    layer = qsvd.adapted_layers(loaded)["layers.0.q_proj"]
    assert layer.ranknum["default"].item() == 4
    ranks = [m.r["default"] for m in qsvd.adapted_layers(loaded).values()]
    assert sum(ranks) == (8 if pruned else 16)
    if pruned:
        assert 0 in ranks


@pytest.mark.parametrize("pruned", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_is_saved(kind: Kind, pruned: bool, tmp_path: Path) -> None:
    model = trained(kind, pruned)
    qsvd.save_adapter(model, tmp_path)

    assert_same_output(
        model,
        peft_model(kind, folder=tmp_path).eval()
        if kind == "4bit"
        else peft_model(kind, folder=tmp_path).train(),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saves_is_loaded(kind: Kind, tmp_path: Path) -> None:
    theirs = peft_model(kind, config())
    for number, (name, weight) in enumerate(theirs.named_parameters()):
        if "lora_" in name:
            weight.grad = torch.randn_like(weight) * 10.0**number
    allocator = theirs.base_model
    for step in (1, 10):
        allocator.update_and_allocate(step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT takes tensors of rank 0 for shards
        theirs.save_pretrained(str(tmp_path))

    loaded = qsvd.load_adapter(stack(kind, depth=2), tmp_path)

    assert sum(m.r["default"] for m in qsvd.adapted_layers(loaded).values()) == 8
    assert_same_output(loaded, theirs)


def test_a_pruned_adapter_is_trained_on_pruned_again_and_saved(tmp_path: Path) -> None:
    qsvd.save_adapter(trained(target_r=3), tmp_path)
    settings = config(target_r=1)
    model = qsvd.load_adapter(stack(depth=2), tmp_path, trainable=True)
    allocator = RankAllocator(model, settings)
    assert allocator.schedule.initial == 12
    for weight in (p for p in model.parameters() if p.requires_grad):
        weight.grad = torch.randn_like(weight)
    allocator.step(0)
    assert allocator.step(10) == 4

    qsvd.save_adapter(model, tmp_path)

    assert_same_output(qsvd.load_adapter(stack(depth=2), tmp_path), model)
    assert_same_output(model, peft_model("4bit", folder=tmp_path).eval())
    pattern = json.loads((tmp_path / CONFIG).read_text())["rank_pattern"]
    assert {len(kept) for kept in pattern.values()} == {4}
    assert sum(map(sum, pattern.values())) == 4


def test_unpruned_files_keep_masked_triplets(tmp_path: Path) -> None:
    model = trained()
    qsvd.save_adapter(model, tmp_path, prune=False)

    loaded = qsvd.load_adapter(stack(depth=2), tmp_path)

    assert {m.r["default"] for m in qsvd.adapted_layers(loaded).values()} == {4}
    assert torch.equal(loaded(x()), model(x()))


def test_the_scale_of_no_alpha_stays_that_of_the_initial_rank(tmp_path: Path) -> None:
    model = trained(lora_alpha=0)
    qsvd.save_adapter(model, tmp_path)
    assert_same_output(qsvd.load_adapter(stack(depth=2), tmp_path), model)


def test_a_second_adapter_is_added_to_an_adapted_model(tmp_path: Path) -> None:
    first, second = trained(), trained(lora_alpha=2)
    qsvd.save_adapter(second, tmp_path)
    before = first(x())

    assert qsvd.load_adapter(first, tmp_path, "second") is first

    assert_same_output(first, second)
    for layer in qsvd.adapted_layers(first).values():
        layer.set_adapter("default")
    assert torch.equal(first(x()), before)
    qsvd.save_adapter(first, tmp_path, "second")
    assert_same_output(qsvd.load_adapter(stack(depth=2), tmp_path), second)


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    qsvd.save_adapter(trained(), tmp_path / "deep" / "er")
    qsvd.save_adapter(trained(), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {WEIGHTS, CONFIG, "tokenizer.json", "deep"}


def _edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        change(content)
        (folder / CONFIG).write_text(json.dumps(content))

    return edit


def _retensored(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return edit


FIRST = "base_model.model.layers.0.q_proj.lora_"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / WEIGHTS).unlink(), f"has no {WEIGHTS}; found []"),
        (
            lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
            "have to be unpickled are not read",
        ),
        (lambda f: (f / CONFIG).unlink(), f"has no {CONFIG}"),
        (lambda f: (f / CONFIG).write_text("{"), "is not JSON"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "or not all of it"),
        (lambda f: (f / WEIGHTS).write_bytes(b"\x80\x04K\x01."), "or not all of it"),
        (_edited(lambda c: c.update(peft_type="LORA")), "`peft_type` is 'LORA'"),
        (_edited(lambda c: c.update(target_modules=["k_proj"])), "no module is called 'k_proj'"),
        (
            _edited(lambda c: c.update(target_modules=["q_proj"])),
            "v_proj.lora_A` belongs to no layer",
        ),
        (_edited(lambda c: c.update(target_modules="all-linear", exclude_modules=[])), None),
        (
            _edited(lambda c: c.update(init_r=5)),
            "has 4 ranks at 'layers.0.q_proj.lora_E', and `init_r` is 5",
        ),
        (_edited(lambda c: c.update(rank_pattern=None)), "is (0, 64), expected (4, 64)"),
        (
            _edited(lambda c: c["rank_pattern"].pop("layers.0.q_proj.lora_E")),
            "`rank_pattern` lacks",
        ),
        (_edited(lambda c: c["rank_pattern"].update(x=[True])), "`rank_pattern` has 'x'"),
        (
            _edited(lambda c: c["rank_pattern"].update({"layers.0.q_proj.lora_E": "all"})),
            "list of booleans",
        ),
        (
            _edited(lambda c: c["rank_pattern"].update({"layers.0.q_proj.lora_E": [True] * 4})),
            "expected (4, 64)",
        ),
        (_retensored(lambda t: t.pop(FIRST + "E")), f"lacks `{FIRST}E`"),
        (
            _retensored(lambda t: t.update({"../../etc/lora_A": torch.zeros(1)})),
            "`../../etc/lora_A`",
        ),
        (
            _retensored(lambda t: t.update({FIRST + "Z": torch.zeros(1)})),
            f"`{FIRST}Z` belongs to no",
        ),
        (
            _retensored(lambda t: t.update({FIRST + "A": torch.zeros(0, 65)})),
            "is (0, 65), expected (0, 64)",
        ),
        (
            _retensored(lambda t: t.update({FIRST + "A": torch.zeros(0, 64, dtype=torch.int8)})),
            "torch.int8",
        ),
        (
            _retensored(
                lambda t: t["base_model.model.layers.1.v_proj.lora_B"].view(-1)[3].fill_(torch.nan)
            ),
            "v_proj.lora_B` holds a NaN",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_by_key_and_the_model_is_as_it_was(
    damage: Callable[[Path], object], message: str | None, tmp_path: Path
) -> None:
    qsvd.save_adapter(trained(), tmp_path)
    damage(tmp_path)
    model = stack(depth=2)
    before = described(model)
    if message is None:  # a change that fits
        qsvd.load_adapter(model, tmp_path)
        return

    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        qsvd.load_adapter(model, tmp_path)

    assert message in str(refused.value)
    assert described(model) == before


def test_a_model_that_is_not_adapted_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no layer of qsvd's"):
        qsvd.save_adapter(stack(), tmp_path)
    with pytest.raises(ValueError, match=r"No adapter 'x'\. Adapters: \['default'\]"):
        qsvd.save_adapter(trained(), tmp_path, "x")
    assert not list(tmp_path.iterdir())


# Two adapters, which differ in rank and in every value, saved in turn until it is killed.
SAVER = """
import sys, qsvd
from tests.qsvd.test_checkpoint import trained
models = [trained(init_r=2, target_r=1), trained(init_r=5, target_r=3)]
for number in range(10**6):
    qsvd.save_adapter(models[number % 2], sys.argv[1])
    print(number, flush=True)
"""


def test_a_killed_save_leaves_a_whole_pair(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()

        loaded = qsvd.load_adapter(stack(depth=2), tmp_path)

        ranks = sum(m.r["default"] for m in qsvd.adapted_layers(loaded).values())
        assert ranks in (4, 12)


@pytest.mark.parametrize("stop", range(5))
def test_each_moment_of_a_save_leaves_the_old_pair_or_the_new(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save is stopped after each of its steps in turn, as a kill would."""
    from qsvd import _files

    qsvd.save_adapter(trained(init_r=2, target_r=1), tmp_path)
    steps = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal steps
            if steps == stop:
                raise KeyboardInterrupt
            steps += 1
            return function(*args)

        return call

    monkeypatch.setattr(_files, "_write_through", counted(_files._write_through))
    monkeypatch.setattr(_files.os, "replace", counted(_files.os.replace))
    new = trained(init_r=5, target_r=3)
    if stop < 4:
        with pytest.raises(KeyboardInterrupt):
            qsvd.save_adapter(new, tmp_path)
    else:
        qsvd.save_adapter(new, tmp_path)

    loaded = qsvd.load_adapter(stack(depth=2), tmp_path)

    ranks = sum(m.r["default"] for m in qsvd.adapted_layers(loaded).values())
    assert ranks == (4 if stop < 3 else 12)
