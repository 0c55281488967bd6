"""Models behind a server that speaks OpenAI's protocol: vLLM, SGLang, and most others.

    vllm serve Qwen/Qwen2.5-VL-7B-Instruct --port 8000
    python tools/caption.py folder --input=photos --server=http://localhost:8000/v1 ...

A server under load refuses, a proxy before it breaks off, a node of it dies. So each request is
tried again, until it is answered, or until it is clear what is wrong:

    the server    busy, broken, gone. It rests, for longer each time, and others are asked; one that
                  is busy or late is asked half as much at once, and one more with each round of
                  answers, as TCP does. When nobody answers for `patience` seconds the command ends,
                  and goes on when it is given again.
    the request   servers fail at it again and again, and answer others, if only an easy one. It
                  costs one caption.
    the command   a wrong key, URL or model: InputError.

The body of an answer is read under a deadline and a limit of bytes: what sends one byte a minute
for ever is a failure too.
"""

import base64
import dataclasses
import email.utils
import io
import json
import math
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
from PIL import Image

from lumina_jax.data.images import Rejected
from lumina_jax.data.sources.reading import without_secrets
from lumina_jax.errors import InputError, RestartError
from lumina_jax.unicap.backends.base import Reply, Request
from lumina_jax.untrusted import text

_MAX_ANSWER = 2**24  # bytes
_MIN_REST, _MAX_REST = 0.5, 60.0  # seconds of a server after a failure, and after many
_MAX_TOKENS = 2**31
_MAX_TIMEOUTS = 3  # of a request; each costs `timeout` seconds
_ASK = "/chat/completions"
_SMALL = 256  # pixels; a picture below is sent without loss
# Of HTTP. About this request alone, whoever is asked:
_OF_REQUEST = (400, 413, 415, 422, 451)
# About the key, the URL or the model:
_OF_COMMAND = (301, 302, 307, 308, 401, 402, 403, 404, 405)
# About the server; it says nothing of the request:
_BUSY = (429, 502, 503, 504, 529)
_ENDS = ("stop", "eos", "eos_token", "stop_sequence")
RESERVED = ("messages", "model", "max_tokens", "temperature", "seed", "stream")


class _Failed(Exception):
    """An attempt that may be made again.

    Attributes:
        wait: seconds that the server asks for.
        of_server: it says nothing about the request.
        timed_out: it took longer than it may.
    """

    def __init__(
        self, why: str, wait: float = 0.0, *, of_server: bool = False, timed_out: bool = False
    ):
        super().__init__(why)
        self.wait, self.of_server, self.timed_out = wait, of_server, timed_out


