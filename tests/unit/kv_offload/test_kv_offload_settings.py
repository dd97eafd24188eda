from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.common.errors import StartupError
from fastserve.common.settings import load_settings
from fastserve.kv_offload.pool import PREFIX, Pool, slot_bytes
from fastserve.kv_offload.scratch import remove_stale
from fastserve.kv_offload.settings import Settings, parse_size


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4096), ("2K", 2048), ("512M", 1 << 29), ("4GiB", 1 << 32)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["0", "lots", "-1G", "1.5G"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(StartupError, match="is not a size such as 512M or 4G"):
        load_settings(Settings, "x", [f"--host-memory={text}"])


def test_missing_pool_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"pool folder .* does not exist"):
        load_settings(Settings, "x", ["--pool-dir", str(tmp_path / "none")])


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--disk-path", "."], "--disk-path and --disk-size go together"),
        (["--disk-size", "1G"], "--disk-path and --disk-size go together"),
        (["--disk-path", "/none", "--disk-size", "1G"], "disk folder /none does not exist"),
        (["--disk-path", ".", "--disk-size", "much"], "is not a size"),
        (["--tls-cert", "c", "--tls-key", "k"], "go together"),
        (["--peer-listen", "127.0.0.1:0"], "--peer-listen needs --peer-token-file or --tls-cert"),
        (
            ["--peer-listen", "0.0.0.0:7072", "--peer-token-file", "t"],
            "--peer-listen on 0.0.0.0 needs --peer-address",
        ),
    ],
)
def test_settings_that_do_not_fit_together(flags: list[str], why: str) -> None:
    with pytest.raises(StartupError, match=why):
        load_settings(Settings, "x", flags)


def test_slots_are_whole_pages() -> None:
    assert slot_bytes(1) == 4096
    assert slot_bytes(4096) == 4096
    assert slot_bytes(4097) == 8192


def test_pool_file_lives_as_long_as_its_owner(tmp_path: Path) -> None:
    pool = Pool(tmp_path, 8192)
    assert pool.path.stat().st_size == 8192
    remove_stale(tmp_path, PREFIX)  # a live pool is locked and stays
    assert pool.path.exists()
    pool.close()
    assert not pool.path.exists()


def test_pool_file_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "fastserve-kv-0123456789ab"
    left.write_bytes(b"x")
    other = tmp_path / "somebody-elses"
    other.write_bytes(b"x")
    remove_stale(tmp_path, PREFIX)
    assert not left.exists()
    assert other.exists()


def test_pool_larger_than_the_file_system_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"cannot reserve .* Lower --host-memory"):
        Pool(tmp_path, 1 << 50)
    assert list(tmp_path.iterdir()) == []
