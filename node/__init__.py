"""What prefill and decode nodes share: the lives of attempts, leases, the engine's thread, router links.

The pure parts are `events`, `attempt`, `core`, `effect_buffer`, `leases`, `outbox` and `backoff`; the rest
is the shell around them. Nothing here knows either role's rules: those are `PrefillNodeCore` and
`DecodeNodeCore`.
"""
