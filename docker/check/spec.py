"""Compose files: variables put in, and held against the compose specification."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import jsonschema
import yaml
from images import ROOT, run

FILES: Final = ("aggregator", "hospital", "federation")
# The first has the specification's JSON schema, the second a parser of today's specification.
_PACKAGES: Final = ("docker-compose==1.29.2", "compose-spec==0.2.1")
_VARIABLE: Final = re.compile(r"\$\{(\w+)(?::?([-?])([^}]*))?\}")


def load(path: Path, variables: Mapping[str, str]) -> dict[str, Any]:
    """A compose file with its anchors, merges and variables put in."""

    def put_in(found: re.Match[str]) -> str:
        name, kind, rest = found.groups()
        if value := variables.get(name):
            return value
        if kind == "?":
            raise SystemExit(f"{path.name} needs {name}: {rest}")
        return rest or ""

    text = "\n".join(line.partition("  # ")[0] for line in path.read_text("utf-8").splitlines())
    content: dict[str, Any] = yaml.safe_load(_VARIABLE.sub(put_in, text))
    return {key: value for key, value in content.items() if not key.startswith("x-")}


def check_all(work: Path) -> None:
    """Hold every compose file against the specification."""
    folder = work / "spec"
    if not folder.exists():
        run("pip", "install", "--quiet", "--no-deps", "--target", folder, *_PACKAGES)
    schema = json.loads((folder / "compose/config/compose_spec.json").read_text("utf-8"))
    # The schema of 2021 lacks the project's name, which the specification has since 2022.
    schema["properties"]["name"] = {"type": "string"}
    sys.path.append(str(folder))
    import compose_spec

    for name in FILES:
        content = load(ROOT / "docker" / f"{name}.yaml", {"FEDWARD_IMAGES": "/data", **os.environ})
        jsonschema.Draft7Validator(schema).validate(content)
        parsed = compose_spec.PyCompose.from_json(json.dumps(content))
        parsed.validate()
        print(f"{name}.yaml: {len(parsed)} services, as the specification wants them")
