"""The page of the operator API, from its OpenAPI description.

``python -m tools.docs.api > docs/api.md`` writes it anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import create_engine

from fedward.flower.control_client import ControlClient
from fedward_server.api.app import build_api
from fedward_server.api.health import Health
from fedward_server.config import ServerConfig
from fedward_server.enrolment import Enrolment
from fedward_server.registry import Registry
from tools.docs.schema_tables import anchor

Schema = Mapping[str, Any]
_HEAD: Final = """# The operator API

HTTPS with JSON on port 9444 of [the aggregator](aggregator.md). `fedward-server` is its client;
programs may be others. It describes itself at `/openapi.json`; this page is generated from that.

A call carries `Authorization: Bearer TOKEN`. Tokens are made with `fedward-server token create` and
have a role: `viewer` reads, `coordinator` also submits and steers studies, `admin` also enrols
sites and makes tokens. Calls are limited in rate, per token and, without a valid one, per token
prefix and network; a valid token is never locked by the failures of others. Each call that may
change something is in the audit log (`GET /v1/audit`), and of calls without a valid token at most
one entry a minute that counts them. The token is looked at before the body is read. A request says
how long it is (`Content-Length`) and has at most `limits.request_bytes`; its headers have 16 KiB.

```sh
curl --cacert ca.crt --header "Authorization: Bearer $FEDWARD_TOKEN" \\
  https://aggregator.example.org:9444/v1/studies
```

A call that fails answers with a [problem](#problem): the rule, the value, the next step, and the
[exit code](errors.md) with which the command line ends.

| status | when |
|---|---|
"""
_WORDS: Final = {
    "study": "the study's id",
    "name": "of the site or the token",
    "wish": "`pause`, `resume` or `stop`",
    "limit": "so many, at most 10,000",
}
_TAGS: Final = {
    "health": "Health, without a token",
    "sites": "Sites",
    "studies": "Studies",
    "access": "Tokens and audit",
}


def page() -> str:
    """The page in Markdown."""
    told = description()
    lines = [_HEAD + "\n".join(_statuses(told)), ""]
    for tag, title in _TAGS.items():
        lines += [f"## {title}", ""]
        for path, calls in told["paths"].items():
            for method, call in calls.items():
                if tag in call.get("tags", ()):
                    lines += _call(method.upper(), path, call)
    lines += ["## Objects", ""]
    for name, schema in sorted(told["components"]["schemas"].items()):
        if not name.startswith(("HTTPValidation", "ValidationError")):
            lines += _object(name, schema)
    return "\n".join(lines)


def description() -> dict[str, Any]:
    """The OpenAPI description, without a service."""
    registry = Registry(create_engine("sqlite://"), Ed25519PrivateKey.generate())
    nothing = cast(ControlClient, None)
    config = ServerConfig(version=1)
    health = Health(config, registry, nothing)
    return build_api(config, Enrolment(registry, nothing), health).openapi()


def _statuses(told: Schema) -> Iterator[str]:
    responses = told["paths"]["/v1/sites"]["get"]["responses"]
    for status, one in responses.items():
        if not status.startswith("2"):
            yield f"| {status} | {one['description']} |"


def _call(method: str, path: str, call: Schema) -> list[str]:
    role = call.get("x-role", "")
    lines = [f"### `{method} {path}`", "", call.get("description", call["summary"]), ""]
    lines += [f"Role: `{role}`.", ""] if role else []
    given = call.get("parameters", [])
    if given:
        lines += ["| parameter | in | type | meaning |", "|---|---|---|---|"]
        for one in given:
            default = one["schema"].get("default")
            kind = _type(one["schema"]) + ("" if default is None else f", `{_plain(default)}`")
            meaning = _meaning(one) or _WORDS.get(one["name"], "")
            lines.append(f"| `{one['name']}` | {one['in']} | {kind} | {meaning} |")
        lines.append("")
    if body := call.get("requestBody"):
        lines += [f"Body: {_type(body['content']['application/json']['schema'])}.", ""]
    return [*lines, _answer(call), ""]


def _answer(call: Schema) -> str:
    status, answer = next(
        (code, one) for code, one in call["responses"].items() if code.startswith("2")
    )
    content: Mapping[str, Schema] = answer.get("content", {})
    kinds = ", ".join(
        kind
        if media == "application/json" and (kind := _type(one.get("schema") or {}))
        else f"`{media}`"
        for media, one in content.items()
    )
    return f"Answer {status}: {kinds}." if kinds else f"Answer {status}."


def _object(name: str, schema: Schema) -> list[str]:
    lines = [f'<a id="{anchor(name)}"></a>', "", f"### {name}", ""]
    lines += [_line(schema["description"]), ""] if "description" in schema else []
    lines += ["| key | type | meaning |", "|---|---|---|"]
    for key, one in schema.get("properties", {}).items():
        need = "" if key in schema.get("required", ()) else ", optional"
        lines.append(f"| `{key}` | {_type(one) or 'any'}{need} | {_meaning(one)} |")
    return [*lines, ""]


def _type(schema: Schema) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{anchor(name)})"
    if "anyOf" in schema:
        return " or ".join(filter(None, map(_type, schema["anyOf"])))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = str(schema.get("type", ""))
    if kind == "array":
        return f"list of {_type(schema.get('items', {})) or 'any'}"
    if kind == "object" and isinstance(inner := schema.get("additionalProperties"), Mapping):
        return f"object of {_type(inner) or 'any'}"
    return {"string": "text", "null": "null"}.get(kind, kind)


def _meaning(schema: Schema) -> str:
    return _line(schema.get("description", "")).replace("|", r"\|")


def _line(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    print(page(), end="")
