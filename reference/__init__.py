"""What is true: the contract in NumPy, its gradients, its error bounds, and the quantisers."""

from reference.adapter import Adapter, AdapterGradients, backward, forward, output
from reference.blockwise import (
    NestedAbsmax,
    dequantize_4bit,
    dequantize_absmax,
    quantize_4bit,
    quantize_absmax,
)
from reference.bounds import (
    Arithmetic,
    Bounded,
    bound_base_dx,
    bound_base_output,
    bound_gradients,
    bound_output,
    gradients_in_domain,
    in_domain,
)
from reference.codebooks import codebook, dynamic_map, fp4, nf4
from reference.formats import FLOAT64, FORMATS, TF32, Format, round_to
from reference.int8 import (
    CPU_CONSTANT,
    CUDA_CONSTANT,
    TRUE_CONSTANT,
    QuantizedRows,
    backward_int8,
    dequantize_rows,
    linear_int8,
    linear_int8_train,
    outlier_columns,
    quantize_rows,
)

__all__ = [
    "CPU_CONSTANT",
    "CUDA_CONSTANT",
    "FLOAT64",
    "FORMATS",
    "TF32",
    "TRUE_CONSTANT",
    "Adapter",
    "AdapterGradients",
    "Arithmetic",
    "Bounded",
    "Format",
    "NestedAbsmax",
    "QuantizedRows",
    "backward",
    "backward_int8",
    "bound_base_dx",
    "bound_base_output",
    "bound_gradients",
    "bound_output",
    "codebook",
    "dequantize_4bit",
    "dequantize_absmax",
    "dequantize_rows",
    "dynamic_map",
    "forward",
    "fp4",
    "gradients_in_domain",
    "in_domain",
    "linear_int8",
    "linear_int8_train",
    "nf4",
    "outlier_columns",
    "output",
    "quantize_4bit",
    "quantize_absmax",
    "quantize_rows",
    "round_to",
]
