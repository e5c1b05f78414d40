"""The live view of `conserve up`: asks the gateway, draws, until stopped.

On a terminal it redraws in place; elsewhere (a pipe, a log file) it prints a plain line when
something has changed, at most one per interval.
"""

from __future__ import annotations

import asyncio
import datetime
from collections import deque
from collections.abc import Awaitable, Callable

from rich.console import Console
from rich.live import Live

from conserve_serving.cli import render
from conserve_serving.cli.errors import GatewayAnsweredError, GatewayUnreachableError
from conserve_serving.cli.gateway_http import ClusterStatus, ConversationStatus, GatewayHttp

REFRESH_S = 0.5
PLAIN_INTERVAL_S = 10.0
#: Latest conversations asked for: some of them have ended and are not shown.
LOOKED_AT = 50


def local_now() -> datetime.datetime:
    """Wall-clock time in the machine's own zone."""
    return datetime.datetime.now().astimezone()


class Reporter:
    """Shows what a cluster does, in place on a terminal and line by line elsewhere.

    Args:
        console: where to write.
        live: redraw in place.
        now: wall-clock time, for the time at the start of a line.
    """

    def __init__(
        self,
        console: Console,
        *,
        live: bool,
        now: Callable[[], datetime.datetime] = local_now,
    ) -> None:
        self.live = live
        self._console = console
        self._now = now
        self._notices: deque[str] = deque(maxlen=render.NOTICES_SHOWN)
        self._drawn = False

    def say(self, text: str) -> None:
        """Print a line, before or after the view."""
        # One line stays one line in a pipe, whatever its width; nothing in it is markup.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def notify(self, message: str) -> None:
        """Tell something that happened; the live view shows the latest of these."""
        stamped = f"{self._now():%H:%M:%S} {message}"
        self._notices.append(stamped)
        if not self._drawn:
            self.say(stamped)

    async def run(
        self, gateway: GatewayHttp, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        """Show the cluster until cancelled.

        Args:
            gateway: the gateway to ask.
            sleep: waits between two looks.
        """
        if self.live:
            await self._run_live(gateway, sleep)
        else:
            await self._run_plain(gateway, sleep)

    async def _run_live(
        self, gateway: GatewayHttp, sleep: Callable[[float], Awaitable[None]]
    ) -> None:
        cluster: ClusterStatus | None = None
        conversations: list[ConversationStatus] = []
        self._drawn = True
        try:
            with Live(console=self._console, auto_refresh=False) as live:
                while True:
                    problem = None
                    try:
                        cluster = await asyncio.to_thread(gateway.cluster)
                        latest = await asyncio.to_thread(
                            gateway.conversations, limit=LOOKED_AT, everybody=True
                        )
                        conversations = [c for c in latest if c.state == "open"]
                    except (GatewayUnreachableError, GatewayAnsweredError) as failure:
                        problem = failure.what
                    view = render.screen(
                        cluster,
                        conversations,
                        url=gateway.url,
                        problem=problem,
                        notices=tuple(self._notices),
                        height=self._console.height,
                    )
                    live.update(view, refresh=True)
                    await sleep(REFRESH_S)
        finally:
            self._drawn = False

    async def _run_plain(
        self, gateway: GatewayHttp, sleep: Callable[[float], Awaitable[None]]
    ) -> None:
        last = ""
        while True:
            try:
                now = render.line(await asyncio.to_thread(gateway.cluster))
            except (GatewayUnreachableError, GatewayAnsweredError) as failure:
                now = f"status not current: {failure.what}"
            if now != last:
                self.say(f"{self._now():%H:%M:%S} {now}")
                last = now
            await sleep(PLAIN_INTERVAL_S)
