"""Tool calls in a model's text: found while it streams (`hermes`, `llama`), asked for by the prompt
(`prompt`), and forced where the caller wants one (`forced`). Pure."""
