"""The server's application: routes of the Open Inference Protocol, limits, and what Prometheus reads."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import prometheus_client as prometheus
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mirrormask import __version__
from mirrormask.runtime.bundle.loaded import LoadedModel
from mirrormask.serve.batches import Batches, Full
from mirrormask.serve.protocol import LENGTH_HEADER, BadRequest, answer, described, parsed

__all__ = ["Limits", "application"]

LOG = logging.getLogger("mirrormask.serve")


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
        batch: rows of a batch that requests are put together to.
        delay: seconds that a request waits for others, at most.
        waiting: requests that may wait for a model.
        body: bytes of a request.
        patience: seconds in which a request's body has to have come; the command gives heads as many.
        bodies: bytes of all bodies that are not answered yet.
    """

    batch: int = 32
    delay: float = 0.002
    waiting: int = 512
    body: int = 64 << 20
    patience: float = 30.0
    bodies: int = 1 << 30


class _Metrics:
    """What is counted, in a registry of this application's own."""

    def __init__(self) -> None:
        self.registry = registry = prometheus.CollectorRegistry()
        self.requests = prometheus.Counter(
            "mirrormask_requests", "Inference requests by model and status", ["model", "status"], registry=registry
        )
        self.seconds = prometheus.Histogram(
            "mirrormask_request_seconds", "From the whole request to its answer", ["model"], registry=registry
        )
        self.batches = prometheus.Histogram(
            "mirrormask_batch_rows",
            "Rows of a batch",
            ["model"],
            buckets=[1 << i for i in range(11)],
            registry=registry,
        )
        self.model = prometheus.Histogram(
            "mirrormask_model_seconds", "Of a batch in the model", ["model"], registry=registry
        )
        self.waiting = prometheus.Gauge("mirrormask_waiting", "Requests that wait", ["model"], registry=registry)


def application(models: Mapping[str, LoadedModel], limits: Limits | None = None) -> Starlette:
    """The application that serves these models.

    Example:
        >>> application({}).routes[0].path
        '/v2'
    """
    return _Server(models, limits or Limits()).app


