"""Requests in, replies out: the routes, their limits and the token."""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import json
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from pydantic import BaseModel, ConfigDict, FailFast, ValidationError
from starlette.requests import ClientDisconnect

from rag_rl import __version__
from rag_rl.errors import BackendError, ConfigError, UserError
from rag_rl.server.search_thread import SearchThread, one_line
from rag_rl.types import Hit, Passage, Query

logger = logging.getLogger(__name__)

_Body = TypeVar("_Body", bound=BaseModel)

# How long a request may take to arrive, once its first line is there.
_BODY_PATIENCE_S = 30.0
# What pydantic puts into the place of an error for the member of a union.
_UNION_LABELS = ("str", "QueryBody")


@dataclass(frozen=True)
class Limits:
    """The most that a server takes.

    Attributes:
        max_top_k: hits a query, >= 1.
        max_queries: queries a request, >= 1.
        max_query_chars: characters a query, its question and its hops included, >= 1.
        max_exclude: excluded ids a query, >= 0.
        max_body_bytes: bytes a request, >= 1; more are refused before they are read.
        max_requests: requests that are being read, searched or waiting, >= 1; one more is told to come back.

    Raises:
        ConfigError: a number is below that.
    """

    max_top_k: int = 100
    max_queries: int = 1024
    max_query_chars: int = 32_768
    max_exclude: int = 1000
    max_body_bytes: int = 8 << 20
    max_requests: int = 256

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            least = 0 if name == "max_exclude" else 1
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")


class QueryBody(BaseModel):
    """A query with its history, as ``rag_rl.types.Query``."""

    model_config = ConfigDict(strict=True, extra="forbid")

    text: str
    question: str = ""
    # At the first wrong item: a body of a million of them would make a million errors.
    history: Annotated[list[tuple[str, str]], FailFast()] = []


class SearchBody(BaseModel):
    """What ``POST /search`` takes."""

    model_config = ConfigDict(strict=True, extra="forbid")

    queries: Annotated[list[str | QueryBody], FailFast()]
    top_k: int | None = None
    exclude: Annotated[list[Annotated[list[str], FailFast()]], FailFast()] = []


class RetrieveBody(BaseModel):
    """What ``POST /retrieve`` takes: Search-R1's request (arXiv 2503.09516), in which other keys are ignored."""

    model_config = ConfigDict(strict=True)

    queries: Annotated[list[str], FailFast()]
    topk: int | None = None
    return_scores: bool = False


def _query(asked: str | QueryBody) -> str | Query:
    return asked if isinstance(asked, str) else Query(asked.text, asked.question, tuple(asked.history))


def _search_reply(found: Sequence[Sequence[Hit]], fingerprint: str | None) -> bytes:
    results = [
        [
            {
                "passage": {
                    "doc_id": hit.passage.doc_id,
                    "title": hit.passage.title,
                    "text": hit.passage.text,
                    "chunk": hit.passage.chunk,
                },
                "score": float(hit.score),
                "rank": hit.rank,
            }
            for hit in hits
        ]
        for hits in found
    ]
    return _written({"fingerprint": fingerprint, "results": results})


def _retrieve_reply(found: Sequence[Sequence[Hit]], scores: bool) -> bytes:
    result: list[list[dict[str, Any]]] = []
    for hits in found:
        documents = [{"id": hit.passage.doc_id, "contents": _contents(hit.passage)} for hit in hits]
        if scores:
            pairs = zip(documents, hits, strict=True)
            result.append([{"document": document, "score": float(hit.score)} for document, hit in pairs])
        else:
            result.append(documents)
    return _written({"result": result})


def _contents(passage: Passage) -> str:
    """Search-R1's text of a document: the title in quotes on a line of its own, which its readers cut off there."""
    title = " ".join(passage.title.split())
    return f'"{title}"\n{passage.text}' if title else f"\n{passage.text}"


def _written(content: Any) -> bytes:
    try:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise BackendError("the retriever gave a score that is not finite") from error
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which scraped text can hold: JSON can escape it
        return json.dumps(content, separators=(",", ":")).encode()


