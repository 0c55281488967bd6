"""What every command shares: its start, and how it ends when the input is wrong."""

import difflib
import re
import sys
from collections.abc import Callable

from absl import app, flags, logging

from lumina_jax.errors import InputError


def run(
    main: Callable[..., int | None],
    *,
    required: tuple[str, ...] = (),
    commands: tuple[str, ...] = (),
) -> None:
    """Parses flags, then runs `main`; wrong input ends in one line and status 2, no traceback.

    Args:
      main: Called without arguments, or with the chosen command where there are `commands`.
      required: Flags that must be given.
      commands: What the one word before or between the flags can be.
    """

    def guarded(argv):
        logging.set_verbosity(logging.INFO)
        logging.use_absl_handler()
        # Libraries speak of every file they open; only what they warn of is for the user.
        logging.get_absl_handler().addFilter(
            lambda record: record.levelno > 20 or "lumina_jax" in record.pathname
        )
        try:
            words = argv[1:]
            if len(words) != bool(commands) or not set(words) <= set(commands):
                needed = f"name one of {', '.join(commands)}" if commands else "only --flags"
                raise InputError(
                    f"Got the argument(s) {' '.join(words) or 'none'}; needed: {needed}. "
                    f"`--help` shows an example."
                )
            missing = [name for name in required if flags.FLAGS[name].value in (None, [])]
            if missing:
                raise InputError(
                    f"Missing --{', --'.join(missing)}. `--help` shows an example."
                )
            return main(*words)
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
