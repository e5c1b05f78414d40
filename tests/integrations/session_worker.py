"""Agents that many tests' conversations run as; a file of its own, so that processes can import it.

Each says its own conversation's name in every prompt, so that what arrives shows whether its tag
is the right one.
"""

from __future__ import annotations

import asyncio
from typing import Any

from conserve_agents import conversation, current_conversation
from conserve_agents.openai import AsyncConServeOpenAI, ConServeOpenAI

TURNS = 3
#: Address and served model.
Where = tuple[str, str]


def ask(client: ConServeOpenAI, model: str, name: str, turn: int) -> None:
    """One turn of the current conversation; the prompt says which it ought to be."""
    messages: Any = [{"role": "user", "content": f"{name} turn {turn}"}]
    client.chat.completions.create(model=model, messages=messages)


async def aask(client: AsyncConServeOpenAI, model: str, name: str, turn: int) -> None:
    """The same, async."""
    messages: Any = [{"role": "user", "content": f"{name} turn {turn}"}]
    await client.chat.completions.create(model=model, messages=messages)


def run_agent(client: ConServeOpenAI, model: str, name: str) -> None:
    """A conversation in this thread."""
    with conversation(name, end_on_exit=False):
        for turn in range(1, TURNS + 1):
            ask(client, model, name, turn)


async def run_async_agent(client: AsyncConServeOpenAI, model: str, name: str) -> None:
    """A conversation in this task, which lets others run between its turns."""
    async with conversation(name, end_on_exit=False):
        for turn in range(1, TURNS + 1):
            await aask(client, model, name, turn)
            await asyncio.sleep(0)


def go_on(where: Where, name: str) -> str:
    """In another process: the later turns of the conversation that was handed over."""
    talk = current_conversation()
    assert talk is not None
    base_url, model = where
    with ConServeOpenAI(base_url=base_url) as client:
        for turn in range(2, TURNS + 1):
            ask(client, model, name, turn)
    return talk.id


async def run_tasks(where: Where, names: list[str]) -> None:
    """Conversations of tasks."""
    base_url, model = where
    async with AsyncConServeOpenAI(base_url=base_url) as client:
        await asyncio.gather(*(run_async_agent(client, model, name) for name in names))


def run_many(where: Where, names: list[str]) -> None:
    """In another process: conversations of its own, in tasks."""
    asyncio.run(run_tasks(where, names))
