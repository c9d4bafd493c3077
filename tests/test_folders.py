"""Folders come whole or not at all."""

import pytest

from lit_vapo.folders import check_new, claim_folder, new_folder, write_whole


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_takes_its_place_when_it_is_whole(tmp_path, there):
    target = tmp_path / "a" / "b"
    if there:
        target.mkdir(parents=True)
    with new_folder(target, "--output") as partial:
        (partial / "file").write_text("whole")
        assert not (target / "file").exists()
    assert (target / "file").read_text() == "whole"
    assert [p.name for p in target.parent.iterdir()] == ["b"]


def test_after_an_error_nothing_is_left_and_a_second_try_succeeds(tmp_path):
    target = tmp_path / "b"

    def write(text):
        with new_folder(target, "--output") as partial:
            (partial / "file").write_text(text)
            if text == "bad":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write("bad")
    assert list(tmp_path.iterdir()) == []
    write("good")
    assert (target / "file").read_text() == "good"


def test_what_is_there_is_never_written_over(tmp_path):
    (tmp_path / "file").write_text("mine")
    message = r"--output: expected a new or empty folder, got '.*' with files in it"
    with pytest.raises(FileExistsError, match=message):
        check_new(tmp_path, "--output")
    with pytest.raises(FileExistsError, match=message), new_folder(tmp_path, "--output"):
        pass
    assert (tmp_path / "file").read_text() == "mine"
    assert check_new(tmp_path / "new", "--output") == tmp_path / "new"


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "a" / "results.json"
    write_whole(path, "first\n")
    write_whole(path, "zweite – Zeile\r\n")
    assert path.read_bytes() == "zweite – Zeile\r\n".encode()
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]

    def killed(self, target):
        raise KeyboardInterrupt

    # Until the last moment it is the former file that others see.
    monkeypatch.setattr(type(path), "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "third")
    assert path.read_bytes() == "zweite – Zeile\r\n".encode()


def test_what_comes_from_other_options_is_refused(tmp_path):
    claim_folder(tmp_path, "output", {"width": 8, "seed": 0})
    claim_folder(tmp_path, "output", {"width": 8, "seed": 0})
    with pytest.raises(ValueError, match=r"output: .* was made with width 8; expected another folder, or these values"):
        claim_folder(tmp_path, "output", {"width": 16, "seed": 0})
    # A folder of before an option was thought of.
    with pytest.raises(ValueError, match=r"was made with layers None"):
        claim_folder(tmp_path, "output", {"width": 8, "seed": 0, "layers": 2})
