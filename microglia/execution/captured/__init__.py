"""Decoding that is captured once per bucket and replayed: the mask is data, never shape.

On a GPU at small batch the time of a decode step goes into launching hundreds of small kernels, and every new shape
would have to be captured or compiled anew. So here the step's shapes come from a few buckets, each captured once over
static buffers, and a new prompt only copies: its heads' weights into compact buffers, the keys and values of a few
heads into other slots of the static cache.
"""

from microglia.execution.captured.captured import Captured
from microglia.execution.captured.step import CapturedStep

__all__ = ["Captured", "CapturedStep"]
