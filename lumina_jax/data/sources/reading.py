"""Finding and reading the files of a source, wherever fsspec reaches.

A fault of one picture, such as a missing file, is `Rejected` and costs that picture. A fault of the
store (no network, no permission) is raised as it is: the task fails instead of losing pictures that
are there, and the same command given again goes on with it.
"""

import errno
import itertools
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lumina_jax.data.images import Rejected
from lumina_jax.errors import InputError, causes

MAX_BYTES = 2**28  # of one picture or caption file; what is larger was not meant to be one
_WILD = re.compile(r"[*?\[{]")
_BRACES = re.compile(r"\{([^{}]*)\}")
# What stands before the host of a URL, and values behind ? and & whose names say what they are.
_USER = re.compile(r"(\w://)[^\s/@]+@")
_SIGNATURE = re.compile(
    r"([?&][\w.%-]*(?:sig|token|secret|password|passwd|credential|api-?_?key|accesskey\w*)[\w.%-]*=)"
    r"[^&\s]+",
    re.IGNORECASE,
)
_NUM_LOOKUPS = 32  # at the same time, since a store answers each after tens of milliseconds
# Of a path that names no file, whatever is tried again; "" and a caption in the place of a path are
# such too.
_NO_FILE = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


def open_filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns the filesystem of a path or URL, and its name there."""
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise InputError(f"Cannot read {path}: {error}.") from error


def list_files(path: str, suffixes: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the files that a path stands for, and a short name of each, in the order of names.

    A path is a file, a folder, whose files with one of the suffixes are taken, or a pattern such as
    `gs://bucket/*/{00000..00031}.tar`. The short name is the file's place below the folder, or
    below the last folder of the pattern that is the same for all.
    """
    fs, root = open_filesystem(path)
    # In this order: asked whether it is a folder, the web would send the whole file.
    if fs.isfile(root):
        files, root = [root], root.rpartition("/")[0]
    elif fs.isdir(root):
        root = root.rstrip("/")
        found = [name for name in names_below(fs, root) if name.lower().endswith(tuple(suffixes))]
        files = [f"{root}/{name}" for name in found]
    else:
        patterns = expand_braces(root)
        root = "/".join(itertools.takewhile(_is_plain, root.split("/")[:-1]))
        plain = [pattern for pattern in patterns if _is_plain(pattern)]
        with ThreadPoolExecutor(_NUM_LOOKUPS) as pool:
            is_there = pool.map(fs.isfile, plain)
            missing = [file for file, there in zip(plain, is_there, strict=True) if not there]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise InputError(
                f"Not found: {', '.join(missing[:3])}{more}. Give a file, a folder or a pattern of "
                "files that are there."
            )
        files = plain + [f for p in patterns if not _is_plain(p) for f in fs.glob(p)]
    if not files:
        raise InputError(f"{path} holds no {' or '.join(suffixes)} file. Give another path.")
    names = sorted({file[len(root) + 1 :] for file in files})
    return [(url_of(fs, f"{root}/{name}"), name) for name in names]


def _is_plain(pattern: str) -> bool:
    return not _WILD.search(pattern)


def names_below(fs: fsspec.AbstractFileSystem, root: str) -> list[str]:
    """Returns every file of a folder, by its path in it, sorted; hidden ones are left out."""
    start = len(root.rstrip("/")) + 1
    found = _walk(root) if isinstance(fs, LocalFileSystem) else fs.find(root)
    names = (name[start:] for name in found)
    # Stores that know no folders keep empty files in their place, whose names end with a slash.
    return sorted(n for n in names if n and n[-1] != "/" and not f"/{n}".count("/."))


def _walk(root: str) -> Iterator[str]:
    """Yields every file, and links to folders; fsspec would pass over what it may not read."""

    def fail(error: OSError):
        raise InputError(
            f"{error.filename} cannot be read ({error.strerror}). Allow it, or give another folder."
        ) from error

    for folder, inner, files in os.walk(root, onerror=fail):
        links = (name for name in inner if os.path.islink(f"{folder}/{name}"))
        yield from (f"{folder}/{name}" for name in (*files, *links))


def url_of(fs: fsspec.AbstractFileSystem, name: str) -> str:
    return name if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(name)


def expand_braces(pattern: str) -> list[str]:
    """Returns what a shell makes of {a,b} and {000..031}; other braces stay."""
    match = next((m for m in _BRACES.finditer(pattern) if _choices(m[1])), None)
    if match is None:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    whole = [text for choice in _choices(match[1]) for text in expand_braces(head + choice + tail)]
    return list(dict.fromkeys(whole))


def _choices(inner: str) -> list[str]:
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
        first, last = numbers.groups()
        return [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    return inner.split(",") if "," in inner else []


def join(root: str, path: str) -> str:
    """Returns where a path as written is: itself when it is absolute or a URL, else below root."""
    return path if path.startswith("/") or "://" in path else f"{root.rstrip('/')}/{path}"


def read_file(path: str) -> bytes:
    """Returns the content of one file; raises Rejected when there is none."""
    try:
        fs, name = fsspec.core.url_to_fs(path)
        return read_from(fs, name)
    except ImportError as error:
        raise InputError(f"Cannot read {path}: {error}.") from error
    except ValueError as error:
        raise Rejected("bad path", f"{path}: {error}") from error
    except Exception as error:
        # What the web answers differs by server and library; links that are dead are its normal.
        if path.startswith(("http://", "https://")):
            chain = causes(error)
            gone = any(getattr(cause, "status", 0) in (404, 410) for cause in chain)
            reason = "not found" if gone else "unreachable"
            raise Rejected(reason, f"{path}: {chain[-1]!r}") from error
        raise


def read_from(fs: fsspec.AbstractFileSystem, name: str) -> bytes:
    """Returns the content of a file; raises Rejected when there is none, or none that ends."""
    try:
        if isinstance(fs, LocalFileSystem) and _is_endless(name):
            raise Rejected("not a file", f"{name} is a pipe, a socket or a device")
        with fs.open(name, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        if isinstance(error, FileNotFoundError) or error.errno in _NO_FILE:
            raise Rejected("not found", name) from error
        raise
    if len(content) > MAX_BYTES:
        raise Rejected("too large", f"{name} has more than {MAX_BYTES:,} bytes")
    return content


def _is_endless(name: str) -> bool:
    """Whether this is a pipe, which would be waited for, or a device, which goes on and on."""
    try:
        mode = os.stat(name).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def parse_object(content: bytes | str) -> dict[str, Any]:
    """Returns the JSON object that a text is; raises Rejected when it is none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Rejected("broken JSON", f"{error} in {short(content)}") from error
    if not isinstance(value, dict):
        raise Rejected("broken JSON", f"needed an object, got {short(value)}")
    return value


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def safe_id(name: str) -> str:
    """Returns a name that can be written, and shown to anybody.

    File names and JSON may hold what UTF-8 cannot, and URLs what opens their store.
    """
    return without_secrets(name).encode(errors="backslashreplace").decode()


def without_secrets(text: str) -> str:
    """Returns a text without the passwords, keys and signatures of the URLs in it."""
    text = _USER.sub(r"\1***@", text) if "@" in text else text
    return _SIGNATURE.sub(r"\1***", text) if "=" in text else text
