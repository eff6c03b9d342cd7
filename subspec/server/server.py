"""Listen, serve, and drain: Ctrl-C finishes what runs and refuses what is new, a second Ctrl-C ends at once."""

import os
import signal
import socket
import threading
from contextlib import ExitStack, suppress
from types import FrameType

import uvicorn

from subspec.config.schema import DecodingConfig, ServeConfig
from subspec.errors import ConfigError
from subspec.server.app import build_app
from subspec.server.service import Service
from subspec.server.worker import Worker
from subspec.targets import Target
from subspec.utils.console import Note


def listen(serve: ServeConfig) -> socket.socket:
    """The socket of a server, so that a port in use is refused before anything is loaded, by a ConfigError."""
    try:
        family, *_, address = socket.getaddrinfo(serve.host, serve.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise ConfigError(
            f"serve.host={serve.host} serve.port={serve.port}: cannot listen there ({reason}): choose another"
        ) from error


class Server:
    """A worker, and its HTTP server in a thread of its own."""

    def __init__(self, target: Target, worker: Worker, decoding: DecodingConfig, serve: ServeConfig) -> None:
        self.worker = worker
        self.service = Service(target, worker, decoding, serve.queue)
        app = build_app(self.service, serve.api_key)
        self.http = uvicorn.Server(
            uvicorn.Config(app, http="h11", ws="none", lifespan="off", access_log=False, log_config=None)
        )

    def run(self, listening: socket.socket, note: Note) -> None:
        """Serve until a signal; call it in the main thread, which loaded the engine.

        Raises KeyboardInterrupt if texts were cut off, or the engine's failure.
        """
        thread = threading.Thread(target=self.serve_http, args=[listening], name="http", daemon=True)

        def drain(*_: int | FrameType | None) -> None:
            if self.http.should_exit:
                self.http.force_exit = True
                self.worker.stop()
            elif self.service.taken:
                note(f"finishing {self.service.taken} request(s); Ctrl-C again ends at once")
            self.http.should_exit = True

        with ExitStack() as stack:
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.signal(number, drain))
            thread.start()
            try:
                self.worker.run()
            finally:
                self.http.should_exit = True
                # A client that reads nothing must not keep a server from ending at once.
                thread.join(5 if self.http.force_exit else None)
        if self.http.force_exit:
            raise KeyboardInterrupt("texts were cut off")

    def serve_http(self, listening: socket.socket) -> None:
        """Serve until ``http.should_exit``, then stop the worker."""
        try:
            with suppress(KeyboardInterrupt):
                self.http.run(sockets=[listening])
        finally:
            self.worker.stop()
