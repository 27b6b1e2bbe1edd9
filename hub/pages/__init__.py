"""The hub for people with a browser: lists, adapters, comparisons. Reads only, and refuses to know the protocols."""
