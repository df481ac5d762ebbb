"""bitsandbytes: a packed eval forward of an empty batch kills the process with SIGFPE."""

import signal
import subprocess
import sys

PROBE = """
import bitsandbytes as bnb, sys, torch
if not bnb.functional.has_avx512bf16():
    sys.exit(2)
layer = bnb.nn.Linear4bit(128, 64, bias=False).to("cpu").eval()
layer(torch.randn(2, 128))
print(tuple(layer(torch.randn(0, 128)).shape))
"""
run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
if run.returncode == 2:
    print("NOT APPLICABLE here: the CPU has no AVX512-BF16, so the layer is not repacked")
    sys.exit(2)

observed = f"exit {run.returncode}, output {run.stdout.strip()!r}"
expected = "exit 0, output '(0, 64)'"
present = run.returncode == -signal.SIGFPE

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)
