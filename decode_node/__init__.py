"""The decode node: receives prompts' KV from prefill nodes and draws every token after the first."""
