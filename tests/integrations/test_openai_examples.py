"""The example agents on the OpenAI SDK: their tools, and whole runs through a real gateway."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conserve_agents import Gateway

EXAMPLES = Path(__file__).parents[2] / "example_agents"


def load(name: str, module: str) -> Any:
    """A module of an example; several have one called ``agent``."""
    spec = importlib.util.spec_from_file_location(
        f"{name}_{module}", EXAMPLES / name / f"{module}.py"
    )
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES / "customer_service")
    agent = load("customer_service", "agent")
    sys.modules.pop("shop", None)
    return agent


@pytest.fixture
def shop() -> Iterator[Any]:
    module = load("customer_service", "shop")
    made = module.Shop(":memory:")
    yield lambda name, **arguments: getattr(made, name)(**arguments)
    made.close()


def ids(printed: str) -> list[str]:
    """Ids of the conversations that a report names."""
    lines = [line for line in printed.splitlines() if line.startswith("conversation ")]
    return [line.split()[1].rstrip(":") for line in lines]


# --- the shop -------------------------------------------------------------------------------


def test_customers_and_orders_are_found(shop: Any) -> None:
    found = shop("find_customer_by_email", email="Yara.Haddad@example.com")
    assert (found["id"], found["orders"]) == ("C101", ["W1042", "W1043"])
    assert found == shop("find_customer_by_name", full_name="yara haddad", postcode="1003")
    order = shop("get_order_details", order_id="#W1042")
    assert (order["status"], [item["product"] for item in order["items"]]) == (
        "pending",
        ["Desk lamp", "Water bottle"],
    )
    assert shop("list_products")["P2"] == "Desk lamp"
    assert {v["stock"] for v in shop("get_product_variants", product_id="P2")} == {3, 9}


def test_only_what_the_policy_allows_is_done(shop: Any) -> None:
    cancelled = shop("cancel_order", order_id="W1042", reason="no longer needed")
    assert cancelled["status"] == "cancelled"
    assert shop("find_customer_by_email", email="yara.haddad@example.com")["credit_cents"] == 6000
    returned = shop("return_items", order_id="W1043", variant_ids=["V31"])
    assert (returned["status"], returned["note"]) == ("return requested", "V31")
    exchanged = shop(
        "exchange_items", order_id="W1051", variant_ids=["V62"], new_variant_ids=["V61"]
    )
    assert exchanged["note"] == "V61 for V62"
    assert shop("find_customer_by_email", email="tomas.novak@example.com")["credit_cents"] == 3500
    moved = {"street": "1 New Road", "city": "Osaka", "postcode": "5300001"}
    assert shop("change_order_address", order_id="W1060", **moved)["city"] == "Osaka"
    assert shop("change_customer_address", customer_id="C103", **moved)["city"] == "Osaka"


@pytest.mark.parametrize(
    ("name", "arguments", "why"),
    [
        ("find_customer_by_email", {"email": "x"}, "no such customer"),
        ("get_order_details", {"order_id": "W1"}, "no order"),
        ("get_product_variants", {"product_id": "P9"}, "no product"),
        ("cancel_order", {"order_id": "W1043", "reason": "no longer needed"}, "delivered"),
        ("cancel_order", {"order_id": "W1042", "reason": "too dear"}, "not accepted"),
        ("return_items", {"order_id": "W1042", "variant_ids": ["V21"]}, "pending"),
        ("return_items", {"order_id": "W1043", "variant_ids": ["V21"]}, "has the items"),
        ("return_items", {"order_id": "W1043", "variant_ids": []}, "has the items"),
        (
            "exchange_items",
            {"order_id": "W1043", "variant_ids": ["V11"], "new_variant_ids": ["V12"]},
            "out of stock",
        ),
        (
            "exchange_items",
            {"order_id": "W1043", "variant_ids": ["V11"], "new_variant_ids": ["V21"]},
            "same product",
        ),
        (
            "exchange_items",
            {"order_id": "W1043", "variant_ids": ["V11"], "new_variant_ids": ["V13"]},
            "store credit",
        ),
        (
            "exchange_items",
            {"order_id": "W1043", "variant_ids": ["V11"], "new_variant_ids": []},
            "length",
        ),
        ("change_order_address", {"order_id": "W1042", "street": "The"}, "no number"),
        ("change_customer_address", {"customer_id": "C9", "street": "1 A"}, "no customer"),
        ("calculate", {"expression": "__import__('os')"}, "only numbers"),
        ("calculate", {"expression": "1 /"}, "cannot calculate"),
        ("calculate", {"expression": "1 / 0"}, "cannot calculate"),
    ],
)
def test_what_it_forbids_is_refused(
    shop: Any, name: str, arguments: dict[str, Any], why: str
) -> None:
    if "address" in name:
        arguments = {**arguments, "city": "A", "postcode": "1"}
    with pytest.raises(Exception, match=why) as refused:
        shop(name, **arguments)
    assert type(refused.value).__name__ == "ShopError"


def test_tools_are_described_and_called_as_a_model_does() -> None:
    module = load("customer_service", "shop")
    made = module.Shop(":memory:")
    tools = module.tools_of(made)
    described = {s["function"]["name"]: s["function"] for s in module.schemas(tools.values())}
    assert len(described) == 12 and "close" not in described
    parameters = described["return_items"]["parameters"]
    assert parameters["required"] == ["order_id", "variant_ids"]
    assert parameters["properties"]["variant_ids"]["items"] == {"type": "string"}
    assert all(f["description"] for f in described.values())
    assert module.call(tools, "calculate", '{"expression": "(4500 + 1500) / 100"}') == (
        '{"result": 60.0}'
    )
    for name, arguments in (("rm", "{}"), ("calculate", "{"), ("calculate", '{"x": 1}')):
        assert module.call(tools, name, arguments).startswith("error: ")
    made.close()


# --- whole runs -----------------------------------------------------------------------------


def test_a_customer_is_served(
    service: Any, cluster: str, gateway: Gateway, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    database = tmp_path / "shop.db"
    assert service.main(["--gateway", cluster, "--database", str(database)]) == 0
    printed = capsys.readouterr().out
    assert "C101" in printed and "[cancel_order " in printed
    (conversation,) = ids(printed)
    assert "transfers  1 (1 × first_turn)" in printed and "J on all engines" in printed
    seen = gateway.conversation(conversation)
    assert seen["state"] == "ended" and seen["turns"] >= 8
    assert seen["cached_tokens"] > seen["prompt_tokens"] / 2
    kept = load("customer_service", "shop").Shop(database)
    assert kept.get_order_details("W1042")["status"] == "cancelled"
    kept.close()


def test_dates_are_worked_out_in_one_conversation_or_in_several(
    cluster: str, gateway: Gateway, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = load("plain_openai", "agent")
    assert agent.main(["--gateway", cluster]) == 0
    printed = capsys.readouterr().out
    assert "59" in printed and "Sunday" in printed
    (conversation,) = ids(printed)
    assert gateway.conversation(conversation)["state"] == "ended"
    assert agent.main(["--gateway", cluster, "--together"]) == 0
    apart = ids(capsys.readouterr().out)
    assert len(set(apart)) == 2
    assert {gateway.conversation(one)["state"] for one in apart} == {"ended"}
    assert agent.run_tool("add_days", '{"to_date": "2026-02-27", "days": 2}') == "2026-03-01"
    assert agent.run_tool("weekday", '{"of_date": "never"}').startswith("error: ")


@pytest.mark.parametrize("name", ["customer_service", "plain_openai"])
def test_a_gateway_that_is_not_there_is_said(
    name: str, service: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = service if name == "customer_service" else load(name, "agent")
    assert agent.main(["--gateway", "http://127.0.0.1:9/v1"]) == 1
    assert "conserve up" in capsys.readouterr().err
