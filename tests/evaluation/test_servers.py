"""backend=openai against a real HTTP server on the loopback that answers as it was told to."""

import json
import resource
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from serving import Server, completion, serving

from branchmerge.config import BackendConfig
from branchmerge.errors import UserError
from branchmerge.evaluation import backends
from branchmerge.evaluation.backends import openai
from branchmerge.evaluation.backends.openai import Servers
from branchmerge.evaluation.requests import Request, Response, Sampling, requests_for
from branchmerge.trajectories.schema import Message


def echo(body: dict[str, Any], tries: int) -> dict[str, Any]:
    return completion(f"{body['messages'][-1]['content']} {body['seed']}")


def backend(*servers: Server, **settings: Any) -> Servers:
    given = {"timeout_s": 20.0, "retries": 3, **settings}
    return Servers(BackendConfig(kind="openai", base_urls=[s.url for s in servers], model="student", **given))


def asked(questions: int, samples: int = 1, **sampling: Any) -> list[Request]:
    turns = [(f"q{n}", (Message("user", f"question {n}"),)) for n in range(questions)]
    return requests_for("task", turns, samples, Sampling(max_new_tokens=100, **sampling), seed=42)


def responses(servers: Servers, requests: list[Request]) -> dict[Request, Response]:
    return {request: response for pairs in servers.generate(requests) for request, response in pairs}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "FIRST_WAIT", 0.02)


def test_every_request_gets_its_own_response_many_at_once() -> None:
    requests = asked(100, samples=4, temperature=0.6, top_p=0.95)
    with serving(Server(echo)) as server:
        found = responses(backend(server, concurrency=64), requests)
        assert server.most > 8
    assert found.keys() == set(requests)
    for request, response in found.items():
        assert response == Response(f"{request.messages[0].content} {request.seed}", 7, "stop")
    assert len({body["seed"] for body in server.bodies}) == 400  # samples of a question are not the same draw


def test_more_at_once_than_a_process_may_open_files_at_first() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, hard))
    try:
        with serving(Server(echo)) as server:
            servers = backend(server, concurrency=150, retries=0)
            assert len(responses(servers, asked(300))) == 300 and servers.failures == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_sampling_is_sent_in_full() -> None:
    with serving(Server(echo)) as server:
        responses(backend(server), asked(1, temperature=0.6, top_p=0.95, until=("END",)))
    (body,) = server.bodies
    assert body["model"] == "student" and body["messages"] == [{"role": "user", "content": "question 0"}]
    assert (body["temperature"], body["top_p"], body["max_tokens"], body["stop"]) == (0.6, 0.95, 100, ["END"])
    assert "top_k" not in body  # OpenAI's own servers refuse the key


def test_vllm_is_told_not_to_take_the_models_own_settings() -> None:
    with serving(Server(echo, owned_by="vllm", max_model_len=4096)) as server:
        servers = backend(server)
        responses(servers, asked(1))
    assert servers.context == 4096
    assert server.bodies[0]["top_k"] == -1 and server.bodies[0]["repetition_penalty"] == 1.0


TOLD = BackendConfig(kind="openai", model="student")
VLLM = BackendConfig(kind="vllm", dtype="float32", device="cpu", batch_size=4)


def test_what_decides_a_response_is_in_its_key_and_earlier_keys_stay() -> None:
    assert backends.facts(TOLD) == {"backend": "openai", "model": "student"}
    assert backends.facts(replace(TOLD, revision="step 200")) == {**backends.facts(TOLD), "revision": "step 200"}
    usual = {"backend": "vllm", "dtype": "float32", "batch_size": 4}
    assert backends.facts(VLLM) == usual
    arguments = ["--quantization", "fp8"]
    assert backends.facts(replace(VLLM, vllm_arguments=arguments)) == {**usual, "vllm_arguments": arguments}


