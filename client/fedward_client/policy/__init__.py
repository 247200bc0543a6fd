"""The site's policy on studies: limits, decisions, approvals, quiet hours."""
