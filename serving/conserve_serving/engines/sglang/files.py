"""Pages of KV as files on a file system that all engines of a cluster share.

::

    FOLDER/stamp.json                         the layout (see ``layout``)
    FOLDER/pages/ab/<key>.<shard>             a page, under its SGLang key
    FOLDER/conversations/<id>/<key>.<shard>   the same file again, linked: it is needed there
    FOLDER/drafts/                            pages being written

A page that several conversations begin with is stored once, and its link count says how many need
it. Ending a conversation removes its links and the pages nobody else links. Readers are safe
throughout: a page appears whole (renamed into place), and one that is removed while it is read
stays readable to the end; one that is gone when it is asked for is simply computed again.
Loaded inside SGLang: standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_log = logging.getLogger(__name__)

_SAFE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
#: After a round of collecting made no room, the next is worth its scan only after a moment.
_FULL_FOR_S: Final = 0.5
_STALE_DRAFT_S: Final = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What one round of collecting left, and what it removed."""

    pages: int
    bytes: int
    conversations: int
    removed_pages: int
    removed_conversations: int


@dataclass(frozen=True, slots=True)
class _Page:
    path: Path
    bytes: int
    age_s: float
    links: int


class PageFiles:
    """One rank's pages.

    Args:
        folder: of one model; made if it is not there.
        shard: which part of each page this rank holds; part of the files' names.
        max_bytes: most that all pages in the folder may take.
        max_age_s: conversations without a new page for this long are forgotten.
        unclaimed_age_s: the same for pages that belong to no conversation.
        grace_s: what is younger is never removed to make room.
        clock: seconds since the epoch, as the file system stamps them.
        link, rename: what the file system is asked to do; a test's fail or come too late.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        *,
        shard: str,
        max_bytes: int,
        max_age_s: float,
        unclaimed_age_s: float,
        grace_s: float,
        clock: Callable[[], float],
        link: Callable[[Path, Path], None] = os.link,
        rename: Callable[[Path, Path], object] = Path.replace,
    ) -> None:
        self.folder = folder
        self._shard = shard
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._unclaimed_age_s = unclaimed_age_s
        self._grace_s = grace_s
        self._clock = clock
        self._link, self._rename = link, rename
        self._pages = folder / "pages"
        self._conversations = folder / "conversations"
        self._drafts = folder / "drafts"
        for each in (self._pages, self._conversations, self._drafts):
            each.mkdir(parents=True, exist_ok=True)
        self._used_bytes = 0
        self._full_until_s = 0.0
        self._serials = itertools.count()  # several threads draw from it
        self._me = f"{os.getpid()}-{os.urandom(4).hex()}"  # of one machine among several
        self.collect()

    # --- pages -------------------------------------------------------------------------------
    def has(self, key: str) -> bool:
        """Whether this rank's part of the page is stored."""
        return os.path.exists(self._page(key))  # noqa: PTH110 - called for every page of a prompt

    def count_present(self, keys: Sequence[str]) -> int:
        """How many pages, from the first on without a gap, are stored."""
        for count, key in enumerate(keys):
            if not self.has(key):
                return count
        return len(keys)

    def put(self, key: str, data: memoryview) -> bool:
        """Store a page. Returns False when there is no room for it, now or on the device."""
        path = self._page(key)
        if self.has(key):
            return True
        if not self._make_room(data.nbytes):
            return False
        draft = self._draft(key)
        try:
            with draft.open("wb", buffering=0) as file:
                left = data.cast("B")
                while left:
                    left = left[file.write(left) :]
            path.parent.mkdir(exist_ok=True)
            self._rename(draft, path)
        except OSError as error:
            draft.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                _log.warning("no room for a page in %s: %s", self.folder, error.strerror)
                return False
            raise
        self._used_bytes += data.nbytes
        return True

    def read_into(self, key: str, target: memoryview) -> bool:
        """Fill ``target`` with a page. Returns False when it is not there, or of another size."""
        try:
            with self._page(key).open("rb", buffering=0) as file:
                left = target.cast("B")
                if os.fstat(file.fileno()).st_size != len(left):
                    _log.error("page %s in %s has another size: ignored", key, self.folder)
                    return False
                while left:
                    count = file.readinto(left)
                    if not count:
                        return False
                    left = left[count:]
        except FileNotFoundError:
            return False
        return True

    # --- conversations -----------------------------------------------------------------------
    def claim(self, conversation: str, keys: Sequence[str]) -> list[str]:
        """Keep pages for as long as ``conversation`` lasts.

        Returns:
            The keys whose page is not there.
        """
        home = self._home(conversation)
        home.mkdir(exist_ok=True)
        missing = []
        for key in keys:
            page = self._page(key)
            link = home / page.name
            try:
                with contextlib.suppress(FileExistsError):
                    self._link(page, link)
                if not page.exists():  # its last owner ended in this moment: bring it back
                    with contextlib.suppress(FileExistsError):
                        self._link(link, page)
            except FileNotFoundError:
                missing.append(key)
        return missing

    def release(self, conversation: str) -> int:
        """The conversation is over: forget it, and the pages that nobody else needs.

        Returns:
            Pages removed.
        """
        home = self._home(conversation)
        try:
            names = os.listdir(home)  # noqa: PTH208 - names are all that is needed
        except FileNotFoundError:
            return 0
        removed = 0
        for name in names:
            (home / name).unlink(missing_ok=True)
            removed += self._drop_if_unclaimed(self._pages / name[:2] / name)
        with contextlib.suppress(OSError):  # another rank's, or a page just claimed
            home.rmdir()
        return removed

    def holds(self, conversation: str) -> int:
        """Pages kept for a conversation, of all ranks."""
        try:
            return len(os.listdir(self._home(conversation)))  # noqa: PTH208
        except FileNotFoundError:
            return 0

    # --- collecting --------------------------------------------------------------------------
    def collect(self, need_bytes: int = 0) -> Collected:
        """Remove what is too old, then, where there is no room, what is oldest.

        Args:
            need_bytes: room wanted beyond what is stored.
        """
        now_s = self._clock()
        gone = removed = 0
        homes = sorted(self._ages(self._conversations, now_s))
        for age_s, home in reversed(homes):
            if age_s > self._max_age_s:
                removed += self.release(home.name)
                gone += 1
        pages = []
        for page in self._scan(now_s):
            old = page.links == 1 and page.age_s > self._unclaimed_age_s
            if old and self._drop_if_unclaimed(page.path):
                removed += 1
            else:
                pages.append(page)
        total = sum(page.bytes for page in pages)
        limit = self._max_bytes - need_bytes
        if total > limit:
            for page in sorted(pages, key=lambda page: -page.age_s):
                spare = page.links == 1 and page.age_s > self._grace_s
                if total > limit and spare and self._drop_if_unclaimed(page.path):
                    removed += 1
                    total -= page.bytes
        while total > limit and homes and homes[-1][0] > self._grace_s:
            age_s, home = homes.pop()
            if age_s <= self._max_age_s:
                _log.warning("no room: gave up the pages of %s, idle for %.0f s", home.name, age_s)
                removed += self.release(home.name)
                gone += 1
                total = sum(page.bytes for page in self._scan(now_s))
        for age_s, draft in self._ages(self._drafts, now_s):
            if age_s > _STALE_DRAFT_S:
                draft.unlink(missing_ok=True)
        self._used_bytes = total
        return Collected(
            pages=len(pages),
            bytes=total,
            conversations=max(0, len(homes)),
            removed_pages=removed,
            removed_conversations=gone,
        )

    def clear(self) -> None:
        """Remove every page and every conversation; the stamp stays."""
        for each in (self._pages, self._conversations):
            shutil.rmtree(each, ignore_errors=True)
            each.mkdir(parents=True, exist_ok=True)
        self._used_bytes = 0

    # --- inside ------------------------------------------------------------------------------
    def _page(self, key: str) -> Path:
        return self._pages / key[:2] / f"{key}.{self._shard}"

    def _home(self, conversation: str) -> Path:
        if not _SAFE_NAME.fullmatch(conversation):
            conversation = hashlib.sha256(conversation.encode()).hexdigest()
        return self._conversations / conversation

    def _make_room(self, need_bytes: int) -> bool:
        if self._used_bytes + need_bytes <= self._max_bytes:
            return True
        if self._clock() < self._full_until_s:
            return False
        self.collect(need_bytes)
        if self._used_bytes + need_bytes <= self._max_bytes:
            return True
        self._full_until_s = self._clock() + _FULL_FOR_S
        return False

    def _draft(self, key: str) -> Path:
        return self._drafts / f"{self._me}-{next(self._serials)}-{key[:16]}"

    def _drop_if_unclaimed(self, page: Path) -> int:
        draft = self._draft(page.name)
        try:
            if page.stat().st_nlink > 1:
                return 0
            self._rename(page, draft)  # from now on nobody can claim it
            if draft.stat().st_nlink > 1:  # somebody did, since it was looked at
                with contextlib.suppress(FileExistsError):
                    os.link(draft, page)
                draft.unlink()
                return 0
            draft.unlink()
        except FileNotFoundError:
            return 0
        return 1

    def _scan(self, now_s: float) -> Iterator[_Page]:
        with os.scandir(self._pages) as groups:
            for group in groups:
                with os.scandir(group.path) as entries:
                    for entry in entries:
                        try:
                            status = os.stat(entry.path)  # noqa: PTH116 - links: not in DirEntry
                        except FileNotFoundError:
                            continue
                        yield _Page(
                            Path(entry.path),
                            status.st_size,
                            now_s - status.st_mtime,
                            status.st_nlink,
                        )

    @staticmethod
    def _ages(folder: Path, now_s: float) -> list[tuple[float, Path]]:
        found = []
        with os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    found.append((now_s - entry.stat().st_mtime, Path(entry.path)))
        return found
