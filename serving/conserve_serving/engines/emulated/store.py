"""The hand-off store: one small file per hand-off, named by the prompt's last full page key.

What a GPU deployment keeps here is KV pages; the emulated engine keeps who may load how much.
Files appear by rename, so a reader sees all of one or nothing. KV of another model, page size or
data type must never be loaded (real SGLang has none of dtype and layout in its keys): each file
carries a stamp, and so does the folder, compared when an engine starts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from conserve_serving.engines.content import TokenPrompt
from conserve_serving.engines.emulated.errors import StampMismatchError, StoreError

_log = logging.getLogger(__name__)

_STAMP_FILE: Final = "stamp.json"
_SUFFIX: Final = ".kv.json"
#: Of each conversation, the keys of its hand-offs.
_CLAIMS: Final = ".keys"
#: Most hand-offs written between two rounds of removal, which look at every file.
_MOST_WRITES_PER_SWEEP: Final = 256
_MOST_ANSWERS: Final = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What must agree between the engine that wrote KV and the one that loads it."""

    model: str
    page_size: int
    dtype: str


class HandoffStore:
    """One engine's view of the store's folder.

    Args:
        folder: created where it does not exist.
        stamp: this engine's.
        engine_id: written into the files, for people who look.
        max_age_s, max_files: hand-offs beyond either are removed, oldest first.
        clock: seconds since the epoch, for the files' age.

    Raises:
        StampMismatchError: the folder belongs to engines with another stamp.
        StoreError: the folder cannot be made or read.
    """

    def __init__(
        self,
        folder: Path,
        *,
        stamp: Stamp,
        engine_id: str,
        max_age_s: float = 900.0,
        max_files: int = 4096,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._stamp = stamp
        self._engine_id = engine_id
        self._max_age_s = max_age_s
        self._max_files = max_files
        self._clock = clock
        self._writes = 0
        self._writes_per_sweep = max(1, min(_MOST_WRITES_PER_SWEEP, max_files // 4))
        #: Last page key of a prompt seen before → key and tokens of its longest stored prefix.
        self._answers: OrderedDict[bytes, tuple[str, int] | None] = OrderedDict()
        self.refused = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._claim()
        except OSError as error:
            raise StoreError(f"store {folder} cannot be used: {error}") from error

    def write(self, key: str, tokens: int, conversation: str | None = None) -> None:
        """Publish a hand-off: the first ``tokens`` tokens of the prompt ``key`` names are here.

        Args:
            conversation: whose it is; `forget` removes it.

        Raises:
            StoreError: the file cannot be written (disk full, folder gone).
        """
        content = {
            "tokens": tokens,
            "pages": tokens // self._stamp.page_size,
            **asdict(self._stamp),
            "engine": self._engine_id,
            "conversation": conversation,
            "written_at_s": self._clock(),
        }
        try:
            self._publish(self._path(key), content)
            if conversation is not None:
                with self._claims(conversation).open("a") as claims:
                    claims.write(f"{key}\n")
        except OSError as error:
            raise StoreError(f"hand-off {key} cannot be written: {error}") from error
        self._writes += 1
        if self._writes % self._writes_per_sweep == 0:
            self.sweep()

    def forget(self, conversation: str) -> None:
        """A conversation is over: its hand-offs go, but for those another one has since."""
        claims = self._claims(conversation)
        try:
            keys = claims.read_text().split()
        except FileNotFoundError:
            return
        for key in set(keys):
            path = Path(self._path(key))
            with contextlib.suppress(FileNotFoundError, ValueError):
                if json.loads(path.read_bytes())["conversation"] == conversation:
                    path.unlink()
        claims.unlink(missing_ok=True)

    def stored_tokens(self, prompt: TokenPrompt) -> int:
        """Leading tokens of ``prompt`` the store holds: its longest stored prefix.

        The last page is asked for first: of a prompt just handed over it is the one there is. A
        tail turn finds nothing there and walks back over what was appended, to the last page of
        the prompt before, whose answer is remembered. (Not this prompt's own: it may be asked
        again because its hand-off was not complete.)
        """
        page = prompt.page_tokens
        last: bytes | None = None
        found: tuple[str, int] | None = None
        for start in range((prompt.tokens // page - 1) * page, -1, -page):
            key = prompt.key_at(start)
            if not isinstance(key, bytes):
                raise TypeError(f"a token prompt's keys are bytes, not {type(key).__name__}")
            repeated = last is not None and key in self._answers
            last = last or key
            tokens = self._look(key.hex())
            if tokens is not None:
                found = (key.hex(), min(tokens, start + page))
                break
            if repeated:
                found = self._answers[key]
                if found is not None and self._look(found[0]) is None:
                    found = None  # swept since
                break
        if last is not None:
            self._answers[last] = found
            self._answers.move_to_end(last)
            if len(self._answers) > _MOST_ANSWERS:
                self._answers.popitem(last=False)
        return found[1] if found is not None else 0

    def sweep(self) -> int:
        """Remove what is too old or too much; how many files that was."""
        found: list[tuple[float, str]] = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if not entry.name.endswith((_SUFFIX, _CLAIMS, ".tmp")):
                    continue
                try:
                    found.append((entry.stat().st_mtime, entry.path))
                except FileNotFoundError:
                    continue  # another engine swept it
        found.sort()
        oldest = self._clock() - self._max_age_s
        excess = len(found) - self._max_files
        removed = 0
        for place, (written, path) in enumerate(found):
            if written >= oldest and place >= excess:
                break
            Path(path).unlink(missing_ok=True)
            removed += 1
        return removed

    def _claims(self, conversation: str) -> Path:
        name = hashlib.blake2b(conversation.encode(), digest_size=16).hexdigest()
        return self._folder / f"{name}{_CLAIMS}"

    def _path(self, key: str) -> str:
        return f"{self._folder}/{key}{_SUFFIX}"

    def _claim(self) -> None:
        path = self._folder / _STAMP_FILE
        if not path.exists():
            temporary = self._write_temporary(str(path), asdict(self._stamp))
            try:
                os.link(temporary, path)  # the first engine decides; link never overwrites
            except FileExistsError:
                pass
            finally:
                Path(temporary).unlink()
        theirs = json.loads(path.read_bytes())
        for name, ours in asdict(self._stamp).items():
            if theirs.get(name) != ours:
                raise StampMismatchError(
                    f"store {self._folder} holds KV with {name} {theirs.get(name)!r}, this engine "
                    f"has {ours!r}: give engines that differ a store folder each"
                )

    def _look(self, key: str) -> int | None:
        """Tokens of the hand-off of this name; None where there is none for this engine."""
        path = self._path(key)
        if not os.path.exists(path):  # noqa: PTH110 - half the cost of Path.exists, hot loop
            return None
        try:
            content = json.loads(Path(path).read_bytes())
        except FileNotFoundError:
            return None  # swept since we looked
        except (OSError, ValueError) as error:
            _log.warning("hand-off %s cannot be read: %s", path, error)
            return None
        for name, ours in asdict(self._stamp).items():
            if content.get(name) != ours:
                self.refused += 1
                _log.error(
                    "hand-off %s refused: its %s is %r, this engine's is %r",
                    path,
                    name,
                    content.get(name),
                    ours,
                )
                return None
        return int(content["tokens"])

    def _publish(self, path: str, content: dict[str, Any]) -> None:
        Path(self._write_temporary(path, content)).replace(path)

    def _write_temporary(self, path: str, content: dict[str, Any]) -> str:
        temporary = f"{path}.{os.getpid()}.{id(self)}.tmp"
        Path(temporary).write_bytes(json.dumps(content).encode())
        return temporary
