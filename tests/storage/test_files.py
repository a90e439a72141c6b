import os
from pathlib import Path

import pytest

from wml_ray.errors import UserError
from wml_ray.storage.files import get_text, local_files, put_text, read_json, write_json


@pytest.mark.parametrize("folder", ["local", "remote"], indirect=True)
def test_files_are_read_as_they_were_written(folder):
    assert read_json(folder / "a" / "b.json", "") is None
    write_json(folder / "a" / "b.json", {"one": 1})
    assert read_json(folder / "a" / "b.json", "") == {"one": 1}
    put_text(folder / "a" / "b.json", "again")
    with local_files(folder / "a", ["b.json"]) as local:
        assert (local / "b.json").read_text() == "again"
    with pytest.raises(FileNotFoundError), local_files(folder / "a", ["c.json"]) as local:
        (local / "c.json").read_text()


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "it is empty"), (b'{"a": 1', "delimiter"), (b"[]", "no object"), (b"\xff", "no text"), (b"{}", "lacks 'a'")],
)
def test_a_damaged_file_is_one_line_with_its_name_and_the_remedy(tmp_path, content, reason):
    (tmp_path / "b.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"b\.json is damaged \(.*{reason}.*\); delete it$"):
        read_json(tmp_path / "b.json", "delete it", ["a"])


def test_a_written_file_and_its_folder_are_synced_to_the_disk(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def note(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write_json(tmp_path / "b.json", {})
    assert synced == [tmp_path / synced[0].name, tmp_path]
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(os.mkfifo, id="pipe"),
        pytest.param(os.mkdir, id="folder"),
        pytest.param(lambda path: os.symlink("/dev/zero", path), id="link to a device"),
    ],
)
def test_a_file_that_is_no_regular_file_is_refused_at_once(tmp_path, make):
    make(tmp_path / "result.json")
    with pytest.raises(UserError, match=r"result\.json is not a regular file"):
        get_text(tmp_path / "result.json")


def test_a_link_to_a_regular_file_is_read(tmp_path):
    (tmp_path / "elsewhere").write_text("text")
    (tmp_path / "result.json").symlink_to(tmp_path / "elsewhere")
    assert get_text(tmp_path / "result.json") == "text"
