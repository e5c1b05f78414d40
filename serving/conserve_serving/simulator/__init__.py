"""A virtual-time driver of the scheduler core and the engine model: no sockets, no clock."""

from __future__ import annotations

from conserve_serving.simulator.cluster import SimulatedEngine, VirtualCluster
from conserve_serving.simulator.conversation import SimulatedConversation, SimulatedTurn, TurnResult

__all__ = [
    "SimulatedConversation",
    "SimulatedEngine",
    "SimulatedTurn",
    "TurnResult",
    "VirtualCluster",
]
