"""Where raw pictures come from: one module for each kind of source, and the table of them."""

import dataclasses
import importlib
from typing import Any

from lumina_jax.data.sources.base import Source
from lumina_jax.errors import InputError

# Modules are imported when they are asked for: a kind that is not used needs none of its packages.
KINDS = {
    "folder": "folder.FolderSource",
    "json": "json_lines.JsonSource",
    "parquet": "parquet.ParquetSource",
    "tfds": "tfds.TfdsSource",
    "webdataset": "webdataset.WebDatasetSource",
}


def make_source(kind: str, path: str, /, **options: Any) -> Source:
    """The source that a command names; the options are the fields of its dataclass."""
    if kind not in KINDS:
        raise InputError(f"No source is called {kind!r}; choose one of: {', '.join(KINDS)}.")
    module, name = KINDS[kind].split(".")
    source = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    fields = [field.name for field in dataclasses.fields(source) if field.name != "path"]
    if unknown := sorted(set(options) - set(fields)):
        raise InputError(
            f"A source of kind {kind} has no option {', '.join(unknown)}; it has "
            f"{', '.join(fields)}."
        )
    return source(path, **options)
