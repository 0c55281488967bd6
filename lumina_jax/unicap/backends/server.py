"""Models behind a server that speaks OpenAI's protocol: vLLM, SGLang, and most others.

    vllm serve Qwen/Qwen2.5-VL-7B-Instruct --port 8000
    python tools/caption.py folder --input=photos --server=http://localhost:8000/v1 ...

A server under load refuses, a proxy before it breaks off, a node of it dies. So each request is
tried again, at another server where there are several, until it is answered, or until it is clear
what is wrong: this request (it costs one caption), the command (InputError), or the servers (the
command ends, and goes on when it is given again).

Every answer is read under a deadline and a limit of bytes: what sends one byte a minute for ever
is a failure too.
"""

import base64
import io
import json
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import httpx
import tenacity
from PIL import Image

from lumina_jax.data.images import Rejected
from lumina_jax.data.sources.reading import without_secrets
from lumina_jax.errors import InputError, RestartError
from lumina_jax.unicap.backends.base import Reply, Request

_MAX_ANSWER = 2**24  # bytes
_MAX_WAIT = 60.0  # seconds between two attempts
_SMALL = 256  # pixels; a picture below is sent without loss
# Of HTTP: about this request alone, whoever is asked; about the command as a whole.
_OF_REQUEST = (400, 413, 415, 422, 451)
_OF_COMMAND = (401, 403, 404, 405)


class _Failed(Exception):
    """An attempt that may be made again.

    Attributes:
        wait: seconds that the server asks for.
        reached: whether a server was there to fail.
    """

    def __init__(self, why: str, wait: float = 0.0, reached: bool = True):
        super().__init__(why)
        self.wait, self.reached = wait, reached


class ServerBackend:
    """A model behind one or several servers.

    Args:
        urls: of the servers' API, such as "http://localhost:8000/v1"; each request goes to the one
            with the fewest under way.
        model: as the servers call it; "" takes the only one that they have.
        concurrency: requests under way, over all servers.
        timeout: seconds for the whole of an answer.
        attempts: at a request that servers fail at, before it is asked whether they live. If they
            do, the fault is the request's.
        patience: seconds without any answer after which the servers are given up.
        requests_per_minute: at most, over all servers; 0 is no limit.
        api_key: sent as a bearer token; it is never written anywhere.
        extra: more fields of each request, such as {"repetition_penalty": 1.05}.
        sleep: for tests.
    """

    in_threads = True

    def __init__(
        self,
        urls: Sequence[str],
        model: str = "",
        *,
        concurrency: int = 64,
        timeout: float = 300.0,
        attempts: int = 8,
        patience: float = 600.0,
        requests_per_minute: float = 0.0,
        api_key: str = "",
        extra: Mapping[str, Any] | None = None,
        sleep: Callable[[float], Any] | None = None,
    ):
        _check(urls, concurrency, timeout, attempts, patience, requests_per_minute)
        self._urls = [url.rstrip("/") for url in urls]
        self._timeout, self._attempts, self._patience = timeout, attempts, patience
        self._extra = dict(extra or {})
        self.num_pictures = concurrency
        self._client = httpx.Client(
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)),
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        )
        weakref.finalize(self, self._client.close)
        self._pace = _Pace(requests_per_minute)
        self._lock = threading.Lock()
        self._under_way = dict.fromkeys(self._urls, 0)
        self._last_answer = time.monotonic()
        self._end: BaseException | None = None
        self._ended = threading.Event()
        self._sleep = sleep or self._ended.wait
        self.model = model or self._only_model()

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """Returns a reply to each request; many threads may call it at once."""
        if len(requests) == 1:
            return [self._ask(requests[0])]
        with futures.ThreadPoolExecutor(max(1, min(self.num_pictures, len(requests)))) as pool:
            return list(pool.map(self._ask, requests))

    def _ask(self, request: Request) -> Reply:
        body = self._body(request)
        try:
            return self._until_answered("/chat/completions", body, _reply)
        except _Failed as failed:
            return Reply("", fault=Rejected("server failed", str(failed)))
        except Rejected as refused:
            return Reply("", fault=refused)

    def _body(self, request: Request) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": request.prompt}]
        if request.image is not None:
            url = {"url": data_url(request.image)}
            content.insert(0, {"type": "image_url", "image_url": url})
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
            **self._extra,
        }

    def _only_model(self) -> str:
        try:
            names = self._until_answered("/models", None, _model_names)
        except (_Failed, Rejected) as error:
            raise InputError(
                f"{self._urls[0]} does not say which models it has ({error}). Name one: "
                "--server_model=..."
            ) from error
        if len(names) != 1:
            raise InputError(
                f"{self._urls[0]} has the models {', '.join(names) or 'none'}. Name one: "
                "--server_model=..."
            )
        return names[0]

    def _until_answered(
        self, path: str, body: Mapping[str, Any] | None, read: Callable[[Any], Any]
    ) -> Any:
        """Returns what `read` makes of the answer; attempts that fail are made again."""
        began = time.monotonic()

        def give_up(state: tenacity.RetryCallState) -> bool:
            failed = state.outcome.exception()
            silent = time.monotonic() - self._last_answer
            if silent > self._patience:
                raise RestartError(
                    f"No answer of {', '.join(map(without_secrets, self._urls))} for "
                    f"{silent:.0f} s; the last one: {failed}. What is done is kept: start the "
                    "servers, and give the same command again."
                )
            if not failed.reached or state.attempt_number < self._attempts:
                return False  # that nobody is there says nothing about the request
            return self._last_answer > began or self._lives()

        def wait(state: tenacity.RetryCallState) -> float:
            most = min(_MAX_WAIT, 0.5 * 2**state.attempt_number)
            return max(state.outcome.exception().wait, random.uniform(most / 2, most))

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Failed),
            stop=give_up,
            wait=wait,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            return retrying(self._once, path, body, read)
        except (InputError, RestartError) as error:
            self._end = self._end or error  # the other threads need not find out for themselves
            self._ended.set()
            raise

    def _lives(self) -> bool:
        """Whether the easiest question is answered."""
        try:
            body = self._body(Request("Say yes.", max_tokens=1))
            self._once("/chat/completions", body, _reply)
        except (_Failed, Rejected):
            return False
        return True

    def _once(self, path: str, body: Mapping[str, Any] | None, read: Callable[[Any], Any]) -> Any:
        if self._end is not None:
            raise self._end
        self._pace.wait(self._sleep)
        with self._some_server() as url:
            status, headers, content = self._exchange(url + path, body)
        told = content[:300].decode(errors="replace").strip()
        if status in _OF_COMMAND:
            raise InputError(
                f"{without_secrets(url)}{path} answers {status}: {told}. Check the URL (it ends in "
                "/v1 as a rule), the name of the model and the key."
            )
        if status in _OF_REQUEST:
            self._last_answer = time.monotonic()
            raise Rejected("refused by the server", f"{status}: {told}")
        if status != 200:
            raise _Failed(f"{status}: {told}", wait=_retry_after(headers))
        try:
            answer = read(json.loads(content))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise _Failed(f"an answer that is none ({error!r}): {told}") from error
        self._last_answer = time.monotonic()
        return answer

    def _exchange(
        self, url: str, body: Mapping[str, Any] | None
    ) -> tuple[int, Mapping[str, str], bytes]:
        deadline = time.monotonic() + self._timeout
        method = "GET" if body is None else "POST"
        content = bytearray()
        try:
            with self._client.stream(method, url, json=body) as response:
                for piece in response.iter_bytes():
                    content += piece
                    if time.monotonic() > deadline:
                        raise _Failed(f"not answered in full within {self._timeout:g} s")
                    if len(content) > _MAX_ANSWER:
                        raise _Failed(f"an answer of more than {_MAX_ANSWER:,} bytes")
                return response.status_code, response.headers, bytes(content)
        except httpx.ConnectError as error:
            raise _Failed(f"{without_secrets(url)}: {error}", reached=False) from error
        except httpx.UnsupportedProtocol as error:
            raise InputError(f"{without_secrets(url)} is no URL of a server: {error}") from error
        except httpx.HTTPError as error:
            raise _Failed(f"{type(error).__name__} {error}".strip()) from error

    @contextmanager
    def _some_server(self) -> Iterator[str]:
        with self._lock:
            least = min(self._under_way.values())
            url = random.choice([u for u, count in self._under_way.items() if count == least])
            self._under_way[url] += 1
        try:
            yield url
        finally:
            with self._lock:
                self._under_way[url] -= 1


