"""The gate: what leaves a hospital is what the plan names, and nothing else."""

from fedward_client.egress.gate import Gate, expected_arrays, refusal_for

__all__ = ["Gate", "expected_arrays", "refusal_for"]
