"""DICOM files of synthetic images (PS3.3 A.2 CR, A.3 CT, A.26 DX); each says what it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)

from fedward_simulation.cohort.facts import NOTE
from fedward_simulation.cohort.scanner import Scanner

_CLASSES = {
    "CR": ComputedRadiographyImageStorage,
    "DX": DigitalXRayImageStorageForPresentation,
    "CT": CTImageStorage,
}


@dataclass(frozen=True)
class Place:
    """Where an image stands in the cohort; everything that names it follows from this.

    Attributes
    ----------
    cohort : str
        Seed and kind, so that two cohorts share no UID.
    hospital : str
        Name of the hospital.
    patient, image : int
        Numbers from 1.
    """

    cohort: str
    hospital: str
    patient: int
    image: int

    @property
    def patient_id(self) -> str:
        """PatientID, also the key of ``labels.csv``."""
        return f"SYNTHETIC-{self.hospital.upper()}-{self.patient:04}"

    @property
    def stem(self) -> str:
        """File name without its suffix."""
        return f"{self.patient_id}-{self.image}"

    def uid(self, level: str, *parts: int) -> UID:
        """A UID that follows from the place alone."""
        source = [self.cohort, self.hospital, str(self.patient), level, *map(str, parts)]
        return generate_uid(entropy_srcs=["fedward synthetic cohort", "/".join(source)])


def dataset(pixels: NDArray[Any], scanner: Scanner, place: Place) -> FileDataset:
    """A complete DICOM file in memory, compressed where the scanner does so.

    Parameters
    ----------
    pixels : NDArray
        ``(rows, columns)`` stored values, uint8 or uint16.
    """
    uid = place.uid("image", place.image)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = _CLASSES[scanner.modality]
    meta.MediaStorageSOPInstanceUID = uid
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    _put(ds, SOPClassUID=_CLASSES[scanner.modality], SOPInstanceUID=uid)
    _patient_and_study(ds, place)
    _series(ds, scanner, place)
    _image(ds, scanner, place)
    {"CR": _cr, "DX": _dx, "CT": _ct}[scanner.modality](ds, scanner, place)
    ds.set_pixel_data(pixels, scanner.photometric, scanner.bits, generate_instance_uid=False)
    if scanner.compressed:
        # Named, so that the bytes do not depend on which encoders are installed.
        ds.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
    return ds


def _put(ds: Dataset, **values: Any) -> None:
    for keyword, value in values.items():
        setattr(ds, keyword, value)


def _patient_and_study(ds: Dataset, place: Place) -> None:
    _put(
        ds,
        PatientName=f"SYNTHETIC^{place.hospital.upper()} {place.patient:04}",
        PatientID=place.patient_id,
        PatientBirthDate="",
        PatientSex="O",
        StudyInstanceUID=place.uid("study"),
        StudyDate="20000101",
        StudyTime="120000",
        AccessionNumber="",
        ReferringPhysicianName="",
        StudyID="SYNTHETIC",
        StudyDescription="SYNTHETIC phantom",
    )


def _series(ds: Dataset, scanner: Scanner, place: Place) -> None:
    _put(
        ds,
        Modality=scanner.modality,
        SeriesInstanceUID=place.uid("series"),
        SeriesNumber=1,
        SeriesDescription="SYNTHETIC phantom",
        BodyPartExamined="CHEST",
        Manufacturer="SYNTHETIC",
        ManufacturerModelName=f"Phantom {scanner.modality} {scanner.bits}",
        InstitutionName=f"SYNTHETIC {place.hospital}",
    )


def _image(ds: Dataset, scanner: Scanner, place: Place) -> None:
    centre, width = _window(scanner)
    _put(
        ds,
        SyntheticData="YES",
        ImageType=["DERIVED", "SECONDARY"],
        ImageComments=NOTE,
        DerivationDescription="SYNTHETIC: computed from a phantom",
        InstanceNumber=place.image,
        RescaleSlope=f"{scanner.slope:g}",
        RescaleIntercept=f"{scanner.intercept:g}",
        RescaleType="HU" if scanner.modality == "CT" else "US",
        WindowCenter=f"{centre:g}",
        WindowWidth=f"{width:g}",
        BurnedInAnnotation="NO",
        LossyImageCompression="00",
    )


def _window(scanner: Scanner) -> tuple[float, float]:
    """Centre and width in modality values: the lung window in CT, else all that can be stored."""
    if scanner.modality == "CT":
        return -400, 1500
    # As C.11.2.1.2.1 counts, a window over n values from 0 has its centre at n / 2.
    width = scanner.largest * scanner.slope + 1
    return scanner.intercept + width / 2, width


def _cr(ds: Dataset, scanner: Scanner, place: Place) -> None:
    _put(
        ds,
        ViewPosition="PA",
        PatientOrientation=["L", "F"],
        ImagerPixelSpacing=[scanner.spacing, scanner.spacing],
        PixelSpacing=[scanner.spacing, scanner.spacing],
    )


def _dx(ds: Dataset, scanner: Scanner, place: Place) -> None:
    region, view = Dataset(), Dataset()
    _put(region, CodeValue="816094009", CodingSchemeDesignator="SCT", CodeMeaning="Chest")
    _put(view, CodeValue="399348003", CodingSchemeDesignator="SCT", CodeMeaning="antero-posterior")
    _put(
        ds,
        ImageType=["DERIVED", "SECONDARY", ""],
        PresentationIntentType="FOR PRESENTATION",
        PatientOrientation=["L", "F"],
        ImageLaterality="U",
        AnatomicRegionSequence=[region],
        ViewCodeSequence=[view],
        ViewPosition="AP",
        DetectorType="",
        ImagerPixelSpacing=[scanner.spacing, scanner.spacing],
        PixelIntensityRelationship="LOG",
        PixelIntensityRelationshipSign=-1,
        PresentationLUTShape="INVERSE" if scanner.photometric == "MONOCHROME1" else "IDENTITY",
        AcquisitionContextSequence=[],
    )


def _ct(ds: Dataset, scanner: Scanner, place: Place) -> None:
    """A coronal slice: rows run to the patient's left, columns to the feet."""
    left, top = ((n - 1) / 2 * scanner.spacing for n in (scanner.columns, scanner.rows))
    _put(
        ds,
        ImageType=["DERIVED", "SECONDARY", "AXIAL"],
        PatientPosition="HFS",
        FrameOfReferenceUID=place.uid("frame"),
        PositionReferenceIndicator="",
        PixelSpacing=[scanner.spacing, scanner.spacing],
        ImageOrientationPatient=[1, 0, 0, 0, 0, -1],
        ImagePositionPatient=[round(-left, 3), 5.0 * place.image, round(top, 3)],
        SliceThickness=5,
        KVP=120,
        AcquisitionNumber=1,
    )
