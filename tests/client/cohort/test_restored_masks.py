"""Masks of older cohorts that nobody held against their images."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedward.errors import DataError
from fedward_client.cohort.open import Restorer
from fedward_client.cohort.records import Piece, Source
from fedward_client.data.readers.nifti import NiftiMask
from fedward_client.secret import Pseudonyms


def test_a_nifti_mask_without_its_images_place_is_not_opened(tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("mask", "image")}
    restorer = Restorer(paths, dict.fromkeys(paths, "0" * 64), (), 3, Pseudonyms(b"s" * 32))
    source = Source(kind="nifti", pieces=(Piece(file="mask"),))
    with pytest.raises(DataError, match="Freeze the dataset again"):
        restorer.mask(source)
    beside = restorer.mask(source.model_copy(update={"beside": "image"})).load
    assert beside == NiftiMask(paths["mask"], 3, paths["image"])
