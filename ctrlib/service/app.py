"""The HTTP interface: ``/score``, ``/rank``, ``/healthz``, ``/metadata``, ``/metrics``, ``/reload``, and a page to try it."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ctrlib.config import ConfigError
from ctrlib.schema import suggest
from ctrlib.service.engine import BusyError, Engine, Limits, RequestError, Serving
from ctrlib.service.pages import PAGE, example, openapi

_log = logging.getLogger("ctrlib.service")
Endpoint = Callable[[Request], Awaitable[Response]]
_KEYS = {"/score": ("context", "candidates"), "/rank": ("context", "candidates", "top_k", "label")}
_REPORTED = 16  # unknown keys: a body may have a hundred thousand, and looking for what was meant takes time
_LOCAL = ("127.0.0.1", "::1", "testclient")


class _RefusedError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, reason: str, errors: list[dict[str, str]] | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.errors = status, reason, errors or []


def create_app(path: str | Path, limits: Limits | None = None) -> Starlette:
    """The service of a run or artifact folder, for any ASGI server.

    Raises:
        DataError, ConfigError: the model cannot be loaded, or fails its check.
    """
    engine = Engine(path, limits)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        engine.start()
        with suppress(NotImplementedError, RuntimeError, ValueError, AttributeError):  # not here, or not in the main thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, partial(_reload_later, engine))
        yield
        await engine.stop()

    routes: list[tuple[str, str, Callable[[Engine, Request], Awaitable[Response]]]] = [
        ("/score", "POST", _score),
        ("/rank", "POST", _rank),
        ("/reload", "POST", _reload),
        ("/healthz", "GET", _health),
        ("/metadata", "GET", _metadata),
        ("/metrics", "GET", _metrics),
        ("/openapi.json", "GET", _openapi),
        ("/", "GET", _page),
    ]
    app = Starlette(
        routes=[Route(at, _endpoint(engine, at, answer), methods=[method]) for at, method, answer in routes],
        lifespan=lifespan,
        exception_handlers={HTTPException: _plain_error},
    )
    app.state.engine = engine
    return app


def serve(path: str | Path, *, host: str = "127.0.0.1", port: int = 8080, limits: Limits | None = None) -> None:
    """Serve until a signal comes: SIGTERM and SIGINT answer what is waiting and end, SIGHUP loads the artifact again.

    Raises:
        ConfigError: the extra ``serve`` is not installed.
        DataError: as :func:`create_app`.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ConfigError("serving needs uvicorn; pip install 'ctrlib[serve]'") from error
    uvicorn.run(
        create_app(path, limits),
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=15,
    )


def _endpoint(engine: Engine, at: str, answer: Callable[[Engine, Request], Awaitable[Response]]) -> Endpoint:
    async def run(request: Request) -> Response:
        started = time.perf_counter()
        given = request.headers.get("x-request-id", "")
        name = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else uuid.uuid4().hex
        try:
            response = await answer(engine, request)
        except _RefusedError as refused:
            response = _refusal(refused, name)
            if refused.status == 503:
                response.headers["retry-after"] = "1"
        except ClientDisconnect:
            response = Response(status_code=400)
        except Exception:
            _log.exception("request %s", name)
            response = JSONResponse({"error": "internal error; see the log", "errors": [], "request_id": name}, 500)
        response.headers["x-request-id"] = name
        seconds = time.perf_counter() - started
        engine.metrics.request(at, response.status_code, seconds)
        _log.info("%s %s %d %.2f ms %s", request.method, at, response.status_code, 1e3 * seconds, name)
        return response

    return run


def _refusal(refused: _RefusedError, name: str) -> Response:
    """What was wrong; parts of a request that no UTF-8 can hold are shown escaped."""
    errors = [{key: _printable(text) for key, text in error.items()} for error in refused.errors]
    return JSONResponse({"error": _printable(refused.reason), "errors": errors, "request_id": name}, refused.status)


async def _plain_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail, "errors": []}, error.status_code, error.headers)


