"""Access to the Weights & Biases library and service: key, network and helper process."""

import contextlib
import os
import socket
import urllib.request
from typing import Any
from urllib.parse import urlsplit

import psutil


def import_wandb() -> Any:
    """Import the library with its error reports off unless the user has switched them on."""
    # The reports use the same network. If that fails, they delay the end of the run by 20 s.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb


def has_credentials(wandb: Any) -> bool:
    """Whether the library finds a key in the environment, netrc or its settings. Never prompts."""
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    return bool(wandb.api.api_key)


def reachable(url: str, timeout_s: float) -> bool:
    """Whether a connection to the host of ``url`` opens; assumed behind a proxy."""
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    if parts.hostname is None or parts.scheme in proxies or "all" in proxies:
        return True
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=timeout_s).close()
    except OSError:
        return False
    return True


def drop_service(wandb: Any) -> None:
    """Kill the library's helper process, a child of this process.

    It would retry pending uploads for minutes, and the interpreter waits for it at exit.
    """
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name().startswith("wandb-core"):
                child.kill()
    # Raises because the connection is gone.
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()
