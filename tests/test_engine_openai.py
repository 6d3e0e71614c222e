"""The HTTP policy against a real local server: what it sends, what it survives, what it reports."""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

import rstar.engines.openai as module
from rstar.config import EngineSection
from rstar.engines.base import ContextOverflow, EngineError
from rstar.engines.openai import OpenAIPolicy
from rstar.types import PromptText, SamplingParams, UserError

PROMPT = PromptText(("<|im_start|>user\nTwo plus two?", "\n<code>\n"))
SECTION = EngineSection(kind="openai", model="toy", retries=3, timeout=5.0, concurrency=4, api_key_env="TOY_KEY")
STEP = ("<end_of_step>", "<end_of_code>")
Answer = Callable[[dict[str, Any]], web.StreamResponse | Awaitable[web.StreamResponse]]


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BACKOFF", 0.01)


class Server:
    """A completion server that answers by a script; it keeps the bodies and headers it was sent."""

    def __init__(self, *script: Answer) -> None:
        self.script = list(script)  # the last one repeats
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        self.times.append(time.monotonic())
        answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        result = answer({**self.bodies[-1], "request": request})
        return result if isinstance(result, web.StreamResponse) else await result


@asynccontextmanager
async def serving(*script: Answer, **changes: Any) -> AsyncIterator[tuple[Server, OpenAIPolicy]]:
    server = Server(*script)
    app = web.Application()
    app.router.add_post("/v1/completions", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    policy = OpenAIPolicy(replace(SECTION, url=server.url, **changes))
    try:
        yield server, policy
    finally:
        await policy.close()
        await policy.close()  # twice is as good as once
        await runner.cleanup()


def choice(text: str, finish: str = "stop", **more: Any) -> dict[str, Any]:
    return {"text": text, "finish_reason": finish, **more}


def reply(*choices: dict[str, Any], prompt_tokens: int = 7, completion_tokens: int | None = 5) -> Answer:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return lambda body: web.json_response({"choices": list(choices), "usage": usage})


def status(code: int, message: str = "no", **headers: str) -> Answer:
    return lambda body: web.json_response({"error": {"message": message}}, status=code, headers=headers)


async def test_a_request_carries_prompt_and_sampling_and_nothing_random() -> None:
    async with serving(reply(choice("a", stop_reason=None), choice("b", stop_reason=None))) as (server, policy):
        params = SamplingParams(n=2, temperature=0.8, top_p=0.9, max_tokens=33, stop=STEP, seed=5)
        await policy.generate(PROMPT, params)
    body = server.bodies[0]
    assert body["prompt"] == PROMPT.text
    assert body["model"] == "toy"
    assert (body["n"], body["temperature"], body["top_p"], body["max_tokens"]) == (2, 0.8, 0.9, 33)
    assert body["stop"] == list(STEP)
    assert body["include_stop_str_in_output"] is True
    assert "seed" not in body  # not batch-invariant on any server: it would promise what it cannot keep


async def test_samples_report_text_tokens_logprob_and_what_ended_them() -> None:
    logprobs = {"tokens": ["x", "<end_of_step>"], "token_logprobs": [-0.5, -0.25]}
    answer = reply(
        choice("x<end_of_step>", logprobs=logprobs, stop_reason="<end_of_step>"),
        choice(
            "the end", logprobs={"tokens": ["the", " end", ""], "token_logprobs": [-1.0, -1.0, -1.0]}, stop_reason=None
        ),
        choice("going on", "length", logprobs={"tokens": ["g"], "token_logprobs": [None]}, stop_reason=None),
        completion_tokens=6,
    )
    async with serving(answer) as (_, policy):
        step, end, cut = await policy.generate(PROMPT, SamplingParams(n=3, stop=STEP))
        usage = policy.usage
    assert (step.text, step.tokens, step.logprob, step.stop, step.cut_off) == (
        "x<end_of_step>",
        2,
        -0.75,
        STEP[0],
        False,
    )
    assert (end.tokens, end.stop, end.cut_off) == (3, None, False)
    assert (cut.stop, cut.cut_off) == (None, True)
    assert math.isnan(cut.logprob)
    assert (usage.generated_tokens, usage.prompt_tokens, usage.engine_calls) == (6, 7, 1)


@pytest.mark.parametrize("field", ["stop_reason", "matched_stop"])
async def test_a_stop_string_that_the_server_cut_off_is_put_back_from_its_reason(field: str) -> None:
    async with serving(reply(choice("x = 1\n", **{field: "<end_of_code>"}))) as (server, policy):
        (sample,) = await policy.generate(PROMPT, SamplingParams(stop=STEP))
    assert (sample.text, sample.stop) == ("x = 1\n<end_of_code>", "<end_of_code>")
    assert len(server.bodies) == 1


async def test_a_model_that_ended_by_itself_gets_no_stop_string() -> None:
    async with serving(reply(choice("done", stop_reason=None))) as (_, policy):
        (sample,) = await policy.generate(PROMPT, SamplingParams(stop=("<end_of_step>",)))
    assert (sample.text, sample.stop) == ("done", None)


async def test_a_stop_string_hidden_by_the_server_is_found_in_its_token_list() -> None:
    listed = {"tokens": ["x", "\n", "<end_", "of_code>"], "token_logprobs": [-1, -1, -1, -1]}
    async with serving(reply(choice("x\n", logprobs=listed))) as (server, policy):
        (sample,) = await policy.generate(PROMPT, SamplingParams(stop=STEP))
    assert (sample.text, sample.stop) == ("x\n<end_of_code>", "<end_of_code>")
    assert len(server.bodies) == 1


async def test_the_only_stop_string_is_asked_for_too() -> None:
    script = (reply(choice("x\n")), reply(choice("<end_of_step>y = 2", "length")))
    async with serving(*script) as (_, policy):
        (sample,) = await policy.generate(PROMPT, SamplingParams(stop=("<end_of_step>",)))
    assert (sample.text, sample.stop) == ("x\n<end_of_step>", "<end_of_step>")


async def test_a_solution_that_ended_is_not_taken_for_one_that_waits_for_the_calculator() -> None:
    script = (reply(choice("48/2 clips.\n#### 24")), reply(choice("\n\nQuestion:", "length")))
    async with serving(*script) as (server, policy):
        (sample,) = await policy.generate(PROMPT, SamplingParams(calculator=True, max_tokens=400))
    assert (sample.text, sample.cut_off) == ("48/2 clips.\n#### 24", False)
    assert len(server.bodies) == 2


async def test_among_several_hidden_stop_strings_the_model_is_asked_how_it_goes_on() -> None:
    script = (reply(choice("x\n")), reply(choice("<end_of_code>\n<output>", "length")))
    async with serving(*script) as (server, policy):
        (sample,) = await policy.generate(PROMPT, SamplingParams(stop=STEP, temperature=0.7))
    assert (sample.text, sample.stop) == ("x\n<end_of_code>", "<end_of_code>")
    probe = server.bodies[1]
    assert probe["prompt"] == PROMPT.text + "x\n"
    assert probe["temperature"] == 0
    assert "stop" not in probe


async def test_a_continuation_without_a_stop_string_counts_as_ended_by_the_model() -> None:
    async with serving(reply(choice("x\n")), reply(choice("nothing like it", "length"))) as (_, policy):
        (sample,) = await policy.generate(PROMPT, SamplingParams(stop=STEP))
    assert (sample.text, sample.stop, sample.cut_off) == ("x\n", None, False)


async def test_extensions_are_dropped_for_a_server_that_refuses_them() -> None:
    def strict(body: dict[str, Any]) -> web.Response:
        if "include_stop_str_in_output" in body:
            error = {"error": {"message": "Unrecognized request argument: include_stop_str_in_output"}}
            return web.json_response(error, status=400)
        return web.json_response({"choices": [choice("x!")] * body["n"], "usage": {}})

    async with serving(strict, retries=0) as (server, policy):
        one = SamplingParams(stop=("!",))
        samples = await asyncio.gather(*(policy.generate(PROMPT, one) for _ in range(3)))  # all meet the refusal
        sent = len(server.bodies)
        await policy.generate(PROMPT, one)
        assert len(server.bodies) == sent + 1  # it is remembered
    assert [s.text for (s,) in samples] == ["x!"] * 3


async def test_no_second_begin_token_is_asked_for() -> None:
    async with serving(reply(choice("x"))) as (server, policy):
        await policy.generate(PromptText(("<s>[INST] hi",)), SamplingParams())
        await policy.generate(PROMPT, SamplingParams())
    assert server.bodies[0]["add_special_tokens"] is False
    assert "add_special_tokens" not in server.bodies[1]


async def test_missing_samples_are_asked_for_again() -> None:
    async with serving(reply(choice("only one"))) as (server, policy):
        samples = await policy.generate(PROMPT, SamplingParams(n=3))
    assert len(samples) == 3
    assert [body["n"] for body in server.bodies] == [3, 2, 1]


async def test_greedy_samples_are_paid_for_once() -> None:
    async with serving(reply(choice("same"))) as (server, policy):
        samples = await policy.generate(PROMPT, SamplingParams(n=3, temperature=0))
    assert [s.text for s in samples] == ["same"] * 3
    assert [body["n"] for body in server.bodies] == [1]


async def test_tokens_are_shared_out_when_the_server_gives_only_their_sum() -> None:
    async with serving(reply(choice("aaaaaaaaa"), choice("b"), completion_tokens=20)) as (_, policy):
        long, short = await policy.generate(PROMPT, SamplingParams(n=2))
    assert long.tokens + short.tokens == 20
    assert long.tokens == 18


async def test_tokens_are_counted_by_the_tokenizer_when_there_is_one(tiny_model: Path) -> None:
    async with serving(reply(choice("12345"), choice("1"), completion_tokens=20)) as (server, _):
        policy = OpenAIPolicy(replace(SECTION, url=server.url), str(tiny_model))
        five, one = await policy.generate(PROMPT, SamplingParams(n=2))
        await policy.close()
    assert (five.tokens, one.tokens) == (5, 1)  # this tokenizer splits digits


@pytest.mark.parametrize("code", [429, 500, 503])
async def test_a_busy_server_is_asked_again(code: int) -> None:
    async with serving(status(code), status(code), reply(choice("ok"))) as (server, policy):
        (sample,) = await policy.generate(PROMPT, SamplingParams())
    assert sample.text == "ok"
    assert len(server.bodies) == 3


async def test_waits_grow_between_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BACKOFF", 0.1)
    waits: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        """Long waits are only written down: what passes between two requests depends on the machine too."""
        if seconds >= 0.05:
            waits.append(seconds)
        await sleep(0 if seconds >= 0.05 else seconds)

    async with serving(status(500), status(500), status(500), reply(choice("ok"))) as (server, policy):
        with monkeypatch.context() as patch:
            patch.setattr(module.asyncio, "sleep", note)
            await policy.generate(PROMPT, SamplingParams())
    first, second, third = waits
    assert 0.05 <= first <= 0.1 <= second <= 0.2 <= third <= 0.4
    assert len(server.bodies) == 4


async def test_retry_after_is_honoured() -> None:
    async with serving(status(429, "slow down", **{"Retry-After": "0.4"}), reply(choice("ok"))) as (server, policy):
        await policy.generate(PROMPT, SamplingParams())
    assert server.times[1] - server.times[0] >= 0.4


async def test_retry_after_may_be_a_date() -> None:
    assert module._retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert 3e9 > module._retry_after("Wed, 21 Oct 2099 07:28:00 GMT") > 1e9
    assert module._retry_after("soon") == 0.0


async def test_a_server_that_stays_broken_is_an_engine_error() -> None:
    async with serving(status(503, "loading the model")) as (server, policy):
        with pytest.raises(EngineError, match=r"503.*loading the model.*4 times"):
            await policy.generate(PROMPT, SamplingParams())
    assert len(server.bodies) == 4


async def test_a_slow_server_is_given_up_and_asked_again() -> None:
    async def slow(body: dict[str, Any]) -> web.Response:
        await asyncio.sleep(30)
        return web.json_response({})

    async with serving(slow, reply(choice("ok")), timeout=2.0) as (server, policy):
        (sample,) = await policy.generate(PROMPT, SamplingParams())
    assert sample.text == "ok"
    assert len(server.bodies) == 2


async def test_a_dropped_connection_is_tried_again() -> None:
    def drop(body: dict[str, Any]) -> web.Response:
        body["request"].transport.abort()
        return web.Response()

    async with serving(drop, reply(choice("ok"))) as (server, policy):
        (sample,) = await policy.generate(PROMPT, SamplingParams())
    assert sample.text == "ok"
    assert len(server.bodies) == 2


@pytest.mark.parametrize(
    "text", ["<html>gateway</html>", '{"choices": [{"te', '{"choices": []}', '{"choices": [{}]}', "[]"]
)
async def test_an_unreadable_body_is_tried_again(text: str) -> None:
    async with serving(lambda body: web.Response(text=text), reply(choice("ok"))) as (_, policy):
        (sample,) = await policy.generate(PROMPT, SamplingParams())
    assert sample.text == "ok"


async def test_a_server_that_is_not_there_is_an_engine_error() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, never listening
        policy = OpenAIPolicy(replace(SECTION, url=f"http://127.0.0.1:{unused.getsockname()[1]}/v1", retries=1))
        with pytest.raises(EngineError, match="2 times"):
            await policy.generate(PROMPT, SamplingParams())
        await policy.close()


@pytest.mark.parametrize(
    "body", ['{"error": {"message": "context is 4096"}}', '{"message": "context is 4096"}', "context is 4096"]
)
async def test_a_refused_request_is_the_users_and_is_not_repeated(body: str) -> None:
    async with serving(lambda _: web.Response(text=body, status=400)) as (server, policy):
        with pytest.raises(UserError, match="400: context is 4096"):
            await policy.generate(PROMPT, SamplingParams())
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("code", "body"),
    [
        (400, "This model's maximum context length is 4096 tokens"),
        (400, "The input (61709 tokens) is longer than the model's context length (4096 tokens)."),
        (400, "request (4390 tokens) exceeds the available context size (4096)"),
        (500, "Context size has been exceeded. 4096"),
    ],
)
async def test_a_prompt_past_the_servers_context_is_told_apart(code: int, body: str) -> None:
    async with serving(lambda _: web.Response(text=body, status=code)) as (server, policy):
        with pytest.raises(ContextOverflow, match="4096"):
            await policy.generate(PROMPT, SamplingParams())
    assert len(server.bodies) == 1


