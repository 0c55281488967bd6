"""The flags that say where pictures come from, of every command that reads some."""

from absl import flags

from lumina_jax.data.sources import KINDS, make_source
from lumina_jax.data.sources.base import Source
from lumina_jax.data.sources.openmoji import OpenMojiSource
from lumina_jax.errors import InputError

flags.disclaim_key_flags()  # they belong to the command, whose --help shows them

SOURCES = ("openmoji", *KINDS)


def define(*, captions: bool) -> None:
    """Defines the flags.

    Args:
        captions: whether those that say which captions the source has are among them.
    """
    flags.DEFINE_string("input", None, "Where the pictures are: a path or URL, see above.")
    flags.DEFINE_string("root", None, "json, parquet: where relative picture paths begin.")
    flags.DEFINE_string("image", None, "parquet: the column of pictures, or of their paths.")
    flags.DEFINE_string("split", None, "tfds: the split to read.")
    flags.DEFINE_string("emojis", "all", "openmoji: the characters to draw, or all.")
    if captions:
        flags.DEFINE_list(
            "captions",
            None,
            "Where captions are, as key:kind:language. Default: keys of well-known names.",
        )
        flags.DEFINE_string("kind", None, "Of captions that do not say: long, medium, short, tags.")
        flags.DEFINE_string("language", None, "Of captions that do not say; en by default.")
        flags.DEFINE_bool(
            "describe", False, "openmoji: long, medium and tag captions too, of what is measured."
        )
        flags.DEFINE_string("license", None, "Of the pictures, for the manifest.")
        flags.DEFINE_string("attribution", None, "What has to be said with the pictures.")


def make(kind: str, resolution: int, *, needs_captions: bool = True) -> Source:
    """Returns the source that the flags describe.

    Args:
        kind: of the source.
        resolution: of drawings, in pixels.
        needs_captions: whether a picture without one is rejected.
    """
    names = ("root", "image", "split", "captions", "kind", "language", "license", "attribution")
    given = {name: flags.FLAGS[name].value for name in names if name in flags.FLAGS}
    options = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
        if value is not None
    }
    path, emojis = flags.FLAGS.input, flags.FLAGS.emojis
    describe = "describe" in flags.FLAGS and flags.FLAGS.describe
    if kind == "openmoji":
        if options or path:
            extra = ", ".join(f"--{name}" for name in (*options, *(["input"] if path else [])))
            raise InputError(f"The source openmoji takes no {extra}; it has --emojis.")
        return OpenMojiSource(emojis, resolution, describe)
    for name, given in (("emojis", emojis != "all"), ("describe", describe)):
        if given:
            raise InputError(f"--{name} is of the source openmoji, not of {kind}.")
    if not path:
        raise InputError(f"Missing --input, where the {kind} source is. `--help` shows an example.")
    if not needs_captions:
        options["needs_captions"] = False
    return make_source(kind, path, **options)
