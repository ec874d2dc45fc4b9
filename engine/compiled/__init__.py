"""What torch has no quick CPU kernel for, compiled by numba, which is imported nowhere else.

Each kernel is a C function ``void(int64_t *arguments)``, run by torch's own OpenMP team. Its arguments are
sizes, strides (in elements) and addresses. Each item of its work, a row or one KV head of a row, is computed
by one thread in an order that depends on nothing but that item: its result is the same bits whatever else is
in the batch, and however many threads there are.
"""
