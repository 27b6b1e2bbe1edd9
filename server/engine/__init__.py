"""The engine: continuous batching of many adapters on one base model.

Refuses to know HTTP, JSON and names: it takes token ids and digests, and gives events.
"""
