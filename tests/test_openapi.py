"""The OpenAPI document against the service it describes: what it allows is answered, what it forbids is refused."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import uuid
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import schemathesis
from bundles import make_columns, make_project
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from openapi_spec_validator import validate

from ekiben.records import Policy
from ekiben.serving.http.app import ServiceApp
from ekiben.serving.bundle import Limits
from ekiben.serving.http.routes import ROUTES
from ekiben.serving.http.state import State

SERVICES: dict[str, dict[str, Any]] = {
    "binary": {},
    "strict": {"limits": Limits(missing="reject", unseen="reject", max_rows=3, max_body_mb=0.1)},
    "multiclass": {"task": "multiclass", "runtime": "linear"},
    "regression": {"task": "regression"},
    "groups": {"policy": Policy(task="binary", group_by="sex", thresholds={"F": 0.3, "M": 0.6})},
    "unexplained": {"runtime": "python"},
}


def tables() -> dict[str, bytes]:
    rows = make_columns(3, seed=3).to_rows()
    out, table, parquet, stream = io.StringIO(), pa.Table.from_pylist(rows), io.BytesIO(), pa.BufferOutputStream()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    pq.write_table(table, parquet)
    with pa.ipc.new_stream(stream, table.schema) as sink:
        sink.write_table(table)
    arrow = stream.getvalue().to_pybytes()
    return {
        "text/csv": out.getvalue().encode(),
        "application/vnd.apache.arrow.stream": arrow,
        "application/vnd.apache.arrow.file": arrow,
        "application/vnd.apache.parquet": parquet.getvalue(),
    }


TABLES = tables()
ACCEPTANCE = [schemathesis.checks.positive_data_acceptance, schemathesis.checks.negative_data_rejection]
for media, raw in TABLES.items():
    schemathesis.openapi.media_type(media, st.just(raw) | st.binary(max_size=50) | st.just(raw[:-20]))
# RFC 3339 has seconds of 60 and offsets of a day, which no calendar of Python's has.
schemathesis.openapi.format("date-time", st.datetimes().map(lambda moment: moment.isoformat()))


CONFIG = schemathesis.Config.from_dict(
    {
        "checks": {
            "negative_data_rejection": {"expected-statuses": ["400", "405", "413", "415", "422", "501"]},
            "not_a_server_error": {"expected-statuses": ["2xx", "3xx", "4xx", "501"]},
        }
    }
)


@pytest.fixture(scope="module")
def apps(tmp_path_factory) -> Any:
    made: dict[str, ServiceApp] = {}

    def make(name: str) -> ServiceApp:
        if name not in made:
            folder: Path = tmp_path_factory.mktemp(name)
            state = State()
            state.open(make_project(folder, **SERVICES[name]).bundle.folder, journal=folder / "journal")
            made[name] = ServiceApp(state=state)
        return made[name]

    yield make
    for app in made.values():
        app.state.close()


def at_home(app: ServiceApp) -> Any:
    """Let the test's client come from this machine, where no key is needed as long as there is none, to no server."""

    async def called(scope: Any, receive: Any, send: Any) -> None:
        while scope["type"] == "lifespan":
            message = (await receive())["type"]
            await send({"type": f"{message}.complete"})
            if message == "lifespan.shutdown":
                return
        if scope["type"] == "http":
            headers = [(b"host", b"localhost"), *(pair for pair in scope["headers"] if pair[0] != b"host")]
            scope = {**scope, "client": ("127.0.0.1", 40000), "server": ("127.0.0.1", 80), "headers": headers}
        await app(scope, receive, send)

    return called


async def ask(app: ServiceApp, method: str, path: str, **kwargs: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.request(method, path, **kwargs)


def call(app: ServiceApp, method: str, path: str, **kwargs: Any) -> httpx.Response:
    return asyncio.run(ask(app, method, path, **kwargs))


def is_extreme(value: Any) -> bool:
    """Return whether a number of a request, or its inverse, could be too large for a model."""
    if isinstance(value, dict | list):
        return any(map(is_extreme, value.values() if isinstance(value, dict) else value))
    return type(value) in (int, float) and value != 0 and not 1e-30 < abs(value) < 1e30


def ask_as_described(operation: Any, mode: Any, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        if mode.is_positive and "Idempotency-Key" in (case.headers or {}):
            case.headers["Idempotency-Key"] = str(uuid.uuid4())  # one that came before is for the same body only
        answer = case.call()
        # No JSON Schema could say which bytes are a table, nor which numbers are too large for a model.
        is_beyond = case.media_type in TABLES or (is_extreme(case.body) and "no finite answer" in answer.text)
        case.validate_response(answer, excluded_checks=ACCEPTANCE if is_beyond else [])

    run()


@pytest.mark.parametrize(
    ("name", "examples"),
    [("binary", 10), ("strict", 10), *(pytest.param(name, 60, marks=pytest.mark.slow) for name in SERVICES)],
)
def test_any_request_of_the_document_is_answered_as_it_says(apps, name, examples):
    """No 5xx but those it names; every status, header, media type and body as described; what it forbids is refused."""
    document = schemathesis.openapi.from_asgi("/openapi.json", at_home(apps(name)), config=CONFIG)
    routes = []
    for found in document.get_all_operations():
        operation = found.ok()
        routes.append(operation.path)
        for mode in schemathesis.GenerationMode:
            try:
                ask_as_described(operation, mode, examples)
            except Unsatisfiable:
                assert not operation.body, f"{operation.label} {mode}"  # any text will do for its headers: none is wrong
    assert {*routes, "/openapi.json"} == set(ROUTES)  # which was asked for the document


@pytest.mark.parametrize("name", SERVICES)
def test_every_example_is_what_its_schema_says_and_what_the_service_answers(apps, name):
    app = apps(name)
    document = call(app, "GET", "/openapi.json").json()
    checked = 0
    for path, methods in document["paths"].items():
        for operation in methods.values():
            for content in (operation.get("requestBody", {}), operation["responses"]["200"]):
                media = content.get("content", {}).get("application/json", {})
                if "example" in media:
                    schema = {**media["schema"], "components": document["components"]}
                    jsonschema.validate(media["example"], schema, cls=jsonschema.Draft202012Validator)
                    checked += 1
        if "requestBody" in (post := methods.get("post", {})) and path != "/feedback":
            for media, content in post["requestBody"]["content"].items():
                if "example" in content:
                    sent = content["example"] if isinstance(content["example"], str) else json.dumps(content["example"])
                    answer = call(app, "POST", path, content=sent, headers={"content-type": media})
                    assert answer.status_code == (501 if path == "/explain" and name == "unexplained" else 200), answer.text
                    told = post["responses"]["200"]["content"]["application/json"].get("example", {})
                    for key in set(told) - {"model"}:
                        said, promised = answer.json()[key], told[key]
                        assert [one | {"id": ""} for one in said] == [one | {"id": ""} for one in promised]
    assert checked >= 4


def test_every_route_and_its_roles_are_described(apps):
    document = call(apps("binary"), "GET", "/openapi.json").json()
    for path, route in ROUTES.items():
        operation = document["paths"][path][route.methods[0].lower()]
        asked = {role for way in operation["security"] for roles in way.values() for role in roles}
        assert asked == route.roles
        if "requestBody" in operation:
            assert set(operation["requestBody"]["content"]) == set(route.takes)


def test_the_document_is_valid_openapi(apps):
    validate(call(apps("strict"), "GET", "/openapi.json").json())
