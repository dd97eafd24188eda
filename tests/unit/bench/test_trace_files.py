"""Trace files as users write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.bench.workloads import Trace, TraceError, read_trace

HEADER = "arrival_s,prompt_tokens,output_tokens\n"


def read(folder: Path, content: str | bytes, *, arrivals: bool = False) -> Trace:
    path = folder / "t.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_trace(path, arrivals=arrivals)


def test_a_trace_is_read_in_the_order_of_arrival(tmp_path: Path) -> None:
    trace = read(tmp_path, HEADER + "2.5,10,1\n0.5,20,2\n\n2.5,30,3\n", arrivals=True)
    assert trace.arrival_s is not None and trace.arrival_s.tolist() == [0.5, 2.5, 2.5]
    assert trace.prompt_tokens.tolist() == [20, 10, 30]
    assert trace.output_tokens.tolist() == [2, 1, 3]


def test_arrivals_may_be_empty_or_missing_unless_they_are_asked_for(tmp_path: Path) -> None:
    trace = read(tmp_path, HEADER + ",10,1\n,20,2\n")
    assert trace.arrival_s is None and trace.prompt_tokens.tolist() == [10, 20]
    assert len(read(tmp_path, "prompt_tokens,output_tokens\n1,2\n")) == 1


def test_columns_go_by_name_and_a_byte_order_mark_is_no_letter(tmp_path: Path) -> None:
    text = "\ufeffoutput_tokens,model,prompt_tokens\r\n3,x,4\r\n"
    trace = read(tmp_path, text)
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([4], [3])


@pytest.mark.parametrize(
    ("content", "arrivals", "message"),
    [
        ("", False, "line 1: the column prompt_tokens is missing"),
        ("prompt_tokens\n", False, "line 1: the column output_tokens is missing"),
        ("prompt_tokens,output_tokens\n1,1\n", True, "line 1: the column arrival_s is missing"),
        (HEADER, False, "line 2: there is no job"),
        (HEADER + "0,1,1\n0,1\n", False, "line 3: 2 values under 3 columns"),
        (HEADER + "0,1,1,1\n", False, "line 2: 4 values under 3 columns"),
        (HEADER + "0,1.5,1\n", False, "line 2: prompt_tokens must be a whole number, not '1.5'"),
        (HEADER + "0,1,\n", False, "line 2: output_tokens must be a whole number, not ''"),
        (HEADER + "0,0,1\n", False, "line 2: prompt_tokens must be from 1 to"),
        (HEADER + "0,1,9999999999\n", False, "line 2: output_tokens must be from 1 to"),
        (HEADER + "0,1,1\n,1,1\n", True, "line 3: arrival_s is empty"),
        (HEADER + "-1,1,1\n", True, "line 2: arrival_s must be a number of seconds"),
        (HEADER + "nan,1,1\n", True, "line 2: arrival_s must be a number of seconds"),
        (HEADER + "soon,1,1\n", True, "line 2: arrival_s must be a number of seconds"),
        (HEADER + "0," + "1" * 200_000 + ",1\n", False, "line 2: field larger than"),
        (b"\xff\xfe\x00", False, "is not a text file"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(
    tmp_path: Path, content: str | bytes, arrivals: bool, message: str
) -> None:
    with pytest.raises(TraceError) as caught:
        read(tmp_path, content, arrivals=arrivals)
    assert message in str(caught.value) and "t.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read: No such file"):
        read_trace(tmp_path / "none.csv", arrivals=False)
