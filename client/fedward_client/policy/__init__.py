"""What studies may do at a hospital: limits, decisions, approvals, quiet hours."""
