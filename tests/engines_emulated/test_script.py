from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from conserve_serving.engines.emulated.errors import ApiError
from conserve_serving.engines.emulated.lift import paths_in
from conserve_serving.engines.emulated.protocol import Message, ResponseFormat, Tool
from conserve_serving.engines.emulated.script import MAX_ROUNDS, Reply, answer_chat

STRING = {"type": "string"}


def tool(name: str, description: str = "", **properties: dict[str, Any]) -> Tool:
    required = [key for key, part in properties.items() if not part.pop("optional", False)]
    parameters = {"type": "object", "properties": properties, "required": required}
    function = {"name": name, "description": description, "parameters": parameters}
    return msgspec.convert({"type": "function", "function": function}, Tool)


def ask(text: str, *tools: Tool, **options: Any) -> Reply:
    messages = msgspec.convert([{"role": "user", "content": text}], list[Message])
    return answer_chat(messages, tools=list(tools) or None, **options)


def arguments(reply: Reply) -> Any:
    assert len(reply.calls) == 1
    return json.loads(reply.calls[0][1])


WEATHER = tool("get_weather", "Get the weather at a location.", location=dict(STRING))
MAGIC = tool(
    "magic_function",
    "Apply a magic function to an input.",
    input={"type": "integer", "exclusiveMinimum": -1000, "exclusiveMaximum": 1000},
)
ADDER = tool("my_adder", "Adds.", a={"type": "integer"}, b={"type": "integer"})
CUSTOMER = tool("unicode_customer", "Creates one.", customer_name=dict(STRING))
STYLE = tool("greeting_generator", "Generate a greeting.", answer_style=dict(STRING))
NOTHING = tool("magic_function_no_args")
BOOK = tool(
    "book",
    "Book a table.",
    restaurant=dict(STRING),
    people={"type": "integer", "minimum": 1},
    date={"type": "string", "format": "date"},
    seat={"enum": ["inside", "outside"]},
    wishes={"type": "array", "items": STRING, "optional": True},
    contact={
        "type": "object",
        "properties": {"email": STRING, "phone": STRING},
        "required": ["email"],
    },
)


@pytest.mark.parametrize(
    ("text", "offered", "expected"),
    [
        ("What is the value of magic_function(3)? Use the tool.", MAGIC, {"input": 3}),
        ("What is magic_function_no_args()?", NOTHING, {}),
        ("What is 1 + 2", ADDER, {"a": 1, "b": 2}),
        ("Add b = 5 and a = -7", ADDER, {"a": -7, "b": 5}),
        ("What is the weather in San Francisco, CA?", WEATHER, {"location": "San Francisco, CA"}),
        ("Create one named '你好啊集团' (Hello Group)", CUSTOMER, {"customer_name": "你好啊集团"}),
        ("Using the tool, generate a Pirate greeting.", STYLE, {"answer_style": "Pirate"}),
        (
            'Book "Chez Nous" for 4 people, outside, on 2026-05-03; email is ada@example.org',
            BOOK,
            {
                "restaurant": "Chez Nous",
                "people": 4,
                "date": "2026-05-03",
                "seat": "outside",
                "contact": {"email": "ada@example.org"},
            },
        ),
    ],
)
def test_arguments_are_lifted_from_the_words(text: str, offered: Tool, expected: Any) -> None:
    assert arguments(ask(text, offered)) == expected


def test_numbers_out_of_bounds_are_not_lifted() -> None:
    value = arguments(ask("Use magic_function(5000)", MAGIC))["input"]
    assert -1000 < value < 1000


def test_several_values_for_one_argument_become_parallel_calls() -> None:
    text = "What is the weather in Paris and London?"
    both = ask(text, WEATHER).calls
    assert [json.loads(call[1])["location"] for call in both] == ["Paris", "London"]
    assert len(ask(text, WEATHER, parallel_tool_calls=False).calls) == 1


