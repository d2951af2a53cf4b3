"""The application: which path leads to what, and the document that describes it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from threading import Event
from typing import Any, TypeVar
from weakref import WeakSet

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from benthic import __version__
from benthic.config.schema import ServeConfig
from benthic.inference.request import Completion
from benthic.serve import chat, completions, document, metrics, page, prompts
from benthic.serve.access import ARRIVED, SCOPE_OF_CACHE, Door, Keys, State, is_local, log
from benthic.serve.body import Bodies
from benthic.serve.embeddings import embed
from benthic.serve.errors import ApiError, bad, engine_failed, shutting_down, too_late
from benthic.serve.generation import ClientGone, Generation, Job, unless_disconnected
from benthic.serve.models import Models, Served
from benthic.serve.requests import MAX_PROMPTS, ChatRequest, CompletionRequest, EmbeddingRequest, parse
from benthic.serve.stream import EventStream, to_json
from benthic.serve.turns import Turns

_Request = TypeVar("_Request", ChatRequest, CompletionRequest, EmbeddingRequest)
_Result = TypeVar("_Result")
_Endpoint = Callable[[Request], Awaitable[Response]]
_PREPARING = 2
"""Threads that render and tokenise."""


class Endpoints:
    """What the paths do."""

    def __init__(self, models: Models, config: ServeConfig, state: State) -> None:
        self.metrics = metrics.Metrics(models)
        self._models, self._config, self._state = models, config, state
        self._bodies = Bodies(int(config.max_body_mib * 2**20), config.body_seconds)
        self._read, self._prepared = Turns(), Turns()
        self._preparing = ThreadPoolExecutor(_PREPARING, "prepare")
        self._compiling = ThreadPoolExecutor(1, "compile")
        self._embedding = ThreadPoolExecutor(1, "embed")
        # Weakly, lest a thousand requests wait to be found by Python's collector, which then holds up everybody.
        self._at_work: WeakSet[Generation | asyncio.Future[Any]] = WeakSet()
        self._over = False

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        async with self._asked(request, ChatRequest) as asked:
            served = self._models.find(asked.model)
            generation = self._admitted(request, served, asked.n or 1, "n")

            async def prepare() -> list[Job]:
                formed = _formed(asked)
                grammar = await self._run(self._compiling, prompts.grammar_of, served, asked) if formed else None
                return await self._prepare(prompts.chat_jobs, served, asked, self._config.max_tokens, grammar)

            await self._start(request, generation, prepare)
        return await self._respond(request, served, asked, generation, chat)

    async def complete(self, request: Request) -> Response:
        """Continue texts."""
        async with self._asked(request, CompletionRequest) as asked:
            served = self._models.find(asked.model)
            if len(asked.prompts) > MAX_PROMPTS:
                raise bad(f"prompt: {len(asked.prompts)} prompts at once; at most {MAX_PROMPTS}", "prompt")
            generation = self._admitted(request, served, len(asked.prompts) * (asked.n or 1), "prompt")

            async def prepare() -> list[Job]:
                further = completions.settings_of(asked)
                limits = (asked.max_tokens, self._config.max_tokens)
                sampling = await self._prepare(prompts.sampling_of, served, asked, *limits, further)
                jobs: list[Job] = []
                for prompt in asked.prompts:
                    jobs += await self._prepare(prompts.text_jobs, served, asked, prompt, sampling)
                return jobs

            await self._start(request, generation, prepare)
        return await self._respond(request, served, asked, generation, completions)

    async def embed(self, request: Request) -> Response:
        """Turn texts into vectors."""
        async with self._asked(request, EmbeddingRequest) as asked:
            served = self._models.find(asked.model)
            leave, gone = served.admit(1, "input"), Event()
            work = asyncio.ensure_future(self._run(self._embedding, embed, served, asked, gone))
            self._at_work.add(work)
            try:
                async with asyncio.timeout_at(request.scope[ARRIVED] + self._config.request_seconds):
                    return _json(await unless_disconnected(request.receive, work))
            except TimeoutError:
                raise too_late(self._config.request_seconds) from None
            except asyncio.CancelledError:
                if self._over:
                    raise shutting_down() from None
                raise
            finally:
                gone.set()
                leave()

    async def models(self, request: Request) -> Response:
        """The models there are."""
        return _json({"object": "list", "data": [served.describe() for served in self._models]})

    async def model(self, request: Request) -> Response:
        """One of them."""
        return _json(self._models.find(request.path_params["model"]).describe())

    async def health(self, request: Request) -> Response:
        """Whether the process can still work."""
        well = not any(served.engine.failed for served in self._models)
        return _json({"status": "ok" if well else "failed"}, 200 if well else 503)

    async def ready(self, request: Request) -> Response:
        """Whether new requests are taken."""
        well = not any(served.engine.failed for served in self._models)
        word = "draining" if self._state.draining else "ready" if well else "failed"
        return _json({"status": word}, 200 if word == "ready" else 503)

    async def metrics_text(self, request: Request) -> Response:
        """Figures as Prometheus text."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def status(self, request: Request) -> Response:
        """The same for the page."""
        return _json({"draining": self._state.draining, "models": [metrics.status(one) for one in self._models]})

    def give_up(self) -> None:
        """Let go of all requests that are being answered: each is told that the server shuts down."""
        self._over = True
        for work in list(self._at_work):
            work.cancel()

    def close(self) -> None:
        """End the threads."""
        for threads in (self._preparing, self._compiling, self._embedding):
            threads.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def _asked(self, request: Request, kind: type[_Request]) -> AsyncIterator[_Request]:
        async with self._bodies.of(request) as body:
            await self._read.take()
            if self._config.log_prompts:
                log.info("asked: %s", ascii(body.decode(errors="replace")))
            yield parse(kind, body)

    def _admitted(self, request: Request, served: Served, choices: int, param: str) -> Generation:
        generation = Generation(
            served, served.admit(choices, param), self.metrics, arrived=request.scope[ARRIVED],
            seconds=self._config.request_seconds, scope=request.scope[SCOPE_OF_CACHE],
        )  # fmt: skip
        self._at_work.add(generation)
        return generation

    async def _start(
        self, request: Request, generation: Generation, prepare: Callable[[], Awaitable[list[Job]]]
    ) -> None:  # fmt: skip
        try:
            await unless_disconnected(request.receive, generation.start(prepare))
        except BaseException:
            generation.close()
            raise

    async def _respond(
        self, request: Request, served: Served, asked: Any, generation: Generation, shapes: Any
    ) -> Response:  # fmt: skip
        """The answer of a generation in one of the two shapes, whole or streamed; its places are given back."""
        if asked.stream:
            return EventStream(shapes.streamed(served, asked, generation), generation.close)
        try:
            done: list[Completion] = await unless_disconnected(request.receive, generation.completions())
            return _json(await self._prepare(shapes.whole, served, asked, done))
        finally:
            generation.close()

    async def _prepare(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        done = await self._run(self._preparing, work, *arguments)
        await self._prepared.take()
        return done

    async def _run(self, threads: ThreadPoolExecutor, work: Callable[..., _Result], *arguments: Any) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(threads, work, *arguments)


def _formed(asked: ChatRequest) -> bool:
    return bool(asked.usable_tools) or asked.response_format is not None


def _json(content: Any, status: int = 200) -> Response:
    return Response(to_json(content), status, media_type="application/json")


class Application:
    """The whole application over models that are at work, as ASGI has it."""

    def __init__(self, models: Models, config: ServeConfig, keys: Keys, state: State) -> None:
        self._endpoints = Endpoints(models, config, state)
        app = FastAPI(
            title="Benthic", version=__version__, docs_url=None, redoc_url=None, openapi_url=None,
            redirect_slashes=False,
        )  # fmt: skip
        _add_routes(app, self._endpoints, [served.name for served in models])
        app.add_exception_handler(HTTPException, _http_error)
        app.add_exception_handler(ApiError, _api_error)
        app.add_exception_handler(ClientGone, _client_gone)
        app.add_exception_handler(Exception, _unforeseen)
        responses = self._endpoints.metrics.responses
        self._door = Door(
            app, state, keys, open_paths=page.FILES,
            hosts=config.hosts if config.hosts or (is_local(config.host) and not keys) else None,
            log_requests=config.log_requests, count=lambda status: responses.labels(str(status)).inc(),
        )  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        await self._door(scope, receive, send)

    def give_up(self) -> None:
        """Answer all requests that are at work, to the effect that the server shuts down."""
        self._endpoints.give_up()

    def close(self) -> None:
        """End its threads."""
        self._endpoints.close()


def _add_routes(app: FastAPI, endpoints: Endpoints, names: list[str]) -> None:
    for path, endpoint, asked in (
        ("/v1/chat/completions", endpoints.chat, ChatRequest),
        ("/v1/completions", endpoints.complete, CompletionRequest),
        ("/v1/embeddings", endpoints.embed, EmbeddingRequest),
    ):
        app.add_api_route(path, endpoint, methods=["POST"], openapi_extra=document.takes(asked))
    for path, read in (
        ("/v1/models", endpoints.models), ("/v1/models/{model:path}", endpoints.model), ("/health", endpoints.health),
        ("/ready", endpoints.ready), ("/metrics", endpoints.metrics_text), ("/status", endpoints.status),
    ):  # fmt: skip
        _add_readable(app, path, read)
    for path in page.FILES:
        _add_readable(app, path, page.page, described=False)
    described = to_json(document.describe(app, names))

    async def openapi(request: Request) -> Response:
        return Response(described, media_type="application/json")

    _add_readable(app, "/openapi.json", openapi, described=False)


def _add_readable(app: FastAPI, path: str, endpoint: _Endpoint, *, described: bool = True) -> None:
    app.add_api_route(path, endpoint, methods=["GET"], include_in_schema=described)
    app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)


async def _http_error(request: Request, error: Exception) -> Response:
    """Paths and methods that are not there."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    headers = dict(error.headers or {})
    if headers.get("Allow") == "GET":
        headers["Allow"] = "GET, HEAD"  # a route of its own, which starlette does not look at
    return ApiError(error.status_code, error.detail, code=code, headers=headers).response()


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _unforeseen(request: Request, error: Exception) -> Response:
    return engine_failed().response()
