"""The chat page and what answers it.

GET  /          the page, one file that loads nothing else
GET  /settings  of each setting least, most, default and whether it is whole; and what the page says of the model
POST /picture   a picture's file -> the picture as it takes part in conversations (JPEG)
POST /reply     {"conversation": [...], "settings": {...}} -> JSON lines, as they come

The server keeps no conversation: the page sends the whole of it each time, so nothing is ever stale, mixed up between
people or to be deleted. There is one model, so replies are made one after the other.
"""

import base64
import contextlib
import hashlib
import ipaddress
import json
import logging
import re
import socket
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dreamllm_jax.data.document import Segment
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.diffusion import samplers
from dreamllm_jax.generation.documents import Event, generate_documents, paint_reply
from dreamllm_jax.generation.text import Sampling
from dreamllm_jax.model import DreamLLM
from dreamllm_jax.serving.conversation import (
    MAX_BYTES,
    MAX_TOKENS,
    SETTINGS,
    accept_picture,
    read_conversation,
    read_settings,
    told,
)

MAX_WAITING = 8  # people whose turn has not come
UNREAD_SECONDS = 30.0  # after which one who takes nothing of a reply is taken to have left
PIECE = 1 << 16  # bytes of a reply that are sent at once
PAGE = (Path(__file__).parent / "page.html").read_text()
Reply = Callable[[Sequence[Segment], Mapping[str, Any]], Generator[Event, None, None]]
_logger = logging.getLogger(__name__)


