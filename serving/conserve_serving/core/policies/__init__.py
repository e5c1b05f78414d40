"""Policies by name. To add one: write its file, name it here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from conserve_serving.core.errors import UnknownPolicyError
from conserve_serving.core.policies.collocated import Collocated
from conserve_serving.core.policies.conserve import ConServe
from conserve_serving.core.policies.conserve_plus import ConServePlus
from conserve_serving.core.policies.disaggregated import (
    Deflection,
    FullDisaggregation,
    PerTurn,
    Ppd,
)
from conserve_serving.core.policies.oracle import Oracle
from conserve_serving.core.policies.round_robin import LeastLoaded, RoundRobin
from conserve_serving.core.settings import SchedulerSettings
from conserve_serving.core.views import Policy

POLICIES: Final[dict[str, Callable[[SchedulerSettings], Policy]]] = {
    "conserve": ConServe,
    "conserve_plus": ConServePlus,
    "collocated": lambda _: Collocated(),
    "collocated_override": lambda _: Collocated(override=True),
    "collocated_speed": lambda _: Collocated(by_speed=True),
    "collocated_speed_override": lambda _: Collocated(by_speed=True, override=True),
    "full_disaggregation": lambda _: FullDisaggregation(),
    "per_turn": lambda _: PerTurn(),
    "per_turn_5_wrong": lambda _: PerTurn(wrong_share=0.05),
    "per_turn_10_wrong": lambda _: PerTurn(wrong_share=0.1),
    "per_turn_50_wrong": lambda _: PerTurn(wrong_share=0.5),
    "per_turn_greedy": lambda _: PerTurn(greedy=True),
    "per_turn_greedy_10_wrong": lambda _: PerTurn(greedy=True, wrong_share=0.1),
    "ppd": lambda _: Ppd(),
    "deflection": lambda _: Deflection(),
    "round_robin": lambda _: RoundRobin(),
    "least_loaded": lambda _: LeastLoaded(),
    "oracle": lambda _: Oracle(),
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


__all__ = ["POLICIES", "make_policy"]
