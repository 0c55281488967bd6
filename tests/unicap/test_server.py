"""Servers that fail in every way they do: a request is answered in the end, or it is told why."""

import re
import time
from concurrent import futures

import pytest
from PIL import Image

from lumina_jax.errors import InputError, RestartError
from lumina_jax.unicap.backends import Servers, opened
from lumina_jax.unicap.backends.base import Request
from lumina_jax.unicap.backends.server import ServerBackend
from lumina_jax.unicap.prompts import load_prompts
from tests.unicap import captioning_server
from tests.unicap.small_captioner import write

PROMPT = load_prompts().look("short", "en")
RED = Image.new("RGB", (40, 30), (220, 40, 40))
ANSWER = write("short", "en", "red", "40x30")
QUICK = {"timeout": 0.5, "patience": 20.0, "sleep": lambda seconds: time.sleep(seconds / 50)}


def request(**changed):
    return Request(PROMPT, RED, **changed)


def test_an_answer_comes_with_its_tokens_and_the_only_model_is_found():
    with captioning_server.running() as server:
        backend = ServerBackend([server.url])
        (reply,) = backend.ask([request()])
    assert backend.model == "small-vl"
    assert reply.text == ANSWER
    assert (reply.num_prompt_tokens, reply.num_tokens) == (1000, len(ANSWER) // 4)


@pytest.mark.parametrize(
    "how",
    [
        "500",
        "503",
        "busy",
        "no JSON",
        "other JSON",
        "no text",
        "cut",
        "reset",
        "dribble",
        "endless",
    ],
)
def test_what_fails_now_and_then_is_asked_again(how):
    def misbehave(number, body):
        return how if number % 3 else None

    with captioning_server.running(misbehave) as server:
        backend = ServerBackend([server.url], **QUICK)
        replies = backend.ask([request() for _ in range(4)])
    assert [reply.text for reply in replies] == [ANSWER] * 4
    assert server.num_requests > 4


@pytest.mark.parametrize(
    ("how", "told"), [("400", "400: .*told to answer 400"), ("filtered", "its content filter")]
)
def test_a_request_that_is_refused_costs_itself_alone(how, told):
    def misbehave(number, body):
        return how if body["seed"] == 7 else None

    with captioning_server.running(misbehave) as server:
        backend = ServerBackend([server.url], **QUICK)
        good, bad = backend.ask([request(), request(seed=7)])
    assert good.text == ANSWER
    assert bad.text == ""
    assert bad.fault.reason == "refused by the server"
    assert re.search(told, bad.fault.detail)


@pytest.mark.parametrize("alone", [True, False])
def test_a_request_at_which_servers_fail_costs_itself_alone(alone):
    """Also where nothing else is under way, by which the server could be seen to live."""

    def misbehave(number, body):
        return "500" if body["seed"] == 7 else None

    with captioning_server.running(misbehave) as server:
        backend = ServerBackend([server.url], attempts=3, **QUICK)
        *others, bad = backend.ask([*([] if alone else [request()]), request(seed=7)])
    assert [reply.text for reply in others] == [] if alone else [ANSWER]
    assert bad.fault.reason == "server failed"
    assert "told to answer 500" in bad.fault.detail


def test_servers_that_fail_at_everything_lose_no_request():
    """The command ends, to be given again, and all threads with it."""
    with captioning_server.running(lambda number, body: "500") as server:
        given = QUICK | {"patience": 0.5}
        backend = ServerBackend([server.url], attempts=2, **given)
        with futures.ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(backend.ask, [request()]) for _ in range(4)]
            for future in asked:
                with pytest.raises(RestartError, match=r"No answer of .* give the same command"):
                    future.result(20)


def test_a_server_that_comes_back_is_waited_for():
    with captioning_server.running() as server:
        backend = ServerBackend([server.url], "small-vl", **QUICK)
        port = server.server_port
    with futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(backend.ask, [request()])
        time.sleep(0.5)
        assert not asked.done()
        with captioning_server.running(port=port):
            (reply,) = asked.result(20)
    assert reply.text == ANSWER


def test_a_server_that_is_gone_is_left_for_the_other():
    with captioning_server.running() as gone:
        pass
    with captioning_server.running() as server:
        backend = ServerBackend([gone.url, server.url], "small-vl", **QUICK)
        replies = backend.ask([request() for _ in range(8)])
    assert [reply.text for reply in replies] == [ANSWER] * 8


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_a_wrong_key_or_url_is_the_users_to_mend(status):
    with captioning_server.running(lambda number, body: status) as server:
        backend = ServerBackend([server.url], **QUICK)
        with pytest.raises(InputError, match=f"answers {status}: .* the name of the model"):
            backend.ask([request()])


def test_no_more_are_under_way_than_may_be_and_as_many_are():
    def misbehave(number, body):
        time.sleep(0.05)

    with captioning_server.running(misbehave) as server:
        backend = ServerBackend([server.url], concurrency=6)
        backend.ask([request() for _ in range(24)])
    assert server.most_under_way == 6


def test_requests_are_spread_over_the_minute():
    with captioning_server.running() as server:
        backend = ServerBackend([server.url], "small-vl", requests_per_minute=1200.0)
        backend.ask([request() for _ in range(10)])
    assert server.times[-1] - server.times[0] > 9 * 60 / 1200 * 0.9


def test_the_key_is_sent_and_stands_nowhere_else(monkeypatch):
    monkeypatch.setenv("CAPTION_KEY", "very-secret")
    with captioning_server.running() as server:
        spec = Servers((server.url,), key_variable="CAPTION_KEY")
        opened(spec).ask([request()])
    assert server.keys == {"Bearer very-secret"}
    assert "very-secret" not in repr(spec)
    monkeypatch.delenv("CAPTION_KEY")
    with pytest.raises(InputError, match="The variable CAPTION_KEY is empty"):
        Servers((server.url,), key_variable="CAPTION_KEY", concurrency=3)()


def test_several_models_have_to_be_told_apart():
    with (
        captioning_server.running(models=("a", "b")) as server,
        pytest.raises(InputError, match=r"has the models a, b\. Name one"),
    ):
        ServerBackend([server.url])


@pytest.mark.parametrize(
    ("urls", "given", "told"),
    [
        ([], {}, "one or more, each once"),
        (["localhost:8000"], {}, "'localhost:8000' is no http"),
        (["http://a/v1"], {"concurrency": 0}, "must be 1 or more"),
        (["http://a/v1"], {"timeout": 0.0}, "timeout=0.0 must be above 0"),
    ],
)
def test_what_cannot_be_is_refused(urls, given, told):
    with pytest.raises(InputError, match=told):
        ServerBackend(urls, "small-vl", **given)
