"""The gallery: every mutant, gathered from the files that hold one chapter's faults each."""

from __future__ import annotations

from tests.mutants import (
    adapter_faults,
    allocation_faults,
    backward_faults,
    boundary_faults,
    compilation_faults,
    corner_faults,
    dropout_faults,
    dtype_faults,
    forward_faults,
    gradient_faults,
    importance_faults,
    initialisation_faults,
    penalty_faults,
    scaling_faults,
    state_faults,
    surroundings_faults,
)
from tests.mutants.mutant import MUTANTS

CHAPTERS = (
    forward_faults,
    boundary_faults,
    corner_faults,
    gradient_faults,
    backward_faults,
    dropout_faults,
    scaling_faults,
    initialisation_faults,
    adapter_faults,
    dtype_faults,
    state_faults,
    compilation_faults,
    surroundings_faults,
    importance_faults,
    allocation_faults,
    penalty_faults,
)

__all__ = ["CHAPTERS", "MUTANTS"]
