"""Where the gateway listens: a port that is free, and the host as a URL has it."""

from __future__ import annotations

import errno
import socket

from conserve_serving.cli.errors import CliError, PortInUseError

DEFAULT_PORT = 8000
#: How many ports, the default one included, are tried when none was asked for.
PORTS_TRIED = 100


class Reservation:
    """A free port, kept from everybody who takes any free port until it is released.

    Attributes:
        port: its number.
    """

    def __init__(self, socket: socket.socket) -> None:
        self._socket = socket
        self.port: int = socket.getsockname()[1]

    def release(self) -> None:
        """Give the port to whom it was reserved for. Safe to call more than once."""
        self._socket.close()


def reserve_port(host: str, port: int | None) -> Reservation:
    """Reserve the port the gateway will listen on.

    Args:
        host: address to listen on.
        port: the port asked for (0: any free one); None: the default, or the next free one.

    Raises:
        PortInUseError: the port asked for is taken.
        CliError: the address cannot be listened on, or no port near the default is free.
    """
    if port is not None:
        reserved = _try_bind(host, port)
        if reserved is None:
            raise PortInUseError(
                f"port {port} on {host} is in use",
                remedy="choose another with --port, or stop the program that listens there"
                " (another `conserve up`?)",
            )
        return reserved
    for candidate in range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED):
        reserved = _try_bind(host, candidate)
        if reserved is not None:
            return reserved
    raise CliError(
        f"no free port between {DEFAULT_PORT} and {DEFAULT_PORT + PORTS_TRIED - 1} on {host}",
        remedy="choose one with --port",
    )


def _try_bind(host: str, port: int) -> Reservation | None:
    """The port, reserved; None when it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    probe = socket.socket(family, socket.SOCK_STREAM)
    try:
        # As servers do: a port with connections in TIME_WAIT counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
    except OSError as failure:
        probe.close()
        if failure.errno == errno.EADDRINUSE:
            return None
        raise CliError(
            f"cannot listen on {host} port {port}: {failure.strerror or failure}",
            remedy="check the host and the port (ports below 1024 need privileges)",
        ) from failure
    return Reservation(probe)


def is_ours(host: str) -> bool:
    """Whether a host is this machine: one of its addresses can be bound."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def url_host(host: str) -> str:
    """The host as a local client writes it in a URL."""
    if host in {"0.0.0.0", "::"}:  # noqa: S104 - compared, not bound
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
