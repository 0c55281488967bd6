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
QUICK = {"timeout": 0.5, "patience": 20.0, "rest": 0.02}


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
        return how if number in (0, 1, 3) else None

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


@pytest.mark.parametrize("how", ["only thought", "aborted"])
def test_an_answer_that_ends_elsewhere_is_not_finished(how):
    with captioning_server.running(lambda number, body: how) as server:
        (reply,) = ServerBackend([server.url], **QUICK).ask([request()])
    assert reply.fault is None
    assert not reply.finished


@pytest.mark.parametrize("alone", [True, False])
def test_a_request_at_which_servers_fail_costs_itself_alone(alone):
    """Also where nothing else is under way, by which the server could be seen to live."""

    def misbehave(number, body):
        return "500" if body["seed"] == 7 else None

    with captioning_server.running(misbehave) as server:
        backend = ServerBackend([server.url], attempts=3, **QUICK)
        *others, bad = backend.ask([*([] if alone else [request()]), request(seed=7)])
    assert [reply.text for reply in others] == [] if alone else [ANSWER]
    assert bad.fault.reason == "servers failed at it"
    assert "told to answer 500" in bad.fault.detail


def test_a_picture_that_hangs_its_server_costs_itself_alone():
    """Also where all others are done, so that nobody else is answered for longer than patience."""

    def misbehave(number, body):
        return "hang" if body["seed"] == 7 else None

    with captioning_server.running(misbehave) as server:
        given = QUICK | {"timeout": 0.2, "patience": 0.3}
        backend = ServerBackend([server.url], concurrency=2, **given)
        replies = backend.ask([request(seed=seed) for seed in range(12)])
    assert [reply.text for reply in replies] == [ANSWER] * 7 + [""] + [ANSWER] * 4
    assert replies[7].fault.reason == "servers failed at it"
    assert "not answered" in replies[7].fault.detail


@pytest.mark.parametrize("how", ["busy", "429", "503"])
def test_a_busy_server_costs_no_request_and_is_asked_less_at_once(how):
    """It takes three at a time."""

    def misbehave(number, body):
        time.sleep(0.02)
        return how if server.under_way > 3 else None

    with captioning_server.running(misbehave) as server:
        backend = ServerBackend([server.url], concurrency=24, attempts=2, **QUICK)
        replies = backend.ask([request() for _ in range(60)])
    assert [reply.text for reply in replies] == [ANSWER] * 60
    assert server.num_requests < 3 * 60


@pytest.mark.parametrize("other", ["gone", "500"])
def test_a_server_that_fails_at_once_does_not_draw_the_work_to_it(other):
    def misbehave(number, body):
        time.sleep(0.05)

    with (
        captioning_server.running(misbehave) as good,
        captioning_server.running(lambda number, body: "500") as bad,
    ):
        if other == "gone":
            bad.shutdown()
            bad.server_close()
        backend = ServerBackend([bad.url, good.url], "small-vl", concurrency=12, patience=20.0)
        replies = backend.ask([request() for _ in range(60)])
    assert [reply.text for reply in replies] == [ANSWER] * 60
    assert good.most_under_way >= 8
    assert bad.num_requests < 30


def test_a_server_that_refuses_the_key_is_left_for_the_other():
    with (
        captioning_server.running() as good,
        captioning_server.running(lambda number, body: "401") as bad,
    ):
        backend = ServerBackend([bad.url, good.url], "small-vl", **QUICK)
        replies = backend.ask([request() for _ in range(10)])
    assert [reply.text for reply in replies] == [ANSWER] * 10


def test_servers_that_are_back_are_asked_again_and_idle_time_is_no_silence():
    down = [True]
    with captioning_server.running(lambda number, body: "503" if down else None) as server:
        backend = ServerBackend([server.url], **QUICK | {"patience": 0.3})
        with pytest.raises(RestartError):
            backend.ask([request()])
        time.sleep(0.4)
        server.misbehave = lambda number, body: "503" if server.num_requests % 2 else None
        (reply,) = backend.ask([request()])
    assert reply.text == ANSWER


def test_a_picture_that_no_format_takes_is_refused_alone():
    backend = ServerBackend(["http://127.0.0.1:1/v1"], "small-vl")
    (reply,) = backend.ask([Request(PROMPT, Image.new("RGB", (70_000, 1)))])
    assert reply.fault.reason == "cannot be sent"


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
        (["http://a:b/v1"], {}, "'http://a:b/v1' is no URL"),
        (["http:///v1"], {}, "names no host"),
        (["http://a/v1"], {"extra": {"messages": []}}, "messages are those of the command"),
        (["http://a/v1"], {"timeout": float("inf")}, "timeout=inf must be a number above 0"),
        (["http://a/v1"], {"concurrency": 0}, "must be 1 or more"),
        (["http://a/v1"], {"timeout": 0.0}, "timeout=0.0 must be a number above 0"),
    ],
)
def test_what_cannot_be_is_refused(urls, given, told):
    with pytest.raises(InputError, match=told):
        ServerBackend(urls, "small-vl", **given)
