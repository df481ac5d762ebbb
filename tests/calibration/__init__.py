"""How near honest implementations come to the bounds: `python -m tests.calibration`."""
