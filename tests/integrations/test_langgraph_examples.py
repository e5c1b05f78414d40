"""The research team, as it is started, through a real gateway (the repository explorer's tests are
in tests/langchain)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from conserve_agents import Gateway

EXAMPLES = Path(__file__).parents[2] / "example_agents"


def started(name: str, *arguments: str) -> tuple[int, str, str]:
    """Run an example in a process of its own: exit status, what it printed, what it complained."""
    argv = [sys.executable, str(EXAMPLES / name / "agent.py"), *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)  # noqa: S603 - our own
    return done.returncode, done.stdout, done.stderr


def test_a_research_team(cluster: str, gateway: Gateway) -> None:
    status, printed, complaints = started(
        "research_team", 'Compare "prefill", "hand-off" and "parking".', "--gateway", cluster
    )
    assert status == 0, complaints
    said, _, report = printed.partition("\nconversation ")
    for topic in ("prefill", "hand-off", "parking"):
        assert topic in said.lower()
    assert said.count("research returned:") == 3
    (thread_id,) = set(re.findall(r"research-team-\w{8}", report))
    family = [c for c in gateway.conversations() if c["id"].startswith(thread_id)]
    (lead,) = (c for c in family if c["id"] == thread_id)
    researchers = [c for c in family if c["id"] != thread_id]
    assert (len(researchers), lead["turns"], lead["parent"]) == (3, 2, None)
    assert {c["state"] for c in family} == {"ended"}
    for one in researchers:
        assert (one["parent"], one["turns"]) == (thread_id, 3)
        assert one["transfers"] <= 1
        assert len({turn["decode_engine"] for turn in one["recent_turns"]}) == 1
        assert one["id"] in report
    assert report.count(f"started by {thread_id}") == 3
    assert "J on all engines" in report


def test_without_a_gateway_it_says_how_to_start_one() -> None:
    status, _, complaints = started("research_team", "q", "--gateway", "http://127.0.0.1:9/v1")
    assert status == 1 and "conserve up" in complaints
