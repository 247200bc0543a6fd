"""Synthetic hospitals as DICOM files, to try a study without any patient."""

from fedward_simulation.cohort.facts import CohortFacts, HospitalFacts
from fedward_simulation.cohort.write import write_cohort

__all__ = ["CohortFacts", "HospitalFacts", "write_cohort"]
