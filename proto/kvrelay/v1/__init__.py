"""Generated from proto/kvrelay/v1/*.proto by `make proto`; not edited by hand."""
