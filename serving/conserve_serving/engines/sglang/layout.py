"""What must agree between engines that read each other's pages, and is not part of their keys.

SGLang's page keys hash token ids only; data type, memory layout and tensor parallelism are in
none of them, so a page of another layout would be loaded as wrong numbers. The store therefore
carries a stamp, and an engine whose layout differs refuses to start.
Loaded inside SGLang: standard library only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

from conserve_serving.engines.sglang.errors import LayoutMismatchError, StoreError

_STAMP = "stamp.json"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How an engine lays out one page of KV.

    Attributes:
        model: name the model is served under.
        page_tokens: tokens of a page.
        dtype: of the KV cache's numbers.
        memory_layout: ``--hicache-mem-layout``.
        tp_size: tensor-parallel ranks that share a page's heads; 1 where they all hold all (MLA).
        pp_size: pipeline stages.
        page_bytes: bytes of one rank's page.
    """

    model: str
    page_tokens: int
    dtype: str
    memory_layout: str
    tp_size: int
    pp_size: int
    page_bytes: int

    def digest(self) -> str:
        """Short name of this layout, for transports whose keys carry it."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def check_stamp(self, folder: Path) -> None:
        """Leave this layout's stamp in ``folder``, or compare with the one that is there.

        Raises:
            LayoutMismatchError: another layout's; the message names both values.
            StoreError: the stamp cannot be read or written.
        """
        stamp = folder / _STAMP
        mine = dataclasses.asdict(self)
        draft = folder / f".{_STAMP}.{os.getpid()}.{os.urandom(4).hex()}"
        try:
            draft.write_text(json.dumps(mine, indent=1), encoding="utf-8")
            try:
                os.link(draft, stamp)  # whole or not at all, and the first one wins
            except FileExistsError:
                pass
            finally:
                draft.unlink()
            theirs = json.loads(stamp.read_text(encoding="utf-8"))
        except OSError as error:
            raise StoreError(
                f"cannot keep a stamp in {folder}: {error.strerror}: give a folder on a file "
                "system with hard links that this engine may write to"
            ) from error
        except ValueError as error:
            raise StoreError(f"{stamp} is damaged: delete {folder} while no engine runs") from error
        for name, value in mine.items():
            other = theirs.get(name) if isinstance(theirs, dict) else None
            if other != value:
                raise LayoutMismatchError(
                    f"{name} is {value!r} here and {other!r} in {folder}: start all engines with "
                    f"the same {name}, or, if none runs with {other!r} any more, delete the folder"
                )
