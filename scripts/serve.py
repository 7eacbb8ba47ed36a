"""Serves a checkpoint over HTTP, with the requests and responses of OpenAI's API (openai_api.py).

    pip install starlette uvicorn
    python scripts/serve.py --checkpoint_path checkpoints/SmolLM2-135M-Instruct/model.pth
    curl localhost:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hello"}]}'

The paths are /v1/models, /v1/completions and /v1/chat/completions. Both kinds of completions can stream. The server
decodes the sequences of all clients together. When a client disconnects, its slots in the KV cache become free. After
Ctrl-C or SIGTERM the server finishes the running sequences and ends. A second signal ends the server at once.
"""

import asyncio
import hmac
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from cli.interrupts import exit_on_interrupt

    exit_on_interrupt()

from cli import common_args
from cli.script import exit_with_error, run_script
from engine.async_engine import AsyncEngine, GenerationError
from engine.scheduler import Scheduler
from llm import LLM
from scripts.openai_api import CompletionRequest, require
from text.tokenizer import Tokenizer
from utils.errors import UsageError

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError as e:
    exit_with_error(f"this script needs `pip install starlette uvicorn` ({e})")

OOM_HINT = "take a quantized checkpoint, a smaller --parallel or --max_seq_length"
MAX_BODY = 4 * 2**20  # bytes of a request
MAX_BODY_SECONDS = 30  # to receive a request: a client that stops sending must not keep the server from ending
CHAT_PATH = "/v1/chat/completions"


def main():
    parser = common_args.build_parser(__doc__)
    add = parser.add_argument
    common_args.add_checkpoint_path(parser)
    add("--host", default="127.0.0.1", help="default: %(default)s, which only this machine can reach")
    add("--port", type=int, default=8000, help="default: %(default)s; 0: any that is free")
    add("--api_key", help="refuse requests without the header `Authorization: Bearer API_KEY`")
    add("--parallel", type=int, default=8, help="sequences decoded at a time (default: %(default)s)")
    add("--max_seq_length", type=int, default=4096, help="tokens of a prompt and its completion (default: %(default)s)")
    add("--compile", action="store_true", help="capture the decode steps on a GPU, too")
    common_args.add_device(parser)
    common_args.add_precision(parser)
    common_args.add_threads(parser)
    args = parser.parse_args()
    require(min(args.parallel, args.max_seq_length) > 0, "--parallel and --max_seq_length must be at least 1")
    require("" not in (args.host, args.api_key), "an empty --host or --api_key would let in everybody: leave it out")
    common_args.set_threads(args.threads)
    listener = listen(args.host, args.port)
    llm = LLM(args.checkpoint_path, max_seq_len=args.max_seq_length, **common_args.build_load_options(args))
    engine = AsyncEngine(Scheduler(llm.model, args.parallel, llm.max_seq_len, args.compile))
    server = Server(engine, llm.tokenizer, llm.checkpoint_path.absolute().parent.name, args.api_key)
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"http://{host}:{listener.getsockname()[1]}/v1", file=sys.stderr, flush=True)
    server.run([listener])


def listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError, ValueError) as e:
        raise UsageError(f"cannot listen on {host}, port {port}: {e}") from None


class Server(uvicorn.Server):
    def __init__(self, engine: AsyncEngine, tokenizer: Tokenizer, model_name: str, api_key: str | None = None):
        self.engine, self.tokenizer, self.model_name, self.api_key = engine, tokenizer, model_name, api_key
        routes = [Route(path, self.completions, methods=["POST"]) for path in ("/v1/completions", CHAT_PATH)]
        routes.append(Route("/v1/models", self.models))
        errors = (HTTPException, UsageError, GenerationError, ClientDisconnect, Exception)
        app = Starlette(routes=routes, exception_handlers=dict.fromkeys(errors, error_response))
        super().__init__(uvicorn.Config(app, http="h11", lifespan="off", log_level="error"))

    def handle_exit(self, signum: int, frame):
        if self.should_exit:  # the second signal
            os._exit(128 + signum)
        self.should_exit = True

    async def models(self, request: Request) -> Response:
        self.check_key(request)
        model = {"id": self.model_name, "object": "model", "created": 0, "owned_by": "gpt-fast"}
        return JSONResponse({"object": "list", "data": [model]})

    async def completions(self, request: Request) -> Response:
        self.check_key(request)
        try:
            body = await asyncio.wait_for(receive_body(request), MAX_BODY_SECONDS)
        except asyncio.TimeoutError:
            raise HTTPException(408, f"the request took more than {MAX_BODY_SECONDS} s to arrive") from None
        is_chat = request.scope["path"] == CHAT_PATH
        # In a thread, because tokenizing megabytes of text takes seconds
        options = is_chat, self.model_name, self.tokenizer, self.engine.scheduler
        completion = await asyncio.to_thread(CompletionRequest, body, *options)
        updates = self.engine.generate(completion.sequences)
        if completion.is_stream:
            return StreamingResponse(events(completion.chunks(updates)), media_type="text/event-stream")
        async for _ in updates:
            if await request.is_disconnected():
                raise ClientDisconnect
        return JSONResponse(completion.response())

    def check_key(self, request: Request):
        given, expected = request.headers.get("authorization", ""), f"Bearer {self.api_key}"
        if self.api_key and not hmac.compare_digest(given.encode("latin-1"), os.fsencode(expected)):
            raise HTTPException(401, "the API key is missing or wrong")


async def receive_body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"the request is larger than {MAX_BODY} bytes")
    return bytes(body)


async def events(chunks: AsyncIterator[dict]) -> AsyncIterator[str]:
    """Yields a server-sent event for each of chunks, and [DONE] at the end."""
    try:
        async for chunk in chunks:
            yield f"data: {json.dumps(chunk)}\n\n"
    except GenerationError as e:  # the status 200 is sent already, so the error is an event
        yield f"data: {error_response(None, e).body.decode()}\n\n"
    yield "data: [DONE]\n\n"


def error_response(request: Request | None, e: Exception) -> Response:
    status = getattr(e, "status_code", 400 if isinstance(e, UsageError) else 500)
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": getattr(e, "detail", str(e)), "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status)


if __name__ == "__main__":
    run_script(main, OOM_HINT)
