"""Generate fastserve.proto.v1 from fastserve/v1/*.proto (`make proto`).

protoc derives Python module names from the path of the .proto file (fastserve.v1), which would
collide with nothing but say little; the package is fastserve.proto.v1, so the imports between
generated files are rewritten. `--check` generates into a temporary folder and compares, for CI.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import re
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).parent
PACKAGE = HERE / "src" / "fastserve" / "proto" / "v1"


def generate(target: Path) -> None:
    """Write the modules and type stubs of every .proto file into `target`."""
    with tempfile.TemporaryDirectory() as scratch:
        sources = sorted(str(path) for path in (HERE / "fastserve" / "v1").glob("*.proto"))
        well_known = Path(protoc.__file__).parent / "_proto"
        plugins = ("python", "pyi", "grpc_python", "mypy_grpc")
        # protoc finds plugins on the PATH: those of this interpreter's environment come first.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        outputs = [f"--{plugin}_out={scratch}" for plugin in plugins]
        arguments = [f"-I{HERE}", f"-I{well_known}", *outputs]
        if protoc.main(["protoc", *arguments, *sources]) != 0:
            raise SystemExit("protoc failed")
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted((Path(scratch) / "fastserve" / "v1").iterdir()):
            text = re.sub(
                r"\bfastserve\.v1 import\b", "fastserve.proto.v1 import", path.read_text()
            )
            text = re.sub(
                r"^import fastserve\.v1\.", "import fastserve.proto.v1.", text, flags=re.M
            )
            text = re.sub(r"(?<![\w/.\"'])fastserve\.v1\.(\w+_pb2)", r"fastserve.proto.v1.\1", text)
            (target / path.name).write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="fail if the committed code is stale")
    if not parser.parse_args().check:
        generate(PACKAGE)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        generate(fresh)
        names = sorted(path.name for path in fresh.iterdir())
        kept = sorted(
            p.name for p in PACKAGE.iterdir() if p.name not in ("__init__.py", "__pycache__")
        )
        stale = [
            n for n in names if n not in kept or not filecmp.cmp(fresh / n, PACKAGE / n, False)
        ]
        stale += [name for name in kept if name not in names]
    if stale:
        print(f"generated code is stale ({', '.join(stale)}): run `make proto`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
