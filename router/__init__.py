"""The router: a pure core that decides, and a gRPC shell that performs. No torch, no GPU."""
