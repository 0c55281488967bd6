"""What hypothesis makes of a sound file: bytes changed anywhere, JSON with other values."""

import copy
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

# Numbers at the edges of what programs count with, names that lead elsewhere, wrong kinds.
_NUMBERS = (0, -1, 1, 2, 3, 255, 2**31, 2**32 - 1, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308)
_WORDS = ("", "../x", "/etc/passwd", "a/../../b", "\0", "x" * 5000, "\ud800", "NaN", "{}", "é猫")
_DEEP = "a value nested deeply"
_DEEP_JSON = "[" * 3000 + "]" * 3000

plain = st.one_of(
    st.sampled_from(_NUMBERS),
    st.sampled_from(_WORDS),
    st.sampled_from((None, True, False, float("nan"), float("inf"), _DEEP)),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
)
values = st.one_of(
    plain,
    st.lists(plain, max_size=4),
    st.dictionaries(st.text(max_size=8), plain, max_size=3),
)

_KINDS = ("flip", "set", "insert", "delete", "cut", "repeat", "copy", "zeros")
_EDIT = st.tuples(
    st.sampled_from(_KINDS), st.floats(0, 1), st.integers(0, 64), st.binary(min_size=1, max_size=8)
)
_EDITS = st.lists(_EDIT, max_size=6)
# Which of the values, what to do with it, and what with.
_JSON_EDITS = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(("set", "set", "delete", "rename")), values),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits: Sequence[tuple[str, float, int, bytes]]) -> bytes:
    """`content` after edits; a place is a part of its length."""
    found = bytearray(content)
    for kind, part, size, data in edits:
        at = min(int(part * len(found)), max(len(found) - 1, 0))
        match kind:
            case "flip" if found:
                found[at] ^= data[0] or 1
            case "set":
                found[at : at + len(data)] = data
            case "insert":
                found[at:at] = data
            case "delete":
                del found[at : at + size]
            case "cut":
                del found[at:]
            case "repeat":
                found[at:at] = found[at : at + size] * 3
            case "copy":
                found[at : at + size] = found[:size]
            case "zeros":
                found[at : at + size] = bytes(min(size, len(found) - at))
    return bytes(found)


def files(seeds: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """One of the seeds after edits, or bytes of no kind."""
    damaged = st.builds(edited, st.sampled_from(seeds), _EDITS)
    return st.one_of(damaged, damaged, damaged, st.binary(max_size=200))


def json_files(seeds: Sequence[Any]) -> st.SearchStrategy[bytes]:
    """One of the objects after other values were put into it, as a file that may be damaged."""
    changed = st.builds(_change, st.sampled_from(seeds), _JSON_EDITS)
    return st.one_of(changed, changed, changed, st.builds(edited, changed, _EDITS))


def _change(seed: Any, edits: Sequence[tuple[int, str, Any]]) -> bytes:
    found = [copy.deepcopy(seed)]
    for number, kind, value in edits:
        places = list(_places(found))
        parent, key = places[number % len(places)]
        if kind == "set" or parent is found:
            parent[key] = copy.deepcopy(value)
        else:
            there = parent.pop(key)
            if kind == "rename" and isinstance(parent, dict):
                parent[str(value)[:20]] = there
    return json.dumps(found[0]).replace(f'"{_DEEP}"', _DEEP_JSON).encode()


def _places(tree: Any):
    """Every value of nested lists and dicts, as what holds it and where."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)
