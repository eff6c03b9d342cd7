"""The Weights & Biases library and service as a run meets them: is there a key, a network, a helper process."""

import contextlib
import os
import socket
import urllib.request
from typing import Any
from urllib.parse import urlsplit

import psutil


def import_wandb() -> Any:
    """The library, with its own error reports off unless the user has switched them on."""
    # Its own error reports go over the same network: where that fails, they hold up the end of the run by 20 s.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb


def has_credentials(wandb: Any) -> bool:
    """Whether the library would find a key: environment, netrc or its own settings. Never prompts."""
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    return bool(wandb.api.api_key)


def reachable(url: str, timeout_s: float) -> bool:
    """Whether a connection to the host of ``url`` opens; assumed where a proxy stands in between."""
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
    """End the library's helper process, a child of ours, and forget it.

    It would otherwise retry for minutes what it still wants to upload, and the interpreter waits for it at exit.
    """
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name().startswith("wandb-core"):
                child.kill()
    # Complains that the connection is gone, which is what this is for.
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()
