"""Moving KV between nodes: handshake, flow control, verification, transports."""