def test_several_tools_named_in_the_words_are_called_together() -> None:
    reply = ask("Use magic_function on 3 and my_adder on 4 and 5", MAGIC, ADDER)
    assert [name for name, _ in reply.calls] == ["magic_function", "my_adder"]


def test_tool_choice() -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    assert ask("Hello!", MAGIC, WEATHER, tool_choice="required").calls
    assert ask("Hello!", MAGIC, WEATHER, tool_choice=named).calls[0][0] == "get_weather"
    refused = ask("What is the weather in Rome?", WEATHER, tool_choice="none")
    assert not refused.calls
    assert refused.content


@pytest.mark.parametrize(
    ("choice", "tools", "message"),
    [
        ("required", [], "Tools cannot be empty"),
        ({"type": "function", "function": {"name": "x"}}, [], "Tools cannot be empty"),
        ({"type": "function", "function": {"name": "x"}}, [MAGIC], "Tool 'x' not found"),
        ("sometimes", [MAGIC], "tool_choice 'sometimes' is unknown"),
    ],
)
def test_impossible_tool_choices(choice: Any, tools: list[Tool], message: str) -> None:
    with pytest.raises(ApiError, match=message):
        ask("Hello", *tools, tool_choice=choice)


FILES = [
    tool("list_files", "List the files in a folder.", path={"type": "string", "optional": True}),
    tool("read_file", "Read a file.", path=dict(STRING)),
    tool("search", "Search all files for a text.", query=dict(STRING)),
]
RESULTS = {
    "list_files": "README.md\ncore/ledger.py\ncore/types.py",
    "read_file": "class Ledger: keeps the books",
    "search": "core/ledger.py:1: class Ledger",
    "grep": "README.md:9: `ledger.books.id` names the books of a ledger\ncore/x.py:1: class Ledger",
}


def run_loop(question: str, tools: list[Tool], **options: Any) -> tuple[list[str], Reply]:
    history: list[dict[str, Any]] = [{"role": "user", "content": question}]
    used: list[str] = []
    for _ in range(MAX_ROUNDS + 2):
        reply = answer_chat(msgspec.convert(history, list[Message]), tools=tools, **options)
        if not reply.calls:
            return used, reply
        calls = []
        for index, (name, text) in enumerate(reply.calls):
            used.append(f"{name}{text}")
            call = {"id": f"{len(used)}", "function": {"name": name, "arguments": text}}
            calls.append(call)
            assert index < 8
        history.append({"role": "assistant", "content": "", "tool_calls": calls})
        for call in calls:
            content = RESULTS.get(call["function"]["name"], "done")
            history.append({"role": "tool", "tool_call_id": call["id"], "content": content})
    raise AssertionError(f"the loop did not end: {used}")


def test_an_agent_loop_lists_reads_and_answers_with_what_it_read() -> None:
    used, reply = run_loop("What does the ledger in this repository do?", FILES)
    assert used == ["list_files{}", 'read_file{"path": "core/ledger.py"}']
    assert RESULTS["read_file"] in reply.content


def test_a_loop_uses_the_tools_the_question_names() -> None:
    used, _ = run_loop("Search for 'Ledger' and read core/ledger.py", FILES)
    assert 'search{"query": "Ledger"}' in used
    assert 'read_file{"path": "core/ledger.py"}' in used


def test_a_file_that_a_search_found_is_read_and_no_name_in_its_text() -> None:
    tools = [tool("grep", "Search all files for a text.", query=dict(STRING)), FILES[1]]
    used, _ = run_loop("Which file says where the ledger keeps its books?", tools)
    (read,) = [call for call in used if call.startswith("read_file")]
    assert read in ('read_file{"path": "README.md"}', 'read_file{"path": "core/x.py"}')


@pytest.mark.parametrize("question", ["", "Hello", "Use every tool on every file, twice!", "¿?"])
def test_every_loop_ends(question: str) -> None:
    many = [*FILES, WEATHER, MAGIC, ADDER, BOOK, NOTHING, STYLE, CUSTOMER]
    used, reply = run_loop(question, many)
    assert len(used) == len(set(used))
    assert reply.content


