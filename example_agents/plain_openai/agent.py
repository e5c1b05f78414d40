"""An agent without a framework: the OpenAI SDK, async and streamed, and a few tools about dates.

conserve up                                                     # in another terminal
python example_agents/plain_openai/agent.py "How many days between 2026-01-01 and 2026-03-01?"
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from datetime import UTC, date, datetime, timedelta
from typing import Any

import openai

from conserve_agents import Gateway, GatewayError, conversation
from conserve_agents.openai import AsyncConServeOpenAI  # stock: from openai import AsyncOpenAI
from conserve_agents.report import Watch, try_text

PROMPT = "Answer questions about dates. Work every date and duration out with your tools."
QUESTIONS = (
    "How many days are between the dates 2026-01-01 and 2026-03-01?",
    "Which weekday is the date 2026-03-01?",
)
MAX_CALLS = 8  # of the model, for one question


def today() -> str:
    """Get the date of today."""
    return datetime.now(UTC).date().isoformat()


def days_between(first_date: str, second_date: str) -> str:
    """Count the days between two dates."""
    return str((date.fromisoformat(second_date) - date.fromisoformat(first_date)).days)


def weekday(of_date: str) -> str:
    """Tell the weekday of a date."""
    return f"{date.fromisoformat(of_date):%A}"


def add_days(to_date: str, days: int) -> str:
    """Add a number of days to a date."""
    return (date.fromisoformat(to_date) + timedelta(days=days)).isoformat()


_DATE = {"type": "string", "description": "as YYYY-MM-DD"}
TOOLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "today": (today, {}),
    "days_between": (days_between, {"first_date": _DATE, "second_date": _DATE}),
    "weekday": (weekday, {"of_date": _DATE}),
    "add_days": (add_days, {"to_date": _DATE, "days": {"type": "integer"}}),
}
SCHEMAS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": tool.__doc__,
            "strict": True,  # the SDK's streaming helper wants it of every tool
            "parameters": {
                "type": "object",
                "properties": parameters,
                "required": list(parameters),
                "additionalProperties": False,
            },
        },
    }
    for name, (tool, parameters) in TOOLS.items()
]


def run_tool(name: str, arguments: str) -> str:
    """Run a tool call as a model has made it; what is wrong with it becomes its result."""
    try:
        return str(TOOLS[name][0](**json.loads(arguments or "{}")))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        return f"error: {error!r}"


async def answer(
    client: AsyncConServeOpenAI, model: str, messages: list[Any], *, show: bool
) -> str:
    """The model's answer to ``messages``, after as many tool calls as it takes.

    Args:
        messages: the history; grows by what is said.
        show: print the text as it comes.
    """
    for _ in range(MAX_CALLS):
        async with client.chat.completions.stream(
            model=model, messages=messages, tools=SCHEMAS
        ) as stream:
            async for event in stream:
                if show and event.type == "content.delta":
                    print(event.delta, end="", flush=True)
            message = (await stream.get_final_completion()).choices[0].message
        messages.append(message.model_dump(exclude_none=True, exclude={"parsed"}))
        for call in message.tool_calls or ():
            result = run_tool(call.function.name, call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        if not message.tool_calls:
            return message.content or ""
    return f"No answer after {MAX_CALLS} calls."


async def ask_in_turn(client: AsyncConServeOpenAI, model: str, questions: list[str]) -> list[str]:
    """All questions in one conversation; returns its id."""
    messages: list[Any] = [{"role": "system", "content": PROMPT}]
    async with conversation(end_on_exit=False) as talk:
        for question in questions:
            print(f"> {question}")
            messages.append({"role": "user", "content": question})
            await answer(client, model, messages, show=True)
            print("\n")
    return [talk.id]


async def ask_together(client: AsyncConServeOpenAI, model: str, questions: list[str]) -> list[str]:
    """Each question in a conversation of its own, all at once; returns their ids."""

    async def ask(question: str) -> str:
        messages: list[Any] = [
            {"role": "system", "content": PROMPT},
            {"role": "user", "content": question},
        ]
        async with conversation(end_on_exit=False) as talk:
            text = await answer(client, model, messages, show=False)
        print(f"> {question}\n{text}\n")
        return talk.id

    return list(await asyncio.gather(*(ask(question) for question in questions)))


async def run(gateway: Gateway, model: str, questions: list[str], *, together: bool) -> None:
    """Ask, report, and end what was begun."""
    watch = Watch(gateway)
    async with AsyncConServeOpenAI(base_url=f"{gateway.root}/v1") as client:
        ask = ask_together if together else ask_in_turn
        ids = await ask(client, model, questions)
    print(try_text(watch, ids))
    for id_ in ids:
        gateway.end_conversation(id_)


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Ask questions about dates.")
    parser.add_argument("questions", nargs="*", default=list(QUESTIONS))
    parser.add_argument("--together", action="store_true", help="each in its own conversation")
    parser.add_argument("--gateway", help="default: CONSERVE_BASE_URL, else 127.0.0.1:8000")
    parser.add_argument("--model", help="default: the first one the gateway serves")
    options = parser.parse_args(argv)
    try:
        gateway = Gateway(options.gateway)
        model = options.model or gateway.models()[0]
        asyncio.run(run(gateway, model, options.questions, together=options.together))
    except GatewayError as error:
        print(f"{error}\nStart one with: conserve up", file=sys.stderr)
        return 1
    except openai.OpenAIError as error:
        print(f"The model could not be asked: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
