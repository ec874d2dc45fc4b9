"""Between protobuf and plain values: the only place that translates. Decoders validate, and raise
`InvalidRequest` naming the field, never anything else."""
