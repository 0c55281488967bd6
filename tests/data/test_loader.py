"""The loader's one promise: step k has the same global batch on any number of processes."""

import collections
import hashlib
import itertools
import logging
import shutil
import threading

import numpy as np
import pytest

from lumina_jax.data import records
from lumina_jax.data.buckets import Bucket
from lumina_jax.data.captions import Caption, CaptionPolicy
from lumina_jax.data.loader import Dataset, Loader
from lumina_jax.data.records import Manifest
from lumina_jax.data.sources import openmoji
from lumina_jax.errors import InputError
from lumina_jax.system_prompts import prefixed
from tests.small_data import damage, make_dataset, make_emojis, picture

SQUARE = (Bucket(32, 32),)


@pytest.fixture
def load(dataset, tokenize):
    """Makes a loader of the shared dataset; keywords change it."""

    def make(*directories, **changes) -> Loader:
        settings = {"batch_size": 8, "seed": 0, "tokenize": tokenize, "num_threads": 2}
        datasets = [
            d if isinstance(d, Dataset) else Dataset(str(d)) for d in directories or (dataset,)
        ]
        return Loader(datasets, **(settings | changes))

    return make


def digest(*shares) -> str:
    """Hashes the global batch that the processes' shares make up, in order."""
    content = hashlib.sha256()
    for name in ("images", "token_ids", "token_mask"):
        array = np.concatenate([share[name] for share in shares])
        content.update(repr((array.shape, array.dtype)).encode() + array.tobytes())
    content.update(repr([[*share["ids"], *share["captions"]] for share in shares]).encode())
    return content.hexdigest()


def joined(*shares) -> dict:
    """Assembles the global batch, as jax.make_array_from_process_local_data does."""
    arrays = ("images", "token_ids", "token_mask", "ids")
    return {name: np.concatenate([share[name] for share in shares]) for name in arrays} | {
        "captions": list(itertools.chain.from_iterable(share["captions"] for share in shares))
    }


@pytest.mark.parametrize("process_count", [2, 4, 8])
def test_the_global_batch_is_the_same_on_any_number_of_processes(load, process_count):
    alone = load()
    assert len(alone.buckets) == 3
    together = [
        load(process_index=index, process_count=process_count) for index in range(process_count)
    ]
    seen = set()
    for step in range(32):
        shares = [loader.batch_at(step) for loader in together]
        assert all(len(share["images"]) == 8 // process_count for share in shares)
        assert digest(joined(*shares)) == digest(alone.batch_at(step)), f"step {step}"
        seen.add(shares[0]["images"].shape)
    assert len(seen) == 3


def test_a_process_reads_only_its_own_rows(load, monkeypatch):
    read = []
    original = records.Records.read

    def count(self, indices):
        read.extend(indices)
        return original(self, indices)

    monkeypatch.setattr(records.Records, "read", count)
    load(process_index=1, process_count=4).batch_at(3)
    assert len(read) == 2


def test_a_batch_has_the_promised_shapes(load):
    batch = load(buckets=[Bucket(40, 24)]).batch_at(0)
    assert batch["images"].shape == (8, 24, 40, 3)  # width x height in the name, [H, W] in arrays
    assert batch["images"].dtype == np.uint8
    assert batch["token_ids"].shape == batch["token_mask"].shape == (8, 16)
    assert (batch["token_ids"].dtype, batch["token_mask"].dtype) == (np.int32, np.bool_)
    assert len(batch["ids"]) == len(batch["captions"]) == 8


def test_pictures_and_captions_stay_together(load):
    names = {
        emoji.id: {caption.text for caption in emoji.captions} | {""}
        for emoji in openmoji.select("all")
    }
    loader = load()
    for step in range(8):
        batch = loader.batch_at(step)
        for record_id, caption in zip(batch["ids"], batch["captions"], strict=True):
            assert caption in names[record_id]


def test_another_seed_gives_other_batches(load):
    first, second = load(seed=1), load(seed=2)
    assert all(digest(first.batch_at(k)) != digest(second.batch_at(k)) for k in range(8))


def test_iterating_from_a_step_gives_the_batches_of_those_steps(load):
    loader = load(prefetch=3)
    for start in (0, 5, 1_000_000):
        batches = itertools.islice(loader.iterate(start), 6)
        assert [digest(batch) for batch in batches] == [
            digest(loader.batch_at(step)) for step in range(start, start + 6)
        ]


def test_a_run_that_stops_and_resumes_sees_what_an_uninterrupted_one_sees(load):
    whole = [digest(batch) for batch in itertools.islice(load().iterate(), 12)]
    before = [digest(batch) for batch in itertools.islice(load().iterate(), 7)]
    after = [digest(batch) for batch in itertools.islice(load().iterate(7), 5)]
    assert before + after == whole


def test_closing_an_iterator_ends_its_threads(load):
    before = set(threading.enumerate())
    batches = load().iterate()
    next(batches)
    threads = set(threading.enumerate()) - before
    assert threads
    batches.close()
    for thread in threads:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in threads)


