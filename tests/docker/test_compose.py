"""What the compose files promise, read from the files themselves."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedward_client.config import config_from, load_config

DOCKER = Path(__file__).resolve().parents[2] / "docker"
NAMES = ("aggregator", "hospital", "federation")
VERSION = tomllib.loads((DOCKER.parent / "pyproject.toml").read_text())["project"]["version"]
Service = dict[str, Any]


def services(name: str) -> dict[str, Service]:
    found: dict[str, Service] = yaml.safe_load((DOCKER / f"{name}.yaml").read_text())["services"]
    return found


ALL = [(f"{file}: {name}", one) for file in NAMES for name, one in services(file).items()]
every = pytest.mark.parametrize("service", [one for _, one in ALL], ids=[name for name, _ in ALL])


def is_step(service: Service) -> bool:
    return bool(service.get("restart") == "no")


def is_a(service: Service, role: str) -> bool:
    return str(service["image"]).startswith(f"fedward-{role}:") and not is_step(service)


def targets(service: Service) -> dict[str, tuple[str, str]]:
    """Place inside to where it comes from and how it is mounted."""
    found = {}
    for text in service.get("volumes", ()):
        source, place, mode = re.fullmatch(r"(\$\{[^}]+\}|[^:]+):([^:]+)(?::(ro))?", text).groups()  # type: ignore[union-attr]
        found[place] = (source, mode or "rw")
    return found


@every
def test_every_service_is_sealed(service: Service) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "devices", "pid", "ipc", "userns_mode"} & set(service)
    assert any(one.startswith("/tmp:") for one in service["tmpfs"])
    assert service["pids_limit"] > 0


@every
def test_every_image_is_pinned_to_this_release(service: Service) -> None:
    assert re.fullmatch(rf"fedward-(server|connector|trainer|importer):{VERSION}", service["image"])


@every
def test_what_stays_is_looked_after_and_a_step_ends(service: Service) -> None:
    if is_step(service):
        assert service["healthcheck"] == {"disable": True}
    else:
        command = service["healthcheck"]["test"]
        assert command[0] == "CMD" and command[2] == "health"


@every
def test_a_trainer_has_no_network_and_a_connector_no_data(service: Service) -> None:
    places = targets(service)
    if is_a(service, "trainer"):
        assert service["network_mode"] == "none"
        assert "networks" not in service and "ports" not in service
        assert places["/data/images"][1] == "ro"
        assert "/var/lib/fedward/connector" not in places
    if is_a(service, "connector"):
        assert set(places) == {"/etc/fedward", "/var/lib/fedward/connector", "/run/fedward"}
        assert places["/run/fedward"][1] == places["/etc/fedward"][1] == "ro"
        assert "ports" not in service and "deploy" not in service


def test_the_importer_has_the_pacs_and_the_images_and_nothing_of_the_others() -> None:
    content = yaml.safe_load((DOCKER / "hospital.yaml").read_text())
    importer = content["services"]["importer"]
    places = targets(importer)
    assert set(places) == {"/etc/fedward", "/data/images", "/var/lib/fedward/importer"}
    assert places["/etc/fedward"][1] == "ro" and places["/data/images"][1] == "rw"
    others = {n: one for n, one in content["services"].items() if n != "importer"}
    assert all(importer["networks"] != one.get("networks") for one in others.values())
    own = {source for source, _ in places.values()} - {places["/etc/fedward"][0]}
    shared = {source for one in others.values() for source, _ in targets(one).values()}
    assert own & shared == {places["/data/images"][0]}
    assert importer["profiles"] == ["pacs"] and "ports" not in importer
    assert content["networks"]["pacs"]["external"] is True


@pytest.mark.parametrize("prefix", ["hospital:", "federation:north", "federation:south"])
def test_a_hospitals_two_processes_share_the_socket_and_what_is_read_only(prefix: str) -> None:
    file, _, name = prefix.partition(":")
    both = [one for key, one in services(file).items() if key.startswith(name)]
    (trainer,) = (targets(one) for one in both if is_a(one, "trainer"))
    (connector,) = (targets(one) for one in both if is_a(one, "connector"))
    shared = {source for source, _ in trainer.values()} & {
        source for source, _ in connector.values()
    }
    assert {trainer[place] for place in ("/run/fedward",)}.pop()[0] in shared
    for place, (source, mode) in trainer.items():
        if source in shared and place != "/run/fedward":
            assert mode == "ro" and place == "/etc/fedward"


def test_no_two_hospitals_share_anything_of_their_own() -> None:
    found: dict[str, set[str]] = {"north": set(), "south": set()}
    for name, one in services("federation").items():
        side = name.split("-")[0]
        if side in found and not is_step(one):
            found[side] |= {source for source, _ in targets(one).values()}
    assert not found["north"] & found["south"]


def test_a_hospital_has_a_gpu_and_keeps_its_state_in_volumes() -> None:
    content = yaml.safe_load((DOCKER / "hospital.yaml").read_text())
    (device,) = content["services"]["trainer"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
    assert set(content["volumes"]) == {"trainer", "connector", "importer", "socket"}


def test_only_the_hospitals_port_of_the_aggregator_is_open() -> None:
    (aggregator,) = services("aggregator").values()
    assert aggregator["ports"] == ["9443:9443"]
    network = yaml.safe_load((DOCKER / "federation.yaml").read_text())["networks"]
    assert network == {"between": {"internal": True}}


@pytest.mark.parametrize("file", ["aggregator", "hospital", "federation"])
def test_volumes_that_are_used_are_declared(file: str) -> None:
    content = yaml.safe_load((DOCKER / f"{file}.yaml").read_text())
    used = {
        source
        for one in content["services"].values()
        for source, _ in targets(one).values()
        if not source.startswith((".", "$"))
    }
    assert used == set(content["volumes"])


def test_the_example_configurations_are_valid_and_have_the_places_of_the_images() -> None:
    config = load_config(DOCKER / "site.toml", datasets_here=False)
    assert config.server is not None
    trainer = targets(services("hospital")["trainer"])
    connector = targets(services("hospital")["connector"])
    assert str(config.site.state) in trainer and str(config.server.state) in connector
    assert str(config.trainer.socket.parent) in {*trainer} & {*connector}
    assert str(config.importer.state) in targets(services("hospital")["importer"])
    assert str(config.datasets["images"].root) in trainer


def test_the_federations_hospitals_have_a_valid_configuration() -> None:
    text = (DOCKER / "federation" / "site.toml").read_text()
    text = text.replace("@NAME@", "north").replace("@COORDINATOR@", "0" * 64)
    config = config_from(tomllib.loads(text), Path("/etc/fedward"), datasets_here=False)
    assert config.policy.require_privacy and not config.trainer.allow_networked_trainer


def test_every_script_that_a_step_runs_is_there() -> None:
    for name, one in services("federation").items():
        if is_step(one):
            script = one["command"][0].removeprefix("/")
            assert (DOCKER / script).read_text().count("set -eu") == 1, name
