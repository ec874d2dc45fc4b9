"""Tensor parallelism: one process a rank, rank 0 in the node's own; all GPUs of one host."""
