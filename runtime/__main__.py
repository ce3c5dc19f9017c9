"""python -m kvant.runtime verify|show ARTIFACT: an artifact checked without any compiler."""

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from ..ir.errors import KvantError

OK, REFUSED, USAGE, BUG, INTERRUPTED = 0, 1, 2, 70, 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kvant.runtime",
        description="Check or show an artifact with the runtime alone. An artifact is native "
        "code: verify only what you built or pinned.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="verify|show")
    for name, text in (
        ("verify", "hashes, compatibility, and every kernel against the reference"),
        ("show", "what the artifact is made of"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("artifact", metavar="ARTIFACT", help="a folder made by kvant compile")
        command.add_argument("--json", action="store_true", help="print one JSON document")
        command.add_argument("--id", help="refuse any other artifact than this one")
        if name == "verify":
            command.add_argument("--target", "-t", default="auto", help="auto, cpu, reference, ...")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 refused, 2 usage, 70 our bug."""
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as usage:
        return usage.code if isinstance(usage.code, int) else USAGE
    try:
        _print(_run(options), options.json)
    except KvantError as error:
        _print_error(error, options.json)
        return REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        traceback.print_exc()
        _print_error(_our_bug(error), options.json)
        return BUG
    return OK


def _run(options: argparse.Namespace) -> dict[str, Any]:
    if options.command == "verify":
        from .verify import verify

        return verify(options.artifact, options.target, options.id)
    from .artifact import load

    return load(options.artifact, "reference", options.id).show()


def _our_bug(error: Exception) -> KvantError:
    return KvantError(
        "internal-error",
        f"this is a bug in kvant: {type(error).__name__}",
        where="the lines on stderr",
        fix="please report them with the command you ran",
    )


def _print(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=2, sort_keys=True))
        return
    for key, value in facts.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            print(f"{key}:")
            for row in value:
                print("  " + "  ".join(str(cell) for cell in row.values()))
        elif isinstance(value, dict):
            for name, text in value.items():
                print(f"{key:<24} {name}: {text}")
        else:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            print(f"{key:<24} {text}")


def _print_error(error: KvantError, as_json: bool) -> None:
    if as_json:
        fields = {key: getattr(error, key) for key in ("code", "what", "where", "fix")}
        print(json.dumps({"error": fields}, indent=2, sort_keys=True))
    else:
        print(f"kvant: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
