from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from conserve_serving.engines.content import TokenPrompt
from conserve_serving.engines.emulated import StampMismatchError, StoreError
from conserve_serving.engines.emulated.ack import AckSender
from conserve_serving.engines.emulated.store import HandoffStore, Stamp
from conserve_serving.engines.http_errors import ConnectFailed

STAMP = Stamp(model="m", page_size=4, dtype="bfloat16")


def store(folder: Path, stamp: Stamp = STAMP, **settings: object) -> HandoffStore:
    return HandoffStore(folder, stamp=stamp, engine_id="p0", **settings)  # type: ignore[arg-type] # a test's keywords


def prompt(*ids: int) -> TokenPrompt:
    return TokenPrompt.of(ids, 4)


def test_the_longest_stored_prefix_is_found(tmp_path: Path) -> None:
    writer, reader = store(tmp_path), store(tmp_path)
    long = prompt(*range(22))
    assert reader.stored_tokens(long) == 0
    writer.write(prompt(*range(9)).last_key or "", 8)
    assert reader.stored_tokens(long) == 8
    writer.write(long.last_key or "", 20)
    assert reader.stored_tokens(long) == 20
    assert reader.stored_tokens(prompt(*range(40))) == 20
    assert reader.stored_tokens(prompt(*range(11))) == 8
    assert reader.stored_tokens(prompt(*range(7))) == 0
    assert reader.stored_tokens(prompt(99, *range(1, 22))) == 0


def test_a_tail_turn_does_not_walk_back_to_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = store(tmp_path), store(tmp_path)
    ids = list(range(4000))
    writer.write(prompt(*ids).last_key or "", 4000)
    assert reader.stored_tokens(prompt(*ids)) == 4000
    looked: list[str] = []
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: (looked.append(path), exists(path))[1])
    for _ in range(50):
        ids += range(100)
        assert reader.stored_tokens(prompt(*ids)) == 4000
    assert len(looked) <= 50 * 28  # the 25 pages appended, the page remembered, and its file
    for path in tmp_path.glob("*.kv.json"):
        path.unlink()
    assert reader.stored_tokens(prompt(*ids)) == 0


def test_a_hand_off_says_what_it_is(tmp_path: Path) -> None:
    key = prompt(*range(9)).last_key or ""
    store(tmp_path).write(key, 8)
    content = json.loads((tmp_path / f"{key}.kv.json").read_bytes())
    assert {name: content[name] for name in ("tokens", "pages", "model", "page_size", "dtype")} == {
        "tokens": 8,
        "pages": 2,
        "model": "m",
        "page_size": 4,
        "dtype": "bfloat16",
    }
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (Stamp(model="n", page_size=4, dtype="bfloat16"), "model 'm'"),
        (Stamp(model="m", page_size=8, dtype="bfloat16"), "page_size 4"),
        (Stamp(model="m", page_size=4, dtype="fp8"), "dtype 'bfloat16'"),
    ],
)
def test_an_engine_of_another_kind_does_not_start_on_the_folder(
    tmp_path: Path, other: Stamp, named: str
) -> None:
    store(tmp_path)
    with pytest.raises(StampMismatchError, match=f"{named}.*give engines that differ"):
        store(tmp_path, other)


def test_a_hand_off_with_another_stamp_is_refused_loudly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reader = store(tmp_path)
    whole = prompt(*range(9))
    reader.write(whole.last_key or "", 8)
    path = tmp_path / f"{whole.last_key}.kv.json"
    path.write_bytes(path.read_bytes().replace(b"bfloat16", b"fp8"))
    assert reader.stored_tokens(whole) == 0
    assert reader.refused == 1
    assert "its dtype is 'fp8', this engine's is 'bfloat16'" in caplog.text


def test_a_broken_file_counts_as_absent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reader = store(tmp_path)
    (tmp_path / f"{prompt(*range(9)).last_key}.kv.json").write_bytes(b"{")
    assert reader.stored_tokens(prompt(*range(9))) == 0
    assert "cannot be read" in caplog.text


def test_old_and_superfluous_hand_offs_are_removed(tmp_path: Path) -> None:
    writer = store(tmp_path)
    for age, name in enumerate(["a", "b", "c", "d"]):
        writer.write(name, 4)
        os.utime(tmp_path / f"{name}.kv.json", (990.0 - age, 990.0 - age))
    writer.write("old", 4)
    os.utime(tmp_path / "old.kv.json", (800.0, 800.0))
    sweeper = store(tmp_path, max_age_s=100.0, max_files=3, clock=lambda: 1000.0)
    assert sweeper.sweep() == 2
    assert {path.name for path in tmp_path.glob("*.kv.json")} == {
        "a.kv.json",
        "b.kv.json",
        "c.kv.json",
    }
    assert (tmp_path / "stamp.json").exists()


def test_removal_happens_while_writing(tmp_path: Path) -> None:
    writer = store(tmp_path, max_files=10)
    for number in range(200):
        writer.write(f"{number:03}", 4)
        assert len(list(tmp_path.glob("*.kv.json"))) <= 12
    assert (tmp_path / "199.kv.json").exists()


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot be used"):
        store(tmp_path / "file")


class Post:
    """Answers with these in turn: a status, or an error to raise."""

    def __init__(self, *answers: int | Exception) -> None:
        self.answers = list(answers)
        self.bodies: list[bytes] = []
        self.pauses: list[float] = []

    async def __call__(self, body: bytes) -> int:
        self.bodies.append(body)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def sleep(self, pause_s: float) -> None:
        self.pauses.append(pause_s)


REFUSED = ConnectFailed("h:1", "refused")


@pytest.mark.parametrize(
    ("answers", "tries", "sent"),
    [
        ([200], 1, 1),
        ([REFUSED, 503, 204], 3, 1),
        ([429, 200], 2, 1),
        ([404], 1, 0),
        ([REFUSED] * 9, 5, 0),
    ],
)
async def test_acknowledgements_are_tried_a_bounded_number_of_times(
    answers: list[int | Exception], tries: int, sent: int, caplog: pytest.LogCaptureFixture
) -> None:
    post = Post(*answers)
    sender = AckSender("http://gateway/x", engine_id="p0", post=post, sleep=post.sleep)
    sender.send(key="abc", tokens=64, duration_s=0.25)
    await sender.drain()
    assert (len(post.bodies), sender.sent, sender.lost) == (tries, sent, 1 - sent)
    assert json.loads(post.bodies[0]) == {
        "engine": "p0",
        "key": "abc",
        "tokens": 64,
        "duration_s": 0.25,
    }
    assert post.pauses == [0.05 * 2**n for n in range(tries - 1)]
    assert ("lost" in caplog.text) == (not sent)
    await sender.close()
