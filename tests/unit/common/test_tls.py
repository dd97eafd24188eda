from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.common.errors import StartupError
from fastserve.common.settings import load_settings
from fastserve.common.tls import TlsSettings, load_tls

FILES = Path(__file__).parents[2] / "support" / "tls"


def settings(*names: str, folder: Path = FILES) -> TlsSettings:
    files = {"cert": "peer.crt", "key": "peer.key", "ca": "ca.crt"}
    return load_settings(TlsSettings, "test", [f"--tls-{n}={folder / files[n]}" for n in names])


def test_no_certificate_is_plain() -> None:
    assert load_tls(settings()) is None


def test_the_files_are_read() -> None:
    tls = load_tls(settings("cert", "key", "ca"))
    assert tls is not None
    assert tls.cert == (FILES / "peer.crt").read_bytes()
    assert tls.key == (FILES / "peer.key").read_bytes()
    assert tls.ca == (FILES / "ca.crt").read_bytes()


@pytest.mark.parametrize("names", [("cert",), ("cert", "key"), ("ca",)])
def test_half_a_certificate_is_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(StartupError, match="go together"):
        settings(*names)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=rf"cannot read {tmp_path}/peer.crt"):
        load_tls(settings("cert", "key", "ca", folder=tmp_path))
