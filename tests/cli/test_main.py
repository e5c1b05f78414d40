"""The command line itself: exit codes, messages, configuration."""

from __future__ import annotations

import http.server
import json
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from conserve_serving.cli import COMMANDS, cli, run
from conserve_serving.cli.cluster_file import plan_cluster, read_config, to_toml
from conserve_serving.cli.config import explained
from conserve_serving.cli.errors import BadInputError
from conserve_serving.cli.gateway_http import GatewayHttp
from conserve_serving.cli.sglang_tiers import engine_ids
from conserve_serving.engines.profile import list_profiles
from conserve_serving.gateway.config import Setting, parse_config
from conserve_serving.gateway.config import explain as explain_settings


def test_every_command_is_there_and_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    listed = capsys.readouterr().out
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", listed, re.MULTILINE)
        assert run([name, "--help"]) == 0
        assert f"conserve {name}" in capsys.readouterr().out
    assert cli.get_command(None, "frobnicate") is None  # type: ignore[arg-type] # unused


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from conserve_serving.cli import run; run(['--help']); print(sorted("
        "{'rich', 'pydantic', 'msgspec', 'asyncio', 'uvicorn'} & set(sys.modules)))"
    )
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)  # noqa: S603 - ours
    assert done.stdout.splitlines()[-1] == "[]"


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["frobnicate"]) == 2
    assert "frobnicate" in capsys.readouterr().err
    assert run(["config"]) == 2
    assert "--explain" in capsys.readouterr().err
    assert run(["explain", "--gateway", "ftp://x", "c"]) == 2
    assert "http://HOST:PORT" in capsys.readouterr().err


@pytest.mark.parametrize("speed", ["nan", "inf", "0", "-1"])
@pytest.mark.parametrize("command", [["up"], ["demo"]])
def test_speed_is_a_finite_number(
    capsys: pytest.CaptureFixture[str], command: list[str], speed: str
) -> None:
    assert run([*command, "--speed", speed]) == 2
    assert "--speed" in capsys.readouterr().err


def test_unreachable_gateway_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", "c", "--gateway", "http://127.0.0.1:1"]) == 1
    what, remedy = capsys.readouterr().err.splitlines()
    assert what.startswith("error: no gateway answers at http://127.0.0.1:1")
    assert remedy.startswith("  fix: start one with `conserve up`")


def test_profiles_are_listed_with_their_confidence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["profiles"]) == 0
    listed = capsys.readouterr().out
    assert [name for name in list_profiles() if f"{name}: " not in listed] == []
    assert run(["profiles", "a40-qwen3-0.6b"]) == 0
    assert re.search(r"decode +measured ", capsys.readouterr().out)
    assert run(["profiles", "x100"]) == 2
    assert "no hardware profile 'x100'" in capsys.readouterr().err


# --- configuration ------------------------------------------------------------------------------


def test_explained_settings_are_a_file_that_means_the_defaults() -> None:
    settings = list(explain_settings())
    text = "\n".join(explained(settings))
    for setting in settings:
        assert re.search(rf"^(# )?{setting.name} = ", text, re.MULTILINE), setting.name
    text = text.replace("# role =   # required", 'role = "decode"')
    assert parse_config(text).gateway == parse_config("").gateway
    assert parse_config(text).scheduler == parse_config("").scheduler


def test_a_long_meaning_is_wrapped_as_a_comment() -> None:
    setting = Setting(
        section="[gateway]", name="x", type="int", default="unset", description="word " * 60
    )
    lines = explained([setting])
    assert all(len(line) <= 100 for line in lines)
    assert all(line.startswith("#") for line in lines[4:])


def test_check_says_what_a_file_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        '[[tiers]]\nrole = "prefill"\nprofile = "h100-qwen3-8b"\n'
        '[[tiers]]\nrole = "decode"\nengine = "attach"\nurls = ["http://10.0.0.1:30000"]\n'
    )
    assert run(["config", "--check", str(path)]) == 0
    out = capsys.readouterr().out
    assert "prefill  p0 (emulated, h100-qwen3-8b)" in out
    assert "decode   d0 (http://10.0.0.1:30000)" in out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[gateway]\nprot = 1\n", "did you mean 'port'"),
        ("[gateway]\nport = 99999\n", "gateway.port"),
        ('[scheduler]\npolicy = "best"\n', "no such policy"),
        ('[[tiers]]\nrole = "decode"\nprofile = "x100"\n', "no such profile"),
        ("[gateway\n", "not TOML"),
    ],
)
def test_check_names_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    assert run(["config", "--check", str(path)]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert "fix: " in err
    assert run(["up", "--config", str(path)]) == 2, "the same file cannot be started either"


def test_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "--check", "/nowhere/c.toml"]) == 2
    assert "/nowhere/c.toml" in capsys.readouterr().err


def test_default_cluster_is_one_prefiller_and_two_decoders() -> None:
    plan = plan_cluster(read_config(None), port=0, speed=20.0, run_dir=Path("run"))
    plan.reserved.release()
    assert [(e.id, e.role, e.profile, e.speed) for e in plan.engines] == [
        ("p0", "prefill", "a40-qwen3-0.6b", 20.0),
        ("d0", "decode", "a40-qwen3-0.6b", 20.0),
        ("d1", "decode", "a40-qwen3-0.6b", 20.0),
    ]
    assert {e.model for e in plan.engines} == {"Qwen/Qwen3-0.6B"}


