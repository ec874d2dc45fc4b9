"""What a node runs: the `Engine` protocol, the paged-KV `torch` engine and the model-free `sim` engine."""