def make_reply(
    model: DreamLLM,
    params: dict,
    tokenizer: Tokenizer,
    *,
    size: int | tuple[int, int],
    sampler: samplers.Name | None = None,
    template: str = "",
    within: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Reply:
    """The model's replies: it continues the conversation as a document, or answers in the turns of a template.

    One that is asked to paint in words of its own does so for the last turn, if it may paint at all.

    Args:
      within: in which the model runs: `sharding.use` of its mesh, where it is split. It is entered anew for each event,
        for these may be made in different threads.
    """

    def reply(conversation: Sequence[Segment], settings: Mapping[str, Any]) -> Generator[Event, None, None]:
        seeds = [settings["seed"]]
        painting = {
            "size": size,
            "sampler": samplers.SamplerConfig(sampler, settings["steps"]),
            "guidance": settings["guidance"],
            "guidance_interval": (settings["guidance_from"], settings["guidance_to"]),
        }
        if model.config.prompting is not None and settings["max_images"]:
            events = paint_reply(model, params, tokenizer, conversation, settings["seed"], **painting)
        else:
            events = generate_documents(
                model,
                params,
                tokenizer,
                [conversation],
                max_tokens=settings["max_tokens"],
                max_images=settings["max_images"],
                seeds=seeds,
                sampling=Sampling.of(seeds, settings["temperature"], top_p=settings["top_p"]),
                template=template,
                allowed=MAX_TOKENS,
                **painting,
            )
        while True:
            with within():
                event = next(events, None)
            if event is None:
                return
            yield event

    return reply


def make_app(
    reply: Reply, vocab_size: int, *, checkpoint: str = "", template: str = "", names: Sequence[str] = ()
) -> Starlette:
    """The application.

    Args:
      reply: continues a conversation.
      checkpoint, template: what the page says of the model.
      names: under which the server may be asked, besides its IP addresses and localhost.
    """
    model, decoder = anyio.Lock(), anyio.CapacityLimiter(1)  # one large picture at a time

    async def page(_: Request) -> Response:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": _policy(PAGE), "Referrer-Policy": "no-referrer"})

    async def settings(_: Request) -> Response:
        limits = {name: [*limits, type(limits[0]) is int] for name, limits in SETTINGS.items()}
        about = {"checkpoint": checkpoint, "template": template, "max_bytes": MAX_BYTES}
        return JSONResponse({**about, "limits": limits})

    async def picture(request: Request) -> Response:
        try:
            data = await anyio.to_thread.run_sync(accept_picture, await request.body(), limiter=decoder)
        except ValueError as error:
            return _refusal(error)
        return Response(data, media_type="image/jpeg")

    async def answer(request: Request) -> Response:
        if model.statistics().tasks_waiting >= MAX_WAITING:
            return _refusal("too many people are waiting already; try again later", 503)
        try:
            asked = await request.json()
            if not isinstance(asked, dict):
                raise ValueError("not a conversation and settings")
            chosen = read_settings(asked.get("settings", {}))
            given = asked.get("conversation")
            conversation = await anyio.to_thread.run_sync(read_conversation, given, vocab_size, limiter=decoder)
        except RecursionError:
            return _refusal("not a conversation and settings: brackets within brackets")
        except ValueError as error:
            return _refusal(error)
        return _Lines(lines(conversation, chosen), media_type="application/x-ndjson")

    async def lines(conversation: list[Segment], chosen: Mapping[str, Any]) -> AsyncIterator[str]:
        if model.locked():
            yield _line({"state": "waiting"})
        async with model:
            yield _line({"state": "started"})
            with contextlib.closing(reply(conversation, chosen)) as events:
                try:
                    async for event in iterate_in_threadpool(events):
                        yield _line(told(event))
                    yield _line({"state": "done"})
                except ValueError as error:
                    yield _line({"error": str(error)})
                except Exception:  # whatever it is (out of memory, say), the page hears of it and the server goes on
                    _logger.exception("a reply failed")
                    yield _line({"error": "the model failed; the server's log says why"})

    routes = [
        Route("/", page),
        Route("/settings", settings),
        Route("/picture", picture, methods=["POST"]),
        Route("/reply", answer, methods=["POST"]),
    ]
    middleware = [Middleware(_own_page_only, names=("localhost", *map(str.lower, names)))]
    return Starlette(routes=routes, middleware=middleware, max_body_size=MAX_BYTES)


class _Lines(StreamingResponse):
    """Ends what makes the lines as soon as nobody listens, or takes them: others wait."""

    async def stream_response(self, send: Send) -> None:
        async def send_or_end(message: Message) -> None:
            body = message.get("body", b"")
            for start in range(0, len(body) - PIECE, PIECE):
                with anyio.fail_after(UNREAD_SECONDS):
                    await send({**message, "body": body[start : start + PIECE], "more_body": True})
            with anyio.fail_after(UNREAD_SECONDS):
                await send({**message, "body": body[-(len(body) % PIECE or PIECE) :]} if body else message)

        async with contextlib.aclosing(self.body_iterator):
            with contextlib.suppress(TimeoutError):  # the connection is then closed
                await super().stream_response(send_or_end)


def _own_page_only(app: ASGIApp, names: Sequence[str]) -> ASGIApp:
    """Refuses what other sites' pages send to this server: by their origin, or by a name of theirs that leads here."""

    def problem(headers: Headers) -> str:
        host, origin = headers.get("host", ""), headers.get("origin")
        name = _name(host)
        if not _is_address(name) and name not in names:
            return f"this server is not called {name!r}: use its address, or start it with --host={name}"
        if origin is not None and origin.partition("://")[2] != host:
            return f"this server does not answer pages of {origin}"
        return ""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        found = problem(Headers(scope=scope)) if scope["type"] == "http" else ""
        await (_refusal(found, 403) if found else app)(scope, receive, send)

    return guarded


def _name(host: str) -> str:
    """Without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _refusal(error: Exception | str, status: int = 400) -> Response:
    return JSONResponse({"error": str(error)}, status)


def _line(item: dict[str, Any]) -> str:
    return json.dumps(item) + "\n"


def _policy(page: str) -> str:
    """The page's own script and style may run, and nothing else; it may talk to this server alone."""

    def own(tag: str) -> str:
        digest = hashlib.sha256(re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1].encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    return (
        f"default-src 'none'; script-src {own('script')}; style-src {own('style')}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there, with a word of warning if others than this machine can reach it.

    Raises:
      ValueError: the port is taken, or the host is not this machine's.
    """
    if not (host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)):
        _logger.warning("whoever can reach %s can use the model: there is no password", host)
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(f"cannot listen on --host={host} --port={port}: {error}") from None


def run(app: Starlette, listening: socket.socket) -> None:
    """Serves until interrupted."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=3))
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
