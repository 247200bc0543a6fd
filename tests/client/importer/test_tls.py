"""Fetching and storing over TLS: with certificates both ways, and with a bearer token."""

from __future__ import annotations

import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile_pacs import Pacs, encode, files, hospital, web
from live_federation import write_certificates
from orthanc import Orthanc, start_orthanc, tls_door

from fedward.errors import PacsError
from fedward_client.doctor.pacs import examine_pacs
from fedward_client.importer.fetch import fetch_dataset
from fedward_client.importer.store import store_results

WAYS = {"dicomweb": ("dicomweb", {}), "get": ("dimse", {}), "move": ("dimse", {"retrieve": "move"})}


def certificates(folder: Path) -> Path:
    folder.mkdir()
    write_certificates(folder)
    (folder / "server.key").chmod(0o600)
    return folder


@pytest.fixture(scope="module")
def secured() -> Iterator[Orthanc]:
    """Orthanc with TLS on every port, for whoever has a certificate of its authority."""
    with tempfile.TemporaryDirectory() as folder:
        process, made = start_orthanc(Path(folder), certificates(Path(folder) / "tls"))
        path = Path(folder) / "x.dcm"
        for one in hospital(1, 3):
            path.write_bytes(encode(one))
            made.store(path)
        with tls_door(made):
            yield made
        process.kill()  # it keeps nothing
        process.wait()


def results(out: Path) -> Path:
    (out / "dicom").mkdir(parents=True)
    (out / "predictions.json").write_text("{}")
    one = hospital(1, 1)[0]
    one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = "1.2.826.0.97.5.1"
    one.SeriesInstanceUID, one.Modality = "1.2.826.0.97.5", "SEG"
    (out / "dicom" / "a.seg.dcm").write_bytes(encode(one))
    return out


def examined(config: Any) -> list[str]:
    return [
        f"{one.status} {one.name}: {one.found}" for one in examine_pacs("P", config.pacs["main"])
    ]


@pytest.mark.integration
@pytest.mark.parametrize("way", WAYS)
def test_certificates_both_ways(way: str, secured: Orthanc, make_site: Any, tmp_path: Path) -> None:
    source, more = WAYS[way]
    config = make_site(secured.site(source, **more))
    lines = examined(config)
    assert any("TLS: TLSv1." in line for line in lines)
    assert all(line.startswith("pass") for line in lines)
    outcome = fetch_dataset(config, "chest")
    assert (outcome.fetched, outcome.whole) == (3, True) and len(files(config)) == 3
    stored = store_results(config, "main", results(tmp_path / "out"))
    assert stored.whole and stored.stored == 1


@pytest.mark.integration
@pytest.mark.parametrize("source", ["dicomweb", "dimse"])
def test_the_pacs_wants_a_certificate(source: str, secured: Orthanc, make_site: Any) -> None:
    table = secured.site(source)
    bare = "\n".join(k for k in table.splitlines() if not k.startswith(("certificate", "key")))
    config = make_site(bare + "\n")
    assert examined(config)[-1].startswith("fail")
    with pytest.raises(PacsError):
        fetch_dataset(config, "chest")


@pytest.mark.integration
@pytest.mark.parametrize("source", ["dicomweb", "dimse"])
def test_another_authority_and_another_name(
    source: str, secured: Orthanc, make_site: Any, tmp_path: Path
) -> None:
    other = certificates(tmp_path / "other") / "ca.pem"
    assert secured.certificates is not None
    own = str(secured.certificates / "ca.pem")
    name = secured.site(source).replace("127.0.0.1", "127.0.0.2")
    for table, why in (
        (secured.site(source).replace(own, str(other)), "certificate signature failure"),
        (name, "IP address mismatch"),
    ):
        config = make_site(table)
        line = examined(config)[-1]
        assert line.startswith("fail P: TLS: ") and why in line
        with pytest.raises(PacsError):
            fetch_dataset(config, "chest", dry_run=True)
        with pytest.raises(PacsError):
            store_results(config, "main", results(tmp_path / why.replace(" ", "-")), pause=0.001)


def test_a_bearer_token(make_site: Any, tmp_path: Path) -> None:
    """Right, wrong, and not there; to a server that has no certificate of the authority, never."""
    folder = certificates(tmp_path / "tls")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")

    def wrap(server: Any) -> None:
        server.socket = context.wrap_socket(server.socket, server_side=True)

    token = tmp_path / "token"
    token.write_text("right\n")
    token.chmod(0o600)
    pacs = Pacs(hospital(1), token="right")
    with web(pacs, wrap) as table:
        table += f'ca = "{folder / "ca.pem"}"\n'
        config = make_site(f'{table}token = "token"\n')
        assert all(line.startswith("pass") for line in examined(config))
        outcome = fetch_dataset(config, "chest")
        assert (outcome.fetched, outcome.whole) == (5, True)
        out = results(tmp_path / "out")
        assert store_results(config, "main", out).stored == 1
        token.write_text("wrong")
        for site in (config, make_site(table)):
            assert "HTTP 401" in examined(site)[-1]
            with pytest.raises(PacsError, match="does not accept the token"):
                fetch_dataset(site, "chest")
    assert len(pacs.objects) == 6
