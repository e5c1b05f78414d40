"""An agent that answers a question about a folder. From stock LangGraph it differs by one import.

conserve up                                                     # in another terminal
python example_agents/repo_explorer/agent.py --folder . "Where is the scheduler's policy?"
"""

from __future__ import annotations

import argparse
import sys
import uuid
from pathlib import Path

from folder_tools import folder_tools, listing
from langchain.agents import create_agent
from langgraph.errors import GraphRecursionError

from conserve_agents import Gateway, GatewayError
from conserve_agents.report import Watch, try_text
from langchain_conserve import ChatConServe  # stock: from langchain_openai import ChatOpenAI

PROMPT = (
    "Answer the question about this folder. Look at its files with your tools first. They are:\n"
)
MAX_STEPS = 40


def explore(question: str, folder: Path, llm: ChatConServe, thread_id: str) -> str:
    """Ask the agent; the conversation is the graph's thread, nothing else needs to be said."""
    agent = create_agent(llm, folder_tools(folder), system_prompt=PROMPT + listing(folder))
    state = agent.invoke(
        {"messages": [{"role": "user", "content": question}]},
        {"configurable": {"thread_id": thread_id}, "recursion_limit": MAX_STEPS},
    )
    answer: str = state["messages"][-1].text
    return answer


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Ask a question about a folder.")
    parser.add_argument("question")
    parser.add_argument("--folder", type=Path, default=Path(), help="default: this one")
    parser.add_argument("--gateway", help="default: CONSERVE_BASE_URL, else 127.0.0.1:8000")
    parser.add_argument("--model", help="default: the first one the gateway serves")
    options = parser.parse_args(argv)
    if not options.folder.is_dir():
        parser.error(f"--folder {options.folder}: not a folder")
    try:
        gateway = Gateway(options.gateway)
        served = gateway.models()
        watch = Watch(gateway)
    except GatewayError as error:
        print(f"{error}\nStart one with: conserve up", file=sys.stderr)
        return 1
    llm = ChatConServe(model=options.model or served[0], base_url=f"{gateway.root}/v1")
    thread_id = f"repo-explorer-{uuid.uuid4().hex[:8]}"
    try:
        print(explore(options.question, options.folder, llm, thread_id))
        print(f"\n{try_text(watch, [thread_id])}")
    except GraphRecursionError:
        print(f"No answer after {MAX_STEPS} steps.", file=sys.stderr)
        return 1
    finally:
        llm.end_thread(thread_id)
    return 0


if __name__ == "__main__":
    sys.exit(main())
