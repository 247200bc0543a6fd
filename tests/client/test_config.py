"""``site.toml``: what is accepted, and what a broken one is told."""

from __future__ import annotations

from pathlib import Path

import pytest

import fedward_client
from fedward.errors import ConfigError
from fedward_client.config import hidden_places, load_config, trusted_places
from tools.docs.site import page


def test_paths_are_relative_to_the_file(site: Path, export: Path) -> None:
    config = load_config(site)
    assert config.dataset("chest").root == export
    assert config.site.state == site.parent / "state"
    assert config.dataset("chest").as_task().classes == ("well", "sick")


def test_what_the_connector_must_not_see_and_not_change(site: Path, export: Path) -> None:
    state, ca = site.parent / "state", site.parent / "ca.pem"
    assert hidden_places(load_config(site)) == [state, export]
    table = site.parent / "elsewhere.csv"
    table.write_text("PatientID,label\nDOE,well\n")
    text = site.read_text()
    server = '[server]\naddress = "agg:1"\nca = "{}"\n'
    labels = '[datasets.chest.labels]\nfile = "elsewhere.csv"\n'
    site.write_text(f"{text}\n{labels}{server.format('ca.pem')}")
    config = load_config(site)
    assert hidden_places(config) == [state, export, table]
    code = Path(fedward_client.__file__).parent
    assert trusted_places(config) == [code, ca]
    site.write_text(f"{text}\n{labels}{server.format('elsewhere.csv')}")
    with pytest.raises(ConfigError, match=r"server\.ca: what the connector needs must lie outside"):
        load_config(site)


@pytest.mark.parametrize(
    ("old", "new", "where", "rule"),
    [
        ("version = 1", "version = 2", "version", "must be 1"),
        ("[site]", "[site]\ncolour = 1", "site.colour", "not known"),
        ('name = "st-mary"', "name = 3", "site.name", "must be text"),
        ('task = "class', 'task = "guess', "datasets.chest.task", "must be"),
        ('["well", "sick"]', "[]", "datasets.chest.classes", "at least 1"),
        ('["DX"]', '["dx-ray"]', "datasets.chest.modality", "must be"),
        ("minimum_patients = 4", "minimum_patients = 0", "datasets.chest.minimum", "at least 1"),
        ("ward-7-doe", "elsewhere", "datasets.chest.root", "must exist"),
        ("[site]", '[site]\nstate = "ward-7-doe/state"', "site.state", "inside a dataset"),
        ("[site]", "[site", "TOML", "valid"),
        ("version = 1", "version = true", "version", "whole number"),
        ("minimum_patients = 4", "minimum_patients = 4.0", "datasets.chest.min", "whole number"),
        ("minimum_patients = 4", 'multi_label = "yes"', "datasets.chest.multi", "true or false"),
        ("minimum_patients = 4", "dimensions = 2.0", "datasets.chest.dimen", "whole number"),
        ("minimum_patients = 4", 'colour = "red"', "datasets.chest.colour", "not known"),
        ('["DX"]', '"DX"', "datasets.chest.modality", "must be a list"),
        ('["well", "sick"]', '["well", "well"]', "datasets.chest.classes", "differ"),
        ('["well", "sick"]', '["sick"]', "datasets.chest.classes", "at least two"),
        (
            '= "classification"',
            '= "segmentation"\nmulti_label = true',
            "chest.multi_label",
            "belongs",
        ),
        ('["DX"]', '["DX", "any"]', "datasets.chest.modality", "stands alone"),
        ('["well", "sick"]', "[1, 2]", "datasets.chest.classes", "must be text"),
        ("[datasets.chest]", '[datasets."a/b"]', "datasets", "must match"),
        (
            "minimum_patients = 4",
            '[datasets.chest.patients]\nshared_ids = [""]',
            "datasets.chest.patients.shared_ids",
            "at least 1",
        ),
        (
            "minimum_patients = 4",
            "[datasets.chest.patients]\nshared_ids = [0]",
            "datasets.chest.patients.shared_ids",
            "must be text",
        ),
    ],
)
def test_what_is_wrong_is_named(site: Path, old: str, new: str, where: str, rule: str) -> None:
    text = site.read_text()
    assert old in text
    site.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_config(site)
    assert where in str(caught.value)
    assert rule in str(caught.value)
    assert "ward-7-doe" not in str(caught.value)


