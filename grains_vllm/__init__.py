"""Steering vectors as a feature of stock vLLM: the plugin, the artifact and the shift."""

__version__ = "0.1.0"
