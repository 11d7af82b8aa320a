"""Deciding who holds which layers, which workers run a job, and whose turn it is. Pure: no IO, no clock, no chance."""

from coordinator.planning.coverage import holes, uncovered
from coordinator.planning.placement import place
from coordinator.planning.routing import Route, find_route, stand_in
from coordinator.planning.snapshot import (
    DIRECT,
    RELAYED,
    Demand,
    Link,
    Links,
    ModelShape,
    Placement,
    WorkerView,
    layered,
)

__all__ = [
    "DIRECT",
    "RELAYED",
    "Demand",
    "Link",
    "Links",
    "ModelShape",
    "Placement",
    "Route",
    "WorkerView",
    "find_route",
    "holes",
    "layered",
    "place",
    "stand_in",
    "uncovered",
]
