"""The deterministic fault simulation: real cores of routers, nodes, engines, transfers and clients.

They run on a virtual clock and a virtual network, while everything that can break does, and invariants are
checked after each event.

See docs/fault-simulation.md.
"""
