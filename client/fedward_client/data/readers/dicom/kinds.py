"""What kind of image a DICOM header describes: reports and labels that show no patient, what a
site selects, and how far it is de-identified."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Self

from fedward import rule_codes
from fedward.plan.image_filter import ATTRIBUTES, accepts
from fedward_client.data.quiet import quiet

if TYPE_CHECKING:
    import pydicom

TAGS: Final = (
    *ATTRIBUTES.values(),
    "SOPClassUID",
    "Modality",
    "ConversionType",
    "BurnedInAnnotation",
    "PatientIdentityRemoved",
    "RecognizableVisualFeatures",
)
PROCESSING: Final = "FOR PROCESSING"
PRESENTATION: Final = "FOR PRESENTATION"

_SCOUTS: Final = frozenset({"LOCALIZER", "SCOUT"})
_MOSAIC: Final = "MOSAIC"  # Siemens: the slices of a volume as tiles of one picture
_SLIDES: Final = "1.2.840.10008.5.1.4.1.1.77.1.6"  # VL Whole Slide Microscopy (PS3.3, C.8.12.4.1.1)
_MICROSCOPY: Final = "SM"  # modality; converters write slides as secondary captures too
_SCANNED: Final = "SD"  # conversion type (PS3.3, C.8.6.1): a document of paper
_LABELS: Final = frozenset({"LABEL", "OVERVIEW", "THUMBNAIL"})
# Code strings of ImageType, of vendors too, without blanks and marks.
_CAPTURES: Final = frozenset(
    {"SCREENSAVE", "SCREENSHOT", "SCREENCAPTURE", "DOSEREPORT", "DOSEINFO", "PATIENTPROTOCOL"}
)
_REPORTS: Final = re.compile(
    r"(?<![a-z])((dose|dosis)[ _-]?(report|info|information|record|summary|page|sheet)|"
    r"(patient|exam)[ _-]protocol|screen[ _-]?(save|shot|capture|grab)s?)(?![a-z])",
    re.IGNORECASE,
)

IdentityRule = Literal["keep", "leave-out", "refuse"]


@dataclass(frozen=True)
class ImageOptions:
    """Which images of a dataset are taken.

    Attributes
    ----------
    patterns : mapping
        Of :mod:`fedward.plan.image_filter`.
    keep : frozenset of str
        What is taken although it is left out without a word: "slide-labels", "captures".
    burned_in, identity, visual_features : str
        What becomes of images with text burnt in, whose patient's identity is not said to be
        removed, and with a recognisable face.
    """

    patterns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    keep: frozenset[str] = frozenset()
    burned_in: IdentityRule = "keep"
    identity: IdentityRule = "keep"
    visual_features: IdentityRule = "keep"

    @property
    def rules(self) -> dict[str, IdentityRule]:
        """Each rule by the reason for which it leaves an image out."""
        return {
            rule_codes.BURNED_IN: self.burned_in,
            rule_codes.IDENTIFIED: self.identity,
            rule_codes.RECOGNIZABLE: self.visual_features,
        }

    @property
    def refused(self) -> frozenset[str]:
        """Reasons that no study may come across."""
        return frozenset(reason for reason, rule in self.rules.items() if rule == "refuse")


@dataclass(frozen=True)
class Kind:
    """What a header says of its image.

    Attributes
    ----------
    values : mapping
        Of :data:`fedward.plan.image_filter.ATTRIBUTES`.
    object, modality, conversion : str
        SOP class UID; modality; how a secondary capture was made.
    burned_in, identity_removed, visual_features : str
        "YES", "NO" or what else stands there; "" where nothing does.
    """

    values: Mapping[str, tuple[str, ...]]
    object: str
    modality: str
    conversion: str
    burned_in: str
    identity_removed: str
    visual_features: str

    @classmethod
    def of(cls, header: pydicom.Dataset) -> Self:
        """Of the file with this header."""
        flags = (str(header.get(name) or "").strip().upper() for name in TAGS[-5:])
        values = {key: _values(header, name) for key, name in ATTRIBUTES.items()}
        return cls(values, str(header.get("SOPClassUID") or ""), *flags)

    @property
    def intent(self) -> str:
        """For presentation or for processing; "" where neither is said."""
        return " ".join(self.values["intent"]).upper()

    def reason(self, options: ImageOptions) -> str:
        """Why the image is left out; "" if it is not."""
        return self._no_image(options.keep) or self.identified(options) or self._other(options)

    def identified(self, options: ImageOptions) -> str:
        """Why the site's rules for de-identification leave it out; "" if they do not."""
        found = {
            rule_codes.BURNED_IN: self.burned_in == "YES",
            rule_codes.IDENTIFIED: self.identity_removed != "YES",
            rule_codes.RECOGNIZABLE: self.visual_features == "YES",
        }
        rules = options.rules
        return next((why for why, so in found.items() if so and rules[why] != "keep"), "")

    def _other(self, options: ImageOptions) -> str:
        return "" if accepts(options.patterns, self.values) else rule_codes.NOT_SELECTED

    def _no_image(self, keep: frozenset[str]) -> str:
        words = {value.upper() for value in self.values["image_type"]}
        from fedward_client.data.readers.dicom.sniff import NO_PICTURES  # brings pydicom

        if self.object in NO_PICTURES:
            return rule_codes.OTHER_MODALITY
        if words & _SCOUTS:
            return rule_codes.SCOUT
        if _MOSAIC in words:
            return rule_codes.MOSAIC
        slide = self.object == _SLIDES or self.modality == _MICROSCOPY
        if slide and words & _LABELS and "slide-labels" not in keep:
            return rule_codes.SLIDE_LABEL
        plain = {"".join(filter(str.isalnum, word)) for word in words}
        report = plain & _CAPTURES or any(map(_REPORTS.search, self.values["series_description"]))
        report = report or self.conversion == _SCANNED
        return rule_codes.CAPTURE if report and "captures" not in keep else ""


def _values(header: pydicom.Dataset, name: str) -> tuple[str, ...]:
    value = header.get(name)
    several = [value] if isinstance(value, str) or value is None else list(value)
    return tuple(text for one in several if (text := str(one or "").strip()))


def read_kind(path: Path) -> Kind:
    """What a file's header says of its image."""
    import pydicom  # a configuration is read without it

    with quiet():
        tags = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[*TAGS], force=True)
        return Kind.of(tags)
