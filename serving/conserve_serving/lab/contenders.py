"""What is compared: a policy, what it is told of the future, and how the tiers are used.

Every contender gets the same help, so that a difference is the policy's: host parking, tail turns
first, protection of open conversations' KV are the scheduler's and the engines', not a policy's.
Nothing is refused (:data:`PATIENCE`): a gateway refuses a turn that has waited a minute, and a
refused conversation would drop out of the latencies exactly where they are worst.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

from conserve_serving.core.policies import POLICIES
from conserve_serving.core.settings import SchedulerSettings
from conserve_serving.core.types import TierMode
from conserve_serving.lab.errors import LabError

#: Scheduler settings of every contender, before its own: no turn is refused, none expires, and KV
#: can be copied between engines.
PATIENCE: Final[dict[str, float | int]] = {
    "copies": True,
    "max_hold_s": 1e9,
    "no_engine_hold_s": 1e9,
    "max_waiting_turns": 10**9,
    "idle_timeout_s": 1e9,
}

#: Settings that may not be 0; the least of those that are counts.
_LEAST: Final = {"idle_timeout_s": 0, "max_attempts": 1, "review_interval_s": 0}

#: Predictors, and what each knows; ``lab/predictors.py`` makes them.
PREDICTORS: Final[dict[str, str]] = {
    "none": "nothing is foretold",
    "perfect": "the true output length of each turn",
    "realistic": "mean output at that turn index in the training half of the workload, with "
    "log-normal noise",
    "biased": "half the true output length, always",
    "oracle": "the true output length of each turn, and all KV the conversation will ever hold",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One side of a comparison.

    Attributes:
        label: how tables and plots call it.
        policy: a name of ``core.policies``.
        tier_mode: whether the prefill tier holds conversations, too; policies that host
            everywhere ignore it.
        predictor: one of :data:`PREDICTORS`.
        settings: scheduler settings that differ from the defaults and :data:`PATIENCE`.
    """

    label: str
    policy: str
    tier_mode: str = "dedicated"
    predictor: str = "none"
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse names that do not exist, saying which do."""
        for name, value, known in (
            ("predictor", self.predictor, list(PREDICTORS)),
            ("tier_mode", self.tier_mode, [str(mode) for mode in TierMode]),
        ):
            if value not in known:
                raise LabError(
                    f"contender {self.label!r}: {name} {value!r} is unknown. Use one of "
                    f"{', '.join(known)}."
                )
        known = [f.name for f in fields(SchedulerSettings)]
        for name in self.settings:
            if name not in known or name == "tier_mode":
                raise LabError(
                    f"contender {self.label!r}: there is no scheduler setting {name!r} to change "
                    f"here. There are: {', '.join(n for n in known if n != 'tier_mode')}."
                )
            _check(self.label, name, self.settings[name])

    def scheduler_settings(self) -> SchedulerSettings:
        """The settings its scheduler gets."""
        chosen: dict[str, Any] = {**PATIENCE, **self.settings}
        return SchedulerSettings(tier_mode=TierMode(self.tier_mode), **chosen)

    def check_policy(self) -> None:
        """Make sure that the policy exists.

        Raises:
            LabError: it does not; the message lists those there are.
        """
        if self.policy not in POLICIES:
            raise LabError(
                f"contender {self.label!r}: policy {self.policy!r} is unknown. Use one of "
                f"{', '.join(sorted(POLICIES))}."
            )


#: Label → (contender, one line that says what it is).
_TABLE: Final[tuple[tuple[Contender, str], ...]] = (
    (
        Contender(label="conserve", policy="conserve"),
        "the paper's: turn 1 on the prefill tier, one hand-off, then one decoder",
    ),
    (
        Contender(label="conserve-hosting", policy="conserve", tier_mode="hosting"),
        "the same, with a prefill tier that holds conversations, too",
    ),
    (
        Contender(label="conserve_plus", policy="conserve_plus", tier_mode="auto"),
        "ConServe with every mechanism that observation supports; the prefill tier holds "
        "conversations while that carries more",
    ),
    (
        Contender(label="conserve_plus-dedicated", policy="conserve_plus"),
        "the same, with a prefill tier that only prefills",
    ),
    (
        Contender(label="conserve_plus-hosting", policy="conserve_plus", tier_mode="hosting"),
        "the same, with a prefill tier that always holds conversations, too",
    ),
    (
        Contender(label="collocated", policy="collocated"),
        "every engine hosts: least KV, sticky, tail turns first, open KV protected",
    ),
    (
        Contender(label="collocated_override", policy="collocated_override"),
        "the same, and a conversation leaves an overloaded engine",
    ),
    (
        Contender(label="collocated_speed", policy="collocated_speed"),
        "every engine hosts, weighted by each engine's own speed",
    ),
    (
        Contender(label="collocated_speed_override", policy="collocated_speed_override"),
        "the same, and a conversation leaves an overloaded engine",
    ),
    (
        Contender(label="full_disaggregation", policy="full_disaggregation"),
        "every turn is prefilled on the prefill tier; decoders keep their cache",
    ),
    (
        Contender(label="per_turn-perfect", policy="per_turn", predictor="perfect"),
        "local or remote for each turn by estimated finish; outputs foreseen exactly",
    ),
    (
        Contender(label="per_turn-realistic", policy="per_turn", predictor="realistic"),
        "the same with what a predictor can know",
    ),
    (
        Contender(label="per_turn-biased", policy="per_turn", predictor="biased"),
        "the same with outputs foretold at half their length",
    ),
    (
        Contender(label="per_turn-5-wrong", policy="per_turn_5_wrong", predictor="perfect"),
        "per turn, 5 % of the decisions turned round",
    ),
    (
        Contender(label="per_turn-10-wrong", policy="per_turn_10_wrong", predictor="perfect"),
        "per turn, 10 % of the decisions turned round: the paper's baseline",
    ),
    (
        Contender(label="per_turn-50-wrong", policy="per_turn_50_wrong", predictor="perfect"),
        "per turn, half of the decisions turned round",
    ),
    (
        Contender(label="per_turn-greedy", policy="per_turn_greedy", predictor="perfect"),
        "per turn by the turn's own finish alone, whatever its neighbours lose",
    ),
    (
        Contender(
            label="per_turn-greedy-10-wrong",
            policy="per_turn_greedy_10_wrong",
            predictor="perfect",
        ),
        "the same with 10 % of the decisions turned round",
    ),
    (
        Contender(label="ppd", policy="ppd"),
        "appends go to decoder or prefiller by SLO weights (PPD-like)",
    ),
    (
        Contender(label="deflection", policy="deflection"),
        "decoders take first turns while the prefill queue is long",
    ),
    (
        Contender(label="round_robin", policy="round_robin"),
        "each turn to the next engine, wherever its KV is",
    ),
    (
        Contender(label="least_loaded", policy="least_loaded"),
        "each turn to the engine with the least work, wherever its KV is",
    ),
    (
        Contender(label="oracle", policy="oracle", predictor="oracle"),
        "a bound: reserves each conversation's future KV, which nobody can know",
    ),
)

CONTENDERS: Final[dict[str, Contender]] = {entry.label: entry for entry, _ in _TABLE}
ABOUT: Final[dict[str, str]] = {entry.label: about for entry, about in _TABLE}


def contender(name: str) -> Contender:
    """A contender by its label, or a policy's name with variations: ``POLICY[:PART…]``.

    Each part is a predictor (``perfect``), a tier mode (``hosting``) or a scheduler setting
    (``headroom=0.5``).

    Raises:
        LabError: there is no such contender, policy or part.
    """
    if name in CONTENDERS:
        found = CONTENDERS[name]
        found.check_policy()
        return found
    base, *parts = name.split(":")
    start = CONTENDERS.get(base) or Contender(label=base, policy=base)
    if base not in CONTENDERS and base not in POLICIES:
        raise LabError(
            f"no contender {base!r}. There are: {', '.join(available())}; and any policy with "
            "variations, as in conserve:hosting or per_turn:biased."
        )
    changed: dict[str, Any] = {"settings": dict(start.settings)}
    for part in parts:
        key, equals, value = part.partition("=")
        if equals:
            changed["settings"][key] = _number(name, key, value)
        elif part in PREDICTORS:
            changed["predictor"] = part
        elif part in list(TierMode):
            changed["tier_mode"] = part
        else:
            raise LabError(
                f"contender {name!r}: {part!r} is neither a predictor "
                f"({', '.join(PREDICTORS)}), a tier mode ({', '.join(TierMode)}) nor "
                "SETTING=NUMBER."
            )
    made = Contender(**{**asdict(start), "label": name, **changed})
    made.check_policy()
    return made


def available() -> list[str]:
    """Labels of the contenders whose policy exists."""
    return [label for label, entry in CONTENDERS.items() if entry.policy in POLICIES]


def _check(label: str, name: str, value: Any) -> None:
    """Refuse what the gateway's configuration refuses of a setting, too."""
    default = getattr(SchedulerSettings(), name)
    if isinstance(default, bool):
        wanted, fits = "0 or 1", value in (0, 1)
    elif default is None or isinstance(default, int):
        least = _LEAST.get(name, 0)
        wanted = f"a whole number of {least} or more"
        fits = value is default or (isinstance(value, int) and value >= least)
    elif name in _LEAST:
        wanted, fits = "a number above 0", 0 < value < math.inf
    else:
        wanted, fits = "a number of 0 or more", 0 <= value < math.inf
    if not fits:
        raise LabError(f"contender {label!r}: {name} is {value}. Give {wanted}.")


def _number(name: str, key: str, value: str) -> float | int:
    try:
        number = float(value)
    except ValueError:
        raise LabError(f"contender {name!r}: {key} is {value!r}, which is no number.") from None
    return int(number) if number.is_integer() else number
