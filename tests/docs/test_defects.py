"""The scripts of docs/defects still show their defect, and stop showing it when it is repaired.

Run as a program, this file is its own runner: it executes the scripts in one process and prints
JSON, because importing torch, bitsandbytes and PEFT once costs seconds and fifty times minutes.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import re
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

DEFECTS = Path(__file__).resolve().parents[2] / "docs" / "defects"
SCRIPTS = sorted(path.stem for path in DEFECTS.glob("*.py"))
PINNED = {"torch": "2.13.0", "bitsandbytes": "0.50.2", "peft": "0.21.2"}
CONFIRMED, NOT_REPRODUCED, NOT_APPLICABLE = 0, 1, 2
CRASHED = -1

Outcome = tuple[int, str]  # exit code, output


def execute(script: str) -> Outcome:
    """Run one script in this process; a script that raises is `CRASHED`, with its traceback."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            runpy.run_path(str(DEFECTS / f"{script}.py"), run_name="__main__")
        except SystemExit as stop:
            return int(stop.code or 0), output.getvalue()
        except Exception:
            traceback.print_exc()
            return CRASHED, output.getvalue()
    return CRASHED, output.getvalue() + "the script ended without an exit code"


def refuse_merges() -> contextlib.AbstractContextManager[object]:
    """PEFT's layers explain why they do not merge."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("the base is quantised; keep the adapter beside it")

    return mock.patch.multiple(BaseTunerLayer, merge=refuse, unmerge=refuse)


def compute_the_contract() -> contextlib.AbstractContextManager[object]:
    """Both forwards compute the contract in fp32 and return the base layer's dtype."""
    import torch
    from peft.tuners.adalora.bnb import SVDLinear4bit, SVDLinear8bitLt

    def forward(self: Any, x: Any) -> Any:
        y = self.base_layer(x)
        with torch.autocast(x.device.type, enabled=False):
            for name in dict.fromkeys(self.active_adapters):
                A, E, B = (p[name].float() for p in (self.lora_A, self.lora_E, self.lora_B))
                c = self.scaling[name] / (self.ranknum[name].float() + 1e-5)
                y = y + (self.lora_dropout[name](x).float() @ (A * E * c).T @ B.T).to(y.dtype)
        return y

    patches = contextlib.ExitStack()  # undone when the caller leaves it
    for layer_class in (SVDLinear8bitLt, SVDLinear4bit):
        patches.enter_context(mock.patch.object(layer_class, "forward", forward))
    return patches


def keep_adapters_fp32() -> contextlib.AbstractContextManager[object]:
    """Adapter parameters are not cast to the base layer's compute_dtype."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    method = "_move_adapter_to_device_of_base_layer"
    return mock.patch.object(BaseTunerLayer, method, return_value=None)


def never_repack() -> contextlib.AbstractContextManager[object]:
    """Linear4bit keeps its weight as it is in eval mode."""
    import bitsandbytes.nn.modules

    return mock.patch.object(bitsandbytes.nn.modules, "has_avx512bf16", return_value=False)


def regularise_in_training_only() -> contextlib.AbstractContextManager[object]:
    """The orthogonal term is added in training mode only."""
    from peft.tuners.adalora.model import AdaLoraModel

    original = AdaLoraModel.forward

    def forward(self: Any, *args: object, **kwargs: object) -> Any:
        return original(self, *args, **kwargs) if self.training else self.model(*args, **kwargs)

    return mock.patch.object(AdaLoraModel, "forward", forward)


def call_the_tuner() -> contextlib.AbstractContextManager[object]:
    """PeftModel calls AdaLoraModel, with or without a task_type."""
    from peft import PeftModel

    return mock.patch.object(PeftModel, "get_base_model", lambda self: self.base_model)


def set_the_mode_of_new_dropouts() -> contextlib.AbstractContextManager[object]:
    """update_layer puts its dropout into the layer's mode."""
    from peft.tuners.adalora.layer import AdaLoraLayer

    original = AdaLoraLayer.update_layer

    def update_layer(self: Any, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)
        self.lora_dropout.train(self.training)

    return mock.patch.object(AdaLoraLayer, "update_layer", update_layer)


def cut_names_off_the_end() -> contextlib.AbstractContextManager[object]:
    """A pruned adapter is saved by the exact names of its parameters."""
    from peft.tuners.adalora.model import AdaLoraModel
    from peft.tuners.tuners_utils import BaseTuner

    def select(model: Any, config: Any, adapter_name: str, **given: Any) -> Any:
        ours = BaseTuner._get_adapter_state_dict.__func__
        selected = ours(AdaLoraModel, model, config, adapter_name, **given)
        for key, keep in config.rank_pattern.items():
            for part in ("lora_A", "lora_E", "lora_B"):
                module = key.removesuffix(f".lora_E.{adapter_name}")
                full = f"base_model.model.{module}.{part}.{adapter_name}"
                rows = selected[full].T if part == "lora_B" else selected[full]
                selected[full] = rows[keep].T if part == "lora_B" else rows[keep]
        return selected

    return mock.patch.object(AdaLoraModel, "_get_adapter_state_dict", select)


