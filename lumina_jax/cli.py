"""What every command shares: its start, and how it ends when the input is wrong."""

import difflib
import re
import sys
from collections.abc import Callable

from absl import app, flags, logging

from lumina_jax.errors import InputError


def run(main: Callable[[], int | None], *, required: tuple[str, ...] = ()) -> None:
    """Parses flags, then runs `main`; wrong input ends in one line and status 2, no traceback."""

    def guarded(argv):
        logging.set_verbosity(logging.INFO)
        logging.use_absl_handler()
        try:
            if argv[1:]:
                raise InputError(f"Unknown argument {argv[1]!r}: every argument is a --flag.")
            missing = [name for name in required if flags.FLAGS[name].value in (None, [])]
            if missing:
                raise InputError(
                    f"Missing --{', --'.join(missing)}. `--help` shows an example."
                )
            return main()
        except InputError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        names = difflib.get_close_matches(error.flagname, list(flags.FLAGS), n=1)
        hint = f" Did you mean --{names[0]}?" if names else " `--help` lists the flags."
        _fail(f"Unknown flag --{error.flagname}.{hint}")
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # ml_collections raises what it likes for an unknown key or a value of the wrong type.
        _fail(" ".join(re.sub(r"^['\"]|['\"]$", "", str(error)).split()))


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
