"""Ports that ship with the suite."""
