"""Flower's error codes of undelivered messages, and the error that its strategies raise."""

from flwr.app.exception import AppExitException
from flwr.common.constant import ErrorCode

__all__ = ["AppExitException", "ErrorCode"]
