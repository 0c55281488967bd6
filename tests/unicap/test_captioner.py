"""What is asked of a model, in which order, and what its answers become."""

import itertools

import pytest
from PIL import Image

from lumina_jax.data.caption_table import Excluded
from lumina_jax.data.images import Rejected
from lumina_jax.errors import InputError
from lumina_jax.unicap.backends.base import Reply
from lumina_jax.unicap.backends.pair import Pair
from lumina_jax.unicap.captioner import Captioner, Wanted, talks_of_text
from lumina_jax.unicap.gates import Gates
from lumina_jax.unicap.prompts import load_prompts
from tests.unicap.small_captioner import SmallBackend, write

RED = Image.new("RGB", (40, 30), (220, 40, 40))
LEVELS = list(itertools.product(("en", "zh"), ("long", "medium", "short", "tags")))
ALL = {(kind, language): write(kind, language, "red", "40x30") for language, kind in LEVELS}


def caption(backend, **wanted):
    """Captions one picture; returns its row and the requests."""
    wanted, prompts = Wanted(**wanted), load_prompts()
    talk = Captioner(wanted, prompts, "looker", "writer").converse(
        "red.png", RED, Gates(prompts, wanted.languages)
    )
    asked = []
    try:
        request = next(talk)
        while True:
            asked.append(request)
            request = talk.send(backend.ask([request])[0])
    except StopIteration as end:
        return end.value, asked


def texts(row):
    return {(c.kind, c.language): c.text for c in row.captions}


def test_the_picture_is_looked_at_once_and_all_else_is_made_of_the_long_caption():
    row, asked = caption(SmallBackend())
    assert texts(row) == ALL
    assert [request.image is not None for request in asked] == [True] + 7 * [False]
    assert {c.model for c in row.captions if (c.kind, c.language) != ("long", "en")} == {"writer"}
    assert row.captions[0].model == "looker"
    assert {c.prompts for c in row.captions} == {load_prompts().version}
    assert row.tokens[0] == 800


@pytest.mark.parametrize(
    ("wanted", "num_looks"),
    [
        ({"condense": False}, 4),
        ({"translate": False}, 2),
        ({"condense": False, "translate": False}, 8),
        ({"kinds": ("short", "tags"), "languages": ("en",)}, 2),  # no long one to condense
        ({"kinds": ("short",)}, 1),
    ],
)
def test_other_ways_look_at_the_picture_again(wanted, num_looks):
    row, asked = caption(SmallBackend(), **wanted)
    assert sum(request.image is not None for request in asked) == num_looks
    assert texts(row) == {pair: text for pair, text in ALL.items() if pair in texts(row)}
    assert len(row.captions) == len(asked)


def test_an_answer_that_does_not_pass_is_asked_for_with_the_next_seed():
    def change(request, text):
        return "I'm sorry, I cannot do that." if request.seed < 12 else text

    row, asked = caption(SmallBackend(change=change), languages=("en",), kinds=("long",), seed=10)
    assert [(r.seed, r.temperature) for r in asked] == [(10, 0.0), (11, 0.7), (12, 0.7)]
    assert row.captions[0].seed == 12
    assert row.rejected == (("long", "en", "refusal"),) * 2
    assert row.excluded == ()


def test_one_that_never_passes_is_left_out_and_so_is_what_would_be_made_of_it():
    def change(request, text):
        return "I'm sorry, I cannot do that." if request.image is not None else text

    row, asked = caption(SmallBackend(change=change), attempts=2)
    assert row.captions == ()
    assert len(asked) == 2
    assert row.excluded[0] == Excluded(
        "long", "en", "refusal", "i'm sorry", "I'm sorry, I cannot do that."
    )
    assert {e.fault for e in row.excluded[1:]} == {"nothing to make it from"}
    assert len(row.excluded) == 8


def test_a_translation_that_fails_leaves_the_first_language():
    def change(request, text):
        return "A translation that is none, in English." if "翻译" in request.prompt else text

    row, _ = caption(SmallBackend(change=change))
    assert {language for _, language in texts(row)} == {"en"}
    assert {e.fault for e in row.excluded} == {"wrong language"}


def test_what_a_server_refuses_is_not_asked_again():
    def change(request, text):
        return Reply("", fault=Rejected("refused by the server", "400: unsafe"))

    row, asked = caption(SmallBackend(change=change), kinds=("long",), languages=("en",))
    assert len(asked) == 1
    assert row.excluded[0].detail == "refused by the server: 400: unsafe"


def test_two_models_share_the_work():
    look, text = SmallBackend(model="looker"), SmallBackend(model="writer")
    row, _ = caption(Pair(look, text))
    assert (look.num_asked, text.num_asked) == (1, 7)
    assert len(row.captions) == 8


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"kinds": ("longest",)}, "kinds longest are none of long, medium, short, tags"),
        ({"languages": ("en", "en")}, "languages en, en must be one or more, each once"),
        ({"languages": ("tlh",)}, "Languages tlh are not known"),
        ({"attempts": 0}, "attempts=0 must be 1 to 100"),
        ({"seed": -1}, "seed=-1 must be 0 to"),
        ({"temperature": 3.0}, "temperature=3.0 must be 0 to 2"),
    ],
)
def test_what_cannot_be_wanted_is_refused(wanted, told):
    with pytest.raises(InputError, match=told):
        Wanted(**wanted)


def test_whether_a_model_for_text_is_needed():
    assert talks_of_text(Wanted())
    assert talks_of_text(Wanted(kinds=("short",)))
    assert not talks_of_text(Wanted(languages=("en",), condense=False))
    assert not talks_of_text(Wanted(kinds=("short", "tags"), languages=("en",)))
