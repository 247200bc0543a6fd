"""The policy's page: its example loads, and every rule and option is on it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from click import Group

from fedward.rule_codes import RULES, RuleCode
from fedward.tasks.base import permissions
from fedward.tasks.classification import CLASSIFICATION
from fedward_client.audit import AuditLog, audit_folder, audit_key
from fedward_client.cli import app
from fedward_client.config import DatasetSection
from fedward_client.data.options import LabelSection
from fedward_client.policy.settings import PolicySection
from fedward_client.secret import site_secret

PAGE = (Path(__file__).parents[3] / "docs" / "policy.md").read_text("utf-8")
PLAIN = " ".join(PAGE.split())
GROUPS = permissions(CLASSIFICATION.metrics, lambda metric: metric.arrays)


def test_the_example_is_a_policy() -> None:
    text = re.findall(r"```toml\n(.+?)```", PAGE, re.DOTALL)[0]
    content = tomllib.loads(text.replace("3f6a…", "3f6a" * 16))["policy"]
    content = {key: tuple(v) if isinstance(v, list) else v for key, v in content.items()}
    assert PolicySection.model_validate(content).studies[0].dataset == "chest"


@pytest.mark.parametrize("code", RULES, ids=lambda code: code.wire)
def test_each_rule_is_on_the_page_with_keys_that_exist(code: RuleCode) -> None:
    row = re.search(rf"^\| {re.escape(code.text)} \| (.+) \|$", PAGE, re.MULTILINE)
    assert row
    known = {
        *PolicySection.model_fields,
        "[[policy.studies]]",
        "trainer.allow_networked_trainer",
        "trainer.allow_unconfined_connector",
        *DatasetSection.model_fields,
        *(f"labels.{key}" for key in LabelSection.model_fields),
    }
    for key in re.findall(r"`([^`]+)`", row[1]):
        assert key in known or key.startswith("fedward-client ")


@pytest.mark.parametrize("group", GROUPS)
def test_each_group_of_counts_is_on_the_page_with_its_figures(group: str) -> None:
    row = re.search(rf"^\| {group} \| (.+) \|$", PAGE, re.MULTILINE)
    assert row and set(re.findall(r"`(\w+)`", row[1])) == GROUPS[group]


def test_each_option_of_audit_is_on_the_page() -> None:
    top = typer.main.get_command(app)
    assert isinstance(top, Group)
    audit = top.commands["audit"]
    assert isinstance(audit, Group)
    for name, command in audit.commands.items():
        assert f"`audit {name}`" in PLAIN
        for parameter in command.params:
            for option in parameter.opts:
                assert f"| `{option}` |" in PAGE


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "fedward_client.cli",
        "audit",
        *arguments,
        "--config",
        str(site),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.integration
def test_audit_from_the_command_line(site: Path) -> None:
    state = site.parent / "state"
    assert run(site, "verify").returncode == 21  # nothing was written yet
    site_secret(state)
    log = AuditLog(audit_folder(state), audit_key(state))
    for number in range(3):
        log.append("sent", study="s-1", round=number)
    whole = json.loads(run(site, "verify", "--json").stdout)
    assert (whole["whole"], whole["entries"]) == (True, 3)
    shown = json.loads(run(site, "show", "--last", "2", "--json").stdout)["entries"]
    assert [one["fields"]["round"] for one in shown] == [1, 2]
    assert shown[-1]["hash"] == whole["hash"]
    path = audit_folder(state) / "audit.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"round":1', b'"round":7'))
    found = run(site, "verify")
    assert (found.returncode, "edited at 2" in found.stderr) == (21, True)
    assert "Traceback" not in found.stderr and str(site.parent) not in found.stderr
    (state / "site.secret").rename(state / "elsewhere")
    lost = run(site, "verify")
    assert (lost.returncode, "secret must be there" in lost.stderr) == (19, True)
    assert not (state / "site.secret").exists()
