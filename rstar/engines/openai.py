"""Policy of any OpenAI-compatible completion server (vLLM, SGLang, llama.cpp, a hosted model), over HTTP.

Speaks `/v1/completions` only: a step continues a half-written assistant turn, and `/v1/chat/completions` has no
standard way to say that (vLLM's `continue_final_message` is its own). The prompt's chat template is therefore applied
on our side, and prompts travel as text: a bootstrap policy's tokenizer is the server's business, not ours.

Stop strings are kept in the text where the server knows vLLM's `include_stop_str_in_output`. A server that drops them
is answered in this order: its own `stop_reason`/`matched_stop`, the tokens it lists beside their log-probabilities,
the only stop string there is, and at last one short greedy request that asks how the text goes on. Where none of them
names a stop string the sample counts as ended by the model itself (`stop=None`).
"""

from __future__ import annotations

import asyncio
import email.utils
import itertools
import json
import math
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import aiohttp

from rstar.config import EngineSection
from rstar.engines.base import ContextOverflow, EngineError
from rstar.engines.stop_and_continue import stop_and_continue
from rstar.tokens import load_tokenizer
from rstar.types import Generation, JsonValue, PromptText, SamplingParams, Usage, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BACKOFF = 0.5  # seconds before the first retry; doubles with each
_BACKOFF_CAP = 60.0  # seconds
_PROBE_TOKENS = 16  # enough for any of our delimiters when a server hides which one it met
_EXTENSIONS = ("include_stop_str_in_output", "add_special_tokens")  # vLLM's additions to the request
_BEGIN_TOKENS = ("<s>", "<bos>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>")  # chat templates write them as text


@dataclass(frozen=True)
class _Choice:
    text: str
    finish_reason: str
    stop_reason: str | None  # the stop string the server names
    names_reason: bool  # the server has such a field, so an empty one means end of sequence
    listed: str  # text of the tokens listed with their log-probabilities; empty if not given
    tokens: int | None
    logprob: float


_OVERFLOW = (  # how servers say that a prompt is too long: OpenAI, vLLM, SGLang, llama.cpp
    "context_length_exceeded", "maximum context length", "maximum model length", "context length (", "context size",
)  # fmt: skip


class _Transient(Exception):
    """Worth another try. `retry_after` is the server's wish in seconds, 0 without one."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        self.retry_after = retry_after
        super().__init__(reason)


def check_server(section: EngineSection, key: str = "engine") -> None:
    """Raise UserError where the section, which is the config's `key`, names no server or none of its models."""
    if not section.url.startswith(("http://", "https://")):
        raise UserError(f"{key}.url={section.url!r}", need="a base URL", how=f"{key}.url=http://host:8000/v1")
    if not section.model:
        raise UserError(f"no {key}.model", need="the model's name on the server", how=f"see {section.url}/models")


