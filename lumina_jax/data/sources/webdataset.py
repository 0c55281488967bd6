"""WebDataset: tar files whose members `key.jpg`, `key.txt`, `key.json` make one sample.

The key is the path up to the first dot of the file name, and the members of a sample follow one
another, as https://github.com/webdataset/webdataset writes them. Archives are streamed: nothing is
unpacked, and one sample is in memory at a time.
"""

import dataclasses
import lzma
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from lumina_jax.data.images import Rejected
from lumina_jax.data.sources.base import Item, Part
from lumina_jax.data.sources.metadata import (
    PICTURE_SUFFIXES,
    CaptionedSource,
    faulty,
    make_item,
)
from lumina_jax.data.sources.reading import MAX_BYTES, list_files, open_filesystem

_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_MAX_NAME = 2**20  # bytes of what stands before a member: a long name, other attributes
_NAME_HEADERS = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
_NO_END = "no end mark"
# Of tarfile, and of gzip, bzip2 and xz below it, which pass some of theirs on.
# TypeError is of a header of gzip that ends too soon.
_DAMAGE = (
    tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, OverflowError, TypeError
)  # fmt: skip
_CUT = (_NO_END, "unexpected end of data")  # the second is tarfile's


@dataclasses.dataclass(frozen=True)
class WebDatasetSource(CaptionedSource):
    """Pictures in tar files. The id of one is `<archive>/<key>`.

    A text member is one caption, also when it has several lines. Members that are neither picture,
    text nor JSON are passed over.
    """

    name: ClassVar[str] = "webdataset"

    def parts(self) -> list[Part]:
        return [Part(path, names=(name,)) for path, name in list_files(self.path, _SUFFIXES)]

    def read(self, part: Part) -> Iterator[Item]:
        """What can be read of a damaged archive comes first, and then an item with the fault."""
        fs, file = open_filesystem(part.path)
        (archive,) = part.names
        fault = None
        sample: dict[str, bytes | Rejected | None] = {}
        sample_key = ""
        with fs.open(file, "rb") as stream:
            try:
                for key, suffix, content in self._members(stream):
                    if sample and (key != sample_key or suffix in sample):
                        yield self._item(f"{archive}/{sample_key}", sample)
                        sample = {}
                    sample_key = key
                    if _size(content) + sum(map(_size, sample.values())) > MAX_BYTES:
                        content = Rejected("too large", f"{key} has more than {MAX_BYTES:,} bytes")
                    sample[suffix] = content
            except _DAMAGE as error:
                kind = "truncated" if str(error) in _CUT else "damaged"
                fault = Rejected(f"{kind} archive", str(error))
        if sample:
            yield self._item(f"{archive}/{sample_key}", sample)
        if fault:
            yield faulty(archive, fault)

    def _item(self, name: str, sample: Mapping[str, bytes | Rejected | None]) -> Item:
        """Returns a sample, given the contents of its members by suffix."""
        pictures = [suffix for suffix in sample if suffix in PICTURE_SUFFIXES]
        try:
            if len(pictures) != 1:
                reason = "several pictures" if pictures else "no picture"
                raise Rejected(reason, f"members: {', '.join(sample)}"[:200])
            beside = []
            for suffix, content in sample.items():
                if isinstance(content, Rejected):
                    raise content
                if content is not None and suffix != pictures[0]:
                    beside.append((suffix, content))
            captions, metadata = self.read_beside(beside, split_lines=False)
            return make_item(name, sample[pictures[0]], captions, metadata)
        except Rejected as fault:
            return faulty(name, fault)

    def _members(self, stream: Any) -> Iterator[tuple[str, str, bytes | Rejected | None]]:
        """Yields the key, the suffix and the content of every file; None where it is not needed."""
        with tarfile.open(
            fileobj=stream, mode="r|*", bufsize=2**20, ignore_zeros=True, tarinfo=_Header
        ) as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # else it would remember all of them
                folder, slash, base = member.name.removeprefix("./").rpartition("/")
                stem, _, suffix = base.partition(".")
                suffix = suffix.lower()
                if member.isdir() or not stem:
                    continue  # the names of hidden files begin with a dot
                content = None
                if suffix == "json" or suffix in PICTURE_SUFFIXES or self.text_file(suffix):
                    if not member.isreg():
                        content = Rejected("not a file", f"{member.name} is a link or a device")
                    elif member.size > MAX_BYTES:
                        content = Rejected("too large", f"{member.name}: {member.size:,} bytes")
                    else:
                        content = archive.extractfile(member).read()
                yield folder + slash + stem, suffix, content


def _size(content: bytes | Rejected | None) -> int:
    return len(content) if isinstance(content, bytes) else 0


class _Header(tarfile.TarInfo):
    """The header of a member. One that is damaged or missing is an error.

    Python itself takes it for the end of the archive, and the rest would be lost in silence. A
    block of zeros is the end; after it there may be another archive (`cat a.tar b.tar`).
    """

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        """Refuses a name that is longer than a name can be: tarfile reads it at once."""
        header = super().frombuf(buf, encoding, errors)
        if header.type in _NAME_HEADERS and header.size > _MAX_NAME:
            raise tarfile.InvalidHeaderError(f"a header of {header.size:,} bytes")
        return header

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            header = super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            archive.is_ended = True
            raise
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError) as error:
            if isinstance(error, tarfile.EmptyHeaderError) and getattr(archive, "is_ended", False):
                raise
            raise tarfile.ReadError(_NO_END) from error
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error
        archive.is_ended = False
        return header