BOTH = Response("<think>\n1 + 1\n</think>\n\n\\boxed{2}", 7, "stop")


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (completion("\\boxed{2}", reasoning_content="1 + 1"), BOTH),
        (completion("\\boxed{2}", reasoning="1 + 1"), BOTH),
        (completion(None, "length", 100, reasoning_content="so 3"), Response("<think>\nso 3", 100, "length")),
        (completion("<think>\na\n</think>b"), Response("<think>\na\n</think>b", 7, "stop")),
        (completion(None), Response("", 7, "stop")),
    ],
)  # fmt: skip
def test_reasoning_that_comes_apart_is_put_in_front(told: dict[str, Any], expected: Response) -> None:
    with serving(Server(lambda body, tries: told)) as server:
        assert list(responses(backend(server), asked(1)).values()) == [expected]


CUT = completion("so 3, but wait", "length", 100)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (CUT, Response("<think>\nso 3, but wait", 100, "length")),
        (completion("1 + 1\n</think>\n\n\\boxed{2}"), BOTH),
        (completion("<think>\n1 + 1\n</think>\n\n\\boxed{2}"), BOTH),
        (completion("\\boxed{2}", reasoning_content="1 + 1"), BOTH),
        (completion("\\boxed{2}", reasoning_content=None, reasoning=""), Response("\\boxed{2}", 7, "stop")),
    ],
)  # fmt: skip
def test_reasoning_that_the_template_opened_is_put_in_front_once(
    thinking_student: Path, told: dict[str, Any], expected: Response
) -> None:
    with serving(Server(lambda body, tries: told)) as server:
        given = BackendConfig(kind="openai", base_urls=[server.url], model="student")
        servers = backends.load(given, thinking_student)
        assert list(responses(servers, asked(1)).values()) == [expected]


def test_a_checkpoint_whose_template_opens_nothing_gets_nothing_in_front(tiny_student: Path) -> None:
    with serving(Server(lambda body, tries: CUT)) as server:
        given = BackendConfig(kind="openai", base_urls=[server.url], model="student")
        servers = backends.load(given, tiny_student)
        assert list(responses(servers, asked(1)).values()) == [Response("so 3, but wait", 100, "length")]


@pytest.mark.parametrize("finish", ["abort", "error", "content_filter", "tool_calls", None])
def test_a_response_that_is_not_whole_is_a_failure(finish: Any) -> None:
    with serving(Server(lambda body, tries: completion("<think>\nI was just thin", finish))) as server:
        servers = backend(server, retries=1)
        assert responses(servers, asked(1)) == {}
    assert len(server.bodies) == 2 and f"its finish_reason is {finish}" in servers.failures[0]


@pytest.mark.parametrize("finish", ["stop", "eos", "eos_token", "stop_sequence"])
def test_servers_have_several_names_for_the_end(finish: str) -> None:
    with serving(Server(lambda body, tries: completion("2", finish))) as server:
        assert list(responses(backend(server), asked(1)).values()) == [Response("2", 7, "stop")]


def choice(message: Any, **usage: Any) -> dict[str, Any]:
    return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage or {"completion_tokens": 1}}


@pytest.mark.parametrize(
    "told",
    [
        choice(None), choice("hi"), choice({"content": [{"type": "text", "text": "2"}]}), choice({"content": {}}),
        choice({"content": "2", "reasoning": {"text": "?"}}), choice({"content": "2"}, completion_tokens=None),
        {**choice({"content": "2"}), "choices": []}, {**choice({"content": "2"}), "choices": None},
        {**choice({"content": "2"}), "choices": [None]}, {**choice({"content": "2"}), "usage": None}, {},
    ],
)  # fmt: skip
def test_malformed_answers_are_failures_of_their_requests_alone(told: dict[str, Any]) -> None:
    def first_is_bad(body: dict[str, Any], tries: int) -> dict[str, Any]:
        return told if body["messages"][-1]["content"] == "question 0" else echo(body, tries)

    with serving(Server(first_is_bad)) as server:
        servers = backend(server, retries=1)
        assert {request.question for request in responses(servers, asked(3))} == {"q1", "q2"}
    assert len(servers.failures) == 1 and len(server.bodies) == 4


