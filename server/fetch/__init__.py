"""From the name in a request to an adapter on the local disk: what it means now, and its files, fetched once.

A name is looked up per request, so a moved channel takes effect at once; what a request was given is a digest and a
folder, so nothing moves under it. Outlives a hub that is down. Knows nothing of tokens and engines.
"""
