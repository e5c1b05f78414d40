"""A local counter with the model's own tokenizer (extra ``hf``: the library ``tokenizers``)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Final, Self

from conserve_agents import wire
from conserve_agents.counting import TOKENS_PER_ATTACHMENT, chat_messages, chat_tools, texts_of
from conserve_agents.errors import TokenCountError
from conserve_agents.turns import Prompt

#: What chat templates put around a message: ``<|im_start|>``, role, line end, ``<|im_end|>`` and
#: line end in ChatML, of which templates of other models differ by a token or two.
TOKENS_PER_MESSAGE: Final = 5


class HuggingFaceTokenCounter:
    """Counts with a Hugging Face tokenizer, on this machine.

    A ``transformers`` tokenizer is asked to apply its chat template, which is exact. One of
    ``tokenizers`` has no template: texts and tool schemas are counted exactly, and
    :data:`TOKENS_PER_MESSAGE` for each message's frame.

    Args:
        tokenizer: a ``tokenizers.Tokenizer`` or a ``transformers`` tokenizer.
        name: names it in the header, after ``hf:``; an illegal one is hashed.
    """

    blocking = False

    def __init__(self, tokenizer: Any, *, name: str) -> None:
        self._tokenizer: Final = tokenizer
        self.name: Final = f"hf:{name if wire.is_legal_id(f'hf:{name}') else _hashed(name)}"

    @classmethod
    def from_file(cls, path: str | PathLike[str], *, name: str | None = None) -> Self:
        """The tokenizer in a ``tokenizer.json``, or in the folder of a model that has one.

        Raises:
            TokenCountError: there is none, or the library ``tokenizers`` is not installed.
        """
        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        try:
            made = _library().from_file(str(file))
        except Exception as error:
            raise TokenCountError(f"{file} is not a tokenizer: {error}") from error
        return cls(made, name=name or file.parent.name)

    @classmethod
    def from_pretrained(cls, name: str) -> Self:
        """A model's tokenizer by its name on the Hugging Face hub, from there or from its cache.

        Raises:
            TokenCountError: it cannot be had, or the library ``tokenizers`` is not installed.
        """
        try:
            made = _library().from_pretrained(name)
        except Exception as error:
            raise TokenCountError(f"tokenizer {name!r} cannot be loaded: {error}") from error
        return cls(made, name=name)

    def count(self, prompt: Prompt, tools: Sequence[Any] | None) -> int:
        """See :class:`~conserve_agents.TokenCounter`."""
        if isinstance(prompt, str):
            return self._length(prompt)
        template = getattr(self._tokenizer, "apply_chat_template", None)
        if callable(template):
            rendered = template(
                chat_messages(prompt),
                tools=chat_tools(tools) if tools else None,
                add_generation_prompt=True,
                tokenize=True,
            )
            # Newer releases return a mapping of model inputs.
            return len(rendered["input_ids"] if isinstance(rendered, Mapping) else rendered)
        total = 0
        for message in prompt:
            texts, attachments = texts_of(message)
            total += TOKENS_PER_MESSAGE + TOKENS_PER_ATTACHMENT * attachments
            total += sum(self._length(text) for text in texts)
        if tools:
            total += self._length(json.dumps(chat_tools(tools), ensure_ascii=False, default=str))
        return max(1, total)

    def _length(self, text: str) -> int:
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        return len(getattr(encoded, "ids", encoded))


def _hashed(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _library() -> Any:
    try:
        from tokenizers import Tokenizer  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise TokenCountError(
            "counting with a Hugging Face tokenizer needs: pip install 'conserve-agents[hf]'"
        ) from error
    return Tokenizer