def test_a_server_that_asks_to_wait_is_not_asked_before() -> None:
    times: list[float] = []

    def second_time(body: dict[str, Any], tries: int) -> web.Response | dict[str, Any]:
        times.append(time.monotonic())
        return web.Response(status=429, headers={"Retry-After": "2"}) if tries == 1 else echo(body, tries)

    with serving(Server(second_time)) as server:
        assert len(responses(backend(server), asked(1))) == 1
    assert 2.0 <= times[1] - times[0] < 10.0


def test_a_time_to_wait_that_is_a_date_is_no_error() -> None:
    def second_time(body: dict[str, Any], tries: int) -> web.Response | dict[str, Any]:
        until = {"Retry-After": "Wed, 21 Oct 2037 07:28:00 GMT"}
        return web.Response(status=503, headers=until) if tries == 1 else echo(body, tries)

    with serving(Server(second_time)) as server:
        assert len(responses(backend(server), asked(1))) == 1


def test_each_try_is_waited_for_twice_as_long_as_the_one_before() -> None:
    times: list[float] = []

    def never(body: dict[str, Any], tries: int) -> web.Response:
        times.append(time.monotonic())
        return web.Response(status=500)

    with serving(Server(never)) as server:
        assert responses(backend(server, retries=6), asked(1)) == {}
    # 0.02 s times 1, 2, 4, ... 32, each times 0.5 to 1.5
    pauses = [after - before for before, after in pairwise(times)]
    assert all(pause >= 0.01 * 2**number for number, pause in enumerate(pauses)) and len(pauses) == 6


def test_servers_that_answered_in_between_are_waited_for_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A day of requests sees a server busy more than once."""
    monkeypatch.setattr(Servers, "patience", 1.0)
    monkeypatch.setattr(openai, "LONGEST_WAIT", 0.02)

    def often_busy(body: dict[str, Any], tries: int) -> web.Response | dict[str, Any]:
        return web.Response(status=429) if tries < 4 else echo(body, tries)

    with serving(Server(often_busy)) as server:
        servers = backend(server, retries=0)
        assert len(responses(servers, asked(1))) == 1
        time.sleep(1.2)
        assert len(responses(servers, asked(2))) == 2 and servers.failures == []


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_given_time_and_not_a_number_of_tries(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setattr(openai, "LONGEST_WAIT", 0.02)

    def tenth_time(body: dict[str, Any], tries: int) -> web.Response | dict[str, Any]:
        return web.Response(status=status) if tries < 10 else echo(body, tries)

    with serving(Server(tenth_time)) as server:
        servers = backend(server, retries=1)
        assert len(responses(servers, asked(2))) == 2 and servers.failures == []


def test_a_server_that_comes_back_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "LONGEST_WAIT", 0.05)
    with serving(Server(echo)) as first:
        servers = backend(first, retries=1)
    second, found = Server(echo), {}
    thread = threading.Thread(target=lambda: found.update(responses(servers, asked(1))))
    thread.start()
    time.sleep(1.0)  # more than twenty tries
    with serving(second, port=int(first.url.split(":")[2].split("/")[0])):
        thread.join(30)
    assert len(found) == 1 and servers.failures == []


def test_servers_that_stay_busy_or_away_are_failures_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Servers, "patience", 1.0)
    monkeypatch.setattr(openai, "LONGEST_WAIT", 0.02)

    def busy(body: dict[str, Any], tries: int) -> web.Response:
        return web.Response(status=429, text="busy", headers={"Retry-After": "3600"})

    with serving(Server(busy)) as server:
        servers = backend(server, retries=1, concurrency=1)
        began = time.monotonic()
        assert responses(servers, asked(20)) == {}  # the later ones do not wait again
    assert 1.0 <= time.monotonic() - began < 10.0
    assert len(servers.failures) == 20 and "answers 429: busy" in servers.failures[0]
    assert responses(servers, asked(1)) == {} and "ConnectError" in servers.failures[0]


def test_without_patience_a_busy_server_is_still_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may have used it up; the retries are each request's own."""
    monkeypatch.setattr(Servers, "patience", 0.0)

    def third_time(body: dict[str, Any], tries: int) -> web.Response | dict[str, Any]:
        return web.Response(status=429) if tries < 3 else echo(body, tries)

    with serving(Server(third_time)) as server:
        assert len(responses(backend(server, retries=2), asked(2))) == 2
        assert responses(backend(server, retries=1), asked(3)[2:]) == {}


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_what_may_pass_is_tried_again(status: int) -> None:
    def second_time(body: dict[str, Any], tries: int) -> web.Response | dict[str, Any]:
        return web.Response(status=status, text="busy") if tries == 1 else echo(body, tries)

    with serving(Server(second_time)) as server:
        servers = backend(server)
        assert len(responses(servers, asked(20))) == 20
    assert set(server.tries.values()) == {2} and servers.failures == []


