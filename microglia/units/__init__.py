"""What can go: units of one kind in one layer. Attention heads; the registry says which other kinds there are."""

from microglia.units.head import HeadSite
from microglia.units.site import MOST_UNITS, UNITS, Geometry, Site, find_sites

__all__ = ["MOST_UNITS", "UNITS", "Geometry", "HeadSite", "Site", "find_sites"]