class Service:
    """Requests in, replies out: everything between uvicorn and the thread that searches.

    Args:
        search: the thread.
        limits: the most that it takes; None for the defaults.
        token: what ``Authorization: Bearer`` must bring; None: nothing is asked for.
        top_k: hits a query where a request does not say.

    Attributes:
        accepted: requests that were read whole, found good and handed to the search.
        answered: those among them that have a reply.
        stopping: the server will soon be gone: replies close their connection, and /health is red.

    Raises:
        ConfigError: ``top_k`` is below 1 or above the limit.
    """

    def __init__(
        self, search: SearchThread, *, limits: Limits | None = None, token: str | None = None, top_k: int = 3
    ) -> None:
        self.search = search
        self.limits = limits or Limits()
        if not 1 <= top_k <= self.limits.max_top_k:
            raise ConfigError(f"top_k must be between 1 and {self.limits.max_top_k} (max_top_k), got {top_k}")
        self.top_k = top_k
        self.accepted = self.answered = 0
        self.stopping = False
        self._token = None if token is None else token.encode()
        self._present = 0

    async def health(self) -> Response:
        """Whether searches are answered as they should be.

        Returns:
            200 with what the retriever is and what the server takes, or 503 with what is wrong.
        """
        trouble = "stopping" if self.stopping else await self.search.check()
        about = self.search.about
        if trouble or about is None:
            content: dict[str, Any] = {"status": "unavailable", "detail": trouble}
            return _reply(_written(content), 503)
        limits = {
            "top_k": self._most_hits(),
            "queries": self.limits.max_queries,
            "query_chars": self.limits.max_query_chars,
            "exclude": self.limits.max_exclude,
            "body_bytes": self.limits.max_body_bytes,
        }
        content = {"status": "ok", "version": __version__, **dataclasses.asdict(about), "limits": limits}
        return _reply(_written(content))

    async def answer_search(self, request: Request) -> Response:
        """``POST /search``, our own route.

        Args:
            request: with a ``SearchBody``.

        Returns:
            Hits with their passages.
        """

        def ask(asked: SearchBody, fingerprint: str | None) -> asyncio.Future[bytes]:
            queries = [_query(one) for one in asked.queries]
            exclude = asked.exclude or None
            top_k = self._checked(queries, asked.top_k, exclude)
            return self.search.submit(queries, top_k, exclude, lambda found: _search_reply(found, fingerprint))

        return await self._answer(request, SearchBody, ask)

    async def answer_retrieve(self, request: Request) -> Response:
        """``POST /retrieve``, the route of Search-R1's server.

        Args:
            request: with a ``RetrieveBody``.

        Returns:
            Documents, with or without scores.
        """

        def ask(asked: RetrieveBody, fingerprint: str | None) -> asyncio.Future[bytes]:
            del fingerprint  # no place for it there
            # Its server takes 0 for "not said", too.
            top_k = self._checked(asked.queries, asked.topk or None, None)
            return self.search.submit(
                asked.queries, top_k, None, lambda found: _retrieve_reply(found, asked.return_scores)
            )

        return await self._answer(request, RetrieveBody, ask)

    async def _answer(
        self, request: Request, kind: type[_Body], ask: Callable[[_Body, str | None], asyncio.Future[bytes]]
    ) -> Response:
        self._authorise(request)
        about = self.search.about
        if about is None:
            raise HTTPException(503, "loading", {"Retry-After": "1"})
        with self._place():
            body = await self._read(request)
            try:
                reply = ask(kind.model_validate_json(body), about.fingerprint)
            except ValidationError as error:
                raise _refusal(error) from None
            self.accepted += 1
            try:
                answer = _reply(await reply)
            except UserError as error:
                answer = _reply(_written({"detail": one_line(error)}), 422)
            except BackendError as error:
                logger.error("%s", one_line(error))
                answer = _reply(_written({"detail": one_line(error)}), 502)
            except Exception:
                logger.exception("a search failed")
                answer = _reply(_written({"detail": "the search failed; the server's log says why"}), 500)
            self.answered += 1
            return answer

    def _authorise(self, request: Request) -> None:
        if self._token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token):
            raise HTTPException(401, "a bearer token is needed, and this is not it", {"WWW-Authenticate": "Bearer"})

    @contextmanager
    def _place(self) -> Iterator[None]:
        """Counts a request from its first line to its reply, so that memory is bounded."""
        if self._present >= self.limits.max_requests:
            detail = f"busy: {self.limits.max_requests} requests are being answered"
            raise HTTPException(503, detail, {"Retry-After": "1"})
        self._present += 1
        try:
            yield
        finally:
            self._present -= 1

    async def _read(self, request: Request) -> bytes:
        most = self.limits.max_body_bytes
        refusal = HTTPException(413, f"at most {most} bytes are taken")
        declared = request.headers.get("content-length", "0")
        if len(declared) > 15 or int(declared) > most:
            raise refusal

        async def read() -> bytes:
            body = bytearray()
            async for piece in request.stream():
                body += piece
                if len(body) > most:
                    raise refusal
            return bytes(body)

        try:
            return await asyncio.wait_for(read(), _BODY_PATIENCE_S)
        except asyncio.TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {_BODY_PATIENCE_S:g} s") from None
        except ClientDisconnect:
            raise HTTPException(400, "the connection was closed") from None

    def _most_hits(self) -> int:
        passages = self.search.about.passages if self.search.about else None
        return min(self.limits.max_top_k, passages or self.limits.max_top_k)

    def _checked(
        self, queries: Sequence[str | Query], top_k: int | None, exclude: Sequence[Collection[str]] | None
    ) -> int:
        """The number of hits, where request and limits agree."""
        limits, most = self.limits, self._most_hits()
        top_k = min(self.top_k, most) if top_k is None else top_k
        trouble = ""
        if not 1 <= top_k <= most:
            trouble = f"the number of hits must be between 1 and {most}"
        elif len(queries) > limits.max_queries:
            trouble = f"{len(queries)} queries, at most {limits.max_queries} are taken"
        elif exclude is not None and len(exclude) != len(queries):
            trouble = f"exclude must have one list a query: {len(exclude)} for {len(queries)} queries"
        elif exclude is not None and max(map(len, exclude), default=0) > limits.max_exclude:
            trouble = f"exclude: at most {limits.max_exclude} ids a query are taken"
        for place, query in enumerate(queries):
            if trouble:
                break
            if (size := _size(query)) > limits.max_query_chars:
                trouble = f"queries[{place}]: {size} characters, at most {limits.max_query_chars} are taken"
        if trouble:
            raise HTTPException(422, trouble)
        return top_k


