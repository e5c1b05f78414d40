"""Pages as files: stored once, kept while a conversation needs them, gone when none does."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from conserve_serving.engines.sglang.files import PageFiles

PAGE = 64


class Clock:
    """The wall clock that file times are compared with, moved ahead by hand."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_s


def key(number: int) -> str:
    return f"{number:064x}"


def page(number: int) -> memoryview:
    return memoryview(bytes([number % 256]) * PAGE)


def make(folder: Path, clock: Clock | None = None, **more: Any) -> PageFiles:
    arguments: dict[str, Any] = {
        "shard": "t0",
        "max_bytes": 100 * PAGE,
        "max_age_s": 1000.0,
        "unclaimed_age_s": 60.0,
        "grace_s": 10.0,
        "clock": clock or Clock(),
    }
    return PageFiles(folder, **{**arguments, **more})


@pytest.fixture
def files(tmp_path: Path) -> PageFiles:
    return make(tmp_path)


def read(files: PageFiles, number: int) -> bytes | None:
    target = bytearray(PAGE)
    return bytes(target) if files.read_into(key(number), memoryview(target)) else None


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def stored(folder: Path) -> set[str]:
    return {path.name for path in (folder / "pages").rglob("*.t*")}


def test_a_page_comes_back_as_it_was(files: PageFiles) -> None:
    assert files.put(key(1), page(1))
    assert read(files, 1) == bytes(page(1))
    assert read(files, 2) is None
    assert files.count_present([key(1), key(2), key(1)]) == 1


def test_engines_share_a_folder_and_ranks_keep_apart(tmp_path: Path) -> None:
    writer, reader = make(tmp_path), make(tmp_path)
    other_rank = make(tmp_path, shard="t1")
    writer.put(key(1), page(1))
    assert read(reader, 1) == bytes(page(1))
    assert not other_rank.has(key(1))


def test_a_page_of_another_size_is_never_read(files: PageFiles) -> None:
    files.put(key(1), memoryview(b"short"))
    assert read(files, 1) is None


def test_ending_a_conversation_removes_only_what_nobody_else_needs(
    files: PageFiles, tmp_path: Path
) -> None:
    for number in (1, 2, 3):
        files.put(key(number), page(number))
    assert files.claim("a", [key(1), key(2)]) == []
    assert files.claim("b", [key(1), key(3)]) == []
    assert files.release("a") == 1
    assert stored(tmp_path) == {f"{key(1)}.t0", f"{key(3)}.t0"}
    assert files.release("a") == 0
    assert files.release("b") == 2
    assert stored(tmp_path) == set()
    assert names(tmp_path / "conversations") == set()


def test_any_engine_may_end_a_conversation_for_all_ranks(tmp_path: Path) -> None:
    ranks = [make(tmp_path, shard="t0"), make(tmp_path, shard="t1")]
    for rank in ranks:
        rank.put(key(1), page(1))
        rank.claim("a", [key(1)])
    reader = make(tmp_path, shard="t0")
    assert reader.holds("a") == 2
    assert reader.release("a") == 2
    assert stored(tmp_path) == set()


def test_claiming_says_what_is_not_there(files: PageFiles) -> None:
    files.put(key(1), page(1))
    assert files.claim("a", [key(1), key(2)]) == [key(2)]


def test_a_claim_brings_a_page_back_whose_last_owner_ends_in_that_moment(
    tmp_path: Path,
) -> None:
    def link(source: Path, target: Path) -> None:
        os.link(source, target)
        if "conversations/b" in str(target):
            # What `release("a")` does when it looked at the links just before this one was made.
            source.unlink()

    files = make(tmp_path, link=link)
    files.put(key(1), page(1))
    files.claim("a", [key(1)])
    assert files.claim("b", [key(1)]) == []
    assert read(files, 1) == bytes(page(1))


@pytest.mark.parametrize("end", ["release", "collect"])
def test_a_page_that_is_claimed_while_it_is_removed_stays(tmp_path: Path, end: str) -> None:
    other = make(tmp_path)
    clock = Clock()

    def rename(source: Path, target: Path) -> None:
        if source.parent.parent.name == "pages":  # looked at, and about to be removed
            assert other.claim("b", [key(1)]) == []
        source.replace(target)

    files = make(tmp_path, clock, rename=rename)
    files.put(key(1), page(1))
    if end == "release":
        files.claim("a", [key(1)])
        assert files.release("a") == 0
    else:
        clock.ahead_s = 61.0
        assert files.collect().removed_pages == 0
    assert read(files, 1) == bytes(page(1))
    assert other.release("b") == 1
    assert names(tmp_path / "drafts") == set()


def test_a_reader_keeps_what_it_reads_while_its_conversation_ends(
    files: PageFiles, tmp_path: Path
) -> None:
    files.put(key(1), page(1))
    files.claim("a", [key(1)])
    with (tmp_path / "pages" / key(1)[:2] / f"{key(1)}.t0").open("rb") as open_page:
        files.release("a")
        assert open_page.read() == bytes(page(1))


def test_strange_names_of_conversations_stay_inside_the_folder(
    files: PageFiles, tmp_path: Path
) -> None:
    files.put(key(1), page(1))
    for name in ("../../etc", "a/b", "", ".", "x" * 500, "naïve"):
        assert files.claim(name, [key(1)]) == []
        assert files.holds(name) == 1
    assert len(names(tmp_path / "conversations")) == 6
    for name in ("../../etc", "a/b", "", ".", "x" * 500, "naïve"):
        files.release(name)
    assert stored(tmp_path) == set()


