"""The shop: a SQLite file, and the tools that read and change it. Rules are enforced here as well:
a model that forgets the policy gets an error, not its way.
"""

from __future__ import annotations

import ast
import inspect
import json
import operator
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, get_type_hints

SCRIPT: Final = Path(__file__).with_name("shop.sql")
REASONS: Final = ("no longer needed", "ordered by mistake")
_TYPES: Final[dict[Any, dict[str, Any]]] = {
    str: {"type": "string"},
    list[str]: {"type": "array", "items": {"type": "string"}},
}


class ShopError(Exception):
    """What was asked for is not possible; the text is for the model."""


class Shop:
    """The shop in a database file, made from ``shop.sql`` where there is none yet.

    Args:
        path: the file, or ``:memory:``.
    """

    def __init__(self, path: Path | str) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        if not self._rows("SELECT name FROM sqlite_master WHERE type = 'table'"):
            self._db.executescript(SCRIPT.read_text("utf-8"))

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    # --- tools: looking ----------------------------------------------------------------------

    def find_customer_by_email(self, email: str) -> Any:
        """Find a customer by e-mail address.

        Args:
            email: the e-mail address
        """
        return self._customer("lower(email) = lower(?)", email)

    def find_customer_by_name(self, full_name: str, postcode: str) -> Any:
        """Find a customer by full name and postcode, where the e-mail address is not known.

        Args:
            full_name: first and last name
            postcode: the postcode of the customer's own address
        """
        return self._customer("lower(name) = lower(?) AND postcode = ?", full_name, postcode)

    def get_order_details(self, order_id: str) -> Any:
        """Get the status, the address and the items of an order.

        Args:
            order_id: such as W1042
        """
        order = dict(self._order(order_id))
        items = self._rows(
            "SELECT variant_id, products.name AS product, options, items.price_cents FROM items "
            "JOIN variants ON variants.id = variant_id JOIN products ON products.id = product_id "
            "WHERE order_id = ? ORDER BY variant_id",
            order["id"],
        )
        return {**order, "items": [dict(item) for item in items]}

    def list_products(self) -> Any:
        """List all products with their ids."""
        return {row["id"]: row["name"] for row in self._rows("SELECT * FROM products ORDER BY id")}

    def get_product_variants(self, product_id: str) -> Any:
        """Get the variants of a product: options, price in cents, stock.

        Args:
            product_id: such as P3
        """
        rows = self._rows("SELECT * FROM variants WHERE product_id = ? ORDER BY id", product_id)
        if not rows:
            raise ShopError(f"there is no product {product_id!r}")
        return [dict(row) for row in rows]

    def calculate(self, expression: str) -> Any:
        """Calculate a sum, such as (4500 + 1500) / 100.

        Args:
            expression: numbers, + - * / and brackets
        """
        try:
            return {"result": round(_value(ast.parse(expression, mode="eval").body), 6)}
        except (SyntaxError, ZeroDivisionError, RecursionError) as error:
            raise ShopError(f"cannot calculate {expression!r}: {error}") from error

    # --- tools: changing ---------------------------------------------------------------------

    def cancel_order(self, order_id: str, reason: str) -> Any:
        """Cancel a pending order as a whole. The price becomes store credit.

        Args:
            order_id: such as W1042
            reason: "no longer needed" or "ordered by mistake"
        """
        order = self._order(order_id, "pending")
        if reason not in REASONS:
            raise ShopError(f"reason {reason!r} is not accepted: {' or '.join(REASONS)}")
        with self._db:
            self._set_status(order, "cancelled", reason)
            self._credit(order["customer_id"], sum(self._prices(order["id"]).values()))
        return self.get_order_details(order_id)

    def change_order_address(self, order_id: str, street: str, city: str, postcode: str) -> Any:
        """Change the delivery address of a pending order.

        Args:
            order_id: such as W1042
            street: street and number
            city: the city
            postcode: the postcode
        """
        order = self._order(order_id, "pending")
        _check_address(street, postcode)
        self._db.execute(
            "UPDATE orders SET street = ?, city = ?, postcode = ? WHERE id = ?",
            (street, city, postcode, order["id"]),
        )
        return self.get_order_details(order_id)

    def change_customer_address(
        self, customer_id: str, street: str, city: str, postcode: str
    ) -> Any:
        """Change a customer's own address. Orders keep theirs.

        Args:
            customer_id: such as C101
            street: street and number
            city: the city
            postcode: the postcode
        """
        _check_address(street, postcode)
        found = self._db.execute(
            "UPDATE customers SET street = ?, city = ?, postcode = ? WHERE id = ?",
            (street, city, postcode, customer_id),
        )
        if not found.rowcount:
            raise ShopError(f"there is no customer {customer_id!r}")
        return self._customer("id = ?", customer_id)

    def return_items(self, order_id: str, variant_ids: list[str]) -> Any:
        """Ask for the return of items of a delivered order. Once for each order.

        Args:
            order_id: such as W1042
            variant_ids: the items to return
        """
        order = self._order(order_id, "delivered")
        self._held(order, variant_ids)
        self._set_status(order, "return requested", ", ".join(variant_ids))
        return self.get_order_details(order_id)

    def exchange_items(
        self, order_id: str, variant_ids: list[str], new_variant_ids: list[str]
    ) -> Any:
        """Exchange items of a delivered order for other variants of the same products.

        Args:
            order_id: such as W1042
            variant_ids: the items to give back
            new_variant_ids: what to get instead, in the same order
        """
        order = self._order(order_id, "delivered")
        if len(variant_ids) != len(new_variant_ids):
            raise ShopError("variant_ids and new_variant_ids differ in length")
        prices = self._held(order, variant_ids)
        difference = 0
        for old, new in zip(variant_ids, new_variant_ids, strict=True):
            known = {row["id"]: row for row in self._rows("SELECT * FROM variants")}
            if new not in known or known[new]["product_id"] != known[old]["product_id"]:
                raise ShopError(f"{new!r} is not another variant of the same product as {old!r}")
            if not known[new]["stock"]:
                raise ShopError(f"{new!r} is out of stock")
            difference += known[new]["price_cents"] - prices[old]
        credit = self._customer("id = ?", order["customer_id"])["credit_cents"]
        if difference > credit:
            raise ShopError(f"{difference} cents more, and only {credit} of store credit")
        with self._db:
            note = ", ".join(map(" for ".join, zip(new_variant_ids, variant_ids, strict=True)))
            self._set_status(order, "exchange requested", note)
            self._credit(order["customer_id"], -difference)
        return self.get_order_details(order_id)

    def transfer_to_person(self, summary: str) -> Any:
        """Hand the conversation over to a person.

        Args:
            summary: what the customer wants
        """
        return {"transferred": True, "summary": summary}

    # --- inside ------------------------------------------------------------------------------

    def _rows(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        return self._db.execute(sql, values).fetchall()

    def _customer(self, where: str, *values: str) -> dict[str, Any]:
        rows = self._rows(f"SELECT * FROM customers WHERE {where}", *values)  # noqa: S608 - ours
        if not rows:
            raise ShopError("there is no such customer")
        orders = self._rows("SELECT id FROM orders WHERE customer_id = ?", rows[0]["id"])
        return {**dict(rows[0]), "orders": [order["id"] for order in orders]}

    def _order(self, order_id: str, status: str | None = None) -> sqlite3.Row:
        rows = self._rows("SELECT * FROM orders WHERE id = ?", order_id.removeprefix("#"))
        if not rows:
            raise ShopError(f"there is no order {order_id!r}")
        if status is not None and rows[0]["status"] != status:
            raise ShopError(f"order {order_id} is {rows[0]['status']}, not {status}")
        return rows[0]

    def _prices(self, order_id: str) -> dict[str, int]:
        rows = self._rows("SELECT * FROM items WHERE order_id = ?", order_id)
        return {row["variant_id"]: row["price_cents"] for row in rows}

    def _held(self, order: sqlite3.Row, variant_ids: list[str]) -> dict[str, int]:
        """Prices of the order's items. Raises ShopError unless it has all of these, each once."""
        prices = self._prices(order["id"])
        unknown = [id_ for id_ in variant_ids if id_ not in prices]
        if unknown or not variant_ids or len(set(variant_ids)) < len(variant_ids):
            raise ShopError(f"order {order['id']} has the items {', '.join(prices)}, each once")
        return prices

    def _set_status(self, order: sqlite3.Row, status: str, note: str) -> None:
        self._db.execute(
            "UPDATE orders SET status = ?, note = ? WHERE id = ?", (status, note, order["id"])
        )

    def _credit(self, customer_id: str, cents: int) -> None:
        self._db.execute(
            "UPDATE customers SET credit_cents = credit_cents + ? WHERE id = ?",
            (cents, customer_id),
        )


def _check_address(street: str, postcode: str) -> None:
    for name, text in (("street", street), ("postcode", postcode)):
        if not any(char.isdigit() for char in text):
            raise ShopError(f"{name} {text!r} has no number: ask the customer")


def tools_of(shop: Shop) -> dict[str, Callable[..., Any]]:
    """The shop's public methods by name."""
    methods = inspect.getmembers(shop, inspect.ismethod)
    return {name: fn for name, fn in methods if not name.startswith("_") and name != "close"}


def schemas(tools: Iterable[Callable[..., Any]]) -> list[dict[str, Any]]:
    """Tool schemas in OpenAI's form, from signatures and docstrings."""
    return [{"type": "function", "function": _schema(tool)} for tool in tools]


def call(tools: dict[str, Callable[..., Any]], name: str, arguments: str) -> str:
    """Run one tool call as a model has made it; what is wrong with it becomes its result."""
    if name not in tools:
        return f"error: there is no tool {name!r}"
    try:
        given = json.loads(arguments or "{}")
        bound = inspect.signature(tools[name]).bind(**given)
        return json.dumps(tools[name](*bound.args), ensure_ascii=False)
    except (ShopError, TypeError, ValueError, sqlite3.Error) as error:
        return f"error: {error}"


def _schema(tool: Callable[..., Any]) -> dict[str, Any]:
    summary, _, rest = inspect.cleandoc(tool.__doc__ or "").partition("\n\nArgs:\n")
    said = dict(line.strip().split(": ", 1) for line in rest.splitlines() if ": " in line)
    hints = get_type_hints(tool)
    names = list(inspect.signature(tool).parameters)
    properties = {name: {**_TYPES[hints[name]], "description": said[name]} for name in names}
    parameters = {"type": "object", "properties": properties, "required": names}
    return {"name": tool.__name__, "description": summary, "parameters": parameters}


_OPERATORS: Final[dict[type[ast.AST], Callable[..., float]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


def _value(node: ast.AST) -> float:
    """The value of an arithmetic expression; nothing else is evaluated."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand))
    raise ShopError("only numbers, + - * / and brackets can be calculated")
