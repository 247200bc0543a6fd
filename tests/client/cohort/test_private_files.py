"""Files for the site's own eyes."""

from __future__ import annotations

import pytest

from fedward.errors import OutputError
from fedward.files import write_private
from fedward_client.cohort.freeze import make_cohort, save, usable


def test_a_file_is_replaced_whole_and_for_its_owner_only(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    path.chmod(0o644)
    write_private(path, b"new", modified=10**18)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_mtime_ns == 10**18
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_replaced_and_what_it_led_to_stays(tmp_path):
    (tmp_path / "other").write_text("untouched")
    (tmp_path / "page.html").symlink_to(tmp_path / "other")
    write_private(tmp_path / "page.html", b"new")
    assert (tmp_path / "other").read_text() == "untouched"


def test_a_folder_that_is_missing_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="must be writable"):
        write_private(tmp_path / "none" / "page.html", b"new")


@pytest.mark.integration
def test_what_is_kept_is_for_its_owner_only_whatever_the_mode_of_the_state_folder(
    site, tmp_path, reading
):
    (tmp_path / "state").mkdir(mode=0o755)
    with reading(site) as work:
        found = usable(work.dataset, work.index, work.extract)
        made = make_cohort("chest", work.dataset, found, work.index, work.extract)
        save(made, work.site.site.state)
        kept = sorted((tmp_path / "state").rglob("*"))
        modes = {path.stat().st_mode & 0o777 for path in kept if path.is_file()}
        folders = {path.stat().st_mode & 0o777 for path in kept if path.is_dir()}
    assert len(kept) >= 5 and modes == {0o600} and folders == {0o700}
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o755
