"""The command line and the operator API: what is typed, sent, answered and told."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from fedward.console import run_command
from fedward.errors import AccessError, ConfigError, FedwardError, PlanError, ServiceError
from fedward_server.cli import app
from fedward_server.cli_profile import ApiClient, CliProfile, at
from fedward_server.setup import SetupResult

STUDIES = Path(__file__).parents[2] / "studies"
URL = "https://aggregator.example.org"
Answer = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Each call as method and raw path, answered with an empty object."""
    calls: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        calls.append(f"{request.method} {request.url.raw_path.decode()}")
        return httpx.Response(200, json={"fingerprint": "f", "state": "s", "id": "i"})

    connect(monkeypatch, answer)
    yield calls


def connect(monkeypatch: pytest.MonkeyPatch, answer: Answer) -> None:
    def client(**more: Any) -> httpx.Client:
        more.pop("verify")
        return real(transport=httpx.MockTransport(answer), **more)

    real = httpx.Client
    monkeypatch.setattr("fedward_server.cli_profile.httpx.Client", client)


def call(*words: object) -> Any:
    return CliRunner().invoke(app, [*map(str, words), "--url", URL, "--token", "t"])


NAMED = [
    (("site", "remove"), "DELETE /v1/sites/{}"),
    (("site", "release"), "POST /v1/sites/{}/release"),
    (("token", "revoke"), "DELETE /v1/tokens/{}"),
    (("study", "show", "--json"), "GET /v1/studies/{}"),
    (("study", "stop"), "POST /v1/studies/{}/stop"),
]


@pytest.mark.parametrize(("words", "path"), NAMED, ids=lambda value: str(value))
def test_a_name_is_one_part_of_the_path_whatever_is_in_it(
    asked: list[str], words: tuple[str, ...], path: str
) -> None:
    for name, quoted in (("north?x", "north%3Fx"), ("a#b", "a%23b"), ("ä %41", "%C3%A4%20%2541")):
        call(*words[:2], name, *words[2:])
        assert asked.pop() == path.format(quoted)
    for name in ("", ".", "..", "north/release"):
        done = call(*words[:2], name, *words[2:])
        assert isinstance(done.exception, ConfigError), done.output
    assert asked == []


def test_a_part_that_is_no_text_is_no_traceback() -> None:
    assert at("sites", "\udcff") == "/v1/sites/%3F"


