"""Masks of older cohorts that nobody held against their images."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.cohort.restore import Restorer
from client.cohort.sources import Piece, Source
from client.data.readers.nifti import NiftiMask
from client.secret import Pseudonyms
from fedward.errors import DataError


def test_a_nifti_mask_without_its_images_place_is_not_opened(tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("mask", "image")}
    restorer = Restorer(paths, dict.fromkeys(paths, "0" * 64), (), 3, Pseudonyms(b"s" * 32))
    source = Source(kind="nifti", pieces=(Piece(file="mask"),))
    with pytest.raises(DataError, match="Freeze the dataset again"):
        restorer.mask(source)
    beside = restorer.mask(source.model_copy(update={"beside": "image"})).load
    assert beside == NiftiMask(paths["mask"], 3, paths["image"])