def test_what_is_too_old_is_collected(tmp_path: Path) -> None:
    clock = Clock()
    files = make(tmp_path, clock)
    for number in (1, 2):
        files.put(key(number), page(number))
    files.claim("a", [key(1)])
    clock.ahead_s = 61.0
    assert files.collect().removed_pages == 1  # nobody's
    assert stored(tmp_path) == {f"{key(1)}.t0"}
    clock.ahead_s = 1001.0
    found = files.collect()
    assert (found.removed_conversations, found.pages, found.bytes) == (1, 0, 0)
    assert stored(tmp_path) == set()


def test_a_full_store_gives_up_the_oldest_but_nothing_young(tmp_path: Path) -> None:
    clock = Clock()
    files = make(tmp_path, clock, max_bytes=3 * PAGE)
    for number, name in ((1, "a"), (2, "b")):
        files.put(key(number), page(number))
        files.claim(name, [key(number)])
    _age(tmp_path / "conversations" / "a", 20.0)
    files.put(key(3), page(3))
    assert files.put(key(4), page(4))  # "a" is the oldest and past its grace
    assert stored(tmp_path) == {f"{key(number)}.t0" for number in (2, 3, 4)}
    assert not files.put(key(5), page(5))  # all that is left is young
    assert files.has(key(2))
    clock.ahead_s = 11.0  # not young any more
    assert files.put(key(5), page(5))


def failing(error: int) -> Callable[[Path, Path], object]:
    def rename(source: Path, target: Path) -> object:
        raise OSError(error, os.strerror(error))

    return rename


def test_a_device_without_room_is_a_full_store(tmp_path: Path) -> None:
    files = make(tmp_path, rename=failing(errno.ENOSPC))
    assert not files.put(key(1), page(1))
    assert names(tmp_path / "drafts") == set()


def test_other_troubles_of_the_file_system_are_told(tmp_path: Path) -> None:
    files = make(tmp_path, rename=failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        files.put(key(1), page(1))


def test_drafts_of_a_killed_engine_are_swept(tmp_path: Path) -> None:
    files = make(tmp_path)
    draft = tmp_path / "drafts" / "1-1-dead"
    draft.write_bytes(b"half a page")
    _age(draft, 301.0)
    files.collect()
    assert not draft.exists()


def test_two_writers_and_a_collector_at_once_lose_nothing(tmp_path: Path) -> None:
    writers = [make(tmp_path, max_bytes=10_000 * PAGE) for _ in range(2)]
    reader = make(tmp_path, max_bytes=10_000 * PAGE)
    problems: list[object] = []

    def write(files: PageFiles, name: str) -> None:
        for number in range(150):
            for _ in range(50):  # gone between the two calls: said, and stored again
                files.put(key(number), page(number))
                if not files.claim(f"{name}{number % 7}", [key(number)]):
                    break
            else:
                problems.append(("never claimed", number))
            if number % 13 == 5:
                files.release(f"{name}{(number - 3) % 7}")

    threads = [
        threading.Thread(target=write, args=(files, name))
        for files, name in zip(writers, "ab", strict=True)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        reader.collect()
        for number in range(150):
            content = read(reader, number)
            if content is not None and content != bytes(page(number)):
                problems.append(("torn", number))
    assert problems == []
    for home in names(tmp_path / "conversations"):
        for name in names(tmp_path / "conversations" / home):
            assert (tmp_path / "pages" / name[:2] / name).exists()


def _age(path: Path, age_s: float) -> None:
    then = time.time() - age_s
    os.utime(path, (then, then))


class Life(RuleBasedStateMachine):
    """Against a model: a set of pages for each conversation."""

    numbers = st.integers(0, 8)
    names = st.sampled_from(["a", "b", "c"])

    @initialize()
    def start(self) -> None:
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self.temporary.name)
        self.files = make(self.folder)
        self.claims: dict[str, set[int]] = {}
        self.loose: set[int] = set()

    def teardown(self) -> None:
        if hasattr(self, "temporary"):
            self.temporary.cleanup()

    def _held(self) -> set[int]:
        return set().union(*self.claims.values()) if self.claims else set()

    @rule(number=numbers)
    def put(self, number: int) -> None:
        assert self.files.put(key(number), page(number))
        if number not in self._held():
            self.loose.add(number)

    @rule(name=names, wanted=st.sets(numbers))
    def claim(self, name: str, wanted: set[int]) -> None:
        there = self._held() | self.loose
        missing = self.files.claim(name, [key(number) for number in sorted(wanted)])
        assert missing == [key(number) for number in sorted(wanted - there)]
        self.claims.setdefault(name, set()).update(wanted & there)
        self.loose -= wanted

    @rule(name=names)
    def release(self, name: str) -> None:
        before = self._held()
        self.claims.pop(name, None)
        assert self.files.release(name) == len(before - self._held())

    @rule()
    def collect(self) -> None:
        found = self.files.collect()
        assert found.bytes == found.pages * PAGE

    @invariant()
    def same_pages(self) -> None:
        if hasattr(self, "files"):
            expected = {f"{key(number)}.t0" for number in self._held() | self.loose}
            assert stored(self.folder) == expected


Life.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestLife = Life.TestCase
