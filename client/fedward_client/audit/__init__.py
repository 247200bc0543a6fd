"""The site's audit log: what was asked, what was decided, what left, provably unchanged."""

from fedward_client.audit.log import AuditLog, audit_folder, audit_key
from fedward_client.audit.verify import Fault, Verification, verify

__all__ = ["AuditLog", "Fault", "Verification", "audit_folder", "audit_key", "verify"]
