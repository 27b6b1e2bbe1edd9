"""The inference server: OpenAI-compatible HTTP outside, one engine thread inside.

Refuses to know the hub's database; it asks the hub over HTTP through `loractl.hub.client`.
"""
