"""KV on its way out of an engine, to the hand-off store."""

from __future__ import annotations

from conserve_serving.engines.links import SerialLink
from conserve_serving.engines.model_desk import EPSILON_S
from conserve_serving.engines.model_types import ModelEvent, PagesStored
from conserve_serving.engines.profile import HardwareProfile


class Egress:
    """The link out of one engine and what is on it: one transfer at a time, in order."""

    __slots__ = ("_link", "_pending", "_profile")

    def __init__(self, profile: HardwareProfile) -> None:
        """Args: whose hand-off times the transfers take."""
        self._profile = profile
        self._link = SerialLink()
        self._pending: list[PagesStored] = []  # in order of at_s: the link is serial

    @property
    def busy_s(self) -> float:
        """Seconds of all transfers, those that wait included."""
        return self._link.busy_s

    def send(self, rid: str, *, known_tokens: int, end_tokens: int, now_s: float) -> int:
        """Append the transfer after which ``end_tokens`` leading tokens of a prompt are there.

        Args:
            rid: what ``PagesStored`` is to call it.
            known_tokens: leading tokens that need not be sent.
            end_tokens: of the prompt.
            now_s: model time.

        Returns:
            Tokens that cross the link for it.
        """
        new_tokens = max(end_tokens - known_tokens, 0)
        done_s = self._link.reserve(now_s, self._profile.handoff_s(new_tokens))
        self._pending.append(
            PagesStored(
                rid=rid,
                at_s=done_s,
                tokens=end_tokens,
                duration_s=done_s - now_s,
                sent_tokens=new_tokens,
            )
        )
        return new_tokens

    def next_s(self) -> float | None:
        """When the transfer under way will be over; None: the link is idle."""
        return self._pending[0].at_s if self._pending else None

    def drain(self, now_s: float, events: list[ModelEvent]) -> None:
        """Tell in ``events`` of the transfers that are over by ``now_s``."""
        pending = self._pending
        if not pending:
            return
        done = 0
        while done < len(pending) and pending[done].at_s <= now_s + EPSILON_S:
            done += 1
        if done:
            events += pending[:done]
            del pending[:done]
