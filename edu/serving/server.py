"""Server for the OpenAI protocol, before the embedded teacher and before our own models alike.

GET /health, GET /v1/models, POST /v1/chat/completions (whole, or streamed as server-sent events). An option that cannot
take effect (n > 1, the caller's own tools, log-probabilities) is refused by an error in the protocol's form, never ignored.
No torch at import: only `load_responder` needs it.
"""

import asyncio
import json
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from edu.serving.protocol import ChatRequest, Reply, Responder
from edu.synthetic.teacher import Teacher

if TYPE_CHECKING:
    from edu.data.tokenizer import Tokenizer
    from edu.inference.engine import Engine

MAX_BODY = 1_000_000
"""Bytes of a request's body."""
MAX_MESSAGE = 500
"""Characters of an error message, which may quote the request."""


class TeacherResponder:
    """Embedded teacher behind the protocol; it counts words for tokens."""

    name = "embedded-teacher"
    structured = True

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def respond(self, request: ChatRequest) -> Reply:
        messages = request.conversation()
        text = self.teacher.write(messages, request.drawn_seed)
        return Reply(iter([text]), sum(len(message["content"].split()) for message in messages), len(text.split()))


class ModelResponder:
    """Model of ours behind the protocol, with the calculator as its tool."""

    structured = False

    def __init__(self, name: str, engine: "Engine", tokenizer: "Tokenizer", context: int) -> None:
        """Take a model's engine; `context` is the most tokens that prompt and reply may have together."""
        self.name, self.engine, self.tokenizer, self.context = name, engine, tokenizer, context

    def respond(self, request: ChatRequest) -> Reply:
        """Cut the oldest turns so that a quarter of the context is free, then decode until the end or the limit."""
        from edu.chat.chat_format import calculator_tool, cut_to_context, render_prompt, stream_text
        from edu.inference.params import SamplingParams

        wanted = request.max_completion_tokens or request.max_tokens or self.context
        room = min(wanted, self.context // 4)
        messages = cut_to_context(request.conversation(), self.tokenizer, self.context - room)
        prompt = render_prompt(messages, self.tokenizer)
        limit = min(wanted, self.context - len(prompt))
        end = self.tokenizer.assistant_end
        temperature, top_p = request.distribution
        tokens = self.engine.stream(
            prompt,
            SamplingParams(limit, temperature, top_p=top_p, stop_tokens=[end]),
            seed=request.drawn_seed,
            tool=calculator_tool(self.tokenizer),
        )
        reply = Reply(iter(()), len(prompt))
        reply.pieces = stream_text(_count(tokens, reply, limit, end), self.tokenizer)
        return reply


def _count(tokens: Iterable[int], reply: Reply, limit: int, end: int) -> Iterator[int]:
    """Yield the tokens and count them in the reply."""
    for token in tokens:
        reply.completion_tokens += 1
        reply.finish_reason = "length" if reply.completion_tokens == limit and token != end else "stop"
        yield token


def load_responder(folder: str) -> ModelResponder:
    """Load a checkpoint's folder as a responder, named by its last two parts: `runs/tiny/rl` is the model `tiny-rl`."""
    from edu.inference.engine import Engine
    from edu.model.load import load_model, load_tokenizer
    from edu.training.accelerator import autodetect_device_type

    model = load_model(folder, autodetect_device_type()).eval()
    tokenizer = load_tokenizer(folder)
    name = "-".join(Path(folder).resolve().parts[-2:])
    return ModelResponder(name, Engine(model), tokenizer, model.config.max_position_embeddings)


def until_stop(reply: Reply, stops: list[str]) -> Iterator[str]:
    """Yield the text up to the first of the stops; what may be the beginning of one waits for the next piece.

    >>> list(until_stop(Reply(iter(["a b", "c E", "N", "D d"]), prompt_tokens=0), ["END"]))
    ['a b', 'c ']
    """
    held = ""
    try:
        for piece in reply.pieces:
            held += piece
            found = [at for stop in stops if (at := held.find(stop)) >= 0]
            if found:
                held = held[: min(found)]
                reply.finish_reason = "stop"
                break
            keep = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
            if len(held) > keep:
                yield held[: len(held) - keep]
                held = held[len(held) - keep :]
        if held:
            yield held
    finally:  # also where a stop was found, or the client left: what makes the pieces ends now
        if isinstance(reply.pieces, Generator):
            reply.pieces.close()


def make_app(responder: Responder) -> FastAPI:
    """Build the server of one responder. Replies are made one after the other: a model's cache serves one at a time."""
    app = FastAPI(
        title=responder.name, exception_handlers={HTTPException: _http_error, RequestValidationError: _bad_body}
    )
    model = {"id": responder.name, "object": "model", "created": int(time.time()), "owned_by": "edu"}
    app.add_middleware(BodyLimit)
    turn = asyncio.Lock()  # not a thread's lock: threads that wait for one would leave none to work

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok", "model": responder.name}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: ChatRequest) -> Response:
        if request.model != responder.name:
            return failure(404, f"no model {request.model!r} here, only {responder.name!r}", "model_not_found")
        try:
            request.check(responder.structured)
            reply = await run_in_threadpool(responder.respond, request)
            if request.stream:
                return StreamingResponse(_events(request, reply, turn), media_type="text/event-stream")
            async with turn:
                text = await run_in_threadpool("".join, until_stop(reply, request.stops))
        except ValueError as error:
            return failure(400, str(error))
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reply.finish_reason}
        return JSONResponse(_head(request, "chat.completion") | {"choices": [choice], "usage": _usage(reply)})

    return app