MASKS = """
[datasets.chest.masks]
segments = { "Lung_L" = "Sick", "7" = "well" }
threshold = 0.25
background = ["air"]
"""


def test_what_segments_mean(site: Path) -> None:
    text = site.read_text().replace('"classification"', '"segmentation"')
    site.write_text(text + MASKS)
    options = load_config(site).dataset("chest").masks.options()
    assert options.labels([(3, "LUNG_L"), (7, "x"), (8, "air")], ("well", "sick")) == (
        (3, 2),
        (7, 1),
    )
    assert (options.threshold, options.background) == (0.25, ("air",))


@pytest.mark.parametrize(
    ("old", "new", "where", "rule"),
    [
        ('"Sick"', '"liver"', "masks.segments", "one of `classes`"),
        ('"Sick"', "3", "masks.segments", "must be text"),
        ('"7"', '"lung_l"', "masks.segments", "listed once"),
        ('"air"', '"lung_L"', "masks.segments", "background and a class"),
        ('"air"', '" "', "masks.background", "must match"),
        ("0.25", "0.0", "masks.threshold", "greater than 0"),
        ("0.25", "1.5", "masks.threshold", "at most 1"),
        ("0.25", '"half"', "masks.threshold", "must be a number"),
        ("threshold", "treshold", "masks.treshold", "not known"),
        ('"segmentation"', '"classification"', "chest.masks", "belong to segmentation"),
    ],
)
def test_wrong_masks_are_named(site: Path, old: str, new: str, where: str, rule: str) -> None:
    text = site.read_text().replace('"classification"', '"segmentation"') + MASKS
    assert old in text
    site.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_config(site)
    assert where in str(caught.value)
    assert rule in str(caught.value)


def test_a_bottomless_file_is_refused(site: Path) -> None:
    site.write_text("version = " + "[" * 5000 + "]" * 5000)
    with pytest.raises(ConfigError, match="a few tables deep"):
        load_config(site)


def test_a_linked_state_folder_does_not_hide_that_it_lies_in_a_dataset(
    site: Path, export: Path
) -> None:
    (site.parent / "state").symlink_to(export)
    with pytest.raises(ConfigError, match="inside a dataset"):
        load_config(site)


def test_a_missing_file_is_named_without_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--config") as caught:
        load_config(tmp_path / "none.toml")
    assert str(tmp_path) not in str(caught.value)


def test_the_reference_page_is_that_of_the_schema() -> None:
    docs = Path(__file__).parents[2] / "docs" / "site.md"
    assert docs.read_text("utf-8") == page()


def test_all_that_is_wrong_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    """Unknown keys, values and rules between keys, of every table."""
    (tmp_path / "site.toml").write_text(
        'version = 1\n[site]\nname = "north"\nstate = "data/state"\n[datasets.chest]\n'
        'root = "data"\n'
        'task = "classification"\nclasses = ["a", "a"]\npatient_column = "id"\n'
        '[[policy.studies]]\nmatch = "*"\ndataset = "chets"\n',
        "utf-8",
    )
    with pytest.raises(ConfigError) as failed:
        load_config(tmp_path / "site.toml", datasets_here=False)
    told = str(failed.value)
    assert "line 9, datasets.chest.patient_column: this key is not known" in told
    assert "It belongs in [datasets.NAME.labels]; move it there" in told
    text = (tmp_path / "site.toml").read_text("utf-8").replace('patient_column = "id"\n', "")
    (tmp_path / "site.toml").write_text(text, "utf-8")
    with pytest.raises(ConfigError) as failed:
        load_config(tmp_path / "site.toml", datasets_here=False)
    told = str(failed.value)
    for line in (
        "line 8, datasets.chest.classes: class names must differ",
        "line 4, site.state: the state folder must not lie inside a dataset",
        "line 11, policy.studies.0.dataset: the dataset must be one of chest (got chets)",
    ):
        assert line in told