@dataclasses.dataclass
class _Server:
    """What is known of a server.

    Attributes:
        url: of its API.
        limit: requests that may be under way at it; it has a fraction while it grows.
        under_way: requests that are.
        rests_until: on the monotonic clock.
        num_failures: since its last answer.
        answered: whether it has answered a question.
        refusal: why it answers nobody who comes with this key and this model.
    """

    url: str
    limit: float
    under_way: int = 0
    rests_until: float = 0.0
    num_failures: int = 0
    answered: bool = False
    refusal: str = ""


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
        rest: seconds of a server after its first failure.
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
        rest: float = _MIN_REST,
    ):
        self._extra = dict(extra or {})
        _check(urls, concurrency, attempts, timeout, patience, requests_per_minute, self._extra)
        self._servers = [_Server(url.rstrip("/"), float(concurrency)) for url in urls]
        self._timeout, self._attempts, self._patience = timeout, attempts, patience
        self._rest = rest
        self.num_pictures = concurrency
        self._client = httpx.Client(
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0), pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=concurrency),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        )
        weakref.finalize(self, self._client.close)
        self._pace = _Pace(requests_per_minute)
        self._free = threading.Condition()  # guards the servers
        self._last_answer = time.monotonic()
        self.model = model or self._only_model()

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """Returns a reply to each request; many threads may call it at once."""
        if len(requests) == 1:
            return [self._ask(requests[0])]
        with futures.ThreadPoolExecutor(max(1, min(self.num_pictures, len(requests)))) as pool:
            return list(pool.map(self._ask, requests))

    def _ask(self, request: Request) -> Reply:
        try:
            return self._until_answered(_ASK, self._body(request), _reply)
        except Rejected as fault:
            return Reply("", fault=fault)

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
        first = self._servers[0].url
        try:
            names = self._until_answered("/models", None, _model_names)
        except Rejected as error:
            raise InputError(
                f"{without_secrets(first)} does not say which models it has ({error}). Name one: "
                "--server_model=..."
            ) from error
        if len(names) != 1:
            raise InputError(
                f"{without_secrets(first)} has the models {', '.join(names) or 'none'}. Name one: "
                "--server_model=..."
            )
        return names[0]

    def _until_answered(
        self, path: str, body: Mapping[str, Any] | None, read: Callable[[Any], Any]
    ) -> Any:
        """Returns what `read` makes of the answer; Rejected where the request is at fault."""
        began, last = time.monotonic(), None
        num_failed = num_timed_out = 0
        while True:
            self._pace.wait()
            with self._some_server(but=last) as server:
                try:
                    return self._once(server, path, body, read)
                except _Failed as error:
                    failed, last = error, server
                    self._failed(server, error)
            num_failed += not failed.of_server
            num_timed_out += failed.timed_out
            silent = time.monotonic() - max(self._last_answer, began)
            at_fault = num_failed >= self._attempts or num_timed_out >= _MAX_TIMEOUTS
            if (at_fault or (num_failed and silent > self._patience)) and (
                self._last_answer > began or self._lives()
            ):
                raise Rejected("servers failed at it", str(failed)) from failed
            if silent > self._patience:
                urls = ", ".join(without_secrets(server.url) for server in self._servers)
                raise RestartError(
                    f"No answer of {urls} for {silent:.0f} s; the last one: {failed}. What is done "
                    "is kept: start the servers, and give the same command again."
                ) from failed

    def _lives(self) -> bool:
        """Whether some server answers the easiest question."""
        body = self._body(Request("Say yes.", max_tokens=1))
        for server in self._servers:
            try:
                self._once(server, _ASK, body, _reply)
            except (_Failed, Rejected):
                continue
            return True
        return False

    def _once(
        self,
        server: _Server,
        path: str,
        body: Mapping[str, Any] | None,
        read: Callable[[Any], Any],
    ) -> Any:
        status, headers, content = self._exchange(server.url + path, body)
        told = content[:300].decode(errors="replace").strip()
        if status in _OF_COMMAND and not (status == 403 and server.answered):
            self._refused(server, f"{without_secrets(server.url)}{path} answers {status}: {told}")
        if status in (*_OF_REQUEST, 403):
            self._answered(server, path)
            raise Rejected("refused by the server", f"{status}: {told}")
        if status != 200:
            wait = _retry_after(headers)
            raise _Failed(f"{status}: {told}", wait, of_server=status in _BUSY)
        try:
            answer = read(json.loads(content))
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise _Failed(f"an answer that is none ({error!r}): {told}") from error
        except RecursionError as error:
            raise _Failed("an answer that is none: JSON that is nested too deep") from error
        except Rejected:
            self._answered(server, path)
            raise
        self._answered(server, path)
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
                        raise _Failed(
                            f"not answered in full within {self._timeout:g} s", timed_out=True
                        )
                    if len(content) > _MAX_ANSWER:
                        raise _Failed(f"an answer of more than {_MAX_ANSWER:,} bytes")
                return response.status_code, response.headers, bytes(content)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _Failed(f"{without_secrets(url)}: {error}", of_server=True) from error
        except httpx.TimeoutException as error:
            raise _Failed(f"not answered within {self._timeout:g} s", timed_out=True) from error
        except httpx.HTTPError as error:
            raise _Failed(f"{type(error).__name__} {error}".strip()) from error

    @contextmanager
    def _some_server(self, but: _Server | None) -> Iterator[_Server]:
        """Waits for a server that may be asked: the one with the fewest under way.

        Args:
            but: the last one that failed, which is asked again only where there is no other.
        """
        with self._free:
            while True:
                now = time.monotonic()
                if not (willing := [server for server in self._servers if not server.refusal]):
                    raise self._wrong_command()
                awake = [server for server in willing if server.rests_until <= now]
                free = [server for server in awake if server.under_way < int(server.limit)]
                free = [server for server in free if server is not but] or free
                busy = sum(server.under_way for server in self._servers) >= self.num_pictures
                if free and not busy:
                    break
                rests = [s.rests_until - now for s in willing if s.rests_until > now]
                self._free.wait(min(rests, default=None))
            least = min(server.under_way for server in free)
            server = random.choice([server for server in free if server.under_way == least])
            server.under_way += 1
        try:
            yield server
        finally:
            with self._free:
                server.under_way -= 1
                self._free.notify_all()

    def _answered(self, server: _Server, path: str) -> None:
        with self._free:
            self._last_answer = time.monotonic()
            server.answered |= path == _ASK
            server.num_failures = 0
            server.limit = min(server.limit + 1 / server.limit, self.num_pictures)

    def _failed(self, server: _Server, failed: _Failed) -> None:
        """The server rests, unless it does already: requests fail together."""
        with self._free:
            now = time.monotonic()
            if server.rests_until > now:
                return
            server.num_failures += 1
            most = min(self._rest * 2 ** (server.num_failures - 1), _MAX_REST)
            server.rests_until = now + max(failed.wait, random.uniform(most / 2, most))
            if failed.of_server or failed.timed_out:
                server.limit = max(server.limit / 2, 1.0)

    def _refused(self, server: _Server, why: str) -> None:
        """The server is asked no more; raises what that means."""
        with self._free:
            server.refusal = why
            self._free.notify_all()
            if all(other.refusal for other in self._servers):
                raise self._wrong_command()
        raise _Failed(why, of_server=True)

    def _wrong_command(self) -> InputError:
        reasons = [server.refusal for server in self._servers]
        return InputError(
            f"{'; '.join(reasons[:3])}. Check the URL (it ends in /v1 as a rule), the name of the "
            "model and the key."
        )