class _Pace:
    """Spreads requests evenly, so many in a minute."""

    def __init__(self, requests_per_minute: float):
        self._apart = 60 / requests_per_minute if requests_per_minute else 0.0
        self._next, self._lock = 0.0, threading.Lock()

    def wait(self, sleep: Callable[[float], Any]) -> None:
        if not self._apart:
            return
        with self._lock:
            now = time.monotonic()
            begin = max(now, self._next)
            self._next = begin + self._apart
        sleep(begin - now)


def data_url(image: Image.Image) -> str:
    """Returns a picture as a URL that holds it."""
    content = io.BytesIO()
    if max(image.size) < _SMALL:
        image.save(content, "PNG")
        kind = "png"
    else:
        image.save(content, "JPEG", quality=95)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def _reply(answer: Any) -> Reply:
    (choice, *_) = answer["choices"]
    text, why = choice["message"]["content"], choice.get("finish_reason")
    usage = answer.get("usage") or {}
    if why == "content_filter":
        raise Rejected("refused by the server", "its content filter")
    if not isinstance(text, str):
        raise TypeError(f"content is {text!r:.40}")
    return Reply(
        text,
        finished=why != "length",
        num_prompt_tokens=int(usage.get("prompt_tokens") or 0),
        num_tokens=int(usage.get("completion_tokens") or 0),
    )


def _model_names(answer: Any) -> list[str]:
    return [str(model["id"]) for model in answer["data"]]


def _retry_after(headers: Mapping[str, str]) -> float:
    """Returns the seconds that a server asks for; a date of it is not believed."""
    try:
        return min(max(float(headers.get("retry-after", 0)), 0.0), 10 * _MAX_WAIT)
    except ValueError:
        return 0.0


def read_key(variable: str) -> str:
    """Returns the key in a variable of the environment; command lines are seen by everybody."""
    if not variable:
        return ""
    if not (key := os.environ.get(variable, "")):
        raise InputError(f"The variable {variable} is empty; put the key of the server into it.")
    return key


def _check(
    urls: Sequence[str],
    concurrency: int,
    timeout: float,
    attempts: int,
    patience: float,
    requests_per_minute: float,
) -> None:
    faults = [f"{url!r} is no http:// or https:// URL" for url in urls
              if not url.startswith(("http://", "https://"))]  # fmt: skip
    if not urls or len(set(urls)) < len(urls):
        faults.append("servers must be one or more, each once")
    if concurrency < 1 or attempts < 1:
        faults.append(f"concurrency={concurrency} and attempts={attempts} must be 1 or more")
    if not (timeout > 0 and patience >= 0 and requests_per_minute >= 0):
        faults.append(
            f"timeout={timeout} must be above 0, patience={patience} and "
            f"requests_per_minute={requests_per_minute} not below"
        )
    if faults:
        raise InputError(f"Servers {', '.join(urls)}: {'; '.join(faults)}.")
