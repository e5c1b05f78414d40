"""An agent on LiteLLM's Router that finds out from a log what went wrong.

conserve up                                                     # in another terminal
python example_agents/litellm_agent/agent.py "Why did orders fail?" --log incident.log
"""

from __future__ import annotations

import argparse
import os
import sys
import uuid
from pathlib import Path
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network for prices

import litellm
import openai
from log_tools import SCHEMAS, LogTools

import litellm_conserve
from conserve_agents import Gateway, GatewayError
from conserve_agents.report import Watch, try_text

PROMPT = (
    "You are on call. Answer from the log alone, which you read with your tools, and quote the "
    "lines that prove what you say. Look for what changed before the first error."
)
QUESTION = (
    'Search the log for "payment ERROR", count its lines by level and show the lines around '
    "line 61. Why did orders fail?"
)
MAX_CALLS = 10  # of the model


def investigate(
    question: str, log: LogTools, router: litellm.Router, session_id: str
) -> str | None:
    """The usual loop. To ConServe the session is the conversation; nothing else is different."""
    messages: list[Any] = [
        {"role": "system", "content": PROMPT},
        {"role": "user", "content": question},
    ]
    for _ in range(MAX_CALLS):
        chunks = []
        for chunk in router.completion(
            "on-call",
            messages,
            tools=SCHEMAS,
            stream=True,
            metadata={"session_id": session_id},
        ):
            print(chunk.choices[0].delta.content or "", end="", flush=True)
            chunks.append(chunk)
        message = litellm.stream_chunk_builder(chunks).choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls or ():
            print(f"[{call.function.name} {call.function.arguments}]")
            result = log.call(call.function.name, call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        if not message.tool_calls:
            print()
            return message.content
    return None


def router_for(gateway: Gateway, model: str) -> litellm.Router:
    """One deployment, tried three times. More of them, fallbacks and limits are LiteLLM's usual."""
    litellm_conserve.register(model)
    deployment = {"model": f"conserve/{model}", "api_base": f"{gateway.root}/v1"}
    return litellm.Router([{"model_name": "on-call", "litellm_params": deployment}], num_retries=2)


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Find out from a log what went wrong.")
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument(
        "--log", type=Path, default=Path(__file__).with_name("incident.log"), help="a text file"
    )
    parser.add_argument("--gateway", help="default: CONSERVE_BASE_URL, else 127.0.0.1:8000")
    parser.add_argument("--model", help="default: the first one the gateway serves")
    options = parser.parse_args(argv)
    try:
        log = LogTools(options.log)
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--log {options.log}: {error}")
    try:
        gateway = Gateway(options.gateway)
        router = router_for(gateway, options.model or gateway.models()[0])
        watch = Watch(gateway)
    except GatewayError as error:
        print(f"{error}\nStart one with: conserve up", file=sys.stderr)
        return 1
    session_id = f"incident-{uuid.uuid4().hex[:8]}"
    try:
        answer = investigate(options.question, log, router, session_id)
    except openai.OpenAIError as error:  # the base of LiteLLM's own
        print(f"The model could not be asked: {error}", file=sys.stderr)
        return 1
    else:
        print(f"\n{try_text(watch, [session_id])}")
    finally:
        litellm_conserve.end_session(session_id, api_base=gateway.root)
    if answer is None:
        print(f"No answer after {MAX_CALLS} calls.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
