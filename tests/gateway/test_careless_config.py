"""Configuration that cannot mean what it says is refused at the start, by key and with a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from conserve_serving.gateway.config import parse_config
from conserve_serving.gateway.errors import ConfigError
from conserve_serving.gateway.gateway import Gateway

DECODE = "[[tiers]]\nrole = 'decode'\n"
ATTACH = "engine = 'attach'\n"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (DECODE + "urls = ['http://a:1']", ["tiers.0", "urls", 'engine = "attach"']),
        (DECODE + ATTACH + "urls = []", ["urls is missing"]),
        (
            DECODE + ATTACH + "urls = ['http://a:1', 'http://A:1/']",
            ["tiers.0.urls", "http://A:1/", "twice"],
        ),
        (
            DECODE + ATTACH + "urls = ['http://a']\n" + DECODE + ATTACH + "urls = ['http://a:80']",
            ["tiers.1.urls", "http://a:80", "twice"],
        ),
        (DECODE + ATTACH + "urls = ['http://a:99999']", ["tiers.0.urls", "http://host:port"]),
        (DECODE + ATTACH + "urls = ['http://a:1/v1']", ["tiers.0.urls", "http://host:port"]),
        ("[[tiers]]\nrole = 'prefill'", ["tiers", "decode", "hosting"]),
        ("[identity]\naliases = ['x-ok', 'bad name']", ["identity.aliases", "bad name"]),
        ("[identity]\naliases = ['']", ["identity.aliases", "header"]),
        ("[identity]\naliases = 'x-a'", ["identity.aliases"]),
        ("[gateway]\nport = true", ["gateway.port", "integer"]),
        ("[gateway]\nport = '80'", ["gateway.port", "integer"]),
        ("[gateway]\nstall_timeout_s = '80'", ["gateway.stall_timeout_s", "number"]),
        ("[gateway]\nstall_timeout_s = nan", ["gateway.stall_timeout_s", "finite"]),
        ("[gateway]\npoll_interval_s = inf", ["gateway.poll_interval_s", "finite"]),
        ("[identity]\norder = ['body:sesion_id']", ["identity.order", "body:session_id"]),
        ("[identity]\norder = ['routrs']", ["identity.order", "did you mean 'routers'"]),
        ("[identity]\norder = ['lineage', 'body']", ["identity.order", "last"]),
        ("[identity]\norder = ['header:bad name']", ["identity.order", "bad name"]),
        ("[scheduler]\nmax_attempts = '3'", ["scheduler.max_attempts", "integer"]),
        (DECODE + "count = 257", ["tiers.0.count", "256"]),
        (
            DECODE + "[[tiers]]\nrole = 'prefill'\npage_tokens = 16",
            ["tiers.0.page_tokens = 64", "tiers.1.page_tokens = 16"],
        ),
        (
            DECODE + "[[tiers]]\nrole = 'prefill'\nmodel = 'other'",
            ["tiers.0.model = 'Qwen/Qwen3-0.6B'", "tiers.1.model = 'other'"],
        ),
        (
            DECODE + "[[tiers]]\nrole = 'prefill'\nprofile = 'h100-qwen3-8b'",
            ["tiers.0.model = 'Qwen/Qwen3-0.6B'", "tiers.1.model = 'Qwen/Qwen3-8B'"],
        ),
        (
            DECODE + "[[tiers]]\nrole = 'prefill'\nspeed = 2",
            ["tiers.0.speed = 1", "tiers.1.speed = 2"],
        ),
        (DECODE + "kv_capacity_tokens = 63", ["tiers.0", "kv_capacity_tokens", "page_tokens"]),
        ("[tiers]\nrole = 'decode'", ["tiers", "[[tiers]]"]),
        ("gateway = 3", ["gateway"]),
    ],
)
def test_careless_configuration_is_refused(text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config(text, origin="c.toml")
    for part in [*parts, "c.toml"]:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "[gateway]\nstall_timeout_s = 80",
        "[[tiers]]\nrole = 'prefill'\n[scheduler]\ntier_mode = 'hosting'",
        "[[tiers]]\nrole = 'prefill'\n[scheduler]\npolicy = 'collocated'",
        "tiers = []",
        "[identity]\naliases = ['x-a', 'X_b.c']",
        DECODE + "[[tiers]]\nrole = 'prefill'\ncount = 256\nspeed = 1.0",
        DECODE + "[[tiers]]\nrole = 'prefill'\nengine = 'attach'\nurls = ['http://[::1]:4']",
    ],
)
def test_careful_configuration_is_taken(text: str) -> None:
    parse_config(text)


async def test_journal_that_cannot_be_written_is_a_configuration_error(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "journal.jsonl"
    config = parse_config(f"[gateway]\nport = 0\ndecision_journal = '{path}'")
    with pytest.raises(ConfigError, match=r"gateway\.decision_journal: .*nowhere.*writ"):
        Gateway(config)
