"""What every command shares: its start, and how it ends when the input is wrong."""

import difflib
import pathlib
import sys
from collections.abc import Callable

from absl import app, flags, logging

from lumina_jax import distributed, overrides
from lumina_jax.errors import INTERRUPTED, InputError

_PACKAGE = str(pathlib.Path(__file__).parent)


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
            lambda record: record.levelno > 20 or record.pathname.startswith(_PACKAGE)
        )
        try:
            words = argv[1:]
            if len(words) != bool(commands) or not set(words) <= set(commands):
                needed = f"name one of {', '.join(commands)}" if commands else "only --flags"
                raise InputError(
                    f"Got the argument(s) {' '.join(words) or 'none'}; needed: {needed}. "
                    f"`--help` shows an example."
                )
            missing = [name for name in required if flags.FLAGS[name].value in (None, [], "")]
            if missing:
                raise InputError(f"Missing --{', --'.join(missing)}. `--help` shows an example.")
            _check_config()
            return main(*words)
        except InputError as error:
            _fail(str(error), one_line=False, status=error.status)
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr, flush=True)
            distributed.fail(INTERRUPTED, "interrupted.")
            sys.exit(INTERRUPTED)
        except Exception as error:
            if distributed.peers() is not None:
                logging.exception("Not an error that was foreseen:")
                distributed.fail(1, f"{type(error).__name__}: {error}", error)
            raise

    app.run(guarded, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except SystemExit:  # absl has shown the help that was asked for, and calls that a failure
        sys.exit(0)
    except flags.UnrecognizedFlagError as error:
        names = difflib.get_close_matches(error.flagname, list(flags.FLAGS), n=1)
        hint = f" Did you mean --{names[0]}?" if names else " `--help` lists the flags."
        _fail(f"Unknown flag --{error.flagname}.{hint}")
    except Exception as error:
        # ml_collections raises what it likes for an unknown key or a value of the wrong type.
        _fail(str(error.args[0] if error.args else error))


def _check_config() -> None:
    """A config file that cannot be read is told when it is first used; use it now."""
    if "config" in flags.FLAGS and flags.FLAGS.config is not None:
        try:
            flags.FLAGS.config.to_dict()
        except OSError as error:
            raise InputError(f"--config: {' '.join(str(error).split())}") from None
        overrides.check(flags.FLAGS["config"])


def _fail(message: str, one_line: bool = True, status: int = InputError.status) -> None:
    # Messages of other libraries are broken anywhere; ours where a list begins.
    print("error:", " ".join(message.split()) if one_line else message, file=sys.stderr, flush=True)
    distributed.fail(status, message)
    sys.exit(status)
