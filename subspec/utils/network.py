"""Reachability of the hub, probed once per process within about three seconds.

The hub's client retries for tens of seconds without a network; a plain socket answers at once. Behind a proxy the
socket connects to the proxy and asks it for a tunnel to the hub: a proxy that refuses the tunnel counts as unreachable.
"""

import base64
import os
import socket
import threading
from functools import cache
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

TIMEOUT_S = 2.0

_DEFAULT_PORTS = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080, "socks4": 1080}
_TRUE = {"1", "ON", "YES", "TRUE"}


def offline_requested() -> str | None:
    """The environment variable that forbids network access; None if none does.

    The hub's libraries read these once, when they are imported; here they are read at every call.
    """
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").strip().upper() in _TRUE:
            return name
    return None


def hub_problem(endpoint: str) -> str | None:
    """Why the hub at ``endpoint`` cannot be reached, in a few words; None if it answers."""
    variable = offline_requested()
    if variable is not None:
        return f"{variable} is set"
    return _probe(endpoint)


@cache
def _probe(endpoint: str) -> str | None:
    host = urlsplit(endpoint).hostname or endpoint
    outcome: list[str | None] = []
    # Name resolution has no timeout and may block for long: the daemon thread is abandoned then.
    worker = threading.Thread(target=lambda: outcome.append(_try(endpoint)), daemon=True)
    worker.start()
    worker.join(TIMEOUT_S + 1.0)
    return outcome[0] if outcome else f"{host} did not answer within {TIMEOUT_S + 1.0:.0f} s"


def _try(endpoint: str) -> str | None:
    url = urlsplit(endpoint)
    host, port = url.hostname, _port(url)
    if host is None or port is None:
        return f"HF_ENDPOINT={endpoint} is not a web address"
    proxies = getproxies()
    proxy = None if proxy_bypass(host) else proxies.get(url.scheme) or proxies.get("all")
    try:
        if proxy is None:
            socket.create_connection((host, port), TIMEOUT_S).close()
            return None
        return _try_proxy(urlsplit(proxy if "://" in proxy else f"http://{proxy}"), host, port)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        via = "" if proxy is None else " through the configured proxy"
        return f"{host} cannot be reached{via} ({reason})"


def _port(url: SplitResult) -> int | None:
    try:
        return url.port or _DEFAULT_PORTS.get(url.scheme)
    except ValueError:  # not a number, or out of range
        return None


def _try_proxy(proxy: SplitResult, host: str, port: int) -> str | None:
    proxy_port = _port(proxy)
    if proxy.hostname is None or proxy_port is None:
        return "the proxy set in the environment is not a web address"
    with socket.create_connection((proxy.hostname, proxy_port), TIMEOUT_S) as connection:
        if proxy.scheme != "http":
            return None  # SOCKS or TLS to the proxy: that it listens is all a plain socket can tell
        request = f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n"
        if proxy.username is not None:
            login = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}".encode()
            request += f"Proxy-Authorization: Basic {base64.b64encode(login).decode()}\r\n"
        connection.sendall(f"{request}\r\n".encode())
        answer = connection.recv(256).split(b"\r\n")[0].decode("latin-1").split(" ", 2)
    if len(answer) >= 2 and answer[1].startswith("2"):
        return None
    return f"the configured proxy refuses a connection to {host} ({' '.join(answer[1:]) or 'no answer'})"
