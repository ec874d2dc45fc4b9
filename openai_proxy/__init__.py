"""The OpenAI HTTP API over a kvrelay cluster. It knows routers only through the client library, and keeps
no state: run as many as you like.

`config` (what it may be told), `schema/` (what callers may send), `sampling` (from OpenAI's words to ours),
`chat`, `completions`, `responses` (the three ways to ask), `event_stream` (server-sent events),
`tool_calls/` (calls in a model's text), `errors`, `access` (keys and their limits), `app`, `main`.
"""
