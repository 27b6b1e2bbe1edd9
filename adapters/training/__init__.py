"""How an adapter is made: recipe, data, masks, the loop, and the folder that comes out.

Refuses to know hubs, servers and terminals; progress leaves through typed events.
"""