class _Server:
    def __init__(self, models: Mapping[str, LoadedModel], limits: Limits) -> None:
        self.models, self.limits, self.metrics, self.held = dict(models), limits, _Metrics(), 0
        self.batches: dict[str, Batches] = {}
        self.ready = False
        model = "/v2/models/{name}"
        routes = [
            Route("/v2", self._server),
            Route("/v2/health/live", self._live),
            Route("/v2/health/ready", self._is_ready),
            *[Route(path, self._model) for path in (model, model + "/versions/{version}")],
            *[Route(path + "/ready", self._model_ready) for path in (model, model + "/versions/{version}")],
            *[Route(path + "/infer", self._infer, methods=["POST"]) for path in (model, model + "/versions/{version}")],
            Route("/metrics", self._measured),
        ]
        handlers = {HTTPException: _http_error, BadRequest: _bad_request}
        self.app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)  # type: ignore[arg-type]

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        limits = self.limits
        for name, model in self.models.items():

            def ran(requests: int, rows: int, seconds: float, name: str = name) -> None:
                self.metrics.batches.labels(name).observe(rows)
                self.metrics.model.labels(name).observe(seconds)

            self.batches[name] = Batches(model, most=limits.batch, delay=limits.delay, room=limits.waiting, ran=ran)
        tasks = [asyncio.create_task(batches.run()) for batches in self.batches.values()]
        self.ready = True
        yield
        self.ready = False
        for batches in self.batches.values():
            batches.end()
        await asyncio.gather(*tasks)

    # -- what is asked ------------------------------------------------------------------------------------------------

    async def _server(self, request: HttpRequest) -> Response:
        return JSONResponse({"name": "mirrormask", "version": __version__, "extensions": ["binary_tensor_data"]})

    async def _live(self, request: HttpRequest) -> Response:
        return JSONResponse({"live": True})

    async def _is_ready(self, request: HttpRequest) -> Response:
        return JSONResponse({"ready": self.ready}, 200 if self.ready else 503)

    async def _model(self, request: HttpRequest) -> Response:
        name = self._name(request)
        return JSONResponse(described(name, self.models[name]))

    async def _model_ready(self, request: HttpRequest) -> Response:
        return JSONResponse({"name": self._name(request), "ready": self.ready}, 200 if self.ready else 503)

    async def _measured(self, request: HttpRequest) -> Response:
        for name, batches in self.batches.items():
            self.metrics.waiting.labels(name).set(len(batches.queue))
        text = prometheus.generate_latest(self.metrics.registry)
        return Response(text, media_type=prometheus.CONTENT_TYPE_LATEST)

    async def _infer(self, request: HttpRequest) -> Response:
        name = self._name(request)
        start, status = time.perf_counter(), 500
        try:
            response = await self._inferred(name, request)
            status = response.status_code
        except BadRequest as error:
            status = error.status
            raise
        finally:
            self.metrics.requests.labels(name, str(status)).inc()
            self.metrics.seconds.labels(name).observe(time.perf_counter() - start)
        return response

    async def _inferred(self, name: str, request: HttpRequest) -> Response:
        body = bytearray()
        try:
            try:
                await asyncio.wait_for(self._read(request, body), self.limits.patience)
            except asyncio.TimeoutError:
                slow = f"after {self.limits.patience:g} s there are {len(body)} bytes of the body; send it faster"
                raise BadRequest(slow, 408) from None
            return await self._answered(name, request, bytes(body))
        finally:
            self.held -= len(body)

    async def _answered(self, name: str, request: HttpRequest, body: bytes) -> Response:
        model = self.models[name]
        asked = parsed(body, request.headers.get(LENGTH_HEADER), model.outputs, self.limits.body)
        try:
            results = await self.batches[name].submit(asked.arrays)
        except Full as error:
            raise BadRequest(f"{error}; try again later", 503) from None
        except (TypeError, ValueError) as error:
            raise BadRequest(str(error)) from None
        except Exception:  # a fault of ours, which the log names
            LOG.exception("model %s failed", name)
            raise BadRequest("the model failed; the server's log says why", 500) from None
        text, length = answer(name, asked, results)
        if length is None:
            return Response(text, media_type="application/json")
        return Response(text, media_type="application/octet-stream", headers={LENGTH_HEADER: str(length)})

    async def _read(self, request: HttpRequest, body: bytearray) -> None:
        """The request's body, read no further than it, or all of them together, may be long."""
        coding = request.headers.get("content-encoding", "identity")
        if coding != "identity":
            raise BadRequest(f"a body in the encoding {coding[:40]!r}; send it as it is", 415)
        stated, most = request.headers.get("content-length", ""), self.limits.body
        too_long = BadRequest(f"the body is longer than {most} bytes, which this server takes at most", 413)
        if stated.isdecimal() and int(stated) > most:
            raise too_long
        try:
            async for chunk in request.stream():
                if len(body) + len(chunk) > most:
                    raise too_long
                if self.held + len(chunk) > self.limits.bodies:
                    raise BadRequest("the bodies of other requests fill what this server keeps; try again later", 503)
                body += chunk
                self.held += len(chunk)
        except ClientDisconnect:
            raise BadRequest("the client has gone", 499) from None

    def _name(self, request: HttpRequest) -> str:
        name: str = request.path_params["name"]
        if name not in self.models:
            raise BadRequest(f"there is no model {name[:80]!r}; there are: {', '.join(self.models)}", 404)
        version: str = request.path_params.get("version", "1")
        if version != "1":
            raise BadRequest(f"there is no version {version[:40]!r} of {name!r}; there is: 1", 404)
        return name


class _Error(JSONResponse):
    """What was wrong, in ASCII: it may quote what a client sent, which need not be text that UTF-8 can hold."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode("ascii")


async def _bad_request(request: HttpRequest, error: BadRequest) -> Response:
    return _Error({"error": str(error)}, error.status)


async def _http_error(request: HttpRequest, error: HTTPException) -> Response:
    return _Error({"error": f"{request.method} {request.url.path[:200]}: {error.detail}"}, error.status_code)
