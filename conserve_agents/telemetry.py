"""OpenTelemetry: ``gen_ai.conversation.id`` on spans, where an application uses OpenTelemetry.

Nothing to do for the spans that are current when a model call is made: they get it by themselves.
For every span of a conversation, tools and sub-agents included, add the processor:

    provider.add_span_processor(ConversationSpanProcessor())

Nothing here imports OpenTelemetry before somebody else has, or asks for the processor.
"""

from __future__ import annotations

import sys
from typing import Any, Final

from conserve_agents.context import current_conversation

#: OpenTelemetry's semantic conventions for generative AI, attribute registry.
CONVERSATION_ATTRIBUTE: Final = "gen_ai.conversation.id"


def mark_span(conversation_id: str) -> None:
    """Put the conversation's id on the current span, if there is one that is recorded."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return
    # A module that is half imported has nothing yet: no span can have been started either.
    get_current_span = getattr(trace, "get_current_span", None)
    if get_current_span is not None:
        span = get_current_span()
        if span.is_recording():
            span.set_attribute(CONVERSATION_ATTRIBUTE, conversation_id)


class ConversationSpanProcessor:
    """Marks every span that is started in a conversation; an OpenTelemetry ``SpanProcessor``.

    It has the interface without the base class, so that this module needs no dependency.
    """

    def on_start(self, span: Any, parent_context: Any = None) -> None:  # noqa: ARG002 - interface
        """Called by OpenTelemetry in the context that starts the span."""
        current = current_conversation()
        if current is not None:
            span.set_attribute(CONVERSATION_ATTRIBUTE, current.id)

    def _on_ending(self, span: Any) -> None:
        """Called before a span ends; newer SDKs expect it of every processor."""

    def on_end(self, span: Any) -> None:
        """Nothing is left to do when a span has ended."""

    def shutdown(self) -> None:
        """Nothing is held."""

    def force_flush(self, timeout_millis: int = 30_000) -> bool:  # noqa: ARG002 - interface
        """Nothing is buffered."""
        return True
