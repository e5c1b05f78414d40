"""The listening socket of our own servers."""

from __future__ import annotations

import socket


def listen(host: str, port: int) -> socket.socket:
    """A bound, non-blocking TCP socket; port 0 takes a free one.

    Raises:
        OSError: the address is taken or not ours. The socket has been closed.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Accepted connections inherit it; without it small events wait for delayed acknowledgements.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener
