"""The prefill node: computes prompts' KV, pushes it to decode nodes, and draws the first token."""
