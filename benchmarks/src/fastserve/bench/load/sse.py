"""Server-sent events, parsed as they arrive."""

from __future__ import annotations


class SseParser:
    """Cuts a stream of bytes into the data of its events, however the bytes arrive.

    Understands what servers of this API send: `data:` lines, comments, other fields (ignored), an
    empty line at the end of an event, and LF, CRLF or CR as the end of a line.
    """

    __slots__ = ("_data", "_rest", "_skip_lf")

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._skip_lf = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of the events that `chunk` completes, without those that have none."""
        if self._skip_lf and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._skip_lf = False
        if b"\r" in chunk:
            self._skip_lf = chunk.endswith(b"\r")  # its LF may be on the way
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = (self._rest + chunk).split(b"\n")
        self._rest = lines.pop()
        events = []
        for line in lines:
            if line:
                if line.startswith(b"data:"):
                    self._data.append(line[5:].removeprefix(b" "))
            elif self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events
