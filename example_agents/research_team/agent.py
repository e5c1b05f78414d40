"""A lead and its researchers, side by side: one conversation each, linked to who started them.

conserve up                                                     # in another terminal
python example_agents/research_team/agent.py 'Compare "prefill", "hand-off" and "parking".'
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import uuid
from pathlib import Path
from typing import Any

from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langgraph.errors import GraphRecursionError
from notes import note_tools, outline, read_notes

from conserve_agents import Gateway, GatewayError
from conserve_agents.report import Watch, try_text
from langchain_conserve import ChatConServe, ConversationMiddleware

NOTES = Path(__file__).parents[2] / "docs"
LEAD = (
    "You lead a team of researchers. Split the question into topics, have all of them researched "
    "at once with the research tool, then answer from what your researchers report."
)
RESEARCHER = (
    "You research one topic in a folder of notes. Search the notes, read the one that says most, "
    "and report what it says in a few sentences. Say so when the notes say nothing. The notes:\n"
)
MAX_STEPS = 40


def team(llm: ChatConServe, notes: dict[str, str]) -> Any:
    """The lead agent. Its thread is one conversation, each researcher's work another, its child.

    The middleware adds what only the agents know: a researcher that has reported is over, and its
    KV cache is freed while the lead still works.
    """
    signals = ConversationMiddleware()
    researcher = create_agent(
        llm,
        note_tools(notes),
        system_prompt=RESEARCHER + outline(notes),
        middleware=[signals],
        name="researcher",
    )

    @tool
    async def research(topic: str) -> str:
        """Have one topic researched. Call it once for each topic, for all topics at once."""
        question = HumanMessage(f'What do the notes say about "{topic}"?')
        state = await researcher.ainvoke({"messages": [question]})
        return str(state["messages"][-1].text)

    return create_agent(llm, [research], system_prompt=LEAD, middleware=[signals], name="lead")


async def answer(question: str, notes: dict[str, str], llm: ChatConServe, thread_id: str) -> str:
    """Ask the team."""
    state = await team(llm, notes).ainvoke(
        {"messages": [HumanMessage(question)]},
        {"configurable": {"thread_id": thread_id}, "recursion_limit": MAX_STEPS},
    )
    return str(state["messages"][-1].text)


def conversations_of(gateway: Gateway, thread_id: str) -> list[str]:
    """Ids of the lead's conversation and of its researchers', in the order they began."""
    seen = [c for c in gateway.conversations(limit=1000) if c["id"].startswith(thread_id)]
    return [c["id"] for c in sorted(seen, key=lambda c: -c["age_s"])]


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Have a question researched by a team of agents.")
    parser.add_argument("question")
    parser.add_argument("--notes", type=Path, default=NOTES, help="default: this project's docs")
    parser.add_argument("--gateway", help="default: CONSERVE_BASE_URL, else 127.0.0.1:8000")
    parser.add_argument("--model", help="default: the first one the gateway serves")
    options = parser.parse_args(argv)
    if not options.notes.is_dir():
        parser.error(f"--notes {options.notes}: not a folder")
    try:
        gateway = Gateway(options.gateway)
        served = gateway.models()
        watch = Watch(gateway)
    except GatewayError as error:
        print(f"{error}\nStart one with: conserve up", file=sys.stderr)
        return 1
    llm = ChatConServe(model=options.model or served[0], base_url=f"{gateway.root}/v1")
    thread_id = f"research-team-{uuid.uuid4().hex[:8]}"
    try:
        print(asyncio.run(answer(options.question, read_notes(options.notes), llm, thread_id)))
        print(f"\n{try_text(watch, conversations_of(gateway, thread_id))}")
    except GraphRecursionError:
        print(f"No answer after {MAX_STEPS} steps.", file=sys.stderr)
        return 1
    finally:
        llm.end_thread(thread_id)
    return 0


if __name__ == "__main__":
    sys.exit(main())
