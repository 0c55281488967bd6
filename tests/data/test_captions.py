import collections
import math
import re

import numpy as np
import pytest

from lumina_jax.data.captions import KINDS, Caption, CaptionPolicy
from lumina_jax.errors import InputError
from lumina_jax.system_prompts import SYSTEM_PROMPTS

CAPTIONS = (
    Caption("a long text", "long", "en"),
    Caption("tags", "tags", "en"),
    Caption("dog", "short", "en"),
    Caption("Hund", "short", "de"),
    Caption("狗", "short", "zh"),
)
# Uniforms of 4000 rows. The shares below are allowed four times their standard deviation, and the
# seed is fixed: a test that passes once passes always.
DRAWS = np.random.default_rng(0).random((4000, CaptionPolicy.NUM_DRAWS)).tolist()


def count(policy: CaptionPolicy, captions=CAPTIONS, kind=None) -> collections.Counter:
    return collections.Counter(
        policy.text(captions, policy.choose(captions, draws, kind), draws) for draws in DRAWS
    )


def assert_shares(counts: collections.Counter, shares: dict[str, float]):
    assert set(counts) == set(shares)
    for text, share in shares.items():
        assert counts[text] / 4000 == pytest.approx(
            share, abs=4 * (share * (1 - share) / 4000) ** 0.5
        )


def test_kinds_are_drawn_by_weight_and_captions_of_a_kind_evenly():
    counts = count(CaptionPolicy(kinds={"long": 3.0, "short": 1.0}, dropout=0.0))
    assert_shares(counts, {"a long text": 3 / 4, "dog": 1 / 12, "Hund": 1 / 12, "狗": 1 / 12})


def test_a_kind_that_a_picture_lacks_does_not_count():
    counts = count(CaptionPolicy(kinds={"medium": 9.0, "tags": 1.0}, dropout=0.0))
    assert set(counts) == {"tags"}


def test_languages_are_drawn_by_weight_and_those_not_named_never():
    policy = CaptionPolicy(kinds={"short": 1.0}, languages={"de": 3.0, "zh": 1.0}, dropout=0.0)
    assert_shares(count(policy), {"Hund": 3 / 4, "狗": 1 / 4})
    policy = CaptionPolicy(kinds={"short": 1.0}, languages={"de": 1.0, "zh": 0.0}, dropout=0.0)
    assert set(count(policy)) == {"Hund"}


def test_several_captions_of_a_language_share_its_weight():
    captions = (*CAPTIONS, Caption("hound", "short", "en"))
    policy = CaptionPolicy(kinds={"short": 1.0}, languages={"en": 1.0, "de": 1.0}, dropout=0.0)
    assert_shares(count(policy, captions), {"dog": 1 / 4, "hound": 1 / 4, "Hund": 1 / 2})


def test_the_weights_of_languages_do_not_move_those_of_kinds():
    weights = {"en": 1.0, "de": 9.0}
    policy = CaptionPolicy(kinds={"long": 1.0, "short": 1.0}, languages=weights, dropout=0.0)
    assert_shares(count(policy), {"a long text": 1 / 2, "dog": 1 / 20, "Hund": 9 / 20})


def test_the_kind_of_the_batch_is_taken_where_the_picture_has_it():
    policy = CaptionPolicy(kinds={"long": 1.0, "medium": 1.0, "tags": 1.0}, dropout=0.0)
    assert set(count(policy, kind="tags")) == {"tags"}
    # Not the picture's, and not the policy's: drawn among its own.
    for absent in ("medium", "short"):
        assert_shares(count(policy, kind=absent), {"a long text": 1 / 2, "tags": 1 / 2})


def test_the_kind_of_the_batch_leaves_dropout_and_captions_as_they_are():
    policy = CaptionPolicy(kinds={"short": 1.0, "long": 0.0})
    assert count(policy, kind="short") == count(policy)


def test_the_kind_of_a_batch_is_drawn_by_weight():
    policy = CaptionPolicy(kinds={"tags": 1.0, "long": 3.0, "short": 0.0})
    counts = collections.Counter(policy.draw_kind(draw) for draw in [draws[0] for draws in DRAWS])
    assert_shares(counts, {"long": 3 / 4, "tags": 1 / 4})


@pytest.mark.parametrize("draw", [0.0, math.nextafter(1, 0)])
def test_the_first_and_the_last_draw_choose_something(draw):
    weights = dict.fromkeys(KINDS, 0.1)
    policy = CaptionPolicy(kinds=weights, languages={"en": 0.1, "zh": 0.2}, dropout=0.0)
    assert policy.draw_kind(draw) in KINDS
    draws = [draw] * CaptionPolicy.NUM_DRAWS
    assert policy.text(CAPTIONS, policy.choose(CAPTIONS, draws), draws)


def test_dropout_replaces_the_whole_text():
    assert count(CaptionPolicy(dropout=0.1))[""] / 4000 == pytest.approx(0.1, abs=0.02)
    assert set(count(CaptionPolicy(dropout=1.0))) == {""}
    assert "" not in count(CaptionPolicy(dropout=0.0))


def test_dropout_leaves_the_other_shares_as_they_are():
    policy = CaptionPolicy(kinds={"tags": 3.0, "long": 1.0}, dropout=0.5, shuffle_tags=True)
    captions = (Caption("a, b", "tags", "en"), CAPTIONS[0])
    shares = {"": 1 / 2, "a, b": 3 / 16, "b, a": 3 / 16, "a long text": 1 / 8}
    assert_shares(count(policy, captions), shares)


