"""The engines: who is there, in what state, how loaded. Tells the scheduler when that changes.

Each engine is watched by one task: it joins when it can be described, is polled while it serves,
and is tried again after it was lost. An engine's *epoch* is one incarnation of it: when it
restarts (its counters went backwards, or it was gone), it is lost and joins anew with a higher
one, because its KV is gone.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Iterator

from conserve_serving.core.events import (
    EngineDraining,
    EngineJoined,
    EngineLost,
    EngineReported,
    Event,
    StepTimes,
)
from conserve_serving.core.types import EngineId, Tier
from conserve_serving.engines.client import EngineClient
from conserve_serving.engines.client_types import EngineDescription, Occupancy, step_delta
from conserve_serving.engines.http_errors import ConnectFailed, EngineHttpError
from conserve_serving.gateway.config import GatewaySection, TierSection
from conserve_serving.gateway.energy import EnergyBook
from conserve_serving.gateway.engine import Engine, priors
from conserve_serving.gateway.errors import EngineUnfitError
from conserve_serving.gateway.observe import MixedSteps

_log = logging.getLogger("conserve.gateway.fleet")


class Fleet:
    """All engines.

    Args:
        settings: intervals and limits.
        emit: takes events for the scheduler.
        energy: told of engines that join or are lost, and of what they count.
        make_client: a client for an engine's URL.
        wall: wall seconds, monotonic.
        on_speed: told the cluster's speed factor when the first engine joins.
        hands_over: prefillers are there to hand KV over.
    """

    def __init__(
        self,
        settings: GatewaySection,
        *,
        emit: Callable[[Event], None],
        energy: EnergyBook,
        make_client: Callable[[str], EngineClient],
        wall: Callable[[], float],
        on_speed: Callable[[float], None],
        hands_over: bool,
    ) -> None:
        self._settings = settings
        self._hands_over = hands_over
        self._emit = emit
        self._energy = energy
        self._make_client = make_client
        self._wall = wall
        self._on_speed = on_speed
        self._engines: dict[str, Engine] = {}
        self._epochs: dict[str, int] = {}
        self.speed: float | None = None
        self._changed = asyncio.Event()

    # --- who is there ------------------------------------------------------------------------
    def __iter__(self) -> Iterator[Engine]:
        return iter(self._engines.values())

    def get(self, engine: str) -> Engine | None:
        """The engine of that id, whatever its state."""
        return self._engines.get(engine)

    def serving(self, tier: Tier | None = None) -> list[Engine]:
        """Engines that may be sent turns, of one tier or of all."""
        return [e for e in self if e.serving and (tier is None or e.tier is tier)]

    @property
    def model(self) -> str | None:
        """The model served here: the first engine's that joined and is still here."""
        for engine in self:
            if engine.description is not None and engine.state != "unfit":
                return engine.description.model
        return None

    @property
    def longest_context_tokens(self) -> int | None:
        """Longest context that any engine could hold; None while none has been described."""
        known = [e.description for e in self.serving() if e.description is not None]
        return max((min(d.max_context_tokens, d.kv_capacity_tokens) for d in known), default=None)

    async def wait_change(self) -> None:
        """Return after the next change of any engine's state."""
        await self._changed.wait()

    # --- coming and going --------------------------------------------------------------------
    def add(self, id: str, url: str, section: TierSection, *, gpus: tuple[str, ...] = ()) -> Engine:
        """Watch an engine from now on; one of the same id is replaced.

        Args:
            id: its id.
            url: ``http://host:port``.
            section: the tier it belongs to.
            gpus: GPUs of this machine it runs on, where that is known.

        Raises:
            ValueError: the URL is not of the form ``http://host:port``.
        """
        client = self._make_client(url)
        self.remove(id)
        engine = Engine(EngineId(id), url, section, client, gpus=gpus)
        self._engines[id] = engine
        engine.watcher = asyncio.create_task(self._watch(engine), name=f"watch {id}")
        return engine

    def remove(self, id: str) -> bool:
        """Forget an engine at once; its turns are placed anew. Returns whether it was known."""
        engine = self._engines.pop(id, None)
        if engine is None:
            return False
        self._lose(engine, "removed")
        self._energy.removed(engine)
        if engine.watcher is not None:
            engine.watcher.cancel()
        engine.client.close()
        return True

    def drain(self, id: str) -> bool:
        """Send an engine no new conversations. Returns whether it is known."""
        engine = self._engines.get(id)
        if engine is None:
            return False
        engine.drain_wanted = True
        if engine.state == "ready":
            self._set_state(engine, "draining")
            self._emit(EngineDraining(engine=engine.id, epoch=engine.epoch))
        return True

    async def suspect(self, engine: Engine) -> None:
        """Find out now whether the engine is alive, and how loaded.

        Returns when the scheduler has been told. Callers share one probe: two at once could
        read the counters in the wrong order.
        """
        if not engine.serving:
            return
        if engine.probe is None:
            engine.probe = asyncio.create_task(self._probe(engine), name=f"probe {engine.id}")
            engine.probe.add_done_callback(lambda _: setattr(engine, "probe", None))
        await asyncio.shield(engine.probe)

    async def refresh(self, *, timeout_s: float = 0.5) -> None:
        """Read loads, occupancy and energy of all serving engines now.

        Args:
            timeout_s: how long to wait for the slowest; what it would have said is left out.
        """
        probes = [self.suspect(engine) for engine in self.serving()]
        if probes:
            await asyncio.wait([asyncio.ensure_future(p) for p in probes], timeout=timeout_s)

    async def close(self) -> None:
        """Stop watching and close all connections."""
        tasks = [task for e in self for task in (e.watcher, e.probe) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for engine in self:
            engine.client.close()

    # --- watching ----------------------------------------------------------------------------
    async def _watch(self, engine: Engine) -> None:
        while True:
            await (self.suspect(engine) if engine.serving else self._try_join(engine))
            settings = self._settings
            await asyncio.sleep(
                settings.poll_interval_s if engine.serving else settings.health_interval_s
            )

    async def _try_join(self, engine: Engine) -> None:
        try:
            description = await engine.client.describe()
            loads = await engine.client.loads()
            occupancy = await engine.client.occupancy()
            self._check_fit(engine, description)
        except EngineUnfitError as error:
            self._refuse(engine, "unfit", str(error))
            return
        except EngineHttpError as error:
            self._refuse(engine, engine.state if engine.state != "unfit" else "joining", str(error))
            return
        engine.description = description
        engine.loads = loads
        engine.occupancy = occupancy
        engine.keeps_sessions = description.keeps_sessions
        engine.note = None
        engine.misses = 0
        self._take_extension(engine, description)
        self._join(engine, description)

    def _check_fit(self, engine: Engine, description: EngineDescription) -> None:
        wanted = engine.section.served_name
        if wanted is not None and wanted != description.model:
            raise EngineUnfitError(
                f"engine {engine.id} serves {description.model!r}, its tier says {wanted!r}: "
                "correct tiers.model or start the engine with --served-model-name"
            )
        if engine.tier is Tier.PREFILL and self._hands_over and description.cannot_acknowledge:
            raise EngineUnfitError(
                f"engine {engine.id} is a prefiller without our hand-off store: every first turn "
                "would wait for an acknowledgement in vain; start it with the store (docs: "
                "operations), or attach it as a decoder"
            )
        if engine.tier is Tier.PREFILL and description.handoff_role == "decode":
            raise EngineUnfitError(
                f"engine {engine.id} is a prefiller and its hand-off store only reads (role "
                "'decode'): start it with role 'prefill'"
            )
        for other in self:
            theirs = other.description
            if other is engine or theirs is None or not other.serving:
                continue
            if theirs.model != description.model:
                raise EngineUnfitError(
                    f"engine {engine.id} serves {description.model!r}, {other.id} "
                    f"{theirs.model!r}: one gateway serves one model"
                )
            if theirs.kv_layout != description.kv_layout:
                raise EngineUnfitError(
                    f"engine {engine.id} lays out KV as {description.kv_layout}, {other.id} as "
                    f"{theirs.kv_layout}: pages handed over would be read wrong; start both with "
                    "the same page size, data types and memory layout"
                )
        emulated = description.emulated
        speed = emulated.speed if emulated is not None else 1.0
        if self.speed is not None and speed != self.speed and self.serving():
            raise EngineUnfitError(
                f"engine {engine.id} runs at speed {speed:g}, the others at {self.speed:g}: "
                "one cluster has one clock"
            )

    def _join(self, engine: Engine, description: EngineDescription) -> None:
        emulated = description.emulated
        speed = emulated.speed if emulated is not None else 1.0
        if speed != self.speed:
            self.speed = speed
            self._on_speed(speed)
        engine.epoch = self._epochs.get(engine.id, 0) + 1
        self._epochs[engine.id] = engine.epoch
        speeds, link = priors(engine.section, description)
        host = engine.section.host_capacity_tokens
        if host is None:
            host = _room_to_park(description, engine.occupancy)
        engine.last_byte_s = self._wall()
        self._energy.joined(engine)
        self._set_state(engine, "ready")
        self._emit(
            EngineJoined(
                engine=engine.id,
                epoch=engine.epoch,
                tier=engine.tier,
                kv_capacity_tokens=description.kv_capacity_tokens,
                host_capacity_tokens=host,
                page_tokens=description.page_tokens,
                max_context_tokens=description.max_context_tokens,
                speeds=speeds,
                link=link,
                speeds_guessed=emulated is None and engine.section.profile is None,
            )
        )
        if engine.drain_wanted:
            self._set_state(engine, "draining")
            self._emit(EngineDraining(engine=engine.id, epoch=engine.epoch))

    def _refuse(self, engine: Engine, state: str, note: str) -> None:
        self._energy.away(engine)
        if engine.note != note:
            _log.warning("%s", note)
        engine.note = note
        if engine.state != state:
            self._set_state(engine, state)

    async def _probe(self, engine: Engine) -> None:
        """Read an engine's loads and occupancy; lose it when it is gone or has restarted."""
        epoch, asked_s = engine.epoch, self._energy.now_s()
        try:
            loads = await engine.client.loads()
            extension = await engine.client.extension() if engine.energy_j is not None else None
            occupancy = await engine.client.occupancy()
        except EngineHttpError as error:
            if engine.serving and engine.epoch == epoch:
                self._miss(engine, error)
            return
        if not engine.serving or engine.epoch != epoch:
            return
        engine.misses = 0
        engine.last_byte_s = self._wall()
        if extension is not None:
            engine.energy_j, engine.model_time_s = extension.energy_j, extension.model_time_s
        before, engine.loads, engine.occupancy = engine.loads, loads, occupancy
        delta = step_delta(before, loads) if before is not None else None
        if before is not None and delta is None:
            self._lose(engine, "its counters went backwards: it has restarted")
            return
        steps = None
        if delta is not None:
            self._energy.reported(engine, asked_s, delta, extension)
            mean_tokens = engine.take_mean_context_tokens()
            steps = dataclasses.replace(
                delta.times, decode_kv_tokens=int(delta.decode_batch_sum * mean_tokens)
            )
            if not mean_tokens:  # steps of others' requests: what they read is not known
                steps = dataclasses.replace(steps, decode_steps=0, decode_s=0.0)
        self._emit(
            EngineReported(
                engine=engine.id,
                epoch=engine.epoch,
                kv_held_tokens=occupancy.kv_held_tokens if occupancy is not None else None,
                running_requests=loads.running_requests,
                queued_requests=loads.waiting_requests,
                steps=self._with_mixed(engine, steps),
            )
        )

    def _with_mixed(self, engine: Engine, steps: StepTimes | None) -> StepTimes | None:
        mixed = engine.mixed.take()
        if mixed is None or steps is None or self.speed != 1.0:
            return steps  # an accelerated engine's gaps are mostly the wall clock's noise
        return dataclasses.replace(
            mixed,
            prefill_tokens=steps.prefill_tokens,
            prefill_s=steps.prefill_s,
            decode_steps=steps.decode_steps,
            decode_s=steps.decode_s,
            decode_kv_tokens=steps.decode_kv_tokens,
        )

    def _miss(self, engine: Engine, error: EngineHttpError) -> None:
        engine.misses += 1
        refused = isinstance(error, ConnectFailed) and isinstance(error.__cause__, OSError)
        limit = self._settings.health_failures
        silent_s = self._wall() - engine.last_byte_s
        # Slow is not dead: while its streams bring something, an engine may miss any number.
        if refused or (
            engine.misses >= limit and silent_s >= limit * self._settings.poll_interval_s
        ):
            self._lose(engine, str(error))

    def _lose(self, engine: Engine, why: str) -> None:
        if not engine.serving:
            return
        _log.warning("engine %s is lost: %s", engine.id, why)
        engine.note = why
        engine.occupancy = None
        engine.mixed = MixedSteps()
        self._energy.lost(engine)
        self._set_state(engine, "lost")
        self._emit(EngineLost(engine=engine.id, epoch=engine.epoch))

    def _take_extension(self, engine: Engine, description: EngineDescription) -> None:
        emulated = description.emulated
        if emulated is not None:
            engine.energy_j = emulated.energy_j
            engine.energy_source = emulated.energy_source
            engine.model_time_s = emulated.model_time_s

    def _set_state(self, engine: Engine, state: str) -> None:
        engine.state = state
        self._changed.set()
        self._changed = asyncio.Event()


def _room_to_park(description: EngineDescription, occupancy: Occupancy | None) -> int:
    """KV tokens of the host tier that parked conversations may take.

    SGLang writes through: what is on the device is in the host tier as well, so only what the
    host holds beyond a full device is room to park.
    """
    if description.emulated is not None:
        return description.emulated.host_capacity_tokens
    if occupancy is None or occupancy.host_total_tokens is None:
        return 0
    return max(0, occupancy.host_total_tokens - description.kv_capacity_tokens)
