"""Generate with servers that speak OpenAI's chat protocol (vLLM, SGLang, llama.cpp, ...): many requests at once.

A failed request is not a wrong answer: it is retried, and at last reported as an error that names it. Reasoning that a
server sends separately (`reasoning_content`, or vLLM's newer `reasoning`) is put back in front of the answer.
"""

import asyncio
import logging
import os
import queue
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx

from branchmerge import machine
from branchmerge.config import BackendConfig
from branchmerge.errors import UserError
from branchmerge.evaluation.encoding import Encoder
from branchmerge.evaluation.requests import Request, Response

BUSY = {429, 503}
"""Status codes of a busy server"""
AGAIN = {408, 409, 425, 500, 502, 504, 529}
"""Other status codes of errors that may be transient"""
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds before the first retry, doubled each time with a random part; and the largest wait"""
REASONING = ("reasoning_content", "reasoning")
"""Keys under which servers send the reasoning separately"""
ENDS = {"stop", "eos", "eos_token", "stop_sequence"}
"""finish_reason of a complete response: the first by vLLM, SGLang and llama.cpp, the rest by others"""


# httpx logs every request, and Hydra would print it.
logging.getLogger("httpx").setLevel(logging.WARNING)


class RequestError(Exception):
    """A request failed for good."""


class TryError(Exception):
    """One try of a request failed; another one may succeed."""


class BusyError(TryError):
    """A server is busy; `seconds` is how long it asks to wait."""

    def __init__(self, said: str, seconds: float = 0.0) -> None:
        super().__init__(said)
        self.seconds = seconds


class Servers:
    """One or more servers of one model; requests go to them in turn."""

    path = "chat/completions"
    patience = 600.0
    """Seconds for which all servers together may be busy or unreachable (rate limits per minute, restarts)"""

    def __init__(self, backend: BackendConfig, encoder: Encoder | None = None) -> None:
        """
        Args:
            encoder: of the checkpoint that they serve, where that is known
        """
        self.backend = backend
        self.encoder = encoder
        self.busy_since: float | None = None
        """Time at which a server was first busy since the last response"""
        self.failures: list[str] = []
        """Errors of requests of the last `generate` that got no response"""
        key = os.environ.get(backend.api_key_env, "")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        known = [self._model_on(url) for url in backend.base_urls]
        lengths = [model["max_model_len"] for model in known if model.get("max_model_len")]
        self.context = min(lengths) if lengths else None
        self.is_vllm = all(model.get("owned_by") == "vllm" for model in known)

    def close(self) -> None:
        """Nothing to free."""

    def generate(self, requests: Sequence[Request]) -> Iterator[list[tuple[Request, Response]]]:
        """Yield responses as they come; failed requests are left out and listed in `failures`."""
        self.failures = []
        machine.allow_open_files(min(self.backend.concurrency, len(requests)))  # one per connection
        done: queue.SimpleQueue[list[tuple[Request, Response]] | BaseException | None] = queue.SimpleQueue()
        loop = asyncio.new_event_loop()
        work = loop.create_task(self._all(requests, done))

        def run() -> None:
            try:
                loop.run_until_complete(work)
                done.put(None)
            except asyncio.CancelledError:
                done.put(None)
            except BaseException as error:
                done.put(error)

        thread = threading.Thread(target=run, name="requests", daemon=True)
        thread.start()
        try:
            while (pairs := done.get()) is not None:
                if isinstance(pairs, BaseException):
                    raise pairs
                yield pairs
        finally:  # also if the consumer stops before the end
            loop.call_soon_threadsafe(work.cancel)
            thread.join()
            loop.close()

    async def _all(self, requests: Sequence[Request], done: "queue.SimpleQueue[Any]") -> None:
        """Keep `concurrency` requests in flight."""
        waiting = iter(enumerate(requests))
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.backend.concurrency)
        timeout = httpx.Timeout(self.backend.timeout_s, pool=None)
        async with httpx.AsyncClient(headers=self.headers, limits=limits, timeout=timeout) as client:

            async def worker() -> None:
                for number, request in waiting:
                    try:
                        done.put([(request, await self._one(client, number, request))])
                    except RequestError as error:
                        self.failures.append(f"{request.task} {request.question}, sample {request.sample}: {error}")

            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.backend.concurrency, len(requests))):
                    group.create_task(worker())

    async def _one(self, client: httpx.AsyncClient, number: int, request: Request) -> Response:
        """One response; each try goes to another server. Failed tries are limited, busy servers are waited for.

        Raises:
            RequestError: no try succeeded, or the server refuses the request itself
        """
        urls, retries = self.backend.base_urls, self.backend.retries
        wait, tries, failed = FIRST_WAIT, 0, 0
        while True:
            url = urls[(number + tries) % len(urls)]
            tries += 1
            try:
                response = await self._try(client, url, request)
                self.busy_since = None
                return response
            except BusyError as error:
                left = self._patience_left()
                if tries > retries and not left:
                    raise RequestError(str(error)) from error
                pause = min(error.seconds, left)
            except TryError as error:
                failed += 1
                if failed > retries:
                    raise RequestError(str(error)) from error
                pause = 0.0
            await asyncio.sleep(pause + wait * random.uniform(0.5, 1.5))
            wait = min(2 * wait, LONGEST_WAIT)

    async def _try(self, client: httpx.AsyncClient, url: str, request: Request) -> Response:
        """Ask one server; raises TryError if another try may succeed, else RequestError."""
        try:
            answer = await client.post(f"{url.rstrip('/')}/{self.path}", json=self.body(request))
            if answer.status_code == 200:
                return self.response(request, answer.json())
        except httpx.ConnectError as error:
            raise BusyError(f"{url}: {type(error).__name__} {error}") from error
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            raise TryError(f"{url}: {type(error).__name__} {error}") from error
        said = f"{url} answers {answer.status_code}: {answer.text[:200]}"
        if answer.status_code in BUSY:
            raise BusyError(said, _retry_after(answer))
        raise TryError(said) if answer.status_code in AGAIN else RequestError(said)

    def _patience_left(self) -> float:
        """Seconds for which busy servers are still waited for. All requests share them; otherwise, with the servers
        gone, every batch of requests would wait the full time."""
        now = time.monotonic()
        if self.busy_since is None:
            self.busy_since = now
        return max(self.busy_since + self.patience - now, 0.0)

    def body(self, request: Request) -> dict[str, Any]:
        """The JSON body of a request."""
        return {"messages": [turn.as_dict() for turn in request.messages], **self.settings(request)}

    def settings(self, request: Request) -> dict[str, Any]:
        """The body without the prompt."""
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.backend.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": request.seed,
        }
        if sampling.until:
            body["stop"] = list(sampling.until)
        if (
            sampling.top_k or self.is_vllm
        ):  # vLLM takes the model's own top_k unless told otherwise; others refuse the key
            body["top_k"] = sampling.top_k or -1
        if self.is_vllm:
            body |= {"repetition_penalty": 1.0, "min_p": 0.0}
        return body

    def response(self, request: Request, answer: dict[str, Any]) -> Response:
        """The response in the protocol's JSON; raises KeyError, IndexError, TypeError or ValueError if the JSON is not
        as expected, or the response is incomplete."""
        choice = answer["choices"][0]
        message = choice["message"]
        if not isinstance(message, Mapping):
            raise TypeError(f"its message is {str(message)[:100]}")
        text, finish = text_of(message, "content") or "", finish_of(choice)
        told = [part for name in REASONING if (part := text_of(message, name)) is not None]
        reasoning = max(told, key=len, default=None)
        if reasoning:
            closed = text or finish == "stop"
            text = f"<think>\n{reasoning}" + (f"\n</think>\n\n{text}" if closed else "")
        # Reasoning that a server sends, even if empty, gets its closing tag; other text simply continues the prompt.
        elif reasoning is None and self.encoder is not None and not text.lstrip().startswith("<think>"):
            text = self.encoder.opening(request.messages) + text
        return Response(text, tokens_of(answer), finish)

    def _model_on(self, url: str) -> dict[str, Any]:
        """A server's description of the model; raises UserError if it cannot be reached or serves another one."""
        try:
            answer = httpx.get(f"{url.rstrip('/')}/models", headers=self.headers, timeout=30)
            answer.raise_for_status()
            known = {str(model["id"]): dict(model) for model in answer.json()["data"]}
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"backend.base_urls: {url} does not answer /models ({type(error).__name__}: {error}); start the server,"
                " or give the address that ends in /v1"
            ) from error
        if self.backend.model not in known:
            raise UserError(f"backend.model={self.backend.model}: {url} has {', '.join(known) or 'no model'}")
        return known[self.backend.model]


def text_of(said: Mapping[str, Any], name: str) -> str | None:
    """A text in the protocol's JSON; raises TypeError if it is something else."""
    text = said.get(name)
    if text is not None and not isinstance(text, str):
        raise TypeError(f"its {name} is {str(text)[:100]}")
    return text


def tokens_of(answer: Mapping[str, Any]) -> int:
    """Number of generated tokens; raises KeyError or TypeError if the server does not send it."""
    tokens = answer["usage"]["completion_tokens"]
    if not isinstance(tokens, int):
        raise TypeError(f"its completion_tokens are {str(tokens)[:100]}")
    return tokens


def finish_of(choice: Mapping[str, Any]) -> str:
    """stop or length; raises ValueError where a response ended otherwise: aborted, filtered, by an error."""
    told = choice.get("finish_reason")
    if told == "length":
        return "length"
    if told not in ENDS:
        raise ValueError(f"its finish_reason is {str(told)[:100]}")
    return "stop"


def _retry_after(answer: httpx.Response) -> float:
    """Seconds that a server asks to wait; 0 if it does not, or sends a date."""
    told = answer.headers.get("Retry-After", "")
    return float(told) if told.isdecimal() else 0.0