def test_gateway_gets_started_engines_by_url_and_everything_else_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        '[gateway]\nhost = "127.0.0.1"\ndrain_timeout_s = 7.5\n'
        '[identity]\naliases = ["X-Mine"]\n'
        '[scheduler]\ntier_mode = "hosting"\nhandoff_min_tokens = 512\n'
        '[[tiers]]\nrole = "prefill"\ncount = 2\nspeed = 3.0\n'
        '[[tiers]]\nrole = "decode"\nname = "a"\nspeed = 3.0\nkv_capacity_tokens = 9000\n'
        '[[tiers]]\nrole = "decode"\nengine = "attach"\nurls = ["http://h:1", "http://h:2"]\n'
    )
    config = read_config(path)
    assert engine_ids(config) == [["p0", "p1"], ["a0"], ["d0", "d1"]]
    plan = plan_cluster(config, port=0, run_dir=tmp_path)
    plan.reserved.release()
    assert [e.id for e in plan.engines] == ["p0", "p1", "a0"]
    assert plan.drain_s == 7.5
    text = plan.gateway_config(
        {id_: f"http://127.0.0.1:{n}" for n, id_ in enumerate(("p0", "p1", "a0"), start=4000)}
    )
    written = parse_config(text)
    assert written.gateway.port == plan.reserved.port
    assert written.gateway.drain_timeout_s == 7.5
    assert len(written.gateway.placement_key or "") >= 32
    assert written.identity == config.identity
    assert written.scheduler == config.scheduler
    assert [tier.urls for tier in written.tiers] == [
        ("http://127.0.0.1:4000", "http://127.0.0.1:4001"),
        ("http://127.0.0.1:4002",),
        ("http://h:1", "http://h:2"),
    ]
    assert {tier.engine for tier in written.tiers} == {"attach"}
    assert written.tiers[1].kv_capacity_tokens == 9000
    assert engine_ids(written) == engine_ids(config)


def test_the_key_of_placement_tokens_is_kept_when_one_is_set() -> None:
    config = parse_config('[gateway]\nport = 0\nplacement_key = "a secret of mine"\n')
    plan = plan_cluster(config, port=None, run_dir=Path("run"))
    plan.reserved.release()
    text = plan.gateway_config({"p0": "http://h:1", "d0": "http://h:2", "d1": "http://h:3"})
    assert parse_config(text).gateway.placement_key == "a secret of mine"


def test_toml_writer_round_trips() -> None:
    data = {
        "a": {"s": 'q"\\\n\tü', "i": -3, "f": 1e-05, "b": True, "l": ["x", "y"], "e": []},
        "t": [{"n": 1}, {"n": 2.5}],
    }
    assert tomllib.loads(to_toml(data)) == data


def test_serve_refuses_tiers_it_would_not_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[[tiers]]\nrole = "decode"\nprofile = "a40-qwen3-0.6b"\n')
    assert run(["serve", "--config", str(path)]) == 2
    assert "conserve up" in capsys.readouterr().err


def test_run_dir_that_cannot_be_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert run(["up", "--port", "0", "--run-dir", str(tmp_path / "file" / "sub")]) == 2
    assert "--run-dir" in capsys.readouterr().err


# --- explain against a gateway ------------------------------------------------------------------


@pytest.fixture
def gateway() -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """A gateway that knows one conversation; and the requests it saw."""
    seen: list[tuple[str, str | None]] = []
    known = {
        "id": "a b",
        "state": "open",
        "turns": 1,
        "decode_engine": "d0",
        "recent_turns": [
            {
                "index": 1,
                "outcome": "finished",
                "reason": "pinned",
                "ttft_s": 0.05,
                "duration_s": 0.1,
            }
        ],
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers["Authorization"]))
            status, answer = 404, {"error": {"message": "no such conversation"}}
            if self.path == "/conserve/v1/conversations/a%20b":
                status, answer = 200, known
            elif self.path.startswith("/conserve/v1/conversations?"):
                status, answer = 200, {"conversations": [known]}
            elif self.path == "/conserve/v1/cluster":
                status, answer = 200, {"speed": 20.0}
            elif self.path.endswith("broken"):
                status, answer = 500, {"error": {"message": "a defect"}}
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
        server.shutdown()
        thread.join()


def test_explain_asks_the_gateway(
    gateway: tuple[str, list[tuple[str, str | None]]], capsys: pytest.CaptureFixture[str]
) -> None:
    url, seen = gateway
    assert run(["explain", "a b", "--gateway", f"{url}/v1", "--api-key", "k"]) == 0
    out = capsys.readouterr().out
    assert "conversation a b: open, 1 turn, lives on d0" in out
    assert "first token after 1 s, 2 s in all" in out, "engine seconds, at 20 times the wall clock"
    assert seen[0] == ("/conserve/v1/conversations/a%20b", "Bearer k")
    assert run(["explain", "--gateway", url]) == 0
    assert "a b  open, 1 turn, on d0, 0 transfers" in capsys.readouterr().out
    assert run(["explain", "c", "--gateway", url]) == 2
    assert "does not know the conversation 'c'" in capsys.readouterr().err
    assert run(["explain", "broken", "--gateway", url]) == 1
    assert "answered 500: a defect" in capsys.readouterr().err


def test_urls_of_a_gateway() -> None:
    for url in ("https://x", "http://", "http://h:port", ""):
        with pytest.raises(BadInputError):
            GatewayHttp(url, timeout_s=1.0)
    assert GatewayHttp("localhost:8000/v1", timeout_s=1.0).url == "http://localhost:8000"