def test_what_cannot_be_answered_is_a_failure_and_no_response() -> None:
    def one_fails(body: dict[str, Any], tries: int) -> web.Response | dict[str, Any]:
        bad = body["messages"][-1]["content"] == "question 3"
        return web.Response(status=500, text="out of memory") if bad else echo(body, tries)

    with serving(Server(one_fails)) as server:
        servers = backend(server)
        found = responses(servers, asked(6))
    assert sorted(request.question for request in found) == ["q0", "q1", "q2", "q4", "q5"]
    (failure,) = servers.failures
    assert failure.startswith("task q3, sample 0: ") and "answers 500: out of memory" in failure
    assert max(server.tries.values()) == 4


def test_a_request_that_the_server_refuses_is_not_tried_again() -> None:
    with serving(Server(lambda body, tries: web.Response(status=400, text="too long"))) as server:
        servers = backend(server)
        assert responses(servers, asked(1)) == {}
    assert len(server.bodies) == 1 and "answers 400: too long" in servers.failures[0]


def test_garbage_is_tried_again_and_then_a_failure() -> None:
    with serving(Server(lambda body, tries: web.Response(text="<html>"))) as server:
        servers = backend(server, retries=1)
        assert responses(servers, asked(1)) == {} and len(servers.failures) == 1
    assert len(server.bodies) == 2


def test_several_servers_share_the_work_and_stand_in_for_each_other() -> None:
    with serving(Server(echo)) as one, serving(Server(lambda *_: web.Response(status=503))) as other:
        servers = backend(one, other)
        assert len(responses(servers, asked(20))) == 20
    assert other.bodies and len(one.bodies) == 20 and servers.failures == []


def test_the_key_is_sent_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "abc")
    with serving(Server(echo)) as server:
        responses(backend(server, api_key_env="SECRET"), asked(1))
    assert server.headers[0]["Authorization"] == "Bearer abc"


def test_a_reader_that_goes_away_ends_the_requests() -> None:
    with serving(Server(echo)) as server:
        pairs = backend(server, concurrency=2).generate(asked(2000))
        next(pairs)
        pairs.close()
        assert len(server.bodies) < 1000


def test_a_server_that_is_not_there_or_has_another_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"backend\.base_urls: http://127\.0\.0\.1:9/v1 does not answer /models"):
        Servers(BackendConfig(kind="openai", base_urls=["http://127.0.0.1:9/v1"], model="student"))
    with serving(Server(echo)) as server, pytest.raises(UserError, match=r"backend\.model=teacher: .* has student"):
        Servers(BackendConfig(kind="openai", base_urls=[server.url], model="teacher"))


def test_bodies_are_json_of_the_protocol() -> None:
    with serving(Server(echo)) as server:
        responses(backend(server), asked(1))
    assert json.loads(json.dumps(server.bodies[0])) == server.bodies[0]
    assert set(server.bodies[0]) == {"model", "messages", "temperature", "top_p", "max_tokens", "seed"}
