"""What can go: units of one kind in one layer. Attention heads; the registry says which other kinds there are."""

from microglia.units.head import HeadSite
from microglia.units.site import UNITS, Geometry, Site, find_sites

__all__ = ["UNITS", "Geometry", "HeadSite", "Site", "find_sites"]
