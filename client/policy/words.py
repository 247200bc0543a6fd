"""The sentences with which a policy refuses; fixed, so that they may leave the site."""

from __future__ import annotations

from typing import Final

COORDINATOR: Final = "the coordinator must be one that the site accepts"
STUDY: Final = "the study must be one that the site serves"
MODEL: Final = "the network must be one that the site allows"
PARAMETERS: Final = "the network must not have more parameters than the site allows"
UPLOAD: Final = "an update must not be larger than the site allows"
PRIVATE: Final = "updates must be differentially private"
EPSILON: Final = "ε must not be above what the site allows a study"
COHORT_EPSILON: Final = "ε must not be above what the site allows all studies together"
EVALUATION_EPSILON: Final = "ε of evaluations must not be above what the site allows"
DELTA: Final = "δ must not be above what the site allows"
COHORT: Final = "the site must have a frozen cohort for the study"
PATIENTS: Final = "the site must have as many patients as its policy asks for"
PER_CLASS: Final = "the site must have as many patients of each class as its policy asks for"
PATIENT_KEY: Final = (
    "a private study must have images that name their patients, or a site that takes each image "
    "for a patient"
)

SITES: Final = "a round must ask as many sites as the site's policy asks for"

PENDING: Final = "the study must be approved at the site; it waits for that"
DENIED: Final = "the study must be approved at the site; it was denied"
PAUSED: Final = "the site must not be paused"
QUIET: Final = "the site must be outside its quiet hours"
WITHHELD: Final = "what the site counts must be enough, and allowed, to leave it"

NETWORKED: Final = "the trainer must have no network before it opens a dataset"

STOPPED: Final = "the site must stay up until the order is carried out"
GIVEN_UP: Final = "the order must not be given up by who sent it"

STOPS_TRAINER: Final = "an order must not stop the trainer, and this one did before"
CONNECTOR: Final = "the connector must not be able to read images while an order is carried out"

UNWRITTEN: Final = "the audit log must be writable"
MEMORY: Final = "the device must have memory for one image"

FIX: Final = "Change the plan, or ask the site's security officer"

RULES: Final = (
    COORDINATOR,
    STUDY,
    MODEL,
    PARAMETERS,
    UPLOAD,
    PRIVATE,
    EPSILON,
    COHORT_EPSILON,
    DELTA,
    COHORT,
    PATIENTS,
    PER_CLASS,
    SITES,
    PENDING,
    DENIED,
    PAUSED,
    QUIET,
    WITHHELD,
    NETWORKED,
    EVALUATION_EPSILON,
    CONNECTOR,
    PATIENT_KEY,
)
