"""Chorus: one frozen base model, thousands of LoRA adapters, one batch."""

__version__ = "0.1.0"