def test_a_forced_loop_moves_on_to_tools_not_yet_used() -> None:
    # LangChain's ToolStrategy forces a call at every turn; the last tool takes the answer.
    final = tool("FinalAnswer", "Gives the answer.", text=dict(STRING))
    history = [
        {"role": "user", "content": "What is the weather in Rome?"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "function": {"name": "get_weather", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    messages = msgspec.convert(history, list[Message])
    reply = answer_chat(messages, tools=[WEATHER, final], tool_choice="required")
    assert reply.calls[0][0] == "FinalAnswer"


def test_final_answers_quote_list_content_too() -> None:
    history = [
        {"role": "user", "content": "What is 1 + 2"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "function": {"name": "my_adder", "arguments": "{}"}}],
        },
        {
            "role": "tool",
            "tool_call_id": "1",
            "content": [{"type": "text", "text": '{"result": 3}'}],
        },
    ]
    reply = answer_chat(msgspec.convert(history, list[Message]), tools=[ADDER])
    assert '{"result": 3}' in reply.content
    assert "my_adder" in reply.content


def test_a_follow_up_question_starts_a_new_round() -> None:
    history = [
        {"role": "user", "content": "What is 1 + 2"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "function": {"name": "my_adder", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "3"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "What is 3 + 4"},
    ]
    reply = answer_chat(msgspec.convert(history, list[Message]), tools=[ADDER])
    assert arguments(reply) == {"a": 3, "b": 4}


def formatted(text: str, schema: dict[str, Any]) -> Any:
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return json.loads(
        ask(text, response_format=msgspec.convert(response_format, ResponseFormat)).content
    )


def test_a_response_format_is_filled() -> None:
    joke = {
        "type": "object",
        "properties": {"setup": STRING, "punchline": STRING},
        "required": ["setup", "punchline"],
        "additionalProperties": False,
    }
    value = formatted("Tell me a joke about cats.", joke)
    assert set(value) == {"setup", "punchline"}
    assert all(isinstance(text, str) and text for text in value.values())
    assert "cats" in value.values()


def test_any_json_object_has_the_keys_that_were_asked_for() -> None:
    text = "Tell me a joke about cats. Return JSON with 'setup' and 'punchline' keys."
    reply = ask(text, response_format=ResponseFormat(type="json_object"))
    assert set(json.loads(reply.content)) == {"setup", "punchline"}
    plain = ask("Say something.", response_format=ResponseFormat(type="json_object"))
    assert isinstance(json.loads(plain.content), dict)


def test_a_format_with_tools_comes_after_the_tools() -> None:
    schema = {"type": "object", "properties": {"a": STRING}, "required": ["a"]}
    response_format = msgspec.convert(
        {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}, ResponseFormat
    )
    used, reply = run_loop(
        "What is the weather in Rome?", [WEATHER], response_format=response_format
    )
    assert used == ['get_weather{"location": "Rome"}']
    assert set(json.loads(reply.content)) == {"a"}
    with pytest.raises(ApiError, match="cannot be combined"):
        ask("x", WEATHER, tool_choice="required", response_format=response_format)


def test_an_unknown_response_format_is_refused() -> None:
    with pytest.raises(ApiError, match="'xml' is not emulated"):
        ask("x", response_format=ResponseFormat(type="xml"))
    with pytest.raises(ApiError, match="schema_ is required"):
        ask("x", response_format=ResponseFormat(type="json_schema"))


def test_answers_say_they_are_emulated_and_differ_between_questions() -> None:
    one, other = ask("hi").content, ask("ho").content
    assert "emulated" in one
    assert one != other
    assert one == ask("hi").content


def test_paths_that_a_search_found_come_before_what_only_looks_like_one() -> None:
    text = "at 2 conversations/s see core/x.py\nREADME.md:3: serving\ndocs/a.md:14: more"
    assert paths_in(text) == ["README.md", "docs/a.md", "core/x.py", "conversations/s"]
