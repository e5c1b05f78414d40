"""What tagging costs a LangChain agent on each turn, by the length of its history.

Times, side by side in one process, what ``ChatOpenAI`` does to make a request's payload and what
``ChatConServe`` does to make the same with its tag; and the tag alone. Histories are an agent's:
tool calls with 4 kB of code as results. No request is sent.

    python benchmarks/client_tagging/chat_model.py [--kilobytes 20 200 1000] [--rounds 300]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.runnables.config import set_config_context
from langchain_openai import ChatOpenAI

from langchain_conserve import ChatConServe
from langchain_conserve.identity import Conversations, call_site

RESULT_BYTES = 4000
ADDRESS = "http://127.0.0.1:9/v1"  # nobody is asked


def history(kilobytes: int) -> list[BaseMessage]:
    """An agent's history of about that size."""
    messages: list[BaseMessage] = [SystemMessage("be brief " * 50), HumanMessage("fix the bug")]
    for number in range(kilobytes * 1000 // RESULT_BYTES):
        call = {"name": "read", "args": {"path": f"{number}.py"}, "id": f"c{number}"}
        code = f"    value_{number} = compute(value, {number})\n" * (RESULT_BYTES // 40)
        messages.append(AIMessage("", tool_calls=[{**call, "type": "tool_call"}]))  # type: ignore[list-item] # a ToolCall
        messages.append(ToolMessage(code[:RESULT_BYTES], tool_call_id=f"c{number}"))
    return messages


def median_us(rounds: int, work: Callable[[], object]) -> float:
    """Median time of a round in microseconds."""
    times_s = []
    for _ in range(rounds):
        since_s = time.perf_counter()
        work()
        times_s.append(time.perf_counter() - since_s)
    return statistics.median(times_s) * 1e6


def measure(kilobytes: int, rounds: int) -> str:
    """One row of the table."""
    messages, known = history(kilobytes), Conversations()
    stock: Any = ChatOpenAI(model="m", base_url=ADDRESS, api_key="k")  # type: ignore[arg-type] # SecretStr takes a str
    ours: Any = ChatConServe(model="m", base_url=ADDRESS)

    def tag() -> None:
        call: Any = known.begin(call_site(), messages, gateway=ADDRESS)
        call.conversation.headers_for(None)
        call.end()

    with set_config_context({"configurable": {"thread_id": "T"}}) as context:
        figures = [
            context.run(median_us, rounds, work)
            for work in (
                lambda: stock._get_request_payload(messages),
                lambda: ours._get_request_payload(messages),
                tag,
            )
        ]
    return "| {} kB | {} | {:.0f} | {:.0f} | {:.0f} |".format(kilobytes, len(messages), *figures)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Cost of tagging in LangChain.")
    parser.add_argument("--kilobytes", type=int, nargs="+", default=[20, 200, 1000])
    parser.add_argument("--rounds", type=int, default=300)
    options = parser.parse_args()
    print(
        "| history | messages | ChatOpenAI payload, µs | ChatConServe payload, µs | tag alone, µs |"
    )
    print("|---|---|---|---|---|")
    for kilobytes in options.kilobytes:
        print(measure(kilobytes, options.rounds))


if __name__ == "__main__":
    main()
