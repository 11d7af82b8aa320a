"""Who should hold which layers: the plan for a model's workers, out of what they say. Pure: no IO, no clock, no chance.

Coordinators give out what it says; a worker whose coordinators are silent does its own part of it.
"""

from azu.planning.coverage import holes, uncovered
from azu.planning.placement import place, place_in_steps
from azu.planning.snapshot import (
    DIRECT,
    RELAYED,
    Demand,
    Link,
    Links,
    ModelShape,
    Placement,
    Range,
    WorkerView,
    layered,
)
from azu.planning.views import links_of, network_of, shape_of, views_for

__all__ = [
    "DIRECT",
    "RELAYED",
    "Demand",
    "Link",
    "Links",
    "ModelShape",
    "Placement",
    "Range",
    "WorkerView",
    "holes",
    "layered",
    "links_of",
    "network_of",
    "place",
    "place_in_steps",
    "shape_of",
    "uncovered",
    "views_for",
]