class OpenAIPolicy:
    """`Policy` over HTTP: at most `section.concurrency` requests in flight, each with `section.retries` further tries.

    A LoRA adapter is asked for by its name as the model's, as vLLM serves it. Log-probabilities are what the server
    returns (vLLM: of the untempered distribution), nan where it returns none. `usage` adds up what the server counted;
    the tokenizer only counts samples that the server does not count one by one.
    """

    def __init__(self, section: EngineSection, tokenizer_path: str | None = None) -> None:
        check_server(section)
        self.usage = Usage()
        self._section = section
        self._url = section.url.rstrip("/") + "/completions"
        self._key = os.environ.get(section.api_key_env, "").strip() if section.api_key_env else ""
        self._tokenizer_path = tokenizer_path
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._extended = True  # until a server objects to vLLM's additions
        self._session: aiohttp.ClientSession | None = None
        self._slots: asyncio.Semaphore | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def generate(self, prompt: PromptText, params: SamplingParams) -> list[Generation]:
        """Return `params.n` samples. Greedy samples are all alike, so one is generated and repeated.

        Raises UserError with the server's message on 4xx, EngineError when the tries are used up.
        """
        if params.calculator:  # the server's tokenizer is not known: a result counts as many tokens as characters
            return await stop_and_continue(self.generate, len, prompt, params)
        wanted = 1 if params.temperature == 0 else params.n
        samples: list[Generation] = []
        while len(samples) < wanted:  # some servers give one choice whatever `n` says
            request = replace(params, n=wanted - len(samples))
            choices, generated = await self._complete(prompt, request)
            counts = self._token_counts(choices, generated)
            for choice, tokens in zip(choices[: request.n], counts, strict=False):
                samples.append(await self._generation(choice, tokens, prompt, params))
        return samples * params.n if wanted < params.n else samples

    async def close(self) -> None:
        """Close the connections. Idempotent."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _generation(self, choice: _Choice, tokens: int, prompt: PromptText, params: SamplingParams) -> Generation:
        cut_off = choice.finish_reason == "length"
        kept = next((s for s in params.stop if choice.text.endswith(s)), None)
        if cut_off or kept is not None or not params.stop:
            return Generation(choice.text, tokens, choice.logprob, kept, cut_off and kept is None)
        stop = await self._hidden_stop(choice, prompt, params)
        return Generation(choice.text + (stop or ""), tokens, choice.logprob, stop, False)

    async def _hidden_stop(self, choice: _Choice, prompt: PromptText, params: SamplingParams) -> str | None:
        """The stop string that the server cut off; None where the model ended by itself."""
        if choice.stop_reason in params.stop:
            return choice.stop_reason
        if choice.names_reason:
            return None
        beyond = choice.listed.removeprefix(choice.text) if choice.listed.startswith(choice.text) else ""
        for stop in params.stop:
            if beyond.startswith(stop):
                return stop
        probe = SamplingParams(temperature=0.0, max_tokens=_PROBE_TOKENS, adapter=params.adapter)
        (answer, *_), _ = await self._complete(prompt.plus(choice.text), probe)
        return next((s for s in params.stop if answer.text.startswith(s)), None)

    async def _complete(self, prompt: PromptText, params: SamplingParams) -> tuple[list[_Choice], int | None]:
        """One request with its retries: the choices, and the generated tokens the server counted over all of them."""
        session, slots = self._connect()
        reason = ""
        for attempt in range(self._section.retries + 1):
            try:
                async with slots:
                    return await self._post(session, prompt, params)
            except (_Transient, aiohttp.ClientError, TimeoutError) as error:
                reason = self._redact(str(error) or type(error).__name__)
                wished = error.retry_after if isinstance(error, _Transient) else 0.0
            if attempt < self._section.retries:
                backoff = min(_BACKOFF_CAP, _BACKOFF * 2**attempt)
                await asyncio.sleep(min(wished, self._section.timeout) + random.uniform(0.5, 1.0) * backoff)
        raise EngineError(f"{self._url}: {reason} (tried {self._section.retries + 1} times)")

    async def _post(
        self, session: aiohttp.ClientSession, prompt: PromptText, params: SamplingParams
    ) -> tuple[list[_Choice], int | None]:
        body = self._body(prompt, params)
        async with session.post(self._url, json=body) as response:
            text = await response.text(errors="replace")
            overflow = any(words in text.lower() for words in _OVERFLOW)
            busy = response.status in (408, 409, 425, 429) or response.status >= 500
            if busy and not overflow:
                wish = _retry_after(response.headers.get("Retry-After"))
                raise _Transient(f"HTTP {response.status}: {_message(text)}", wish)
            refused = [name for name in _EXTENSIONS if name in body and name in text]
            if response.status in (400, 422) and refused:
                self._extended = False  # this server refuses what it does not know
                return await self._post(session, prompt, params)
            if response.status >= 400:
                message = self._redact(_message(text))
                raise (ContextOverflow if overflow else UserError)(
                    f"{self._url} answered {response.status}: {message}",
                    need="a request the server takes",
                    how=self._mend(response.status),
                )
        choices, prompt_tokens, generated = _parse(text)
        self.usage.add(
            Usage(
                generated_tokens=generated if generated is not None else sum(self._token_counts(choices, None)),
                prompt_tokens=prompt_tokens,
                engine_calls=1,
            )
        )
        return choices, generated

    def _body(self, prompt: PromptText, params: SamplingParams) -> Mapping[str, JsonValue]:
        body: dict[str, JsonValue] = {
            "model": params.adapter or self._section.model,
            "prompt": prompt.text,
            "n": params.n,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "max_tokens": params.max_tokens,
            "logprobs": 1,
        }
        if params.stop:
            body["stop"] = list(params.stop)
        if self._extended:
            body["include_stop_str_in_output"] = True
            if prompt.text.startswith(_BEGIN_TOKENS):
                body["add_special_tokens"] = False  # the server would put a second begin token before it
        return body

    def _token_counts(self, choices: Sequence[_Choice], generated: int | None) -> list[int]:
        """Generated tokens of each choice: as listed by the server, else by our tokenizer, else by text length."""
        if all(choice.tokens is not None for choice in choices):
            return [choice.tokens or 0 for choice in choices]
        if len(choices) == 1 and generated is not None:
            return [generated]
        if self._tokenizer_path:
            self._tokenizer = self._tokenizer or load_tokenizer(self._tokenizer_path)
            return [len(self._tokenizer(c.text, add_special_tokens=False)["input_ids"]) for c in choices]
        lengths = [max(1, len(choice.text)) for choice in choices]
        share = 0.25 if generated is None else generated / sum(lengths)  # no count at all: four characters a token
        borders = [round(share * sum(lengths[:i])) for i in range(len(lengths) + 1)]
        return [end - start for start, end in itertools.pairwise(borders)]

    def _connect(self) -> tuple[aiohttp.ClientSession, asyncio.Semaphore]:
        loop = asyncio.get_running_loop()
        if self._session is None or self._slots is None or self._loop is not loop:  # a session belongs to one loop
            headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
            self._session = aiohttp.ClientSession(
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=self._section.timeout),
                connector=aiohttp.TCPConnector(limit=0),
            )
            self._slots = asyncio.Semaphore(max(1, self._section.concurrency))
            self._loop = loop
        return self._session, self._slots

    def _redact(self, message: str) -> str:
        return message.replace(self._key, "***") if self._key else message

    def _mend(self, status: int) -> str:
        match status:
            case 401 | 403:
                return f"put the key into the environment variable {self._section.api_key_env}"
            case 404:
                return f"check engine.url and engine.model={self._section.model}"
            case _:
                return "check engine.model, search.max_step_tokens and the server's context length"


def _parse(text: str) -> tuple[list[_Choice], int, int | None]:
    """Choices, prompt tokens and generated tokens of a response. A body that is none is transient: a cut connection
    behind a proxy looks like that."""
    try:
        payload = json.loads(text)
        choices = [_choice(item) for item in payload["choices"]]
        usage = payload.get("usage") or {}
        counted = usage.get("completion_tokens")
        prompt_tokens = int(usage.get("prompt_tokens") or 0)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise _Transient(f"unreadable response ({type(error).__name__}: {error}): {text[:200]!r}") from error
    if not choices:
        raise _Transient("response without choices")
    return choices, prompt_tokens, int(counted) if counted is not None else None


def _choice(item: Mapping[str, JsonValue]) -> _Choice:
    reason = item.get("stop_reason", item.get("matched_stop"))
    logprobs = item.get("logprobs")
    values: Sequence[JsonValue] = []
    listed: Sequence[JsonValue] = []
    if isinstance(logprobs, dict):
        values, listed = (v if isinstance(v := logprobs.get(k), list) else [] for k in ("token_logprobs", "tokens"))
    known = [float(v) for v in values if isinstance(v, int | float)]
    if not isinstance(item["text"], str):
        raise TypeError("a choice's text is no string")
    return _Choice(
        text=item["text"].encode("utf-8", "replace").decode(),  # JSON can hold half a character, a file can not
        finish_reason=str(item.get("finish_reason")),
        stop_reason=reason if isinstance(reason, str) else None,
        names_reason="stop_reason" in item or "matched_stop" in item,
        listed="".join(t for t in listed if isinstance(t, str)),
        tokens=len(values) or None,
        logprob=math.fsum(known) if known and len(known) == len(values) else math.nan,
    )


def _message(text: str) -> str:
    """The server's own words in an error body: `{"error": {"message"}}`, `{"message"}`, `{"detail"}` or plain text."""
    try:
        payload = json.loads(text)
    except ValueError:
        return text.strip()[:300]
    found: JsonValue = payload
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    return (found if isinstance(found, str) else json.dumps(found))[:300]


def _retry_after(header: str | None) -> float:
    """Seconds of a Retry-After header, given as seconds or as a date; 0 if absent or unreadable."""
    if not header:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0
