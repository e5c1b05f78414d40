"""``gen_ai.conversation.id`` on the spans of the real OpenTelemetry SDK."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from conserve_agents import ConversationSpanProcessor, conversation, headers_for
from conserve_agents.openai import ConServeOpenAI
from conserve_agents.telemetry import CONVERSATION_ATTRIBUTE

sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="only in the development extra")


@pytest.fixture
def spans() -> Iterator[Any]:
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: PLC0415 - optional
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import (  # noqa: PLC0415 - same
        InMemorySpanExporter,
    )

    exporter = InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield (
        provider,
        lambda: {
            span.name: (span.attributes or {}).get(CONVERSATION_ATTRIBUTE)
            for span in exporter.get_finished_spans()
        },
    )
    provider.shutdown()


def test_the_span_around_a_model_call_is_marked(server: Any, spans: Any) -> None:
    provider, marks = spans
    tracer = provider.get_tracer("test")
    client = ConServeOpenAI(base_url=server.base_url)
    with tracer.start_as_current_span("agent"), conversation("c", end_on_exit=False):
        with tracer.start_as_current_span("chat m"):
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
        with tracer.start_as_current_span("execute_tool"):
            pass
    assert marks() == {"chat m": "c", "execute_tool": None, "agent": None}


def test_with_the_processor_every_span_of_a_conversation_is(spans: Any) -> None:
    provider, marks = spans
    provider.add_span_processor(ConversationSpanProcessor())
    tracer = provider.get_tracer("test")
    with tracer.start_as_current_span("outside"), conversation("c", end_on_exit=False):
        with tracer.start_as_current_span("tool"):
            pass
        with conversation("sub", end_on_exit=False), tracer.start_as_current_span("sub-agent"):
            pass
    assert marks() == {"tool": "c", "sub-agent": "sub", "outside": None}
    assert provider.force_flush()


def test_without_a_recording_span_nothing_happens() -> None:
    with conversation("c", end_on_exit=False):
        assert headers_for(messages="text")


def test_the_client_layer_imports_nothing_but_the_standard_library() -> None:
    program = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "import conserve_agents.report, conserve_agents.hooks\n"
        "from conserve_agents import conversation, headers_for\n"
        "with conversation('c', end_on_exit=False): headers_for('text')\n"
        "names = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(names - set(sys.stdlib_module_names)))\n"
    )
    done = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['conserve_agents']"
