"""Conformance suite for AdaLoRA layers over bitsandbytes' quantised linears."""

__version__ = "0.1.0"
