"""`python -m fastserve.worker.model.prepare MODEL`: print the folder to serve MODEL from."""

from __future__ import annotations

import argparse
import sys

from fastserve.worker.model.errors import ModelError
from fastserve.worker.model.files import DEFAULT_MODEL, prepare


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="fastserve-prepare",
        description="Check a model, convert it if it is a GGUF file, and print its folder.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        default=DEFAULT_MODEL,
        help=f"a Hugging Face folder, a .gguf file or {DEFAULT_MODEL} (default)",
    )
    arguments = parser.parse_args()
    try:
        folder = prepare(arguments.model, progress=lambda line: print(line, file=sys.stderr))
    except ModelError as error:
        print(error, file=sys.stderr)
        return 2
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
