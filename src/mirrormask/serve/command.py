"""``mirrormask serve FILE``: a compiled model behind HTTP, until SIGTERM."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from mirrormask.checks import Parser, check_int, check_number, known_options, require

__all__ = ["listen", "main", "patient"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def main(arguments: Sequence[str]) -> int:
    """Run ``mirrormask serve`` with these arguments; the exit status.

    Raises:
        ValueError: an option is out of its range, or a file is not a compiled model.
        OSError: a file cannot be read, or the port is taken.
        ImportError: the extra ``serve`` is not installed.
    """
    parser = _parser()
    asked = parser.parse_args(known_options(arguments, parser._option_string_actions))
    uvicorn = require("uvicorn", "serve", "mirrormask serve")
    for module in ("starlette", "prometheus_client"):
        require(module, "serve", "mirrormask serve")
    from mirrormask.runtime.bundle.read import load
    from mirrormask.serve.app import Limits, application

    limits = Limits(
        check_int("--max-batch", asked.max_batch, low=1),
        check_number("--delay-ms", asked.delay_ms, low=0.0, high=10_000.0) / 1e3,
        check_int("--max-waiting", asked.max_waiting, low=1),
        int(check_number("--max-body-mb", asked.max_body_mb, low=0.001, high=4096.0) * (1 << 20)),
        check_number("--body-timeout", asked.body_timeout, low=0.001, high=3600.0),
    )
    check_int("--port", asked.port, low=0, high=65535)
    check_int("--grace", asked.grace, low=0)
    if asked.name and len(asked.file) > 1:
        raise ValueError(f"--name={asked.name!r} is for one file, and there are {len(asked.file)}; leave it out")
    models = {}
    for path in map(Path, asked.file):
        name = asked.name or path.stem
        if not NAME.fullmatch(name) or name in models:
            raise ValueError(f"{name!r} cannot be a model's name, or two files have it; rename one, or pass --name")
        models[name] = model = load(path, tune=not asked.no_tune, threads=asked.threads)
        print(f"{name}: {model!r}, loaded in {model.loading.seconds:.2f} s")
    listener = listen(asked.host, asked.port)
    host, port = listener.getsockname()[:2]
    config = uvicorn.Config(
        application(models, limits),
        http=patient(require("uvicorn.protocols.http.auto", "serve", "mirrormask serve"), limits.patience),
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=asked.grace,
        h11_max_incomplete_event_size=1 << 16,
    )

    class Server(uvicorn.Server):  # type: ignore[misc, name-defined]
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(f"serving on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)

    server = Server(config)

    def stop(*_: object) -> None:
        server.should_exit = True

    # uvicorn handles these while it runs, and raises them once more when all is answered.
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    print("stopped", flush=True)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="mirrormask serve",
        description="Serve compiled models (files of fast.save) by the Open Inference Protocol (KServe v2) over HTTP.",
        epilog="Example: mirrormask serve model.mirror --port 8000",
    )
    parser.add_argument("file", nargs="+", help="model.mirror; the model's name is the file's, without .mirror")
    parser.add_argument("--name", help="another name, for one file")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for all networks (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of a model (default: OMP_NUM_THREADS, else the cores)")
    parser.add_argument("--max-batch", type=int, default=32, help="rows put together (default: %(default)s)")
    parser.add_argument("--delay-ms", type=float, default=2.0, help="wait for others (default: %(default)s)")
    parser.add_argument("--max-waiting", type=int, default=512, help="requests in the queue (default: %(default)s)")
    parser.add_argument("--max-body-mb", type=float, default=64.0, help="of a request (default: %(default)s)")
    parser.add_argument(
        "--body-timeout", type=float, default=30.0, help="seconds for it, or a head (default: %(default)s)"
    )
    parser.add_argument("--grace", type=int, default=10, help="seconds to answer after SIGTERM (default: %(default)s)")
    parser.add_argument("--no-tune", action="store_true", help="guess kernels on a new processor, start sooner")
    return parser


def patient(protocols: ModuleType, seconds: float) -> type[Any]:
    """uvicorn's protocol of a connection, which ends it where no whole head of a request comes within these seconds.

    uvicorn itself waits for the first head for ever. Later ones get up to twice the time. A body's time is the
    application's to count.
    """

    class Patient(protocols.AutoHTTPProtocol):  # type: ignore[name-defined, misc]
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(seconds, self.look, None)

        def look(self, before: object) -> None:
            """Close it if it has waited since the last look: for its first request, or for one after the last."""
            waits = self.cycle is None or self.cycle.response_complete
            if self.transport.is_closing():
                return
            if waits and self.cycle is before:
                self.transport.close()
            else:
                self.loop.call_later(seconds, self.look, self.cycle if waits else self)

    return Patient


def listen(host: str, port: int) -> socket.socket:
    """A socket that waits for connections, each of which sends at once what it is given.

    An answer's head and body are two writes. Without TCP_NODELAY the second waits until the client has confirmed the
    first, which clients put off by 40 ms; asyncio sets it only for sockets that it has made itself.
    """
    version_6 = ":" in host
    family = socket.AF_INET6 if version_6 else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024, dualstack_ipv6=both)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: --host {host} --port {port}") from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
