"""What is measured of captions, on captions of which it is known."""

import collections

import numpy as np
import pytest

from lumina_jax.data import caption_table
from lumina_jax.data.caption_table import Excluded, Piece, Row, Written
from lumina_jax.errors import InputError
from lumina_jax.unicap import statistics
from lumina_jax.unicap.statistics import measure, words_of


def row(id: str, *texts: str, kind: str = "short", language: str = "en") -> Row:
    return Row(id, tuple(Written(text, kind, language, "model", "1", 0) for text in texts))


def write_table(directory, sizes: dict[Piece, int], words: int = 10) -> None:
    """Pieces of so many rows, whose texts are random and so of nearly equal bytes."""
    draw = np.random.default_rng(0)
    for piece, size in sizes.items():
        rows = [
            row(f"{piece.part}/{piece.number}/{number}", draw.bytes(words * 4).hex())
            for number in range(size)
        ]
        caption_table.write_rows(directory, piece, rows)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The cat's black-and-white fur, 3 m!", "the|cat's|black-and-white|fur|3|m"),
        ("snake_case – and -dashes-", "snake|case|and|dashes"),
        ("一只猫，two dogs", "一|只|猫|two|dogs"),
        ("東京タワー", "東|京|タ|ワ|ー"),
        ("고양이 두 마리", "고양이|두|마리"),
        ("हिन्दी में बिल्ली", "हिन्दी|में|बिल्ली"),  # with a mark in every word
        ("می\u200cخواهم گربه", "می\u200cخواهم|گربه"),
        ("Straße ÉTÉ", "strasse|été"),
        ("... — 🐶", ""),
    ],
)
def test_words_are_told_apart_in_any_script(text, words):
    assert words_of(text) == [word for word in words.split("|") if word]


def test_lengths_are_those_of_all_captions_of_a_kind_and_language():
    rows = [row(str(number), "a " * number + "b") for number in range(1, 101)]
    rows.append(row("zh", "一只小猫", language="zh"))
    english, chinese = measure(rows).captions
    assert (english.kind, english.language, english.number) == ("short", "en", 100)
    assert english.words.mean == 51.5
    assert english.words.quantiles == (6, 51, 96)
    assert english.characters.mean == 102
    assert english.characters.quantiles == (11, 101, 191)
    assert chinese.words == chinese.characters
    assert chinese.words.mean == 4
    assert english.tokens is english.over is None


def test_captions_with_more_tokens_than_the_text_encoder_reads_are_counted():
    def count_words(texts):
        return np.array([len(text.split()) for text in texts])

    rows = [row("a", "one two", "one two three"), row("b", "one two three four")]
    (captions,) = measure(rows, count_words, 3).captions
    assert captions.tokens.mean == 3
    assert captions.over == pytest.approx(1 / 3)  # exactly the limit is not over it


def test_the_vocabulary_is_counted_once_for_each_word():
    rows = [row("a", "A red cat"), row("b", "a red dog"), row("c", "A red, red bird")]
    (captions,) = measure(rows).captions
    assert captions.num_words == 10
    assert captions.num_distinct == 5  # a, red, cat, dog, bird
    assert captions.num_once == 3
    assert captions.growth[0] == (3, 3)
    assert captions.growth[-1] == (10, 5)


def test_a_captioner_that_always_begins_alike_is_seen():
    rows = [row(str(n), f"The image shows {n} cats", kind="long") for n in range(8)]
    rows += [row(str(n), f"{n} cats sleep", kind="long") for n in range(2)]
    rows += [row(f"zh{n}", f"这张图里有{n}只猫", language="zh", kind="long") for n in range(4)]
    english, chinese = measure(rows).captions
    (opening,) = english.openings
    assert (opening.text, opening.number) == ("the image shows", 8)
    (opening,) = chinese.openings
    assert (opening.text, opening.number) == ("这张图", 4)
    table = next(t for t in statistics.tables(measure(rows)) if t.title == "Openings")
    assert table.rows == (
        ("long", "zh", "这张图 …", "4", "100.0%"),
        ("long", "en", "the image shows …", "8", "80.0%"),
    )
    assert table.languages == ("zh", "en")