def test_each_epoch_of_a_bucket_holds_every_record_once(load):
    loader = load(buckets=[Bucket(32, 32)], batch_size=1)
    (split,) = [s for s in loader.manifests[0].splits if s.bucket == Bucket(32, 32)]
    epochs = [
        [loader.batch_at(epoch * split.num_records + k)["ids"][0] for k in range(split.num_records)]
        for epoch in range(3)
    ]
    assert all(len(set(epoch)) == split.num_records for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_captions_are_drawn_anew_each_time_a_record_is_seen(load):
    loader = load(buckets=[Bucket(32, 32)], policy=CaptionPolicy(dropout=0.0))
    texts = {}
    for step in range(20):
        batch = loader.batch_at(step)
        for record_id, caption in zip(batch["ids"], batch["captions"], strict=True):
            texts.setdefault(record_id, set()).add(caption)
    assert min(map(len, texts.values())) > 3


def test_every_caption_has_the_system_prompt_and_a_dropped_one_has_none(load):
    plain, prompted = (
        load(policy=CaptionPolicy(dropout=0.5, system_prompt=name)) for name in ("empty", "real")
    )
    for step in range(4):
        without, found = plain.batch_at(step), prompted.batch_at(step)
        expected = [text and prefixed(text, "real") for text in without["captions"]]
        assert found["captions"] == expected
        np.testing.assert_array_equal(found["ids"], without["ids"])


def test_cached_features_that_are_not_there_are_refused_with_how_to_make_them(load):
    with pytest.raises(
        InputError,
        match=r"no cached cap_feats; it has none. Make .* tools/cache_features.py --features=cap",
    ):
        load(features=("cap_feats",))
    for wrong in ("latents", ("images",)):
        with pytest.raises(InputError, match="are not a tuple of latents and cap_feats"):
            load(features=wrong)


def test_buckets_come_in_proportion_to_their_records(load):
    loader = load(batch_size=1)
    steps = 480
    seen = [loader.batch_at(step)["images"].shape for step in range(steps)]
    for split in loader.manifests[0].splits:
        share = seen.count((1, split.bucket.height, split.bucket.width, 3)) / steps
        assert share == pytest.approx(split.num_records / loader.manifests[0].num_records, abs=0.01)


def test_a_bucket_gives_the_same_rows_whatever_buckets_are_beside_it(load):
    square = Bucket(32, 32)
    alone = load(buckets=[square])
    mixed = [load().batch_at(step) for step in range(12)]
    mixed = [digest(batch) for batch in mixed if batch["images"].shape[1:3] == (32, 32)]
    assert mixed == [digest(alone.batch_at(step)) for step in range(len(mixed))]


def test_a_batch_may_be_larger_than_its_bucket(load):
    batch = load(batch_size=64).batch_at(0)
    assert len(batch["ids"]) == 64


def test_many_threads_read_the_same_batches(load):
    loader = load()
    expected = [digest(loader.batch_at(step)) for step in range(16)]
    fresh, found = load(), [None] * 16  # fresh: its readers are opened by the race itself
    threads = [
        threading.Thread(target=lambda k=k: found.__setitem__(k, digest(fresh.batch_at(k))))
        for k in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_a_damaged_record_is_replaced_by_the_same_other_everywhere(load, tmp_path, caplog):
    make_emojis(tmp_path / "d", "🐶🐱🍎🍋")
    damage(tmp_path / "d", {"1F436"})
    alone = load(tmp_path / "d")
    with caplog.at_level(logging.WARNING, logger="absl"):
        batches = [alone.batch_at(step) for step in range(4)]
    ids = np.concatenate([batch["ids"] for batch in batches])
    assert set(ids) == {"1F431", "1F34E", "1F34B"}
    # 32 rows are eight epochs of four records; the damaged one is met once in each.
    assert alone.num_replaced == 8
    messages = [r.getMessage() for r in caplog.records if "cannot be decoded" in r.getMessage()]
    assert len(messages) == 1
    assert "Record 1F436 of bucket 32x32" in messages[0]

    shares = [load(tmp_path / "d", process_index=i, process_count=2) for i in range(2)]
    for step, batch in enumerate(batches):
        assert digest(joined(*(share.batch_at(step) for share in shares))) == digest(batch)
    assert sum(share.num_replaced for share in shares) == 8


def test_a_bucket_of_damaged_records_alone_is_an_error(load, tmp_path):
    make_emojis(tmp_path / "d", "🐶")
    damage(tmp_path / "d", {"1F436"})
    with pytest.raises(InputError, match="None of the 1 records of bucket 32x32 can be decoded"):
        load(tmp_path / "d").batch_at(0)


def test_a_bucket_of_one_record_works(load, tmp_path):
    make_emojis(tmp_path / "d", "🐶")
    assert set(load(tmp_path / "d").batch_at(5)["ids"]) == {"1F436"}


def test_an_empty_bucket_is_left_out_with_a_word(load, tmp_path, caplog):
    buckets = (Bucket(32, 32), Bucket(40, 24))
    make_emojis(tmp_path / "d", "🐶🐱", buckets)
    with caplog.at_level(logging.INFO, logger="absl"):
        loader = load(tmp_path / "d")
    assert loader.buckets == (Bucket(32, 32),)
    assert "Left out, because they have no records: buckets 40x24" in caplog.text
    with pytest.raises(InputError, match=r"The buckets 40x24 of .* have no records"):
        load(tmp_path / "d", buckets=[Bucket(40, 24)])


def test_a_bucket_that_does_not_exist_lists_those_that_do(load):
    with pytest.raises(InputError, match=r"no bucket 64x16; it has \(records\) 24x40 \(\d+\), 32x"):
        load(buckets=[Bucket(32, 32), Bucket(64, 16)])


def test_a_directory_without_a_dataset_says_how_to_make_one(load, tmp_path):
    with pytest.raises(InputError, match=r"Make one with tools/prepare_data\.py"):
        load(tmp_path)


def test_a_missing_shard_is_noticed_at_the_start(load, dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    (shard,) = copy.glob("*32x32*")
    shard.unlink()
    with pytest.raises(InputError, match=rf"lacks {shard.name}. Copy it again"):
        load(copy)


def test_a_shard_that_is_cut_short_is_noticed_at_the_start(load, dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    (shard,) = copy.glob("*32x32*")
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"as it was written \(it has [\d,]+ of [\d,]+ bytes\)"):
        load(copy)


def test_a_shard_that_vanishes_stops_the_run(load, dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    loader = load(copy, buckets=[Bucket(32, 32)])
    (shard,) = copy.glob("*32x32*")
    shard.unlink()
    with pytest.raises(
        InputError, match=r"32x32.* cannot be read .*, and could when the run began"
    ):
        loader.batch_at(0)


def test_a_flipped_byte_costs_one_record(load, dataset, tmp_path, caplog):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    (shard,) = copy.glob("*32x32*")
    content = bytearray(shard.read_bytes())
    content[content.index(b"IDAT", len(content) // 8) + 20] ^= 255
    shard.write_bytes(content)
    loader = load(copy, buckets=[Bucket(32, 32)])
    (split,) = [s for s in loader.manifests[0].splits if s.bucket == Bucket(32, 32)]
    seen = set()
    for step in range(8):
        seen |= set(loader.batch_at(step)["ids"])
    assert len(seen) == split.num_records - 1
    assert loader.num_replaced >= 8 * 8 // split.num_records
    assert caplog.text.count("takes its place") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 6, "process_index": 0, "process_count": 4}, "by 4 proc.*: 4 and 8"),
        ({"batch_size": 2, "process_index": 0, "process_count": 4}, r"nearest: 4\."),
        ({"batch_size": 0}, "batch_size=0 cannot be shared by 1 processes; nearest: 1"),
        ({"num_threads": 0}, "num_threads=0 and prefetch=8 must be 1 or more"),
        ({"prefetch": 0}, "prefetch=0 must be 1 or more"),
        ({"seed": -1}, "seed=-1 must be zero or more"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(load, changes, message):
    with pytest.raises(InputError, match=message):
        load(**changes)


def test_a_negative_step_is_refused(load):
    with pytest.raises(ValueError, match="step=-1 is negative"):
        load().batch_at(-1)
    with pytest.raises(ValueError, match="step=-1 is negative"):
        load().iterate(-1)


def test_captions_that_the_policy_excludes_are_noticed_at_the_start(load, tmp_path):
    with pytest.raises(
        InputError, match=r"24 of 24 records .* short captions in ar, de, .*: long;"
    ):
        load(policy=CaptionPolicy(kinds={"long": 1.0}))
    items = [
        picture("a", captions=[Caption("cat", "short", "en")]),
        picture("German", captions=[Caption("hund", "short", "de")]),
    ]
    make_dataset(tmp_path / "d", items)
    load(tmp_path / "d", policy=CaptionPolicy(languages={"en": 1.0, "de": 1.0}))
    with pytest.raises(
        InputError,
        match=r"1 of 2 records of .* \(one is 'German'\) have short captions in de; .*: en\)",
    ):
        load(tmp_path / "d", policy=CaptionPolicy(languages={"en": 1.0}))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two small data sets: 30 pictures called a..., 10 called b..., in two buckets."""
    folder = tmp_path_factory.mktemp("two")
    buckets = (Bucket(32, 32), Bucket(40, 24))
    for name, num in (("a", 30), ("b", 10)):
        sizes = [(40, 40) if n % 5 else (50, 30) for n in range(num)]
        items = [
            picture(f"{name}{n}", size, [Caption(f"{name}{n}", "short", "en")])
            for n, size in enumerate(sizes)
        ]
        make_dataset(folder / name, items, buckets, keep_duplicates=True)
    return folder / "a", folder / "b"


def count_rows(loader, steps: int) -> collections.Counter:
    return collections.Counter(
        record_id[0] for step in range(steps) for record_id in loader.batch_at(step)["ids"]
    )


def test_without_weights_every_record_is_as_likely(load, two):
    counts = count_rows(load(*two), 100)
    assert counts["a"] / 800 == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("share", [0.9, 0.2, 0.0])
def test_a_mixture_has_the_shares_asked_for_within_each_batch(load, two, share):
    a, b = two
    loader = load(Dataset(str(a), share), Dataset(str(b), 1 - share))
    counts = count_rows(loader, 100)
    assert counts["a"] / 800 == pytest.approx(share, abs=0.01)
    in_batches = {sum(i[0] == "a" for i in loader.batch_at(k)["ids"]) for k in range(40)}
    assert max(in_batches) - min(in_batches) <= 3
    # Every record of a data set is taken equally often.
    ids = collections.Counter(
        record_id for k in range(100) for record_id in loader.batch_at(k)["ids"]
    )
    for name in "ab":
        of_name = [count for record_id, count in ids.items() if record_id[0] == name]
        assert not of_name or max(of_name) - min(of_name) <= 3


def test_a_mixture_is_the_same_on_any_number_of_processes(load, two):
    datasets = [Dataset(str(two[0]), 0.6, "base"), Dataset(str(two[1]), 0.4, "real")]
    alone = load(*datasets)
    for count in (2, 8):
        together = [load(*datasets, process_index=i, process_count=count) for i in range(count)]
        for step in range(12):
            shares = [loader.batch_at(step) for loader in together]
            assert digest(joined(*shares)) == digest(alone.batch_at(step))


def test_a_run_may_go_on_with_another_number_of_processes(load, two):
    whole = [digest(load(*two).batch_at(step)) for step in range(12)]
    found = []
    for first, count in ((0, 4), (4, 1), (8, 8)):
        shares = [
            list(
                itertools.islice(load(*two, process_index=i, process_count=count).iterate(first), 4)
            )
            for i in range(count)
        ]
        found += [digest(joined(*of_step)) for of_step in zip(*shares, strict=True)]
    assert found == whole


def test_each_data_set_may_have_its_own_system_prompt(load, two):
    loader = load(
        Dataset(str(two[0]), 0.5), Dataset(str(two[1]), 0.5, "real"),
        policy=CaptionPolicy(dropout=0.0, system_prompt="base"),
    )  # fmt: skip
    for step in range(4):
        batch = loader.batch_at(step)
        for record_id, caption in zip(batch["ids"], batch["captions"], strict=True):
            assert caption == prefixed(record_id, "base" if record_id[0] == "a" else "real")


def test_the_fingerprint_of_a_mixture_follows_its_parts_and_shares(load, two):
    a, b = map(str, two)
    assert load(a).fingerprint == Manifest.load(a).fingerprint
    prints = {load(Dataset(a, 1.0), Dataset(b, weight)).fingerprint for weight in (1.0, 2.0)} | {
        load(a, b).fingerprint,
        load(b, a).fingerprint,
        load(a).fingerprint,
    }
    assert len(prints) == 5
    assert (
        load(Dataset(a, 1.0), Dataset(b, 3.0)).fingerprint
        == load(Dataset(a, 2.0), Dataset(b, 6.0)).fingerprint
    )


def test_a_bucket_that_only_one_data_set_has_is_trained_on_too(load, two, tmp_path):
    make_dataset(tmp_path / "c", [picture("c", (24, 40))], [Bucket(24, 40)])
    loader = load(two[0], tmp_path / "c", batch_size=1)
    assert loader.buckets == (Bucket(24, 40), Bucket(32, 32), Bucket(40, 24))
    assert count_rows(loader, 31 * 10)["c"] == 10


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.0, None), "Some data ?sets have a weight, and .*/b have none"),
        ((1.0, -1.0), r"weights \[1.0, -1.0\] must be zero or more"),
        ((0.0, 0.0), "and one above zero"),
    ],
)
def test_weights_that_make_no_sense_are_refused(load, two, weights, message):
    datasets = [Dataset(str(d), w) for d, w in zip(two, weights, strict=True)]
    with pytest.raises(InputError, match=message):
        load(*datasets)
    with pytest.raises(InputError, match="No dataset is named"):
        Loader([], batch_size=1, seed=0, tokenize=lambda texts: None)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Twelve pictures with a long and a short caption, four with a short one only."""
    items = [
        picture(
            f"p{n}",
            captions=[Caption("long " * 6, "long", "en")] * (n < 12)
            + [Caption(f"s{n}", "short", "en")],
        )
        for n in range(16)
    ]
    directory = tmp_path_factory.mktemp("kinds") / "d"
    make_dataset(directory, items, keep_duplicates=True)
    return directory


def test_text_slots_follow_the_kind_that_all_captions_of_a_batch_have(load, kinds, tokenize):
    def in_slots(texts, num_slots):
        token_ids, token_mask = tokenize(texts)
        return token_ids[:, :num_slots], token_mask[:, :num_slots]

    policy = CaptionPolicy(kinds={"long": 3.0, "short": 1.0}, dropout=0.0)
    loader = load(kinds, tokenize=in_slots, policy=policy, text_slots={"long": 12, "short": 4})
    seen = collections.Counter()
    for step in range(200):
        batch = loader.batch_at(step)
        slots = batch["token_ids"].shape[1]
        seen[slots] += 1
        assert batch["token_mask"].shape == (8, slots)
        for record_id, caption in zip(batch["ids"], batch["captions"], strict=True):
            is_long = slots == 12 and int(record_id[1:]) < 12  # else it has no such caption
            assert caption.startswith("long" if is_long else "s")
    assert set(seen) == {4, 12}
    assert seen[12] / 200 == pytest.approx(0.75, abs=0.1)

    shares = [
        load(
            kinds, tokenize=in_slots, policy=policy, text_slots={"long": 12, "short": 4},
            process_index=i, process_count=4,
        )
        for i in range(4)
    ]  # fmt: skip
    for step in range(16):
        of_step = [share.batch_at(step) for share in shares]
        assert len({share["token_ids"].shape for share in of_step}) == 1
        assert digest(joined(*of_step)) == digest(loader.batch_at(step))


def test_text_slots_must_name_every_kind_that_is_taken(load, kinds):
    with pytest.raises(InputError, match=r"text_slots .* name no slots for short captions"):
        load(kinds, policy=CaptionPolicy(kinds={"long": 1.0, "short": 1.0}), text_slots={"long": 8})
    with pytest.raises(InputError, match="must be 1 or more"):
        load(kinds, policy=CaptionPolicy(kinds={"short": 1.0}), text_slots={"short": 0})
    # Kinds that the data has not need none.
    load(kinds, text_slots={"long": 8, "short": 4})


def test_a_policy_reaches_the_texts(load, kinds):
    policy = CaptionPolicy(
        kinds={"short": 1.0}, dropout=0.5, dropout_keeps_system_prompt=True, system_prompt="base"
    )
    texts = {text for k in range(8) for text in load(kinds, policy=policy).batch_at(k)["captions"]}
    assert prefixed("", "base") in texts
    assert prefixed("s3", "base") in texts
    assert "" not in texts


def test_without_text_slots_the_captions_of_a_batch_are_of_several_kinds(load, kinds):
    policy = CaptionPolicy(kinds={"long": 1.0, "short": 1.0}, dropout=0.0)
    loader = load(kinds, policy=policy)
    mixed = 0
    for step in range(20):
        batch = loader.batch_at(step)
        both = [int(record_id[1:]) < 12 for record_id in batch["ids"]]  # have a choice
        found = {text[0] for text in itertools.compress(batch["captions"], both)}
        mixed += found == {"l", "s"}
    assert mixed > 10


@pytest.mark.parametrize(("damaged", "following"), [("c", "d"), ("f", "a")])
def test_the_record_after_a_damaged_one_takes_its_place(load, tmp_path, damaged, following):
    make_dataset(tmp_path / "d", [picture(name) for name in "abcdef"])
    sound = load(tmp_path / "d", batch_size=6).batch_at(0)
    damage(tmp_path / "d", {damaged})
    batch = load(tmp_path / "d", batch_size=6).batch_at(0)
    assert sorted(sound["ids"]) == list("abcdef")
    places = [
        list(sound["ids"]).index(following if name == damaged else name) for name in sound["ids"]
    ]
    np.testing.assert_array_equal(batch["ids"], sound["ids"][places])
    np.testing.assert_array_equal(batch["images"], sound["images"][places])


def test_equally_many_records_are_in_another_order_in_each_data_set_and_bucket(load, tmp_path):
    sizes = {Bucket(32, 32): (40, 40), Bucket(40, 24): (50, 30)}
    for name in "ab":
        items = [
            picture(f"{name}{12 * number + n}", size)
            for number, size in enumerate(sizes.values())
            for n in range(12)
        ]
        make_dataset(tmp_path / name, items, tuple(sizes), keep_duplicates=True)
    orders = []
    for bucket in sizes:
        loader = load(tmp_path / "a", tmp_path / "b", buckets=[bucket], batch_size=24)
        ids = loader.batch_at(0)["ids"]
        orders += [[int(i[1:]) % 12 for i in ids if i[0] == name] for name in "ab"]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len(set(map(tuple, orders))) == 4


def held_out_ids(loader, batch_size=4):
    found = {}
    for batch in loader.held_out_batches(batch_size):
        found |= {
            n: i for n, i in zip(batch["index"].tolist(), batch["ids"], strict=True) if n >= 0
        }
    return found


def test_what_is_held_out_is_never_trained_on(load):
    loader = load(held_out=7)
    held_out = held_out_ids(loader)
    assert sorted(held_out) == list(range(7))
    assert len(set(held_out.values())) == 7
    trained = {id for step in range(40) for id in loader.batch_at(step)["ids"]}
    assert not trained & set(held_out.values())
    assert len(trained) == 24 - 7


def test_held_out_records_and_their_captions_depend_on_nothing_but_the_data(load):
    def rows(*loaders, batch_size):
        found = {}
        for shares in zip(
            *(loader.held_out_batches(batch_size) for loader in loaders), strict=True
        ):
            assert len({share["images"].shape for share in shares}) == 1
            for share in shares:
                for row, number in enumerate(share["index"].tolist()):
                    content = (
                        share["ids"][row],
                        share["captions"][row],
                        share["images"][row].sum(),
                    )
                    if number >= 0:
                        assert content[1]  # no caption is dropped
                        assert number not in found
                        found[number] = content
                    else:
                        assert content == ("", "", 0)
        return found

    policy = CaptionPolicy(dropout=0.9)
    alone = rows(load(held_out=10, policy=policy), batch_size=3)
    assert len(alone) == 10
    together = [
        load(held_out=10, policy=policy, seed=5, process_index=index, process_count=4)
        for index in range(4)
    ]
    assert rows(*together, batch_size=8) == alone
    assert rows(*together, batch_size=8) == alone


def test_the_fingerprint_says_what_is_held_out(load):
    found = {load(held_out=num).fingerprint for num in (0, 1, 2)}
    assert len(found) == 3
    assert load().fingerprint == load().manifests[0].fingerprint


def test_a_damaged_record_that_is_held_out_is_left_out(tmp_path, load):
    make_dataset(tmp_path, [picture(f"{n}") for n in range(6)], keep_duplicates=True)
    damage(tmp_path, [held_out_ids(load(tmp_path, held_out=3))[1]])
    assert sorted(held_out_ids(load(tmp_path, held_out=3))) == [0, 2]


def test_a_record_of_each_bucket_is_left_to_train_on(load):
    with pytest.raises(
        InputError, match=r"22 records cannot be held out of 24 in 3 bucket.*0 to 21"
    ):
        load(held_out=22)
    assert len(held_out_ids(load(held_out=24, trains=False))) == 24


def test_held_out_texts_have_the_most_slots_of_any_kind(load):
    def tokenize(texts, slots):
        return np.ones((len(texts), slots), np.int32), np.ones((len(texts), slots), bool)

    slots = {"long": 3, "medium": 9, "short": 5, "tags": 4}
    loader = load(held_out=5, text_slots=slots, tokenize=tokenize)
    assert {b["token_mask"].shape for b in loader.held_out_batches(2)} == {(2, 9)}


def test_a_record_with_a_sound_picture_and_damaged_captions_is_replaced(load, tmp_path):
    """It was decoded, and then ended the run where its caption was chosen."""
    make_emojis(tmp_path / "d", "🐶🐱🍎🍋")
    manifest = Manifest.load(tmp_path / "d")
    (shard,) = manifest.splits[0].shards
    path = tmp_path / "d" / shard.name
    found = list(records.read_shard(path, range(shard.num_records)))
    with records.shard_writer(path) as write:
        for content in found:
            write(content.replace(b"short", b"shor\xff") if b"1F436" in content else content)
    loader = load(tmp_path / "d")
    ids = {name for step in range(4) for name in loader.batch_at(step)["ids"]}
    assert ids == {"1F431", "1F34E", "1F34B"}
    assert loader.num_replaced == 8
