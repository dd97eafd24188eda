"""What became of child processes."""

from __future__ import annotations

import signal


def ending(status: int) -> str:
    """How a child ended, in words that follow its name. status: as `subprocess` gives it."""
    if status == -signal.SIGKILL:
        return (
            "was killed (SIGKILL), most likely for want of memory. A worker's log says what its "
            "weights need: --dtype bfloat16, --quantization int8 or a smaller model take less, and "
            "ranks on several hosts share them (--tensor-parallel-size, --pipeline-parallel-size)"
        )
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"
