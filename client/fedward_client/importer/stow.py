"""Send objects to a PACS by STOW-RS, with dicomweb-client."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any, Final

import pydicom
import requests

from fedward.errors import PacsError
from fedward_client.importer.dicomweb import ANSWER, open_client, open_http, say_http, told
from fedward_client.importer.sender import Item, Refusal, refusal
from fedward_client.importer.settings import PacsSection
from fedward_client.importer.source import Throttle

_ITS_OWN: Final = frozenset({400, 409, 413, 415, 422})  # about the object that was sent
_LATER: Final = frozenset({408, 425, 429})


class StowSender:
    """See :class:`fedward_client.importer.sender.Sender`."""

    def __init__(self, pacs: PacsSection, throttle: Throttle) -> None:
        self._throttle = throttle
        self._http = open_http(pacs, throttle, ANSWER)
        self._client = open_client(pacs, self._http)

    def has(self, item: Item) -> bool:
        """Ask by QIDO-RS."""
        match = {"SOPInstanceUID": item.uid}
        with told():
            found = self._client.search_for_instances(
                item.study, item.series, fields=["SOPInstanceUID"], search_filters=match
            )
            return any(pydicom.Dataset.from_json(one).SOPInstanceUID == item.uid for one in found)

    def send(self, item: Item) -> Refusal | None:
        """Send by STOW-RS."""
        self._throttle.take(item.path.stat().st_size)
        made = pydicom.dcmread(item.path)
        try:
            with told():
                return self._sent(item, made)
        except PacsError:
            self.close()
            raise

    def _sent(self, item: Item, made: pydicom.Dataset) -> Refusal | None:
        try:
            return _failed(self._client.store_instances([made], item.study))
        except requests.HTTPError as error:
            code = error.response.status_code
            if code >= 500 or code in _LATER:
                raise
            with suppress(ValueError, TypeError, KeyError, AttributeError):
                answer = pydicom.Dataset.from_json(json.loads(error.response.content))
                if code in _ITS_OWN and answer.get("FailedSOPSequence"):
                    return _failed(answer)
            return Refusal(*say_http(code), every=code not in _ITS_OWN)

    def close(self) -> None:
        """End the connection; the session opens another by itself."""
        self._http.close()


def _failed(answer: Any) -> Refusal | None:
    """What the answer says of the only object that was sent."""
    wrong = answer.get("FailedSOPSequence")
    return refusal(int(wrong[0].get("FailureReason", 0x0110))) if wrong else None
