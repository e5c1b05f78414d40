"""What ConServe did for a run, in a few lines for people: turns, places, transfers, tokens, joules.

watch = Watch(gateway)                # notes what the engines have used so far
…                                     # run an agent
print(watch.text([talk.id]))          # while the gateway still knows the conversations
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from conserve_agents.errors import GatewayError, GatewayResponseError
from conserve_agents.gateway import Gateway

#: How long a conversation that has just been answered may take to show its last turn and what
#: energy that took.
SETTLE_S: Final = 2.0
_STEP_S: Final = 0.02


class Watch:
    """Watches a gateway from its making on.

    Args:
        gateway: whom to ask.
        sleep: replaces ``time.sleep``, for tests.

    Raises:
        GatewayError: it could not be asked.
    """

    def __init__(self, gateway: Gateway, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._gateway: Final = gateway
        self._sleep: Final = sleep
        self._energy_j, _ = _energy(gateway.cluster())

    def text(self, conversation_ids: Iterable[str]) -> str:
        """The report of these conversations, and the joules that all engines used meanwhile.

        Raises:
            GatewayError: the gateway could not be asked.
        """
        lines = [self._conversation(id_) for id_ in conversation_ids]
        now_j, source = _energy(self._gateway.cluster())
        if now_j is not None and self._energy_j is not None:
            used_j = max(0.0, now_j - self._energy_j)
            lines.append(f"energy: {used_j:.0f} J on all engines meanwhile, idle included{source}")
        return "\n".join(lines)

    def _conversation(self, id_: str) -> str:
        """One conversation, once its latest turn has been booked."""
        for _ in range(int(SETTLE_S / _STEP_S)):
            try:
                seen = self._gateway.conversation(id_)
            except GatewayResponseError as error:
                if error.status != 404:
                    raise
                return f"conversation {id_}: no call of it reached the gateway"
            if not seen.get("running_turns") and (seen.get("energy") or {}).get("settled", True):
                break
            self._sleep(_STEP_S)
        return summary(seen)


def summary(seen: Mapping[str, Any]) -> str:
    """What ConServe did with a conversation, from ``GET /conserve/v1/conversations/{id}``."""
    moved = ", ".join(f"{n} × {why}" for why, n in (seen.get("transfers_by_reason") or {}).items())
    prompt, cached = seen.get("prompt_tokens") or 0, seen.get("cached_tokens") or 0
    parent = seen.get("parent")
    lines = [
        f"conversation {seen.get('id')}: {seen.get('turns')} turns"
        + (f", started by {parent}" if parent else ""),
        f"  engines    prefill {seen.get('prefill_engine') or '(none)'}, decode {_decoders(seen)}",
        f"  transfers  {seen.get('transfers')}" + (f" ({moved})" if moved else ""),
        f"  tokens     {prompt} in prompts, {cached} of them cached "
        f"({cached / max(prompt, 1):.0%}), {seen.get('output_tokens')} generated",
    ]
    energy = seen.get("energy") or {}
    if energy.get("total_j") is not None:
        lines.append(
            f"  energy     {energy['total_j']:.1f} J (prefill {energy['prefill_j']:.1f}, "
            f"decode {energy['decode_j']:.1f}; {energy.get('source')})"
            + ("" if energy.get("settled") else ", more to come")
        )
    return "\n".join(lines)


def try_text(watch: Watch, conversation_ids: Iterable[str]) -> str:
    """:meth:`Watch.text`, or why there is none: an agent's answer must not be lost to it."""
    try:
        return watch.text(conversation_ids)
    except GatewayError as error:
        return f"(no report: {error})"


def _decoders(seen: Mapping[str, Any]) -> str:
    """The decoders of the turns that are remembered, in order, each once."""
    recent = [turn.get("decode_engine") for turn in seen.get("recent_turns") or ()]
    names = list(dict.fromkeys(name for name in [*recent, seen.get("decode_engine")] if name))
    return " → ".join(map(str, names)) or "(none)"


def _energy(cluster: Mapping[str, Any]) -> tuple[float | None, str]:
    """Joules of all engines that report any, and where the figure comes from."""
    engines = [engine for engine in cluster.get("engines") or () if isinstance(engine, dict)]
    known = [e["energy_j"] for e in engines if isinstance(e.get("energy_j"), int | float)]
    sources = sorted({str(e["energy_source"]) for e in engines if e.get("energy_source")})
    return (sum(known) if known else None), (f" ({'; '.join(sources)})" if sources else "")
