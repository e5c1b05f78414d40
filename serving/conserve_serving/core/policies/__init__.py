"""Policies by name. To add one: write its file, name it here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from conserve_serving.core.errors import UnknownPolicyError
from conserve_serving.core.policies.collocated import Collocated
from conserve_serving.core.policies.conserve import ConServe
from conserve_serving.core.policies.round_robin import RoundRobin
from conserve_serving.core.settings import SchedulerSettings
from conserve_serving.core.views import Policy

POLICIES: Final[dict[str, Callable[[SchedulerSettings], Policy]]] = {
    "conserve": ConServe,
    "collocated": lambda _: Collocated(),
    "round_robin": lambda _: RoundRobin(),
}


def make_policy(name: str, settings: SchedulerSettings) -> Policy:
    """The policy of that name.

    Raises:
        UnknownPolicyError: no such policy; the message lists those there are.
    """
    try:
        make = POLICIES[name]
    except KeyError:
        known = ", ".join(sorted(POLICIES))
        raise UnknownPolicyError(f"policy {name!r} is unknown: use one of {known}") from None
    return make(settings)


__all__ = ["POLICIES", "Collocated", "ConServe", "RoundRobin", "make_policy"]
