"""Entry of the command line: exit status, errors, interruption. The commands: commands.py."""

import json
import os
import signal
import sys
import traceback
from types import FrameType

from ..ir.errors import KvantError
from .extras import need

REFUSED, BUG, INTERRUPTED = 1, 70, 130
# Bars and chatter of the libraries: our own spinner says what goes on.
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: status 0, 1 refused, 2 usage, 70 our bug."""
    arguments = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in arguments
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        need("typer", "rich", "pydantic")
        from .commands import app

        app(args=arguments, prog_name="kvant")
    except KvantError as error:
        _report(error, as_json)
        sys.exit(REFUSED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        _report(_our_bug(error), as_json)
        traceback.print_exc()
        sys.exit(BUG)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Unwind, so that temporary files are removed, as for Ctrl-C."""
    sys.exit(128 + number)


def _our_bug(error: Exception) -> KvantError:
    text = str(error).splitlines()
    return KvantError(
        "internal-error",
        f"this is a bug in kvant: {type(error).__name__}: {text[0] if text else 'no message'}",
        where="the lines that follow, on stderr",
        fix="please report them with the command you ran",
    )


def _report(error: KvantError, as_json: bool) -> None:
    """Print an error: as one JSON object on stdout, or for people on stderr."""
    if as_json:
        fields = {key: getattr(error, key) for key in ("code", "what", "where", "fix")}
        print(json.dumps({"error": fields}, indent=2, sort_keys=True))
        return
    name = "\033[1;31mkvant:\033[0m" if sys.stderr.isatty() else "kvant:"
    print(f"{name} {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
