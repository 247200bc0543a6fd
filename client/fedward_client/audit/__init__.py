"""The site's audit log: an append-only, hash-chained record of orders, decisions and answers."""

from fedward_client.audit.log import AuditLog, audit_folder, audit_key
from fedward_client.audit.verify import Fault, Verification, verify

__all__ = ["AuditLog", "Fault", "Verification", "audit_folder", "audit_key", "verify"]
