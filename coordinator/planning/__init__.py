"""Which workers run a job, and whose turn it is. Pure: no IO, no clock, no chance. Who holds what: azu.planning."""

from coordinator.planning.routing import Route, find_route, stand_in

__all__ = ["Route", "find_route", "stand_in"]