async def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_KEY", "sk-secret-123")
    async with serving(status(401, "bad key sk-secret-123")) as (server, policy):
        with pytest.raises(UserError, match="TOY_KEY") as caught:
            await policy.generate(PROMPT, SamplingParams())
    assert server.headers[0]["Authorization"] == "Bearer sk-secret-123"
    assert "sk-secret-123" not in str(caught.value)
    async with serving(status(500, "proxy saw sk-secret-123"), retries=0) as (_, policy):
        with pytest.raises(EngineError) as broken:
            await policy.generate(PROMPT, SamplingParams())
    assert "sk-secret-123" not in str(broken.value)


async def test_requests_in_flight_are_bounded() -> None:
    now, most = 0, 0

    async def count(body: dict[str, Any]) -> web.Response:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.03)
        now -= 1
        return web.json_response({"choices": [choice("ok")], "usage": {}})

    async with serving(count, concurrency=3) as (_, policy):
        await asyncio.gather(*(policy.generate(PROMPT, SamplingParams()) for _ in range(20)))
    assert most == 3


async def test_a_cancelled_request_hangs_up() -> None:
    gone = asyncio.Event()

    async def wait(body: dict[str, Any]) -> web.Response:
        while body["request"].transport is not None:
            await asyncio.sleep(0.01)
        gone.set()
        return web.Response()

    async with serving(wait) as (server, policy):
        task = asyncio.create_task(policy.generate(PROMPT, SamplingParams()))
        while not server.bodies:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(gone.wait(), 30.0)


async def test_an_adapter_is_a_model_name() -> None:
    async with serving(reply(choice("ok"))) as (server, policy):
        await policy.generate(PROMPT, SamplingParams(adapter="stop-agent"))
    assert server.bodies[0]["model"] == "stop-agent"


@pytest.mark.parametrize("changes", [{"url": ""}, {"url": "localhost:8000/v1"}, {"model": ""}])
def test_a_section_that_cannot_work_is_refused_at_once(changes: dict[str, str]) -> None:
    with pytest.raises(UserError):
        OpenAIPolicy(replace(SECTION, **{"url": "http://localhost:1/v1", **changes}))


def test_one_policy_serves_two_event_loops_in_turn() -> None:
    async def ask() -> str:
        async with serving(reply(choice("ok"))) as (server, _):
            policy._url = server.url + "/completions"
            (sample,) = await policy.generate(PROMPT, SamplingParams())
            return sample.text

    policy = OpenAIPolicy(replace(SECTION, url="http://127.0.0.1:1/v1"))
    assert [asyncio.run(ask()), asyncio.run(ask())] == ["ok", "ok"]
    asyncio.run(policy.close())
