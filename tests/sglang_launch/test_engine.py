"""`conserve engine`: one engine of the file, in the foreground."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from conserve_serving.cli import run
from conserve_serving.cli.engine import plan_engine
from conserve_serving.cli.errors import BadInputError
from conserve_serving.gateway.config import parse_config

STAND_IN = Path(__file__).with_name("stand_in")
PATIENCE_S = 60.0
FAR = "http://192.0.2.1:30000"  # RFC 5737: nobody's


def tiers(url: str, *, before: str = "") -> str:
    return (
        f'{before}[[tiers]]\nrole = "decode"\nengine = "sglang"\nmodel = "/m"\nurls = ["{url}"]\n'
        f'python = "{sys.executable}"\nenv = {{PYTHONPATH = "{STAND_IN}"}}\n'
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_engine_runs_in_the_foreground_until_told(tmp_path: Path) -> None:
    port = free_port()
    path = tmp_path / "c.toml"
    path.write_text(
        tiers(f"http://127.0.0.1:{port}", before=f'[handoff]\npath = "{tmp_path}/kv"\n')
    )
    argv = [sys.executable, "-m", "conserve_serving.cli", "engine", "--config", str(path)]
    argv += ["--id", "d0", "--run-dir", str(tmp_path)]
    with subprocess.Popen(  # noqa: S603 - our own module
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if f"d0 is ready at http://127.0.0.1:{port}" in line:
                    break
            with socket.create_connection(("127.0.0.1", port), PATIENCE_S):
                pass
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
    assert process.returncode == 0, err
    assert "fired up" in out, "its log is on the terminal"
    assert "fired up" in (tmp_path / "d0.log").read_text()
    assert (tmp_path / "kv").is_dir()


def test_engine_that_cannot_start_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.toml"
    text = tiers(f"http://127.0.0.1:{free_port()}", before=f'[handoff]\npath = "{tmp_path}"\n')
    path.write_text(text.replace(str(STAND_IN), "/nowhere"))
    assert run(["engine", "--config", str(path), "--id", "d0", "--run-dir", str(tmp_path)]) == 1
    assert "error: d0: SGLang is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "id_", "says"),
    [
        (tiers("http://127.0.0.1:30000"), "d7", "no SGLang engine is called 'd7'"),
        ('[[tiers]]\nrole = "decode"\n', "d0", "no SGLang engine is called 'd0'"),
        (tiers(FAR), "d0", "192.0.2.1, which is not this machine"),
        (tiers("http://127.0.0.1:30000"), "d0", "do not know each other's store"),
        (tiers("").replace('urls = [""]\n', ""), "d0", "d0 has no address"),
    ],
)
def test_what_an_engine_has_to_be_told(text: str, id_: str, says: str) -> None:
    with pytest.raises(BadInputError, match=says):
        plan_engine(parse_config(text), id_, environ={})


def test_engine_acknowledges_to_the_gateway_of_the_file(tmp_path: Path) -> None:
    before = f'[gateway]\nport = 8100\n[handoff]\npath = "{tmp_path}"\n'
    engine, store = plan_engine(
        parse_config(tiers("http://127.0.0.1:30000", before=before)), "d0", environ={}
    )
    assert (engine.host, engine.port, engine.role) == ("127.0.0.1", 30000, "decode")
    assert store.ack_url == "http://127.0.0.1:8100/conserve/v1/handoffs"