def average_finite_gradients_in_fp32() -> contextlib.AbstractContextManager[object]:
    """The allocator computes in fp32, takes a missing gradient for 0 and leaves infinite ones out."""
    import torch
    from peft.tuners.adalora.layer import RankAllocator

    def update_ipt(self: Any, model: Any) -> None:
        for name, p in model.named_parameters():
            if "lora_" not in name:
                continue
            zeros = torch.zeros_like(p, dtype=torch.float32)
            mean, spread = self.exp_avg_ipt.get(name, zeros), self.exp_avg_unc.get(name, zeros)
            new = zeros if p.grad is None else (p.detach().float() * p.grad.float()).abs()
            if new.isfinite().all():
                mean = torch.lerp(new, mean, self.beta1)
                spread = torch.lerp((new - mean).abs(), spread, self.beta2)
            self.ipt[name], self.exp_avg_ipt[name], self.exp_avg_unc[name] = new, mean, spread

    return mock.patch.object(RankAllocator, "update_ipt", update_ipt)


Repair = Callable[[], contextlib.AbstractContextManager[object]]
REPAIRS: dict[Repair, list[str]] = {
    refuse_merges: ["peft_merge_refuses_without_a_message"],
    compute_the_contract: [
        "peft_4bit_adapter_order_changes_the_result",
        "peft_4bit_half_underflows_its_singular_values",
        "peft_8bit_crashes_after_half",
        "peft_8bit_returns_float32_for_half_inputs",
        "peft_cpu_autocast_is_not_recognised",
        "peft_fp16_overflows_before_it_scales",
        "peft_fp16_underflows_before_it_scales",
        "peft_set_adapter_counts_a_repeated_name_twice",
    ],
    keep_adapters_fp32: [
        "peft_4bit_adapter_order_changes_the_result",
        "peft_4bit_adapter_parameters_take_compute_dtype",
        "peft_4bit_later_adapter_takes_the_first_inputs_dtype",
        "peft_4bit_ranknum_becomes_trainable",
        "peft_dense_half_base_trains_ranknum",
    ],
    regularise_in_training_only: [
        "peft_inference_model_rejects_labels",
        "peft_orthogonal_term_stays_in_eval",
    ],
    call_the_tuner: ["peft_orthogonal_term_needs_a_task_type"],
    set_the_mode_of_new_dropouts: ["peft_adapter_added_in_eval_mode_drops"],
    cut_names_off_the_end: ["peft_adapter_names_break_saving"],
    average_finite_gradients_in_fp32: [
        "peft_allocator_crashes_without_a_gradient",
        "peft_allocator_never_forgets_an_overflow",
        "peft_allocator_scores_underflow_in_fp16",
    ],
    never_repack: [
        "bitsandbytes_packed_eval_computes_in_bfloat16",
        "bitsandbytes_packed_eval_dequantizes_to_garbage",
        "bitsandbytes_packed_eval_loses_the_gradient",
        "bitsandbytes_packed_eval_misreads_transposed_inputs",
        "bitsandbytes_packed_eval_wants_multiples",
        "bitsandbytes_packed_state_dict_is_corrupted",
        "peft_4bit_one_eval_forward_kills_later_training",
        "peft_4bit_state_dict_is_corrupted_after_eval",
    ],
}
REPAIRED = [(repair.__name__, script) for repair, scripts in REPAIRS.items() for script in scripts]


def main() -> None:
    """Print {"as installed": {script: outcome}, repair: {script: outcome}, ...} as JSON."""
    outcomes = {"as installed": {script: execute(script) for script in SCRIPTS}}
    for repair, scripts in REPAIRS.items():
        with repair():
            outcomes[repair.__name__] = {script: execute(script) for script in scripts}
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
    sys.exit(0)


import pytest  # noqa: E402  the runner above needs no test framework


def installed() -> dict[str, str]:
    """Versions that are here of what is pinned, without a local part such as `+cpu`."""
    versions = {}
    for package in PINNED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package).partition("+")[0]
    return versions


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, Outcome]]:
    """What every script did, as installed and under each repair, from one process."""
    if installed() != PINNED:
        pytest.skip(f"the list was made with {PINNED}, here is {installed()}")
    command = [sys.executable, __file__]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    result: dict[str, dict[str, Outcome]] = json.loads(run.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_defect_is_present(outcomes: dict[str, dict[str, Outcome]], script: str) -> None:
    """
    Each script still sees its defect, or says that this CPU cannot show it.
    """
    code, output = outcomes["as installed"][script]

    assert code in (CONFIRMED, NOT_APPLICABLE), output
    assert ("REPRODUCED" in output.split("\n")) == (code == CONFIRMED), output


@pytest.mark.parametrize(("repair", "script"), REPAIRED)
def test_a_repaired_library_is_not_blamed(
    outcomes: dict[str, dict[str, Outcome]], repair: str, script: str
) -> None:
    """
    A script reports NOT REPRODUCED once the library is patched.
    """
    code, output = outcomes[repair][script]

    assert code in (NOT_REPRODUCED, NOT_APPLICABLE), output
    assert code == NOT_APPLICABLE or "\nNOT REPRODUCED\n" in output, output


def test_the_table_lists_every_script_once() -> None:
    """
    README.md has one row for each script, and no row for a script that does not exist.
    """
    rows = re.findall(r"^\|.*\]\((\w+)\.py\)", (DEFECTS / "README.md").read_text(), re.MULTILINE)

    assert sorted(rows) == SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_stands_alone(script: str) -> None:
    """
    A script imports the libraries it accuses, and nothing of this repository.
    """
    source = (DEFECTS / f"{script}.py").read_text()

    assert not re.search(r"^\s*(from|import) (qsvd|reference|conformance|tests)\b", source, re.M)
