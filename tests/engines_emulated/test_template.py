from __future__ import annotations

import json

import msgspec
import pytest

from conserve_serving.engines.emulated import tokenizer as tk
from conserve_serving.engines.emulated.errors import ApiError
from conserve_serving.engines.emulated.protocol import Message, Tool
from conserve_serving.engines.emulated.template import MEDIA_TOKENS, ChatTemplate

TOOLS = msgspec.convert(
    [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}],
    list[Tool],
)


def messages(*given: dict[str, object]) -> list[Message]:
    return msgspec.convert(list(given), list[Message])


SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Where is the ledger? " * 20}


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("content", ["In core.", "", "Größe: 你好 😀", "x\n\n y "])
def test_the_next_prompt_begins_with_the_prompt_and_the_answer(
    content: str, tools: list[Tool] | None
) -> None:
    template = ChatTemplate()
    prompt = template.render(messages(SYSTEM, USER), tools)
    answer = template.assistant_body(content, ())
    answer.append(tk.IM_END)
    history = [SYSTEM, USER, {"role": "assistant", "content": content}]
    following = template.render(messages(*history, {"role": "user", "content": "More."}), tools)
    assert following[: len(prompt) + len(answer)] == prompt + answer


def test_tool_calls_render_to_the_ids_they_were_generated_with() -> None:
    template = ChatTemplate()
    prompt = template.render(messages(USER), TOOLS)
    arguments = json.dumps({"path": "a/ü.py", "n": 3}, ensure_ascii=False)
    answer = template.assistant_body("", [("look", arguments), ("look", "{}")])
    answer.append(tk.IM_END)
    # A client parses the arguments and writes them again in its own way.
    spelled = json.dumps({"path": "a/ü.py", "n": 3}, separators=(",", ":"))
    calls = [
        {"id": "1", "type": "function", "function": {"name": "look", "arguments": spelled}},
        {"id": "2", "type": "function", "function": {"name": "look", "arguments": ""}},
    ]
    calls[1]["function"] = {"name": "look", "arguments": {}}
    history = messages(
        USER,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "found"},
    )
    following = template.render(history, TOOLS)
    assert following[: len(prompt) + len(answer)] == prompt + answer


def test_text_parts_count_as_their_text_and_media_as_distinct_placeholders() -> None:
    template = ChatTemplate()

    def with_image(url: str) -> list[Message]:
        parts = [
            {"type": "text", "text": "Look:"},
            {"type": "image_url", "image_url": {"url": url}},
        ]
        return messages({"role": "user", "content": parts})

    plain = template.render(messages({"role": "user", "content": [{"type": "text", "text": "Hi"}]}))
    assert plain == template.render(messages({"role": "user", "content": "Hi"}))
    one, other = (template.render(with_image(f"data:{name}")) for name in ("one", "other"))
    assert len(one) == len(other) > MEDIA_TOKENS["image"]
    assert one != other
    assert one == template.render(with_image("data:one"))


def test_a_final_assistant_message_can_be_left_open() -> None:
    template = ChatTemplate()
    begun = {"role": "assistant", "content": "It is"}
    opened = template.render(messages(USER, begun), continue_final_message=True)
    assert tk.decode(opened).endswith("It is")
    assert opened[-1] != tk.IM_END


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "robot", "content": "x"}, "'role' must be one of"),
        ({"role": "user", "content": [{"type": "smell"}]}, r"messages\[0\]\.content\[0\].*'smell'"),
        ({"role": "user", "content": [{"type": "text"}]}, r"messages\[0\]\.content\[0\]"),
    ],
)
def test_what_cannot_be_rendered_is_refused_by_name(message: dict[str, object], named: str) -> None:
    with pytest.raises(ApiError, match=named):
        ChatTemplate().render(messages(message))
