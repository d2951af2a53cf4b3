"""The OpenAPI document: what each path takes and gives, made from the models that check it."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from benthic.serve.requests import ChatRequest, CompletionRequest, EmbeddingRequest

_SCHEMAS = "#/components/schemas/"
_TEXT = {"type": ["string", "null"]}
_ERROR = {
    "type": "object", "required": ["error"],
    "properties": {"error": {
        "type": "object", "required": ["message", "type", "param", "code"],
        "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": _TEXT, "code": _TEXT},
    }},
}  # fmt: skip
_REFUSALS = {
    "400": "The request is wrong; `param` names the field.", "401": "No valid API key.",
    "404": "There is no such model.", "408": "The body came too slowly.", "413": "The body is too large.",
    "415": "The body must be application/json.", "429": "The queue is full; `Retry-After` says when to come back.",
    "503": "The server is shutting down.", "504": "Not finished before the deadline.",
}  # fmt: skip


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """A path's body."""
    content = {"application/json": {"schema": {"$ref": f"{_SCHEMAS}{model.__name__}"}}}
    error = {"application/json": {"schema": {"$ref": f"{_SCHEMAS}Error"}}}
    refusals = {status: {"description": told, "content": error} for status, told in _REFUSALS.items()}
    return {"requestBody": {"required": True, "content": content}, "responses": refusals}


def describe(app: FastAPI, names: Sequence[str]) -> dict[str, Any]:
    """The document of all routes that belong in it, of a server with models of these names."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    name = {"type": "string", "enum": list(names)}
    document["paths"]["/v1/models/{model}"]["get"]["parameters"] = [
        {"name": "model", "in": "path", "required": True, "schema": name}
    ]
    asked: list[tuple[type[BaseModel], Any]] = [
        (model, "validation") for model in (ChatRequest, CompletionRequest, EmbeddingRequest)
    ]
    schemas = models_json_schema(asked, ref_template=_SCHEMAS + "{model}")[1]["$defs"]
    for model, _ in asked:
        schemas[model.__name__]["properties"]["model"] = name
    components = document.setdefault("components", {})
    components["schemas"] = {**schemas, "Error": _ERROR}
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}]
    return document
