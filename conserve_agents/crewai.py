"""CrewAI: its OpenAI models tagged through the interceptor it offers (needs ``crewai``).

LLM(model="openai/…", base_url="http://127.0.0.1:8000/v1", interceptor=ConServeInterceptor())
"""

from __future__ import annotations

from typing import Any

from conserve_agents.hooks import HttpTagger

try:
    from crewai.llms.hooks.base import BaseInterceptor
except ImportError as error:
    raise ImportError("conserve_agents.crewai needs CrewAI: pip install crewai") from error


class ConServeInterceptor(HttpTagger, BaseInterceptor):  # type: ignore[misc] # no types here
    """Tags a CrewAI model's calls with the current conversation; see :class:`HttpTagger`."""

    def on_outbound(self, message: Any) -> Any:
        """Called by CrewAI with each ``httpx.Request``."""
        self.tag(message)
        return message

    def on_inbound(self, message: Any) -> Any:
        """Called by CrewAI with each ``httpx.Response``."""
        self.observe(message)
        return message

    async def aon_outbound(self, message: Any) -> Any:
        """The same for its async client."""
        return self.on_outbound(message)

    async def aon_inbound(self, message: Any) -> Any:
        """The same for its async client."""
        return self.on_inbound(message)