class _Pace:
    """Spreads requests evenly, so many in a minute."""

    def __init__(self, requests_per_minute: float):
        self._apart = 60 / requests_per_minute if requests_per_minute else 0.0
        self._next, self._lock = 0.0, threading.Lock()

    def wait(self) -> None:
        if not self._apart:
            return
        with self._lock:
            now = time.monotonic()
            begin = max(now, self._next)
            self._next = begin + self._apart
        time.sleep(begin - now)


def data_url(image: Image.Image) -> str:
    """Returns a picture as a URL that holds it; raises Rejected where no format can."""
    content = io.BytesIO()
    kind = "png" if max(image.size) < _SMALL else "jpeg"
    try:
        image.save(content, kind, quality=95, subsampling=0)  # fine red writing needs its colour
    except (OSError, ValueError) as error:
        size = f"{image.width} x {image.height}"
        raise Rejected("cannot be sent", f"{size} as {kind}: {error}") from error
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def _reply(answer: Any) -> Reply:
    (choice, *_) = answer["choices"]
    message, why = choice["message"], choice.get("finish_reason")
    content, usage = message["content"], answer.get("usage") or {}
    if why == "content_filter":
        raise Rejected("refused by the server", "its content filter")
    if refusal := message.get("refusal"):
        raise Rejected("refused by the server", f"{refusal!s:.300}")
    if content is None and why == "length":  # it only thought
        content = ""
    read, wrote = (
        min(max(int(usage.get(f"{name}_tokens") or 0), 0), _MAX_TOKENS)
        for name in ("prompt", "completion")
    )
    return Reply(text(content), why in _ENDS, num_prompt_tokens=read, num_tokens=wrote)


def _model_names(answer: Any) -> list[str]:
    return [text(model["id"]) for model in answer["data"]]


def _retry_after(headers: Mapping[str, str]) -> float:
    """Returns the seconds that a server asks for, which may be a date."""
    given = headers.get("retry-after", "0")
    try:
        seconds = float(given)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(given).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), 10 * _MAX_REST) if math.isfinite(seconds) else 0.0


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
    attempts: int,
    timeout: float,
    patience: float,
    requests_per_minute: float,
    extra: Mapping[str, Any],
) -> None:
    faults = [f"{without_secrets(url)!r} {fault}" for url in urls if (fault := _url_fault(url))]
    if not urls or len(set(urls)) < len(urls):
        faults.append("servers must be one or more, each once")
    if concurrency < 1 or attempts < 1:
        faults.append(f"concurrency={concurrency} and attempts={attempts} must be 1 or more")
    numbers = {"timeout": timeout, "patience": patience}
    for name, value in {**numbers, "requests_per_minute": requests_per_minute}.items():
        if not (math.isfinite(value) and value >= 0) or (name == "timeout" and not value):
            faults.append(f"{name}={value} must be a number above 0")
    if reserved := sorted(set(extra) & set(RESERVED)):
        faults.append(f"extra fields {', '.join(reserved)} are those of the command")
    if faults:
        shown = ", ".join(map(without_secrets, urls))
        raise InputError(f"Servers {shown or '()'}: {'; '.join(faults)}.")


def _url_fault(url: str) -> str | None:
    if not url.startswith(("http://", "https://")):
        return "is no http:// or https:// URL"
    try:
        return None if httpx.URL(url).host else "names no host"
    except httpx.InvalidURL as error:
        return f"is no URL: {error}"
