"""The scheduler core: events in, decisions out. Pure: no I/O, no clock, no randomness."""

from __future__ import annotations

from conserve_serving.core.policies import make_policy
from conserve_serving.core.scheduler import Scheduler
from conserve_serving.core.settings import SchedulerSettings

__all__ = ["Scheduler", "SchedulerSettings", "make_policy"]