async def _body(engine: Engine, request: Request) -> tuple[Mapping[str, Any], int]:
    """The JSON object of a request, and its bytes."""
    limit = engine.limits.body_bytes
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise _RefusedError(413, f"the body is larger than {limit} bytes")
        parts.append(part)
    try:
        data = json.loads(b"".join(parts).decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise _RefusedError(400, f"the body is not UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise _RefusedError(400, "the body is nested too deeply") from error
    except ValueError as error:
        raise _RefusedError(400, f"the body is not JSON ({error!s:.200})") from error
    if not isinstance(data, dict):
        raise _RefusedError(422, f"the body is a {type(data).__name__}; expected an object with context and candidates")
    return data, size


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number; give null for a missing value")


async def _scored(engine: Engine, request: Request, at: str) -> tuple[Mapping[str, Any], Serving, Any]:
    body, size = await _body(engine, request)
    unknown = islice((key for key in body if key not in _KEYS[at]), _REPORTED)
    errors = [{"field": key[:80], "message": f"unknown key {key!r:.80}{suggest(key[:80], _KEYS[at])}"} for key in unknown]
    context, candidates = body.get("context"), body.get("candidates")
    if not isinstance(context, dict):
        errors.append({"field": "context", "message": "expected an object with a value for every field of the context"})
    if not isinstance(candidates, list) or not all(isinstance(row, dict) for row in candidates):
        errors.append({"field": "candidates", "message": "expected a list of objects"})
    elif len(candidates) > engine.limits.candidates:
        raise _RefusedError(413, f"{len(candidates)} candidates; at most {engine.limits.candidates} are allowed")
    top_k, label = body.get("top_k"), body.get("label")
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        errors.append({"field": "top_k", "message": "expected a whole number of 1 or more, or null"})
    labels = engine.serving.ranker.labels
    if label is not None and label not in labels:
        errors.append({"field": "label", "message": f"expected one of {', '.join(labels)}, or null"})
    if errors:
        raise _RefusedError(422, "the request is not valid", errors)
    assert isinstance(context, dict)
    assert isinstance(candidates, list)
    try:
        serving, probability = await engine.score(context, candidates, size)
    except RequestError as error:
        found = [{"field": p.field, "message": p.message} for p in error.problems]
        raise _RefusedError(422, "the request is not valid", found) from error
    except BusyError as error:
        raise _RefusedError(503, str(error)) from error
    return body, serving, probability


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


async def _score(engine: Engine, request: Request) -> Response:
    _, serving, probability = await _scored(engine, request, "/score")
    return JSONResponse({"probabilities": probability.tolist(), "model": serving.version})


async def _rank(engine: Engine, request: Request) -> Response:
    body, serving, probability = await _scored(engine, request, "/rank")
    label = body.get("label")
    if label is not None and label not in serving.ranker.labels:  # another model came in between
        raise _RefusedError(422, "the request is not valid", [{"field": "label", "message": f"no label {label!r:.80}"}])
    ranked = serving.ranker.best(probability, body.get("top_k"), label=label)
    pairs = zip(ranked.order.tolist(), ranked.probability.tolist(), strict=True)
    return JSONResponse({"candidates": [{"index": i, "probability": p} for i, p in pairs], "model": serving.version})


async def _reload(engine: Engine, request: Request) -> Response:
    if request.client is None or request.client.host not in _LOCAL:
        raise _RefusedError(403, "a reload is taken from this machine only")
    try:
        return JSONResponse({"model": await engine.reload()})
    except Exception as error:  # of a block of one's own, anything; the engine has logged it
        raise _RefusedError(409, f"the model before goes on: {error}") from error


def _reload_later(engine: Engine) -> None:
    async def run() -> None:
        try:
            await engine.reload()
        except Exception:
            return  # logged and counted; the model before goes on

    task = asyncio.get_running_loop().create_task(run())
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


_tasks: set[asyncio.Task[None]] = set()  # the loop itself keeps only weak references


async def _health(engine: Engine, _: Request) -> Response:
    return JSONResponse({"status": "ok", "model": engine.serving.version})


async def _metadata(engine: Engine, _: Request) -> Response:
    serving = engine.serving
    ranker = serving.ranker
    return JSONResponse(
        {
            "model": serving.version,
            "labels": ranker.labels,
            "context": ranker.context_fields,
            "candidate": ranker.candidate_fields,
            "schema": ranker.artifact.schema.to_json(),
            "calibration": [c.method for c in ranker.artifact.calibration],
            "parameters": ranker.artifact.info.get("parameters"),
            "hoisted_share": ranker.hoisted_share,
            "example": example(ranker),
        }
    )


async def _metrics(engine: Engine, _: Request) -> Response:
    text = engine.metrics.text(engine.serving.version, engine.waiting)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def _openapi(engine: Engine, _: Request) -> Response:
    return JSONResponse(openapi(engine.serving.ranker, engine.limits.candidates))


async def _page(_: Engine, __: Request) -> Response:
    return HTMLResponse(PAGE)
