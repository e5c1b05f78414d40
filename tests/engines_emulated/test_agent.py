"""A LangGraph agent runs its whole loop against the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langgraph")
pytest.importorskip("langchain_openai")


async def test_a_react_agent_lists_reads_and_answers(engine: Any, tmp_path: Path) -> None:
    from langchain.agents import create_agent  # noqa: PLC0415 - slow to import, optional
    from langchain_core.tools import tool  # noqa: PLC0415 - same
    from langchain_openai import ChatOpenAI  # noqa: PLC0415 - same

    (tmp_path / "README.md").write_text("A repository.")
    (tmp_path / "ledger.py").write_text("class Ledger:\n    '''Who holds which KV where.'''\n")

    @tool
    def list_files(path: str = ".") -> str:
        """List the files in a folder."""
        return "\n".join(sorted(entry.name for entry in (tmp_path / path).iterdir()))

    @tool
    def read_file(path: str) -> str:
        """Read a file."""
        return (tmp_path / path).read_text()

    @tool
    def search(query: str) -> str:
        """Search all files for a text."""
        found = [path.name for path in tmp_path.iterdir() if query in path.read_text()]
        return "\n".join(found) or "nothing"

    model = ChatOpenAI(
        model="emulated",
        base_url=f"{engine.engine.url}/v1",
        api_key="none",  # type: ignore[arg-type] # a plain string is accepted
        use_responses_api=False,
    )
    agent: Any = create_agent(model, [list_files, read_file, search])
    question = "Search for 'Who holds' and tell me what the ledger does."
    result = await agent.ainvoke({"messages": [("user", question)]}, {"recursion_limit": 20})
    used = [call["name"] for m in result["messages"] for call in getattr(m, "tool_calls", [])]
    assert used[0] == "search"
    assert "read_file" in used
    assert "Who holds which KV where" in result["messages"][-1].content
