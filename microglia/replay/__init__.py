"""Decoding that is captured once per bucket and replayed: the mask is data, never shape.

On a GPU at small batch the time of a decode step goes into launching hundreds of small kernels, and every new shape
would have to be captured or compiled anew. So here the step's shapes come from a short ladder of levels, each captured
once over static buffers, and a new prompt only copies: its heads' weights into compact buffers, the keys and values of
a few heads into other places of the static cache.
"""

from microglia.replay.decoder import GraphDecoder, greedy
from microglia.replay.levels import Level, covering, ladder

__all__ = ["GraphDecoder", "Level", "covering", "greedy", "ladder"]
