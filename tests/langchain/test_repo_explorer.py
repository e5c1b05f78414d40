"""The example agent: its tools, and its whole loop through a real gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conserve_agents import Gateway, GatewayResponseError

EXAMPLE = Path(__file__).parents[2] / "example_agents" / "repo_explorer"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    (root / "src").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / ".git" / "secret").write_text("policy")
    (root / "README.md").write_text("# Project\nThe policy is in src/policy.py.\n")
    (root / "src" / "policy.py").write_text("class Policy:\n    name = 'least KV'\n")
    (root / "src" / "blob.bin").write_bytes(b"\xff\xfepolicy")
    (tmp_path / "outside.txt").write_text("policy of others")
    (root / "link.txt").symlink_to(tmp_path / "outside.txt")
    return root


def call(folder: Path, name: str, **arguments: Any) -> str:
    from folder_tools import folder_tools  # noqa: PLC0415 - importable only inside a test

    tools = {tool.name: tool for tool in folder_tools(folder)}
    return str(tools[name].invoke(arguments))


def test_files_are_listed_read_and_searched(folder: Path) -> None:
    assert call(folder, "list_files") == "README.md\nlink.txt\nsrc/"
    assert call(folder, "list_files", path="src") == "blob.bin\npolicy.py"
    assert call(folder, "read_file", path="src/policy.py").startswith("class Policy:")
    assert (
        call(folder, "read_file", path="src/policy.py", first_line=2) == "    name = 'least KV'\n"
    )
    found = call(folder, "search_files", query="POLICY")
    assert found.splitlines() == [
        "README.md:2: The policy is in src/policy.py.",
        "src/policy.py:1: class Policy:",
    ]
    assert call(folder, "search_files", query="kv", path="src/policy.py").count("\n") == 0
    assert "README.md:2" in call(folder, "search_files", query="policy in The")
    assert call(folder, "search_files", query="nowhere") == "no line contains 'nowhere'"


@pytest.mark.parametrize("path", ["..", "../outside.txt", "/etc/passwd", "link.txt", "src/../.."])
def test_nothing_outside_is_reached(folder: Path, path: str) -> None:
    for name in ("list_files", "read_file"):
        assert call(folder, name, path=path).startswith("error: ")
    assert call(folder, "search_files", query="policy", path=path).startswith("error: ")
    assert "others" not in call(folder, "search_files", query="policy")


def test_answers_are_bounded(folder: Path) -> None:
    many = folder / "many"
    many.mkdir()
    for n in range(250):
        (many / f"{n:03}.txt").write_text("needle " * 100)
    listed = call(folder, "list_files", path="many").splitlines()
    assert len(listed) == 201 and listed[-1] == "… and 50 more"
    found = call(folder, "search_files", query="needle").splitlines()
    assert len(found) == 41 and max(map(len, found)) < 230
    (folder / "long.txt").write_text("x" * 99 + "\n" * 1 + "y\n" * 20_000)
    part = call(folder, "read_file", path="long.txt")
    assert len(part) < 17_000 and "goes on at line" in part
    (folder / "huge.txt").write_text("z" * 1_000_001)
    assert call(folder, "read_file", path="huge.txt").startswith("error: ")
    assert call(folder, "search_files", query="") == "error: query is empty; say what to look for"
    assert call(folder, "read_file", path="src/blob.bin") == "error: src/blob.bin: not a text file"
    assert call(folder, "read_file", path="src") == "error: src: Is a directory"
    assert call(folder, "list_files", path="no") == "error: no: No such file or directory"


def test_the_agent_answers_and_says_what_conserve_did(
    folder: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from agent import main  # noqa: PLC0415 - importable only inside a test

    question = 'Where is the policy? Look in "src/policy.py".'
    assert main([question, "--folder", str(folder), "--gateway", cluster]) == 0
    answer, _, report = capsys.readouterr().out.partition("\nconversation ")
    assert "least KV" in answer  # it has read the file
    thread_id, _, rest = report.partition(": ")
    turns = int(rest.split()[0])
    assert turns >= 2
    assert "decode d" in rest and "cached" in rest and "J on all engines" in rest
    seen = Gateway(cluster).conversation(thread_id)
    assert (seen["state"], seen["turns"]) == ("ended", turns)
    assert seen["transfers"] <= 1
    assert seen["cached_tokens"] > 0


def test_what_is_wrong_is_said(
    folder: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from agent import main  # noqa: PLC0415 - importable only inside a test

    assert main(["q", "--gateway", "http://127.0.0.1:9/v1", "--folder", str(folder)]) == 1
    assert "conserve up" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["q", "--folder", str(folder / "none")])
    assert "not a folder" in capsys.readouterr().err
    with pytest.raises(GatewayResponseError, match="404"):
        Gateway(cluster).conversation("never seen")