class BodyLimit:
    """Middleware that refuses a body larger than MAX_BODY, or of unknown length, before it is read."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app, headers = self.app, Headers(scope=scope)
        if int(headers.get("content-length", "0")) > MAX_BODY:
            app = failure(413, f"the body is larger than {MAX_BODY:,} bytes")
        elif "transfer-encoding" in headers:
            app = failure(411, "a body needs a Content-Length")
        await app(scope, receive, send)


async def _events(request: ChatRequest, reply: Reply, turn: asyncio.Lock) -> AsyncIterator[str]:
    """Yield the reply as server-sent events: the role, the pieces, the reason it ended, the usage if asked for, [DONE]."""
    head = _head(request, "chat.completion.chunk")

    def event(delta: dict[str, str], reason: str | None = None) -> str:
        return f"data: {json.dumps(head | {'choices': [{'index': 0, 'delta': delta, 'finish_reason': reason}]})}\n\n"

    yield event({"role": "assistant", "content": ""})
    try:
        async with turn:
            async for piece in iterate_in_threadpool(until_stop(reply, request.stops)):
                yield event({"content": piece})
    except ValueError as error:
        yield f"data: {json.dumps(error_body(str(error)))}\n\n"
        return
    yield event({}, reply.finish_reason)
    if (request.stream_options or {}).get("include_usage"):
        yield f"data: {json.dumps(head | {'choices': [], 'usage': _usage(reply)})}\n\n"
    yield "data: [DONE]\n\n"


def _head(request: ChatRequest, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": request.model}


def _usage(reply: Reply) -> dict[str, int]:
    total = reply.prompt_tokens + reply.completion_tokens
    return {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens, "total_tokens": total}


def error_body(message: str, code: str | None = None) -> dict[str, Any]:
    """Return an error in the protocol's form, which clients turn into their exceptions; long messages are cut."""
    message = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]} ..."
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}


def failure(
    status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    return JSONResponse(error_body(message, code), status, headers)


async def _http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException), error
    return failure(error.status_code, str(error.detail), headers=error.headers)


async def _bad_body(_: Request, error: Exception) -> JSONResponse:
    """Answer a body that is not JSON, lacks a field or breaks a bound, by its first few errors: the protocol says 400."""
    assert isinstance(error, RequestValidationError), error
    problems = [f"{'.'.join(map(str, problem['loc'][1:]))}: {problem['msg']}" for problem in error.errors()[:3]]
    return failure(400, "; ".join(problems))


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket (port 0: any free one); OSError names the flag to change if the address cannot be had."""
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error}; choose another --port or --host") from None


def run_forever(app: FastAPI, listener: socket.socket) -> None:
    """Serve until interrupted."""
    uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", ws="none")).run(sockets=[listener])


@contextmanager
def run_in_thread(app: FastAPI) -> Iterator[str]:
    """Serve on a free port of 127.0.0.1 while the block runs; the value is the base URL, which ends in /v1."""
    config = uvicorn.Config(app, log_level="warning", lifespan="off", ws="none", timeout_graceful_shutdown=1)
    server, listener = uvicorn.Server(config), listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
