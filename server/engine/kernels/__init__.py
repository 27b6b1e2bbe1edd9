"""The arithmetic of a step on packed rows: linear layers with adapters, paged attention. Knows no request and no
schedule."""
