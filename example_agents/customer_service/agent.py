"""A customer-service agent with a policy, a dozen tools and a database, on the OpenAI SDK.

conserve up                                                     # in another terminal
python example_agents/customer_service/agent.py                 # a scripted customer
python example_agents/customer_service/agent.py --chat          # be the customer yourself
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import openai
from shop import Shop, call, schemas, tools_of

from conserve_agents import Gateway, GatewayError, conversation
from conserve_agents.openai import ConServeOpenAI  # stock: from openai import OpenAI
from conserve_agents.report import Watch, try_text

POLICY = Path(__file__).with_name("policy.md")
MAX_CALLS = 12  # of the model, for one message of the customer
CUSTOMER = (
    "Hello! Please find me by e-mail: my e-mail is yara.haddad@example.com.",
    "I would like the details of my order. The order id is W1042.",
    "Please cancel that order. The order id is W1042; the reason is no longer needed.",
    "Yes, go ahead. And get the product variants of the lamp: its product id is P2.",
)


def serve(client: ConServeOpenAI, model: str, shop: Shop, customer: Iterable[str]) -> None:
    """The whole conversation: for each message of the customer, tools until there is an answer."""
    tools = tools_of(shop)
    offered: Any = schemas(tools.values())
    messages: list[Any] = [{"role": "system", "content": POLICY.read_text("utf-8")}]
    for said in customer:
        messages.append({"role": "user", "content": said})
        for _ in range(MAX_CALLS):
            answer = client.chat.completions.create(model=model, messages=messages, tools=offered)
            message = answer.choices[0].message
            messages.append(message.model_dump(exclude_none=True))
            for one in message.tool_calls or ():
                if one.type == "function":
                    result = call(tools, one.function.name, one.function.arguments)
                    print(f"  [{one.function.name} {one.function.arguments}]")
                    messages.append({"role": "tool", "tool_call_id": one.id, "content": result})
            if not message.tool_calls:
                print(f"agent: {message.content}\n")
                break
        else:
            print(f"agent: I am sorry, that took too long. ({MAX_CALLS} calls)\n")


def scripted() -> Iterator[str]:
    """The customer of the example."""
    for said in CUSTOMER:
        print(f"customer: {said}")
        yield said


def typed() -> Iterator[str]:
    """Whoever is at the keyboard, until they leave (end of input, or an empty line)."""
    with contextlib.suppress(EOFError):
        while said := input("customer: ").strip():
            yield said


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Serve a customer of a small shop.")
    parser.add_argument("--chat", action="store_true", help="be the customer yourself")
    parser.add_argument("--database", type=Path, help="kept between runs; default: a fresh one")
    parser.add_argument("--gateway", help="default: CONSERVE_BASE_URL, else 127.0.0.1:8000")
    parser.add_argument("--model", help="default: the first one the gateway serves")
    options = parser.parse_args(argv)
    try:
        gateway = Gateway(options.gateway)
        served = gateway.models()
        watch = Watch(gateway)
    except GatewayError as error:
        print(f"{error}\nStart one with: conserve up", file=sys.stderr)
        return 1
    customer = typed() if options.chat else scripted()
    with tempfile.TemporaryDirectory() as folder:
        shop = Shop(options.database or Path(folder, "shop.db"))
        try:
            with ConServeOpenAI(base_url=f"{gateway.root}/v1") as client, conversation() as talk:
                serve(client, options.model or served[0], shop, customer)
                print(try_text(watch, [talk.id]))
        except openai.OpenAIError as error:
            print(f"The model could not be asked: {error}", file=sys.stderr)
            return 1
        finally:
            shop.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
