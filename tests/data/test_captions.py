import collections
import math

import numpy as np
import pytest

from lumina_jax.data.captions import Caption, CaptionPolicy
from lumina_jax.errors import InputError
from lumina_jax.system_prompts import SYSTEM_PROMPTS

CAPTIONS = (
    Caption("a long text", "long", "en"),
    Caption("tags", "tags", "en"),
    Caption("dog", "short", "en"),
    Caption("Hund", "short", "de"),
    Caption("狗", "short", "zh"),
)


def count(policy: CaptionPolicy, captions=CAPTIONS, draws: int = 4000) -> collections.Counter:
    rng = np.random.default_rng(0)
    return collections.Counter(
        policy.text(captions, policy.choose(captions, rng)) for _ in range(draws)
    )


def test_kinds_are_drawn_by_weight_and_captions_of_a_kind_evenly():
    counts = count(CaptionPolicy(kinds={"long": 3.0, "short": 1.0}, dropout=0.0))
    assert set(counts) == {"a long text", "dog", "Hund", "狗"}
    assert counts["a long text"] / 4000 == pytest.approx(0.75, abs=0.03)
    for text in ("dog", "Hund", "狗"):
        assert counts[text] / 4000 == pytest.approx(0.25 / 3, abs=0.02)


def test_a_kind_that_a_picture_lacks_does_not_count():
    counts = count(CaptionPolicy(kinds={"medium": 9.0, "tags": 1.0}, dropout=0.0))
    assert set(counts) == {"tags"}


def test_only_the_languages_allowed_are_chosen():
    counts = count(CaptionPolicy(kinds={"short": 1.0}, languages=("de", "zh"), dropout=0.0))
    assert set(counts) == {"Hund", "狗"}


def test_dropout_replaces_the_whole_text():
    counts = count(CaptionPolicy(dropout=0.1))
    assert counts[""] / 4000 == pytest.approx(0.1, abs=0.02)
    assert set(count(CaptionPolicy(dropout=1.0))) == {""}
    assert "" not in count(CaptionPolicy(dropout=0.0))


def test_the_system_prompt_precedes_every_caption_but_not_the_empty_text():
    texts = set(count(CaptionPolicy(kinds={"tags": 1.0}, dropout=0.5, system_prompt="base")))
    assert texts == {"", SYSTEM_PROMPTS["base"] + "tags"}


def test_the_choice_does_not_depend_on_the_system_prompt():
    choices = [
        [CaptionPolicy(system_prompt=name).choose(CAPTIONS, np.random.default_rng(seed))
         for seed in range(50)]
        for name in ("empty", "real")
    ]  # fmt: skip
    assert choices[0] == choices[1]


def test_the_same_generator_state_makes_the_same_choice():
    policy = CaptionPolicy()
    first = [policy.choose(CAPTIONS, np.random.default_rng(seed)) for seed in range(50)]
    second = [policy.choose(CAPTIONS, np.random.default_rng(seed)) for seed in range(50)]
    assert first == second
    assert len(set(first)) > 3


def test_a_picture_without_an_allowed_caption_is_refused_with_what_it_has():
    policy = CaptionPolicy(kinds={"short": 1.0}, languages=("fr",))
    with pytest.raises(InputError, match=r"short captions in de, en, zh .*languages: fr\) allows"):
        policy.choose(CAPTIONS, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": {"lnog": 1.0}}, "Unknown caption kinds lnog; the kinds are long, medium"),
        ({"kinds": {"long": -1.0}}, "must be zero or more"),
        ({"kinds": {"long": 0.0}}, "one must be above zero"),
        ({"kinds": {"long": math.nan}}, "must be zero or more"),
        ({"kinds": {}}, "one must be above zero"),
        ({"languages": "en"}, r"is one string; give a tuple of codes"),
        ({"system_prompt": "bas"}, "No system prompt is called 'bas'"),
        ({"dropout": 1.5}, "dropout 1.5 is not a probability; give 0 to 1"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        CaptionPolicy(**settings)
