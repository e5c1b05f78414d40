"""Whose joules are whose, for the gateway: engines to boards, turns to what they are charged.

An engine's joules come from the first of these that there is: its own report (emulated engines),
the GPU boards it runs on, read with NVML, and its profile's power model over the busy times it
reports. Where there is none, there is no figure. What calculates is in
``conserve_serving.energy``; the rule is in docs/energy.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from conserve_serving.energy.groups import BoardGroup, Reading
from conserve_serving.energy.ledger import Account
from conserve_serving.energy.modelled import ModelledMeter, describe_source, phase_weights
from conserve_serving.energy.sampler import Sampler
from conserve_serving.energy.work import Kind, Steps, Tally, Work, equal_weights
from conserve_serving.engines.client_types import EmulatedExtension, StepDelta
from conserve_serving.engines.errors import ProfileError
from conserve_serving.engines.profile import HardwareProfile, load_profile
from conserve_serving.gateway.engine import Engine

_log = logging.getLogger("conserve.gateway.energy")


class _Metered:
    """One engine, and where its joules come from now."""

    def __init__(self, engine: Engine, at_s: float) -> None:
        self.tier = engine.tier.value
        self.gpus: tuple[str, ...] = ()
        self.profile: HardwareProfile | None = None
        self.account = Account(opened_s=at_s)
        self.group: BoardGroup | None = None
        self.boards: frozenset[str] = frozenset()
        #: Its own meter, where it has one: what it reports, or what is modelled for it.
        self.own: Reading | None = None
        self.modelled: ModelledMeter | None = None
        self.reported_s = at_s
        self.shared = False


class EnergyBook:
    """The joules of all engines.

    Args:
        clock: the engines' seconds.
        sampler: reads GPU boards; nothing is read until an engine has some.
    """

    def __init__(self, *, clock: Callable[[], float], sampler: Sampler) -> None:
        self._clock = clock
        self._sampler = sampler
        self._metered: dict[str, _Metered] = {}

    def close(self) -> None:
        """Stop reading."""
        self._sampler.stop()

    def now_s(self) -> float:
        """The engines' seconds: what its times are given in."""
        return self._clock()

    # --- engines -----------------------------------------------------------------------------
    def joined(self, engine: Engine) -> None:
        """An engine has joined, for the first time or anew."""
        now_s = self._clock()
        known = self._metered.setdefault(engine.id, _Metered(engine, now_s))
        known.tier, known.gpus, known.reported_s = engine.tier.value, engine.gpus, now_s
        known.profile = _profile(engine)
        power = known.profile.power if known.profile is not None else None
        known.account.weights = equal_weights if power is None else phase_weights(power)
        if engine.gpus:
            self._sampler.want(engine.gpus)
        self._find_boards(engine, known)
        if known.group is None:
            return
        known.group.up(engine.id, self._readings(known.group), now_s)
        emulated = engine.description.emulated if engine.description is not None else None
        if emulated is not None:  # it counts from zero, or has counted without us
            known.own = _own(emulated)
            known.group.rebase(_meter_of(engine.id), known.own)

    def lost(self, engine: Engine) -> None:
        """An engine is gone."""
        known = self._metered.get(engine.id)
        if known is not None and known.group is not None:
            known.group.down(engine.id, self._clock())

    def away(self, engine: Engine) -> None:
        """An engine is still gone: what its boards draw meanwhile is nobody's."""
        known = self._metered.get(engine.id)
        if known is not None and known.group is not None:
            known.group.away(self._readings(known.group), self._clock())

    def removed(self, engine: Engine) -> None:
        """An engine will not come back; what was booked to it stays."""
        known = self._metered.get(engine.id)
        if known is not None:
            self._leave(engine, known)
            known.gpus = ()

    def reported(
        self, engine: Engine, asked_s: float, delta: StepDelta, own: EmulatedExtension | None
    ) -> None:
        """An engine's counters came in.

        Args:
            engine: one that has joined.
            asked_s: when they were asked for.
            delta: what it did since it was asked before.
            own: an emulated engine's own figures.
        """
        known = self._metered[engine.id]
        self._find_boards(engine, known)
        group = known.group
        if group is None:
            return
        times = delta.times
        steps = Steps(
            prefill_tokens=times.prefill_tokens,
            prefill_s=times.prefill_s,
            decode_steps=times.decode_steps,
            decode_s=times.decode_s,
            decode_batch_sum=delta.decode_batch_sum,
        )
        if own is not None:
            known.own = _own(own)
        elif known.modelled is not None and known.profile is not None:
            known.modelled.add(steps, max(0.0, asked_s - known.reported_s))
            known.own = _modelled(known.modelled, known.profile, asked_s)
        known.reported_s = asked_s
        readings = self._readings(group)
        known.shared = any(r.shared for name, r in readings.items() if name in known.boards)
        group.report(engine.id, asked_s, steps, readings)

    # --- turns -------------------------------------------------------------------------------
    def begin(
        self, engine: Engine, tally: Tally, *, prefill_tokens: int, decodes: bool, streams: bool
    ) -> Work:
        """A request of a turn is sent to an engine; see `Work` for the arguments."""
        work = Work(
            tally,
            begin_s=self._clock(),
            prefill_tokens=prefill_tokens,
            decodes=decodes,
            streams=streams,
        )
        known = self._metered.get(engine.id)
        if known is None or known.group is None or known.shared:
            tally.miss(engine.id)
        if known is not None and known.group is not None:
            known.account.begin(work)
        return work

    # --- boards ------------------------------------------------------------------------------
    def _find_boards(self, engine: Engine, known: _Metered) -> None:
        """Put the engine into the group of the boards it runs on, as far as they are known."""
        boards = self._boards_of(engine, known)
        if boards.keys() == known.boards:
            return
        self._leave(engine, known)
        if not boards:
            return
        now_s = self._clock()
        known.boards = frozenset(boards)
        group = BoardGroup()
        for other in list(self._metered.values()):
            if other.group is not None and other.group.boards & known.boards:
                self._merge(other.group, group)
        group.add(engine.id, known.account, boards, at_s=now_s)
        known.group = group
        emulated = engine.description is not None and engine.description.emulated is not None
        if known.profile is not None and not emulated and _meter_of(engine.id) in boards:
            known.modelled = ModelledMeter(known.profile.power)
            known.own = _modelled(known.modelled, known.profile, now_s)
            group.rebase(_meter_of(engine.id), known.own)

    def _leave(self, engine: Engine, known: _Metered) -> None:
        if known.group is not None:
            known.account.abandon(self._clock())
            known.group.remove(engine.id)
        known.boards, known.group = frozenset(), None
        known.own = known.modelled = None
        known.shared = False

    def _merge(self, old: BoardGroup, into: BoardGroup) -> None:
        into.absorb(old)
        for other in self._metered.values():
            if other.group is old:
                other.group = into

    def _boards_of(self, engine: Engine, known: _Metered) -> dict[str, float | None]:
        """Its boards, or its own meter, with the idle watts believed of each."""
        power = known.profile.power if known.profile is not None else None
        whole_w = power.boards * power.idle_w if power is not None else None
        if engine.description is not None and engine.description.emulated is not None:
            return {_meter_of(engine.id): whole_w}
        snapshot = self._sampler.snapshot
        found = [snapshot.gpus[gpu] for gpu in engine.gpus if gpu in snapshot.gpus]
        if engine.gpus and len(found) == len(engine.gpus) and snapshot.failure is None:
            idle_w = power.idle_w if power is not None else None
            return {gpu.board: idle_w for gpu in found}
        unknown = snapshot.failure is not None or any(g in snapshot.notes for g in engine.gpus)
        if power is not None and (not engine.gpus or unknown):
            return {_meter_of(engine.id): whole_w}
        return {}

    def _readings(self, group: BoardGroup) -> dict[str, Reading]:
        snapshot = self._sampler.snapshot
        readings: dict[str, Reading] = {}
        for id_ in group.engines:
            known = self._metered[id_]
            if known.own is not None:
                readings[_meter_of(id_)] = known.own
            for board in known.boards & snapshot.boards.keys():
                read = snapshot.boards[board]
                source, shared = read.source, False
                if read.mig_devices is not None:
                    shared = not read.mig_devices <= self._our_mig_devices()
                    others = "shared with MIG devices of others" if shared else "MIG, all ours"
                    source = f"{source} of the whole board ({others})"
                readings[board] = Reading(
                    joules=read.joules, at_s=read.at_s, source=source, shared=shared
                )
        return readings

    def _our_mig_devices(self) -> set[str | None]:
        gpus = self._sampler.snapshot.gpus
        return {gpus[g].mig for known in self._metered.values() for g in known.gpus if g in gpus}

    # --- looking -----------------------------------------------------------------------------
    def booked(self) -> Iterator[tuple[str, str, Kind, str, float]]:
        """Engine, tier, kind, source and joules of everything that has been booked."""
        for id_, known in self._metered.items():
            for kind, source, joules in known.account.booked():
                yield id_, known.tier, kind, source, joules

    def describe(self, engine: Engine) -> dict[str, Any]:
        """An engine's joules as JSON: ``energy_j``, ``energy_source``, and what they were for.

        An emulated engine's ``energy_j`` is its own counter since its start; the parts count
        from when it joined.
        """
        known = self._metered.get(engine.id)
        note = self._note(engine, known)
        if known is None or (known.group is None and not known.account.total_j):
            return {"energy_j": None, "energy_source": None, "energy_note": note, "energy": None}
        account, group = known.account, known.group
        idle_w, measured = group.idle_w(engine.id) if group is not None else (None, False)
        return {
            "energy_j": engine.energy_j if engine.energy_j is not None else account.total_j,
            "energy_source": engine.energy_source or (group.source(engine.id) if group else None),
            "energy_note": note,
            "energy": {
                "total_j": account.total_j,
                "idle_j": account.joules(Kind.IDLE),
                "prefill_j": account.joules(Kind.PREFILL),
                "decode_j": account.joules(Kind.DECODE),
                "unattributed_j": account.joules(Kind.UNATTRIBUTED),
                "pending_j": account.pending_j,
                "idle_w": idle_w,
                "idle_w_measured": measured,
            },
        }

    def _note(self, engine: Engine, known: _Metered | None) -> str | None:
        """Why there is no figure, or not the one that was asked for."""
        snapshot = self._sampler.snapshot
        if engine.gpus and snapshot.failure is not None:
            return snapshot.failure
        notes = [snapshot.notes[gpu] for gpu in engine.gpus if gpu in snapshot.notes]
        if notes:
            return "; ".join(notes)
        if known is not None and known.group is None:
            return "being looked for" if engine.gpus else "no GPU and no profile is known of it"
        return None

    def check_invariants(self) -> None:
        """Whether every joule of every engine is somewhere.

        Raises:
            InvariantError: one is not.
        """
        for known in self._metered.values():
            known.account.check_invariants()


def _meter_of(engine: str) -> str:
    """The name of an engine's own meter, among the boards."""
    return f"engine:{engine}"


def _own(emulated: EmulatedExtension) -> Reading:
    return Reading(
        joules=emulated.energy_j,
        at_s=emulated.model_time_s,
        source=emulated.energy_source,
        by_the_clock=False,
    )


def _modelled(meter: ModelledMeter, profile: HardwareProfile, at_s: float) -> Reading:
    return Reading(
        joules=meter.joules, at_s=at_s, source=describe_source(profile), by_the_clock=False
    )


def _profile(engine: Engine) -> HardwareProfile | None:
    emulated = engine.description.emulated if engine.description is not None else None
    name = emulated.profile if emulated is not None else engine.section.profile
    if name is None:
        return None
    try:
        return load_profile(name)
    except ProfileError as error:  # an emulated engine of another version
        _log.warning("energy of engine %s: %s", engine.id, error)
        return None