@pytest.mark.parametrize("body", [b"<html>", b"", b"\xff"])
def test_an_answer_that_is_no_json_is_another_address(
    monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    connect(monkeypatch, lambda request: httpx.Response(200, content=body))
    client = ApiClient(CliProfile(URL, "t", None))
    with pytest.raises(ServiceError, match="an aggregator's API"):
        client.call("GET", "/v1/sites")
    if body:
        with pytest.raises(ServiceError, match="an aggregator's API"):
            list(client.lines("/v1/x"))


def failure(*words: object) -> FedwardError:
    error = CliRunner().invoke(app, list(map(str, words))).exception
    assert isinstance(error, FedwardError), repr(error)
    return error


def test_an_authority_that_is_none_is_told(tmp_path: Path, made: SetupResult) -> None:
    junk = tmp_path / "ca.crt"
    junk.write_text("no PEM")
    for path in (junk, tmp_path / "none.crt"):
        error = failure("site", "list", "--url", URL, "--token", "t", "--ca", path)
        assert isinstance(error, ConfigError) and "PEM file" in str(error)
    (made.config.parent / "tls" / "ca.crt").write_text("damaged")
    assert "PEM file" in str(failure("site", "list", "--config", made.config))


def test_a_token_that_is_none_is_told(made: SetupResult) -> None:
    for token in ("é", "two words", "a\nb"):
        error = failure("site", "list", "--url", URL, "--token", token)
        assert isinstance(error, AccessError) and "token" in str(error)
    (made.config.parent / "keys" / "local.token").unlink()
    error = failure("site", "list", "--config", made.config)
    assert isinstance(error, ConfigError) and "local.token" in str(error)


def test_an_address_that_is_none_is_told() -> None:
    for url in ("https://[::1", "ftp://x", "https://a b"):
        assert isinstance(failure("site", "list", "--url", url, "--token", "t"), ServiceError)


@pytest.mark.parametrize("value", ["2026-01-02", "12:00:00", "[2026-01-02T03:04:05Z]", "nan"])
def test_a_plan_with_a_date_in_it_is_told(tmp_path: Path, asked: list[str], value: str) -> None:
    plan = tmp_path / "study.toml"
    plan.write_text(f"[study]\nwhen = {value}\n")
    error = failure("study", "submit", plan, "--sites", "a", "--url", URL, "--token", "t")
    assert isinstance(error, PlanError) and "no date" in str(error)
    assert asked == []


def test_a_ready_study_is_submitted_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        return httpx.Response(201, json={"id": "pneumonia-1"})

    connect(monkeypatch, answer)
    words = ("study", "submit", "pneumonia", "--sites", "a, b,", "--evaluate-only", "c")
    assert call(*words).exit_code == 0
    (body,) = sent
    assert body["plan"] == tomllib.loads((STUDIES / "pneumonia.toml").read_text("utf-8"))
    assert (body["sites"], body["evaluate_only"]) == (["a", "b"], ["c"])
    error = call("study", "submit", "pneumonja", "--sites", "a").exception
    assert isinstance(error, PlanError) and "ready studies are blood-cells" in str(error)
    assert len(sent) == 1


def line(seq: int, kind: str = "joined", **payload: Any) -> bytes:
    told = {"seq": seq, "at": "2026-01-02T03:04:05", "kind": kind, "payload": payload}
    return json.dumps(told).encode() + b"\n"


class Breaking(httpx.SyncByteStream):
    """Some events, and a connection that breaks."""

    def __init__(self, lines: list[bytes], error: bool) -> None:
        self.lines, self.error = lines, error

    def __iter__(self) -> Iterator[bytes]:
        yield from self.lines
        if self.error:
            raise httpx.RemoteProtocolError("incomplete")


def test_a_restart_of_the_service_ends_no_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    queries: list[str] = []
    down = iter([False, True, True, False])

    def answer(request: httpx.Request) -> httpx.Response:
        queries.append(request.url.query.decode())
        if next(down):
            raise httpx.ConnectError("down")
        if len(queries) == 1:
            stream = Breaking([line(1, site="north"), line(2, site="south")], error=True)
            return httpx.Response(200, stream=stream)
        ended = line(3, "state", state="finished", reason="")
        return httpx.Response(200, stream=Breaking([ended], error=False))

    connect(monkeypatch, answer)
    monkeypatch.setattr("fedward_server.commands.follow._AGAIN", 0.0)
    done = call("study", "watch", "tiny-1")
    assert done.exit_code == 0, done.exception
    assert [one.rpartition("=")[2] for one in queries] == ["0", "2", "2", "2"]
    assert [done.output.count(word) for word in ("north", "south", "finished")] == [1, 1, 1]


def test_a_round_without_an_evaluation_shows_the_last_figure_with_its_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures: list[dict[str, float | None]] = [
        {},
        {"accuracy": 0.5, "auc": 0.75},
        {},
        {"auc": None},
        {"accuracy": 0.5, "auc": None},
    ]

    def told(round_: int, validation: dict[str, float | None]) -> bytes:
        rest = {
            "stage": "all",
            "seconds": 1.0,
            "train_loss": 0.5,
            "sites": {"a": {}},
            "failures": [],
        }
        return line(round_, "round", round=round_, validation=validation, **rest)

    def answer(request: httpx.Request) -> httpx.Response:
        if not request.url.path.endswith("/events"):
            plan = json.dumps({"metrics": {"primary": "auc"}})
            return httpx.Response(200, json={"study": {"plan": plan}})
        rounds = [told(number, one) for number, one in enumerate(figures, 1)]
        ended = line(9, "state", state="finished", reason="")
        return httpx.Response(200, stream=Breaking([*rounds, ended], error=False))

    connect(monkeypatch, answer)
    lines = call("study", "watch", "tiny-1").output.splitlines()
    shown = [one.partition("1.0 s: ")[2] for one in lines[:5]]
    assert shown == [
        "loss 0.500; a",
        "auc 0.750, accuracy 0.500; a",
        "loss 0.500, auc 0.750 in round 2; a",
        "loss 0.500, auc 0.750 in round 2; a",
        "auc not known, accuracy 0.500; a",
    ]


def test_a_watch_waits_neither_for_ever_nor_for_what_was_never_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries: list[int] = []

    def answer(request: httpx.Request) -> httpx.Response:
        tries.append(1)
        if "after=0" in str(request.url) and came:
            return httpx.Response(200, stream=Breaking([line(1, site="north")], error=True))
        raise httpx.ConnectError("down")

    connect(monkeypatch, answer)
    monkeypatch.setattr("fedward_server.commands.follow._AGAIN", 0.01)
    monkeypatch.setattr("fedward_server.commands.follow._PATIENCE", 0.1)
    for came in (True, False):
        tries.clear()
        assert isinstance(call("study", "watch", "tiny-1").exception, ServiceError)
        assert (len(tries) > 3) == came


def test_the_certificates_names_are_a_list(
    made: SetupResult, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["certificate", "show", "--config", str(made.config), "--json"]
    monkeypatch.setattr(sys, "argv", ["fedward-server", *words])
    with pytest.raises(SystemExit):
        run_command(app)
    told = json.loads(capsys.readouterr().out)
    assert isinstance(told["hosts"], list) and "aggregator.example.org" in told["hosts"]
    assert told["expires"].startswith("20") and len(told["fingerprint"]) == 64
