"""The result file: gone on with under the same conditions, refused under others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from grid import Cell
from result import FORMAT, Result, ResultError, read_result

CONFIG = {"name": "GPU X", "dtype": "bfloat16"}
CELL = Cell(chunk_tokens=512, batch=4, ctx_tokens=1024)


def test_what_is_measured_is_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    result = Result(path, CONFIG)
    assert result.begin({"date": "today"}) == 0
    result.add("cells", {"cell": CELL.as_dict()})
    assert read_result(path) == result.data
    assert [entry.name for entry in path.parent.iterdir()] == ["result.json"]


def test_it_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    first = Result(path, CONFIG)
    first.begin({})
    first.add("cells", {"cell": CELL.as_dict()})
    second = Result(path, CONFIG)
    assert second.measured() == {CELL}
    assert second.begin({}) == 1


def test_other_conditions_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    Result(path, CONFIG).begin({})
    with pytest.raises(ResultError, match=r"another name \('GPU X' there, 'GPU Y' now\)"):
        Result(path, CONFIG | {"name": "GPU Y"})


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"format": FORMAT + "0"})])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(ResultError, match=r"result\.json"):
        Result(path, CONFIG)
    assert path.read_text() == text


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = Result(None, CONFIG)
    result.begin({})
    result.save()
    assert list(tmp_path.iterdir()) == []
