"""The HTTP interface: paths, checks and error sentences. It knows nothing of Ray.

Every reply that is not a success is `{"error": "<sentence>"}`.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send
from torch import Tensor

from qvpo_rllib.serving.batcher import Batcher, OverloadedError
from qvpo_rllib.serving.description import MAX_NOISE
from qvpo_rllib.serving.models import Models, Snapshot
from qvpo_rllib.serving.policy import NonFiniteActionError, ServedPolicy
from qvpo_rllib.serving.schema import (
    MAX_BODY_BYTES,
    MAX_K,
    MAX_ROWS,
    MAX_SAMPLES,
    READ_TIMEOUT_S,
    ActReply,
    ActRequest,
    ErrorReply,
    ModelInfo,
    ModelList,
    sentence_of,
)
from qvpo_rllib.version import __version__

logger = logging.getLogger(__name__)

REFRESH_INTERVAL_S = 2.0
RETRY_AFTER_S = 1
NOT_READY = "No model is loaded yet"

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorReply, "description": "A header is not UTF-8."},
    404: {"model": ErrorReply, "description": "There is no such model."},
    408: {"model": ErrorReply, "description": "The body came too slowly."},
    413: {"model": ErrorReply, "description": "The body or the request is too large."},
    422: {"model": ErrorReply, "description": "The body is not a valid request."},
    503: {"model": ErrorReply, "description": "Too many requests wait, or no model is ready."},
}
_ACT_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": ActRequest.model_json_schema()}},
    }
}


class Engine:
    """The models and what computes with them; made and used within one event loop.

    Args:
        batcher: which computes.
    """

    def __init__(self, batcher: Batcher) -> None:
        self.models = Models()
        self.batcher = batcher
        self._changing = asyncio.Lock()

    async def open(self, paths: Sequence[str | Path]) -> None:
        """Serves exactly these bundles; the ones before serve until they are ready."""
        async with self._changing:
            await asyncio.to_thread(self.models.open, paths)

    async def update(self, bundles: Sequence[str | Path]) -> None:
        """Takes up replaced bundles; opens `bundles` if nothing is served yet."""
        try:
            if bundles and not self.models.snapshot.policies:
                await self.open(bundles)
            async with self._changing:
                await asyncio.to_thread(self.models.refresh)
        except ValueError as error:  # one went bad before this process began; it is tried again
            logger.error("%s", error)

    async def update_forever(self, bundles: Sequence[str | Path]) -> None:
        while True:
            await asyncio.sleep(REFRESH_INTERVAL_S)
            await self.update(bundles)


def create_api(
    bundles: Sequence[str | Path] = (), make_batcher: Callable[[], Batcher] = Batcher
) -> FastAPI:
    """Returns the application, whose `app.state.engine` is there once its lifespan has begun.

    Args:
        bundles: opened when its lifespan begins.
        make_batcher: called then, for what computes.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.engine = Engine(make_batcher())
        await app.state.engine.update(bundles)
        task = asyncio.create_task(app.state.engine.update_forever(bundles))
        yield
        task.cancel()
        app.state.engine.batcher.close()

    api = FastAPI(
        title="QVPO policies",
        version=__version__,
        description="The best of K actions of a diffusion policy, for every observation.",
        lifespan=lifespan,
    )
    api.add_exception_handler(HTTPException, _http_error)
    api.add_exception_handler(Exception, _our_error)
    api.add_middleware(OnlyUTF8)

    @api.get("/healthz", response_model=None)
    async def healthz() -> dict[str, str]:
        """Says that the process lives."""
        return {"status": "ok"}

    @api.get("/readyz", response_model=None, responses={503: _ERRORS[503]})
    async def readyz(request: Request) -> dict[str, str]:
        """Says whether models are loaded and warm."""
        if not _snapshot(request).policies:
            raise _try_again(NOT_READY)
        return {"status": "ready"}

    @api.get("/v1/models")
    async def models(request: Request) -> ModelList:
        """Returns every name and version served."""
        snapshot = _snapshot(request)
        limits = {"k_max": MAX_K, "rows_max": MAX_ROWS}
        return ModelList(
            models=[
                # Of the description, `ModelInfo` takes what it has a field for.
                ModelInfo(
                    **asdict(policy.description) | limits,
                    default=snapshot.is_default(policy),
                    problem=problem,
                )
                for policy, problem in zip(snapshot.policies, snapshot.problems, strict=True)
            ]
        )

    @api.post(
        "/v1/models/{name}/act",
        response_model=ActReply,
        responses=_ERRORS,
        openapi_extra=_ACT_BODY,
    )
    async def act(name: str, request: Request) -> Response:
        """Returns the best of k actions for each observation; `name` or `name@version`."""
        policy = _find(_snapshot(request), name)
        try:
            body = ActRequest.model_validate_json(await _read_body(request))
        except ValidationError as error:
            raise HTTPException(422, sentence_of(error)) from None
        k = policy.description.k_eval if body.k is None else body.k
        most = min(MAX_SAMPLES, MAX_NOISE // policy.description.noise_per_sample)
        if len(body.observations) * k > most:
            raise HTTPException(
                413,
                f"{len(body.observations)} observations with k={k} are more than {most:,} "
                "samples: send fewer observations at a time, or a smaller k.",
            )
        obs = _check(policy, body.observations)
        try:
            result = await request.app.state.engine.batcher.act(policy, obs, k, body.seed)
        except NonFiniteActionError as error:
            raise HTTPException(422, str(error)) from None
        except OverloadedError:
            raise _try_again("Too many requests are waiting") from None
        reply = {
            "model": policy.description.name,
            "version": policy.description.version,
            "k": k,
            "seed": body.seed,
            "actions": result.actions.tolist(),
            "time_ms": {
                "queued": round(result.queued_s * 1e3, 3),
                "computing": round(result.computing_s * 1e3, 3),
            },
        }
        return Response(json.dumps(reply, allow_nan=False), media_type="application/json")

    return api


def _snapshot(request: Request) -> Snapshot:
    snapshot: Snapshot = request.app.state.engine.models.snapshot
    return snapshot


def _try_again(reason: str) -> HTTPException:
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    return HTTPException(503, f"{reason}: try again later.", headers=headers)


def _find(snapshot: Snapshot, name: str) -> ServedPolicy:
    policy = snapshot.by_reference.get(name)
    if policy is None:
        if not snapshot.policies:
            raise _try_again(NOT_READY)
        served = ", ".join(sorted(snapshot.by_reference))
        raise HTTPException(404, f"There is no model {name[:200]!r}. Served are: {served}.")
    return policy


async def _read_body(request: Request) -> bytes:
    """Returns the body, counted as it comes, whatever length it announced."""
    close = {"Connection": "close"}  # nobody will read the rest
    too_large = HTTPException(
        413,
        f"The body is larger than {MAX_BODY_BYTES:,} bytes: send fewer observations at a time.",
        headers=close,
    )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError:
        sentence = f"The body did not arrive within {READ_TIMEOUT_S:g} seconds."
        raise HTTPException(408, sentence, headers=close) from None
    return bytes(body)


def _check(policy: ServedPolicy, observations: Sequence[list[float] | dict[str, Any]]) -> Tensor:
    """Returns the observations as [B, O]; 422 for those that do not fit the policy."""
    dim = policy.description.obs_dim
    rows = [_vector(policy, row, found) for row, found in enumerate(observations)]
    for row, numbers in enumerate(rows):
        if len(numbers) != dim:
            raise HTTPException(
                422,
                f"observations[{row}] has {len(numbers)} numbers; "
                f"{policy.description.name} needs {dim}.",
            )
    try:
        return policy.check(np.array(rows))
    except ValueError as error:
        raise HTTPException(422, str(error)) from None


def _vector(policy: ServedPolicy, row: int, found: list[float] | dict[str, Any]) -> Any:
    """Returns an observation as a vector; 422 for parts that the policy does not have."""
    if not isinstance(found, dict):
        return found
    if policy.parts is None:
        raise HTTPException(
            422,
            f"observations[{row}] is an object, but {policy.description.name} has no parts: send a "
            f"list of {policy.description.obs_dim} numbers.",
        )
    try:
        return policy.parts.flatten(found)
    except ValueError as error:
        raise HTTPException(422, f"observations[{row}]: {error}.") from None


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


async def _our_error(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": "The server failed; its log says why."}, 500)


class OnlyUTF8:
    """ASGI middleware: 400 for a header that is not UTF-8, at which Ray Serve fails."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        try:
            b"".join(part for header in scope.get("headers", ()) for part in header).decode()
        except UnicodeDecodeError:
            app = JSONResponse({"error": "A header is not UTF-8."}, 400)
        await app(scope, receive, send)


def proxy_middlewares() -> list[Middleware]:
    """Returns what Ray Serve's proxies take by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""
    return [Middleware(OnlyUTF8)]
