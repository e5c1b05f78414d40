"""Pictures of a run as inline SVG. Colours are CSS classes, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Final

from conserve_serving.replay.records import ClusterSample, ConversationRecord

#: Engine colours there are in the stylesheet (classes e0 … ); more engines share them.
PALETTE: Final = 10

#: Up to this many conversations have a lane each in the timeline.
OWN_LANES: Final = 120

_WIDTH: Final = 1100.0
_LEFT: Final = 120.0
_RIGHT: Final = 12.0
_LANES_HEIGHT: Final = 900.0
_MAX_LANE: Final = 13.0
_MIN_LANE: Final = 0.9


def engine_classes(engines: Iterable[str]) -> dict[str, str]:
    """A colour class for each engine, in order of their names."""
    return {engine: f"e{i % PALETTE}" for i, engine in enumerate(sorted(set(engines)))}


def nice_ticks(high: float, count: int = 8) -> list[float]:
    """Round values from 0 up to ``high``, about ``count`` of them."""
    if not high > 0:
        return [0.0]
    raw = high / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [i * step for i in range(int(high / step + 1e-9) + 1)]


class _Axis:
    """Model seconds to horizontal positions."""

    def __init__(self, high_s: float, *, left: float, right: float) -> None:
        self.high_s = max(high_s, 1e-9)
        self._left = left
        self._scale = (right - left) / self.high_s

    def __call__(self, seconds: float) -> float:
        return self._left + seconds * self._scale

    def grid(self, top: float, bottom: float, unit: str = "s") -> str:
        """Vertical lines with their labels below."""
        parts = []
        for tick in nice_ticks(self.high_s):
            x = self(tick)
            parts.append(f'<path class="grid" d="M{x:.1f} {top:.1f}V{bottom:.1f}"/>')
            parts.append(
                f'<text class="tick mid" x="{x:.1f}" y="{bottom + 14:.1f}">{tick:g} {unit}</text>'
            )
        return "".join(parts)


def _svg(width: float, height: float, body: str, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:.1f}" role="img" '
        f'aria-label="{escape(label, quote=True)}">{body}</svg>'
    )


def timeline(
    conversations: Sequence[ConversationRecord], classes: dict[str, str], end_s: float
) -> str:
    """Conversations over time, coloured by engine.

    A pale bar is a turn from when it was due to its first token (wait, prefill, hand-off), in the
    colour of the engine that prefilled; a full bar its decode. A dark tick marks a first token
    whose KV had been handed over, a red one a turn that was retried or failed.

    Up to ``OWN_LANES`` conversations have a lane each, in order of arrival. More are grouped by
    the decoder they began on, and a lane is used again once its conversation has ended.
    """
    groups = lanes(conversations)
    count = sum(len(group) for _, group in groups)
    gap = 14.0 if len(groups) > 1 else 0.0
    lane = min(_MAX_LANE, max(_MIN_LANE, _LANES_HEIGHT / max(1, count)))
    axis = _Axis(end_s, left=_LEFT, right=_WIDTH - _RIGHT)
    bottom = 6 + lane * count + gap * (len(groups) - 1)
    body = [axis.grid(4, bottom)]
    top = 6.0
    for engine, group in groups:
        if engine is not None:
            body.append(
                f'<text class="tick end" x="{_LEFT - 6:g}" y="{top + lane * len(group) / 2:.1f}">'
                f"{escape(engine[-18:])}</text>"
            )
        for members in group:
            own = engine is None
            body += [_lane(r, classes, axis, top=top, lane=lane, label=own) for r in members]
            top += lane
        top += gap
    return _svg(_WIDTH, bottom + 20, "".join(body), "conversations over engines")


def lanes(
    conversations: Sequence[ConversationRecord],
) -> list[tuple[str | None, list[list[ConversationRecord]]]]:
    """Which conversations share a lane, as ``timeline`` says: groups of lanes of conversations.

    The group's name is its engine's, None where every conversation has a lane of its own.
    """
    ordered = sorted(conversations, key=lambda record: record.arrival_s)
    if len(ordered) <= OWN_LANES:
        return [(None, [[record] for record in ordered])]
    groups: dict[str, list[list[ConversationRecord]]] = {}
    for record in ordered:
        engine = next((t.decode_engine for t in record.turns if t.decode_engine), "no answer")
        group = groups.setdefault(engine, [])
        free = next((lane for lane in group if _end_s(lane[-1]) <= record.arrival_s), None)
        if free is None:
            group.append([record])
        else:
            free.append(record)
    return sorted(groups.items())


def _end_s(record: ConversationRecord) -> float:
    last = record.turns[-1]
    return last.due_s if last.last_token_s is None else last.last_token_s


def _lane(
    record: ConversationRecord,
    classes: dict[str, str],
    axis: _Axis,
    *,
    top: float,
    lane: float,
    label: bool,
) -> str:
    thick = lane * 0.78 if lane >= 3 else lane
    paths: dict[str, list[str]] = {}

    def bar(css: str, start_s: float, stop_s: float) -> None:
        x, width = axis(start_s), max(0.5, axis(stop_s) - axis(start_s))
        paths.setdefault(css, []).append(
            f"M{x:.1f} {top:.1f}h{width:.1f}v{thick:.1f}h-{width:.1f}z"
        )

    moved = 0
    for turn in record.turns:
        if turn.first_token_s is not None and turn.last_token_s is not None:
            prefiller = classes.get(turn.prefill_engine or turn.decode_engine or "", "none")
            bar(f"{prefiller} wait", turn.due_s, turn.first_token_s)
            bar(
                classes.get(turn.decode_engine or "", "none"), turn.first_token_s, turn.last_token_s
            )
            if (turn.transfers or 0) > moved:
                paths.setdefault("handoff", []).append(
                    f"M{axis(turn.first_token_s):.1f} {top:.1f}v{thick:.1f}"
                )
            moved = max(moved, turn.transfers or 0)
        if turn.retries or turn.error:
            at_s = turn.due_s if turn.first_token_s is None else turn.first_token_s
            paths.setdefault("bad", []).append(f"M{axis(at_s):.1f} {top:.1f}v{thick:.1f}")
    first = record.turns[0]
    middle = top + thick / 2
    name = escape(record.conversation.id)
    parts = [
        f"<g><title>{name}: {len(record.turns)} turns, arrived {record.arrival_s:.2f} s, "
        f"first input {first.turn.input_tokens} tokens</title>",
        f'<path class="base" d="M{axis(record.arrival_s):.1f} {middle:.1f}'
        f'H{axis(_end_s(record)):.1f}"/>',
    ]
    parts += [f'<path class="{css}" d="{"".join(d)}"/>' for css, d in paths.items()]
    if label and lane >= 9:
        short = (
            name
            if len(record.conversation.id) <= 20
            else "…" + escape(record.conversation.id[-19:])
        )
        parts.append(
            f'<text class="tick end" x="{_LEFT - 6:g}" y="{top + thick - 1.5:.1f}">{short}</text>'
        )
    parts.append("</g>")
    return "".join(parts)


def occupancy(samples: Sequence[ClusterSample], classes: dict[str, str], end_s: float) -> str:
    """KV held by each engine over time as a share of its capacity, one lane each.

    The line above the area adds what is parked in host memory, on the same scale.
    """
    engines = sorted({engine.id for sample in samples for engine in sample.cluster.engines})
    height, gap = 44.0, 16.0
    axis = _Axis(end_s, left=_LEFT, right=_WIDTH - _RIGHT)
    bottom = len(engines) * (height + gap)
    body = [axis.grid(4, bottom)]
    for number, name in enumerate(engines):
        floor = number * (height + gap) + height + 6
        points = []
        for sample in samples:
            engine = next((e for e in sample.cluster.engines if e.id == name), None)
            if engine is None or engine.kv_held_tokens is None or not engine.kv_capacity_tokens:
                continue
            held = engine.kv_held_tokens / engine.kv_capacity_tokens
            parked = (engine.parked_tokens or 0) / engine.kv_capacity_tokens
            points.append((axis(sample.at_s), held, parked))
        css = classes.get(name, "none")
        if points:
            body.append(_occupancy_lane(points, css, floor=floor, height=height))
        peak = max((held for _, held, _ in points), default=0.0)
        body.append(
            f'<text class="tick end" x="{_LEFT - 6:g}" y="{floor - height / 2:.1f}">'
            f"{escape(name[-18:])}</text>"
            f'<text class="tick end" x="{_LEFT - 6:g}" y="{floor - height / 2 + 13:.1f}">'
            f"peak {peak:.0%}</text>"
        )
    return _svg(_WIDTH, bottom + 20, "".join(body), "KV occupancy of each engine")


def _occupancy_lane(
    points: Sequence[tuple[float, float, float]], css: str, *, floor: float, height: float
) -> str:
    def y(share: float) -> float:
        return floor - min(1.15, share) * height

    area = "".join(f"L{x:.1f} {y(held):.1f}" for x, held, _ in points)
    start, stop = points[0][0], points[-1][0]
    parts = [
        f'<path class="grid" d="M{start:.1f} {floor:.1f}H{stop:.1f}M{start:.1f} '
        f'{floor - height:.1f}H{stop:.1f}"/>',
        f'<path class="{css} area" d="M{start:.1f} {floor:.1f}{area}L{stop:.1f} {floor:.1f}z"/>',
    ]
    if any(parked for _, _, parked in points):
        line = "L".join(f"{x:.1f} {y(held + parked):.1f}" for x, held, parked in points)
        parts.append(f'<path class="parked" d="M{line}"/>')
    return "".join(parts)


def cdf(values: Sequence[float], *, title: str, unit: str) -> str:
    """Share of conversations at or below a latency, with p50 and p95 marked."""
    width, height, left, top = 340.0, 190.0, 34.0, 24.0
    ordered = sorted(values)
    bottom = height - 24
    body = [f'<text class="caption" x="{left:g}" y="14">{escape(title)}</text>']
    if not ordered:
        body.append(f'<text class="tick" x="{left:g}" y="{height / 2:g}">no values</text>')
        return _svg(width, height, "".join(body), title)
    high = ordered[-1] or 1.0
    axis = _Axis(high, left=left, right=width - 14)

    def y(share: float) -> float:
        return bottom - share * (bottom - top)

    for share in (0.0, 0.5, 0.95, 1.0):
        label = f"{share:.0%}" if share != 0.95 else ""
        body.append(
            f'<path class="grid" d="M{left:g} {y(share):.1f}H{width - 14:g}"/>'
            f'<text class="tick end" x="{left - 4:g}" y="{y(share) + 4:.1f}">{label}</text>'
        )
    body += [
        f'<text class="tick mid" x="{axis(t):.1f}" y="{bottom + 15:.1f}">{t:g}{unit}</text>'
        for t in nice_ticks(high, 4)
    ]
    steps = [f"M{axis(0):.1f} {y(0):.1f}"]
    for number, value in enumerate(ordered, 1):
        steps.append(f"H{axis(value):.1f}V{y(number / len(ordered)):.1f}")
    body.append(f'<path class="curve" d="{"".join(steps)}"/>')
    return _svg(width, height, "".join(body), title)