def _size(query: str | Query) -> int:
    if isinstance(query, str):
        return len(query)
    return len(query.text) + len(query.question) + sum(len(one) + len(two) for one, two in query.history)


def _reply(content: bytes, status: int = 200) -> Response:
    headers = {"Retry-After": "1"} if status == 503 else None
    return Response(content, status, headers, media_type="application/json")


def _refusal(error: ValidationError) -> HTTPException:
    """One line on the first thing that is wrong."""
    listed = error.errors(include_url=False, include_context=False, include_input=False)
    # Of a query that may be one of two things, what is wrong with the one that it comes nearer to.
    first = max(listed, key=lambda one: len(one["loc"]))
    if first["type"] == "json_invalid":
        return HTTPException(400, one_line(first["msg"]))
    place = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"] if part not in _UNION_LABELS
    )
    return HTTPException(422, one_line(f"{place.lstrip('.') or 'the body'}: {first['msg']}"))


class _ClosesConnections:
    """Tells clients of a server that is stopping to make their next request on another connection.

    Args:
        app: the application.
        service: says whether it is stopping.
    """

    def __init__(self, app: Any, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def closing(message: Any) -> None:
            if message["type"] == "http.response.start" and self._service.stopping:
                message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            await send(message)

        await self._app(scope, receive, closing)


def make_app(service: Service) -> FastAPI:
    """The routes.

    Args:
        service: answers them.

    Returns:
        An ASGI application.
    """
    app = FastAPI(title="rag-rl", openapi_url=None)
    app.add_middleware(_ClosesConnections, service=service)
    app.add_api_route("/health", service.health, methods=["GET"], response_model=None)
    app.add_api_route("/search", service.answer_search, methods=["POST"], response_model=None)
    app.add_api_route("/retrieve", service.answer_retrieve, methods=["POST"], response_model=None)
    return app