def test_kinds_and_languages_of_weight_zero_are_not_allowed():
    policy = CaptionPolicy(kinds={"long": 1.0, "tags": 0.0}, languages={"en": 1.0, "zh": 0.0})
    allowed = [policy.allows(kind, "en") for kind in ("long", "tags", "short")]
    assert allowed == [True, False, False]
    assert [policy.allows("long", code) for code in ("en", "zh", "de")] == [True, False, False]


def test_the_system_prompt_precedes_every_caption_but_not_the_empty_text():
    texts = set(count(CaptionPolicy(kinds={"tags": 1.0}, dropout=0.5, system_prompt="base")))
    assert texts == {"", SYSTEM_PROMPTS["base"] + "tags"}


def test_a_dropped_caption_can_leave_the_system_prompt_alone():
    policy = CaptionPolicy(dropout=1.0, dropout_keeps_system_prompt=True, system_prompt="base")
    assert set(count(policy)) == {SYSTEM_PROMPTS["base"]}


@pytest.mark.parametrize(
    ("text", "tags", "between"),
    [
        ("dog, red nose,sky, 1girl", ["dog", "red nose", "sky", "1girl"], [", ", ",", ", "]),
        ("狗，红鼻子、天空", ["狗", "红鼻子", "天空"], ["，", "、"]),
        (" dog , sky, ", ["dog", "sky"], [" ", " , ", ", "]),
        ("dog", ["dog"], []),
        ("", [], []),
    ],
)
def test_tags_are_shuffled_between_separators_that_stay(text, tags, between):
    policy = CaptionPolicy(dropout=0.0, shuffle_tags=True, system_prompt="base")
    texts = count(policy, (Caption(text, "tags", "en"),))
    assert len(texts) == math.factorial(len(tags))
    some_tag = "|".join(map(re.escape, tags)) or "(?!)"
    for shuffled in texts:
        shuffled = shuffled.removeprefix(SYSTEM_PROMPTS["base"])
        assert sorted(re.findall(some_tag, shuffled)) == sorted(tags)
        assert [gap for gap in re.split(some_tag, shuffled) if gap] == between


def test_every_order_of_tags_is_as_likely():
    policy = CaptionPolicy(dropout=0.0, shuffle_tags=True)
    orders = ("a, b, c", "a, c, b", "b, a, c", "b, c, a", "c, a, b", "c, b, a")
    counts = count(policy, (Caption("a, b, c", "tags", "en"),))
    assert_shares(counts, dict.fromkeys(orders, 1 / 6))


def test_only_tags_are_shuffled_and_only_when_asked():
    sentence = (Caption("a dog, red, on grass", "short", "en"),)
    assert set(count(CaptionPolicy(dropout=0.0, shuffle_tags=True), sentence)) == {sentence[0].text}
    tags = (Caption("dog, red, grass", "tags", "en"),)
    assert set(count(CaptionPolicy(dropout=0.0), tags)) == {tags[0].text}


def test_the_choice_does_not_depend_on_the_system_prompt():
    choices = [
        [CaptionPolicy(system_prompt=name).choose(CAPTIONS, draws) for draws in DRAWS[:50]]
        for name in ("empty", "real")
    ]
    assert choices[0] == choices[1]
    assert len(set(choices[0])) > 3


def test_the_same_draws_make_the_same_choice():
    policy = CaptionPolicy(languages={"en": 2.0, "zh": 1.0}, shuffle_tags=True)
    assert count(policy) == count(policy)


def test_a_picture_without_an_allowed_caption_is_refused_with_what_it_has():
    policy = CaptionPolicy(kinds={"short": 1.0}, languages={"fr": 1.0}, dropout=1.0)
    with pytest.raises(InputError, match=r"short captions in de, en, zh .*languages: fr\) allows"):
        policy.choose(CAPTIONS, DRAWS[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": {"lnog": 1.0}}, "Unknown caption kinds lnog; the kinds are long, medium"),
        ({"kinds": {"long": -1.0}}, "kind weights .* must be zero or more"),
        ({"kinds": {"long": 0.0}}, "one must be above zero"),
        ({"kinds": {"long": math.nan}}, "must be zero or more"),
        ({"kinds": {}}, "one must be above zero"),
        ({"languages": "en"}, r"languages 'en' have no weights; give one to each, such as"),
        (
            {"languages": ("en", "zh")},
            r"languages \('en', 'zh'\) have no weights; give one to each",
        ),
        ({"languages": {"en": 1.0, "zh": -1.0}}, "language weights .* must be zero or more"),
        ({"languages": {"en": 0.0}}, "one must be above zero"),
        ({"system_prompt": "bas"}, "No system prompt is called 'bas'"),
        ({"dropout": 1.5}, "dropout 1.5 is not a probability; give 0 to 1"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        CaptionPolicy(**settings)


def test_a_kind_that_no_data_has_is_not_drawn_for_a_batch():
    policy = CaptionPolicy(kinds={"long": 1.0, "short": 1.0, "tags": 2.0}, languages={"en": 1.0})
    found = policy.among([("long", "en"), ("tags", "zh"), ("medium", "en")])
    assert found.kinds == {"long": 1.0}
    assert {found.draw_kind(draw) for draw in (0.0, 0.5, 0.999)} == {"long"}


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(weight):
    for name in ("kinds", "languages"):
        with pytest.raises(InputError, match="must be zero or more"):
            CaptionPolicy(**{name: {"long": weight}})
