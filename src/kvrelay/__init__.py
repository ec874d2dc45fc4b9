"""kvrelay: split LLM prefill and decode across machines."""

__version__ = "0.1.0"