def test_repeats_are_captions_that_another_picture_has():
    rows = [
        row("a", "A cat.", "A cat"),  # the same picture says it twice
        row("b", "a  cat"),
        row("c", "Ａ cat!"),
        row("d", "A dog"),
        row("e", "A cat", kind="long"),
        row("d", "A dog"),  # the same picture again
    ]
    _, short = (found := measure(rows)).captions
    assert short.kind == "short"
    assert short.repeats == 2
    (repeated,) = found.repeated
    assert (repeated.text, repeated.number) == ("a cat", 3)


def test_what_was_excluded_is_counted_by_fault_and_kind():
    rows = [
        Row("a", (), (Excluded("long", "en", "loop", "first", "x"),)),
        Row("b", (), tuple(Excluded(k, "en", "loop", "", "x") for k in ("long", "short"))),
        Row("c", (), (Excluded("tags", "zh", "refusal", "sorry", "x"),)),
        Row("d", fault=("truncated", "JPEG")),
        row("e", "A cat"),
    ]
    found = measure(rows)
    assert (found.num_rows, found.num_captioned) == (5, 1)
    assert found.excluded == (
        ("loop", collections.Counter(long=2, short=1), "first"),
        ("refusal", collections.Counter(tags=1), "sorry"),
    )
    assert found.faults == (("truncated", 1, "d: JPEG"),)
    tables = {table.title: table for table in statistics.tables(found)}
    assert tables["Excluded captions"].columns[2:] == ("long", "short", "tags")
    assert tables["Excluded captions"].rows == (
        ("loop", "first", "2", "1", "0"),
        ("refusal", "sorry", "0", "0", "1"),
    )


def test_levels_come_in_their_order_and_languages_by_number():
    rows = [
        row("a", "x", kind="tags", language="de"),
        row("b", "x", "y", kind="long", language="fr"),
        row("c", "x", kind="tags", language="ar"),
    ]
    found = measure(rows)
    assert (found.kinds, found.languages) == (("long", "tags"), ("fr", "ar", "de"))
    captions = statistics.tables(found)[0]
    assert captions.columns == ("captions", "fr", "ar", "de", "all")
    assert captions.rows == (("long", "2", "0", "0", "2"), ("tags", "0", "1", "1", "2"))


def test_nothing_gives_no_tables():
    assert statistics.tables(measure([])) == []
    assert measure([Row("a")]).num_rows == 1


def test_pieces_are_chosen_at_even_distances_and_make_about_so_many_rows(tmp_path):
    sizes = {Piece(part, number): 16 for part in range(10) for number in range(10)}
    write_table(tmp_path, sizes)
    chosen, num_pieces = statistics.choose_pieces(tmp_path, 320)
    assert num_pieces == 100
    places = [10 * piece.part + piece.number for piece in chosen]
    assert abs(len(chosen) - 20) <= 1
    assert set(np.diff(places)) <= {4, 5, 6}
    assert places[0] <= 3
    assert places[-1] >= 97
    assert statistics.choose_pieces(tmp_path, 10_000)[0] == sorted(sizes)
    assert len(statistics.choose_pieces(tmp_path, 1)[0]) == 1


def test_small_pieces_do_not_mislead_the_choice(tmp_path):
    sizes = {Piece(part, number): (64, 1)[number] for part in range(20) for number in range(2)}
    write_table(tmp_path, sizes, words=100)
    chosen, _ = statistics.choose_pieces(tmp_path, 650)  # half of what is there
    assert 18 <= len(chosen) <= 22


def test_rows_are_read_with_their_places(tmp_path):
    write_table(tmp_path, {Piece(0, 0): 2, Piece(3, 1): 1})
    found = list(statistics.read(tmp_path, caption_table.pieces(tmp_path)))
    assert [(*place.piece, place.row) for place, _ in found] == [(0, 0, 0), (0, 0, 1), (3, 1, 0)]
    assert [row.id for _, row in found] == ["0/0/0", "0/0/1", "3/1/0"]


def test_a_table_without_rows_and_a_sample_without_rows_are_refused(tmp_path):
    with pytest.raises(InputError, match="has no captions yet"):
        statistics.choose_pieces(tmp_path, 1)
    with pytest.raises(InputError, match="num_rows=0 reads nothing"):
        statistics.choose_pieces(tmp_path, 0)


def test_numbers_are_taken_at_even_distances():
    assert statistics.evenly(10, 5) == [1, 3, 5, 7, 9]
    assert statistics.evenly(3, 100) == [0, 1, 2]
    assert statistics.evenly(7, 0) == [3]
