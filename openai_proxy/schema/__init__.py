"""What callers may send, as pydantic models: the served OpenAPI document comes from them.

A field that is not here is refused by name. ``null`` stands for a field that was left out.
"""
