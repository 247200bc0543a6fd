"""Multi-frame files that hold several stacks."""

from __future__ import annotations

import numpy as np
import pytest

from fedward.errors import DataError
from fedward_client.data.dataset import DatasetSpec, read_dataset

AXIAL, SAGITTAL = [1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1]


@pytest.fixture
def volumes(tmp_path, make_dicom, make_group, make_plan):
    """The volumes of one multi-frame file, whose frames are told as functional groups."""

    def make(frames: list[dict]) -> list[np.ndarray]:
        pixels = np.arange(len(frames) * 20, dtype=np.int16).reshape(-1, 4, 5)
        make_dicom(
            tmp_path / "x.dcm",
            pixels,
            frames=len(frames),
            PatientID="P1",
            SharedFunctionalGroupsSequence=[
                make_group(PixelMeasuresSequence={"PixelSpacing": [1, 1]})
            ],
            PerFrameFunctionalGroupsSequence=[make_group(**frame) for frame in frames],
        )
        (tmp_path / "labels.csv").write_text("PatientID,label\nP1,sick\n")
        task = make_plan(size=(8, 8, 8)).task
        samples = read_dataset(DatasetSpec(tmp_path, "dicom"), task).samples
        return [sample.load().pixels[0] for sample in samples]

    return make


def frame(height: float, plane: list = AXIAL, **more: dict) -> dict:
    position = [0, 0, height] if plane is AXIAL else [height, 0, 0]
    return {
        "PlanePositionSequence": {"ImagePositionPatient": position},
        "PlaneOrientationSequence": {"ImageOrientationPatient": plane},
        **more,
    }


def numbers(volume: np.ndarray) -> set[int]:
    """The frames that a volume is made of: frame k holds 20 k to 20 k + 19."""
    return {int(v) // 20 for v in np.unique(volume)}


def test_planes_and_stacks_are_told_apart(volumes):
    one = {"FrameContentSequence": {"StackID": "1"}}
    other = {"FrameContentSequence": {"StackID": "2"}}
    made = volumes(
        [
            frame(0, **one),
            frame(0, SAGITTAL),
            frame(2, **one),
            frame(9, **other),
            frame(2, SAGITTAL),
            frame(12, **other),
        ]
    )
    assert [numbers(volume) for volume in made] == [{0, 2}, {1, 4}, {3, 5}]
    assert made[0].shape == (5, 4, 2)


@pytest.mark.parametrize(
    ("sequence", "name", "values"),
    [
        ("FrameContentSequence", "TemporalPositionIndex", (1, 2)),
        ("MREchoSequence", "EffectiveEchoTime", (10.0, 90.0)),
        ("MRDiffusionSequence", "DiffusionBValue", (0.0, 800.0)),
    ],
)
def test_times_echoes_and_weights_where_places_repeat(volumes, sequence, name, values):
    made = volumes([frame(z, **{sequence: {name: v}}) for z in (0, 2, 4) for v in values])
    assert [numbers(volume) for volume in made] == [{0, 2, 4}, {1, 3, 5}]


def test_a_time_for_each_slice_does_not_divide(volumes):
    made = volumes(
        [frame(2 * k, FrameContentSequence={"TemporalPositionIndex": k + 1}) for k in range(4)]
    )
    assert [numbers(volume) for volume in made] == [{0, 1, 2, 3}]


def test_places_that_repeat_without_a_word_are_refused(volumes):
    with pytest.raises(DataError, match="duplicate slices"):
        volumes([frame(z) for z in (0, 0, 2, 2)])


def test_more_frames_than_the_file_has_bytes_for(tmp_path, make_dicom, make_plan):
    path = make_dicom(tmp_path / "x.dcm", np.zeros((2, 4, 4), np.int16), frames=2)
    path.write_bytes(path.read_bytes().replace(b"IS\x02\x002 ", b"IS\x0a\x002000000000"))
    (tmp_path / "labels.csv").write_text("PatientID,label\nP1,sick\n")
    with pytest.raises(DataError, match="not readable: 1"):
        read_dataset(DatasetSpec(tmp_path, "dicom"), make_plan().task)


def test_jitter_of_the_axes_of_frames_divides_nothing(volumes):
    def jittered(k: int) -> dict:
        s = 0.005 + (1e-8 if k % 2 else -1e-8)
        c = (1 - s * s) ** 0.5
        return frame(2 * k) | {
            "PlaneOrientationSequence": {"ImageOrientationPatient": [c, s, 0, -s, c, 0]}
        }

    made = volumes([jittered(k) for k in range(6)])
    assert [numbers(volume) for volume in made] == [set(range(6))]


def test_dimensions_of_a_file_tell_frames_in_one_place_apart(volumes):
    made = volumes(
        [
            frame(z, FrameContentSequence={"DimensionIndexValues": [1, z // 2 + 1, phase]})
            for z in (0, 2, 4)
            for phase in (1, 2)
        ]
    )
    assert [numbers(volume) for volume in made] == [{0, 2, 4}, {1, 3, 5}]
