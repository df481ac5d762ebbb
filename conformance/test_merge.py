"""Chapter MERGE: adapters are not merged into quantised weights, and the refusal is a clean one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from conformance.case import DTYPES, Case
from conformance.spec import Kind, clause
from conformance.trial import Setup, Trial

# "Quantised weights", or which kind; "dequantise" alone is what to do and not yet why.
WHY = re.compile(r"(?<!de)(?<!de-)quanti[sz]|\b[48][- ]?bits?\b|\b(int8|nf4|fp4)\b", re.IGNORECASE)
# Words with which a way out can be told.
INSTEAD = re.compile(
    r"\b(instead|keep|leave|use|save|load|call|convert|first|beside|alongside|separate(ly)?"
    r"|unmerged|without merging)\b|de-?quanti[sz]",
    re.IGNORECASE,
)


def settings(kind: Kind) -> Iterable[Case]:
    """In train and eval mode, one adapter and two."""
    for dtype in DTYPES:
        for training in (True, False):
            yield Case(kind, dtype, 8, 5, (3,), (3, 2), bias=True, training=training)
    yield Case(kind, "float32", 8, 5, (3,), (3,))


def refusals(setup: Setup) -> dict[str, Callable[[], object]]:
    """Every way to ask for a merge, or for its undoing."""
    return {
        "merge()": setup.layer.merge,
        "merge(safe_merge=True)": lambda: setup.layer.merge(safe_merge=True),
        "unmerge()": setup.layer.unmerge,
    }


def check_refusal(trial: Trial, call: str) -> None:
    """The call raises, whether there is something to merge or not, with adapters on and off."""

    def body(case: Case) -> None:
        for values in (True, False):
            setup = trial.build(case, values=values)
            trial.assert_refuses(call, refusals(setup)[call], NotImplementedError)
            setup.layer.enable_adapters(False)
            off = f"{call} with adapters disabled"
            trial.assert_refuses(off, refusals(setup)[call], NotImplementedError)

    trial.check(body, settings(trial.kind))


@clause("MERGE-1")
def test_merge_is_refused(trial: Trial) -> None:
    check_refusal(trial, "merge()")


@clause("MERGE-2")
def test_unmerge_is_refused(trial: Trial) -> None:
    check_refusal(trial, "unmerge()")


@clause("MERGE-3")
def test_safe_merge_is_refused(trial: Trial) -> None:
    check_refusal(trial, "merge(safe_merge=True)")


@clause("MERGE-4")
def test_the_refusal_explains_itself(trial: Trial) -> None:
    def body(case: Case) -> None:
        for call, refused in refusals(trial.build(case)).items():
            said = str(trial.assert_refuses(call, refused, NotImplementedError))
            trial.assert_that(
                WHY.search(said) is not None,
                f"{call} does not say that the weights are quantised; it says {said!r}.",
            )
            trial.assert_that(
                INSTEAD.search(said) is not None,
                f"{call} does not say what to do instead; it says {said!r}.",
            )

    trial.check(body, [Case(trial.kind, ranks=(1, 2))])


def _state(setup: Setup) -> dict[str, torch.Tensor]:
    """Copies of all the tensors of the layer and of its base layer, by name."""
    tensors = {
        **{f"base_layer.{k}": v for k, v in setup.base.state_dict().items()},
        **{k: v for k, v in setup.layer.state_dict().items() if not k.startswith("base_layer.")},
    }
    return {k: v.detach().clone() for k, v in tensors.items() if isinstance(v, torch.Tensor)}


def _facts(setup: Setup) -> dict[str, object]:
    """What else a merge could leave behind: flags, names, numbers, and which objects there are."""
    layer = setup.layer
    return {
        "requires_grad": {n: p.requires_grad for n, p in layer.named_parameters()},
        "training": {n: m.training for n, m in layer.named_modules()},
        "merged": layer.merged,
        "merged_adapters": list(getattr(layer, "merged_adapters", [])),
        "active_adapters": list(layer.active_adapters),
        "disable_adapters": layer.disable_adapters,
        "scaling": dict(layer.scaling),
        "r": dict(layer.r),
        "lora_alpha": dict(layer.lora_alpha),
        "base_layer": id(layer.base_layer),
        "the base layer's weight": id(setup.base.weight),
        "parameters": {n: id(p) for n, p in layer.named_parameters()},
        "torch's random state": bytes(torch.get_rng_state().numpy()),
    }


@clause("MERGE-5")
def test_a_refusal_changes_nothing(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        y = setup.forward().detach().clone()
        state, facts = _state(setup), _facts(setup)
        for call, refused in refusals(setup).items():
            trial.assert_refuses(call, refused, NotImplementedError)
            for name, now in _facts(setup).items():
                trial.assert_that(now == facts[name], f"A refused {call} changes {name}.")
            after = _state(setup)
            trial.assert_that(
                set(after) == set(state),
                f"A refused {call} changes the keys of the state: {set(after) ^ set(state)}.",
            )
            for name, before in state.items():
                trial.assert_same_bits(
                    f"{name} after a refused {call}", after[name], before, same_dtype=True
                )
            trial.assert_same_bits(f"y after a refused {call}", setup.forward(), y)

    trial.check(body, settings(trial.kind))


@clause("MERGE-6")
def test_merged_is_false(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)

        def assert_unmerged(when: str) -> None:
            merged = setup.layer.merged
            trial.assert_that(merged is False, f"`merged` is {merged!r} {when}, expected False.")

        assert_unmerged("on a new layer")
        setup.forward()
        assert_unmerged("after a forward")
        for call, refused in refusals(setup).items():
            trial.assert_refuses(call, refused, NotImplementedError)
            assert_unmerged(f"after a refused {call}")
        setup.layer.enable_adapters(False)
        assert_unmerged("with adapters disabled")

    trial.check(body, [replace(case, bias=False) for case in settings(trial.kind)])
