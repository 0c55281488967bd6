import collections
import shutil

import numpy as np
import pytest

from lumina_jax.data import statistics
from lumina_jax.data.buckets import Bucket
from lumina_jax.data.captions import Caption, CaptionPolicy
from lumina_jax.data.records import Manifest, Shard, Split
from lumina_jax.data.statistics import Row
from lumina_jax.errors import InputError
from lumina_jax.system_prompts import SYSTEM_PROMPTS

SQUARE, WIDE = Bucket(32, 32), Bucket(40, 24)


def count_words(texts):
    return np.array([len(text.split()) for text in texts])


def split_of(bucket: Bucket, num_records: int) -> Split:
    return Split(bucket, (Shard("shard", num_records, 0),), ())


def row_of(bucket: Bucket = SQUARE, size=(64, 64), **num_tokens: int) -> Row:
    """A record with one English caption of each kind that is named."""
    captions = tuple(Caption("", kind, "en") for kind in num_tokens)
    return Row(bucket, size, captions, tuple(num_tokens.values()))


def test_a_sample_is_spread_evenly_over_all_splits():
    splits = [split_of(SQUARE, 700_000), split_of(WIDE, 0), split_of(Bucket(24, 40), 300_000)]
    squares, wide, tall = statistics._spread(splits, 100)
    assert (len(squares), len(wide), len(tall)) == (70, 0, 30)
    for rows, num_records in ((squares, 700_000), (tall, 300_000)):
        assert set(np.diff(rows)) == {10_000}
        assert rows[0] == num_records - rows[-1] == 5_000


def test_a_sample_of_everything_has_each_record_once():
    splits = [split_of(SQUARE, 5), split_of(WIDE, 3)]
    for num_records in (8, 1000):
        assert statistics._spread(splits, num_records) == [list(range(5)), list(range(3))]


def test_records_are_read_with_their_tokens_behind_the_system_prompt(dataset):
    splits = Manifest.load(dataset).splits
    rows = statistics.sample(dataset, splits, 1000, count_words, "base")
    assert collections.Counter(row.bucket for row in rows) == {
        split.bucket: split.num_records for split in splits
    }
    assert all(min(row.size) > 0 for row in rows)
    prompt = len(SYSTEM_PROMPTS["base"].split())
    for row in rows:
        assert row.num_tokens == tuple(prompt + len(c.text.split()) for c in row.captions)
    few = statistics.sample(dataset, splits, 5, count_words, "base")
    assert len(few) == 5
    assert all(row in rows for row in few)


def test_counts_are_those_of_all_records_and_shares_those_of_the_sample():
    splits = [split_of(SQUARE, 60), split_of(WIDE, 40)]
    rows = [
        row_of(size=(64, 64), long=10, short=2),
        row_of(size=(16, 16), long=20, short=2),
        row_of(size=(128, 128), long=30, short=2),
        row_of(WIDE, size=(40, 24), short=4),
    ]
    found = statistics.summarize(splits, rows, max_tokens=20)
    assert (found.num_records, found.num_sampled) == (100, 4)
    assert found.buckets == {SQUARE: 60, WIDE: 40}
    assert found.widths[-1] == found.heights[-1] == 128
    assert (found.scales[-1], found.enlarged) == (2, 0.25)
    by_pair = {(c.kind, c.language): c for c in found.captions}
    assert list(by_pair) == [("long", None), ("long", "en"), ("short", None), ("short", "en")]
    long, short = by_pair["long", "en"], by_pair["short", None]
    assert (long.num_captions, short.num_captions) == (75, 100)
    assert (long.num_tokens[1], long.num_tokens[-1]) == (20, 30)
    assert (long.cut, short.cut) == (pytest.approx(1 / 3), 0)  # as long as the slots is not cut


def test_texts_are_drawn_as_the_policy_draws_them():
    rows = [row_of(long=100, short=10)] * 4000
    policy = CaptionPolicy(kinds={"long": 1.0, "short": 3.0}, dropout=0.2)
    num_tokens = statistics.draw_num_tokens(rows, policy, num_empty=1)
    shares = {n: np.mean(num_tokens == n) for n in np.unique(num_tokens)}
    assert shares == pytest.approx({1: 0.2, 10: 0.6, 100: 0.2}, abs=0.03)
    assert set(statistics.draw_num_tokens(rows, policy, 1, "short")) == {1, 10}


def test_a_kind_has_the_fewest_slots_that_hold_nearly_all_its_captions():
    policy = CaptionPolicy(kinds={"long": 1.0, "short": 1.0}, dropout=0.5)
    lengths = [64] * 99 + [65]
    rows = [row_of(long=300, short=length) for length in lengths]
    assert statistics.choose_text_slots(rows, policy, 256) == {"long": 256, "short": 64}
    rows[0] = row_of(long=300, short=65)
    assert statistics.choose_text_slots(rows, policy, 256) == {"long": 256, "short": 128}
    assert statistics.choose_text_slots(rows, policy, 100) == {"long": 100, "short": 100}


def test_captions_that_take_the_place_of_a_kind_need_their_slots_too():
    policy = CaptionPolicy(kinds={"long": 1.0, "short": 1.0})
    rows = [row_of(long=200, short=10)] * 95 + [row_of(long=200)] * 5
    assert statistics.choose_text_slots(rows, policy, 256)["short"] == 256


def test_padding_is_what_texts_and_pictures_leave_empty():
    rows = [row_of(long=300, short=10)] * 10
    policy = CaptionPolicy(kinds={"long": 1.0, "short": 3.0}, dropout=0.0)
    (mixed,) = statistics.draw_batches(rows, policy, 1, 256)
    assert (mixed.kind, mixed.share, mixed.text_slots) == (None, 1, 256)
    assert set(mixed.text_tokens) <= {10, 256}

    batches = statistics.draw_batches(rows, policy, 1, {"long": 256, "short": 64})
    assert [(b.kind, b.share, b.text_slots) for b in batches] == [
        ("long", 0.25, 256),
        ("short", 0.75, 64),
    ]
    padding = statistics.padding(batches, image_slots=100, image_tokens=np.array([80, 100]))
    assert padding.text_slots == 64 + 48
    assert padding.text_tokens == 64 + 7.5
    assert padding.text == pytest.approx(40.5 / 112)
    assert padding.image == pytest.approx(0.1)
    assert padding.text_of_joint == pytest.approx(40.5 / 212)
    assert padding.joint == pytest.approx(50.5 / 212)


@pytest.mark.parametrize(
    ("splits", "num_records", "message"),
    [
        ([split_of(SQUARE, 1)], 0, "num_records=0 reads nothing; give 1 or more"),
        ([split_of(SQUARE, 0)], 1, "somewhere has no records in these buckets; choose others"),
        ([], 1, "somewhere has no records in these buckets"),
    ],
)
def test_nothing_to_measure_is_refused(splits, num_records, message):
    with pytest.raises(InputError, match=message):
        statistics.sample("somewhere", splits, num_records, count_words)


def test_a_damaged_record_is_told_with_its_place(dataset, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    split = Manifest.load(copy).splits[0]
    path = copy / split.shards[0].name
    content = bytearray(path.read_bytes())
    content[content.index(b"openmoji") :] = bytes(len(content) - content.index(b"openmoji"))
    path.write_bytes(content)
    message = rf"A record of \S+, bucket {split.bucket}, of the numbers 0 to 2, cannot be read"
    with pytest.raises(InputError, match=message):
        list(statistics.read_some(copy, split, range(3)))
