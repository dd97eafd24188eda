"""The threads of the kernels, in C++ (pool_races.cpp)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from fastserve.worker import native

CSRC = Path(native.__file__).parent / "csrc"


def test_a_race_needs_no_helper_that_is_stuck_and_shows_every_task_once(tmp_path: Path) -> None:
    program = tmp_path / "races"
    sources = [Path(__file__).with_name("pool_races.cpp"), CSRC / "pool.cpp"]
    compiler = os.environ.get("CXX", "g++")
    subprocess.run(
        [compiler, "-std=c++20", "-O1", "-pthread", f"-I{CSRC}", "-o", program, *sources],
        check=True,
        timeout=120,
    )
    ended = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (0, "")
