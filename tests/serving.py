"""A real HTTP server on the loopback that speaks OpenAI's chat protocol and answers as it was told to."""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

Answer = Callable[[dict[str, Any], int], web.Response | dict[str, Any]]
"""From a request's body and how often the same seed was asked for"""


class Server:
    """Serves one model; remembers what it was asked."""

    def __init__(self, answer: Answer, **model: Any) -> None:
        self.answer, self.model = answer, {"id": "student", **model}
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.tries: Counter[int] = Counter()
        self.underway = self.most = 0
        self.url = ""

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [self.model]})

    async def chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.tries[body["seed"]] += 1
        self.underway += 1
        self.most = max(self.most, self.underway)
        await asyncio.sleep(0.01)
        self.underway -= 1
        told = self.answer(body, self.tries[body["seed"]])
        return told if isinstance(told, web.Response) else web.json_response(told)


@contextmanager
def serving(server: Server, port: int = 0) -> Iterator[Server]:
    loop, started = asyncio.new_event_loop(), threading.Event()
    app = web.Application()
    app.add_routes([web.get("/v1/models", server.models), web.post("/v1/chat/completions", server.chat)])
    runner = web.AppRunner(app, shutdown_timeout=0.1)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        started.set()

    def run() -> None:
        loop.create_task(start())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def completion(content: str | None, finish: str = "stop", tokens: int = 7, **message: Any) -> dict[str, Any]:
    turn = {"role": "assistant", "content": content, **message}
    return {"choices": [{"message": turn, "finish_reason": finish}], "usage": {"completion_tokens": tokens}}
