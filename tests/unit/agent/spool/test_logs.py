from __future__ import annotations

from pathlib import Path

import pytest

from gamenode.agent.spool.logs import LogSpool, SpooledLog
from gamenode.domain.errors import GameNodeError
from gamenode.domain.log import LogKey

KEY = LogKey("01936d2c-9b1e-7000-8000-00000000abcd", "build", 1)


def files(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*") if path.is_file())


def filled(root: Path) -> SpooledLog:
    log = LogSpool(root, segment_bytes=10).create(KEY)
    for piece in (b"01234567", b"89abcdef", b"ghijklmn", b"opqrstuv"):
        log.append(piece)
    return log


def test_an_empty_log_has_no_file(tmp_path: Path) -> None:
    spool = LogSpool(tmp_path)
    spool.create(KEY).close()
    assert not spool.open(KEY).found
    spool.create(KEY).remove()
    assert files(tmp_path) == []


def test_bytes_are_read_from_any_offset_across_files(tmp_path: Path) -> None:
    log = filled(tmp_path)
    assert len(files(tmp_path)) == 2
    assert log.read(0, 32) == b"0123456789abcdefghijklmnopqrstuv"
    assert log.read(14, 5) == b"efghi"


def test_a_log_is_found_again_after_a_restart(tmp_path: Path) -> None:
    filled(tmp_path).close()
    log = LogSpool(tmp_path, segment_bytes=10).open(KEY)
    assert (log.found, log.begin, log.end) == (True, 0, 32)
    log.append(b"wxyz")
    assert log.read(30, 6) == b"uvwxyz"


def test_what_is_acknowledged_goes_but_the_last_file_stays(tmp_path: Path) -> None:
    log = filled(tmp_path)
    log.trim(15)
    assert log.begin == 0
    log.trim(16)
    assert log.begin == 16
    log.trim(32)
    assert log.begin == 16
    log.close()
    assert LogSpool(tmp_path).open(KEY).begin == 16


def test_files_behind_a_gap_are_not_taken_for_the_log(tmp_path: Path) -> None:
    log = filled(tmp_path)
    log.close()
    first = min(path for path in tmp_path.rglob("*") if path.is_file())
    first.write_bytes(b"0123")
    again = LogSpool(tmp_path).open(KEY)
    assert (again.begin, again.end) == (0, 4)
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("end", [0, 3, 16, 20, 32])
def test_a_cut_log_goes_on_from_there(tmp_path: Path, end: int) -> None:
    log = filled(tmp_path)
    log.cut(end)
    log.append(b"!")
    assert log.end == end + 1
    assert log.read(log.begin, log.end - log.begin) == b"0123456789abcdefghijklmnopqrstuv"[:end] + (
        b"!"
    )


def test_a_restarted_log_begins_elsewhere(tmp_path: Path) -> None:
    log = filled(tmp_path)
    log.restart(1000)
    log.append(b"new")
    log.close()
    again = LogSpool(tmp_path).open(KEY)
    assert (again.begin, again.end, again.read(1000, 3)) == (1000, 1003, b"new")


def test_a_removed_log_leaves_no_folder(tmp_path: Path) -> None:
    filled(tmp_path).remove()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_adds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = filled(tmp_path)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.pwrite", full)
        with pytest.raises(OSError, match="No space"):
            log.append(b"lost")
    log.append(b"kept")
    assert log.read(28, 8) == b"stuvkept"


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc", "a\x00", "x" * 65, "ab.."])
def test_names_that_are_none_never_become_a_path(tmp_path: Path, name: str) -> None:
    spool = LogSpool(tmp_path)
    for key in (LogKey(name, "build", 1), LogKey("abcd", name, 1)):
        with pytest.raises(GameNodeError):
            spool.create(key)
