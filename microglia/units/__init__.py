"""What can go: units of one kind in one layer. Heads, blocks of MLP channels, sublayers, and what they cost."""

from microglia.units.arrangement import BLOCK, Arrangement
from microglia.units.channel import ChannelGeometry, ChannelSite
from microglia.units.costs import StepCosts, UnitCosts
from microglia.units.head import HeadSite
from microglia.units.site import MOST_UNITS, UNITS, Geometry, ProjectedSite, Site, find_sites
from microglia.units.step import dense_weight_bytes, step_costs
from microglia.units.sublayer import SublayerGeometry, SublayerSite, gone, nested

UNITS.update(head=HeadSite, channel=ChannelSite, sublayer=SublayerSite)

__all__ = [
    "BLOCK",
    "MOST_UNITS",
    "UNITS",
    "Arrangement",
    "ChannelGeometry",
    "ChannelSite",
    "Geometry",
    "HeadSite",
    "ProjectedSite",
    "Site",
    "StepCosts",
    "SublayerGeometry",
    "SublayerSite",
    "UnitCosts",
    "dense_weight_bytes",
    "find_sites",
    "gone",
    "nested",
    "step_costs",
]
