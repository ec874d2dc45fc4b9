"""What every other part of kvrelay stands on: ids, errors, sampling parameters, KV layout, messages.

Nothing here imports asyncio, grpc, socket, time, torch or generated code.
"""
