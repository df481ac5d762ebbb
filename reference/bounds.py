"""All error bounds, and the domain that they hold in, under one name."""

from reference.adapter_bounds import bound_gradients, bound_output
from reference.arithmetic import Arithmetic, Bounded
from reference.base_bounds import bound_base_dx, bound_base_output
from reference.domain import gradients_in_domain, in_domain

__all__ = [
    "Arithmetic",
    "Bounded",
    "bound_base_dx",
    "bound_base_output",
    "bound_gradients",
    "bound_output",
    "gradients_in_domain",
    "in_domain",
]
