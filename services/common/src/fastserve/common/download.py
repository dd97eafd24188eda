"""`python -m fastserve.common.download REPOSITORY --into FOLDER`: a model from Hugging Face.

What is there already is not loaded again, and processes that load into one folder take turns.
$HF_TOKEN opens gated repositories, $HF_ENDPOINT names a mirror. Needs huggingface_hub, which the
gateway and the worker have.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# The code of a repository is never run, and weights in other formats are not read.
_TEXTS = ["*.json", "*.jinja", "*.model", "*.txt"]
_WEIGHTS = ["*.safetensors"]


def download(repository: str, revision: str, into: Path, *, weights: bool) -> None:
    """Files that a gateway needs, and with `weights` those of a worker.

    Raises OSError and ValueError with a reason (those of huggingface_hub).
    """
    from huggingface_hub import snapshot_download

    snapshot_download(
        repository,
        revision=revision,
        local_dir=into,
        allow_patterns=_TEXTS + (_WEIGHTS if weights else []),
        token=os.environ.get("HF_TOKEN") or False,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fastserve-download", description="Load a model from Hugging Face into a folder."
    )
    parser.add_argument("repository", help="OWNER/NAME")
    parser.add_argument("--into", type=Path, required=True, help="the folder")
    parser.add_argument("--revision", default="main", help="branch, tag or commit (default: main)")
    parser.add_argument(
        "--tokenizer-only", action="store_true", help="leave the weights out: all a gateway needs"
    )
    options = parser.parse_args(arguments)
    try:
        download(
            options.repository,
            options.revision,
            options.into,
            weights=not options.tokenizer_only,
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        print(f"{options.repository}@{options.revision}: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
