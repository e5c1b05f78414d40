"""A virtual-time driver of the scheduler core and the engine model: no sockets, no clock."""

from __future__ import annotations

from conserve_serving.simulator.cluster import SimulatedEngine, VirtualCluster
from conserve_serving.simulator.conversation import SimulatedConversation, SimulatedTurn, TurnResult
from conserve_serving.simulator.errors import ConservationError, DeadlockError, SimulationError
from conserve_serving.simulator.summary import EngineUse, RunSummary

__all__ = [
    "ConservationError",
    "DeadlockError",
    "EngineUse",
    "RunSummary",
    "SimulatedConversation",
    "SimulatedEngine",
    "SimulatedTurn",
    "SimulationError",
    "TurnResult",
    "VirtualCluster",
]
