"""Decoder-only transformer models: configuration, weights from safetensors, forward pass."""
