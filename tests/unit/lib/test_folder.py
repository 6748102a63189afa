from __future__ import annotations

import os
from pathlib import Path

import pytest

from gamenode.lib.folder import FolderError, hold_folder


def test_a_folder_is_made_for_its_owner_alone_and_held_until_it_is_let_go(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    held = hold_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    with pytest.raises(FolderError, match="another process uses the folder"):
        hold_folder(folder)
    os.close(held)
    os.close(hold_folder(folder))


def test_a_folder_that_cannot_be_made_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match=r"/file/folder cannot be used: Not a directory"):
        hold_folder(tmp_path / "file" / "folder")
