"""Which workers run a job, and whose turn it is. Pure: no IO, no clock, no chance. Who holds what: azu.planning."""

from coordinator.planning.routing import Route, find_route, stand_in
from coordinator.planning.stretch import cut_anew

__all__ = ["Route", "cut_anew", "find_route", "stand_in"]
