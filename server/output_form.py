"""What an output must match, from OpenAI's `response_format` or vLLM's fields. Refuses to know grammars and tokens."""

import msgspec

from loractl.adapters.errors import BadRequest
from loractl.server.engine.messages import Constraint
from loractl.server.openai_wire import Common, ResponseFormat, StructuredOutputs

MAX_SCHEMA_BYTES = 64 << 10


def constraint_of(request: Common, response_format: ResponseFormat | None) -> Constraint | None:
    """What the output must match, from OpenAI's field or one of vLLM's; raises BadRequest when several are given."""
    asked = request.structured_outputs or StructuredOutputs()
    given: dict[str, object] = {
        "structured_outputs.json": asked.json,
        "structured_outputs.regex": asked.regex,
        "structured_outputs.choice": asked.choice,
        "guided_json": request.guided_json,
        "guided_regex": request.guided_regex,
        "guided_choice": request.guided_choice,
        "response_format": None if response_format is None or response_format.type == "text" else response_format,
    }
    named = {field: value for field, value in given.items() if value is not None}
    if len(named) > 1 or (not named and request.structured_outputs is not None):
        field = next(iter(named), "structured_outputs.json").partition(".")[0]
        raise BadRequest(f"give exactly one of {', '.join(given)}", field=field)
    for field, value in named.items():
        if isinstance(value, ResponseFormat):
            return _formatted(value)
        if field.endswith("regex"):
            return Constraint(kind="regex", value=str(value), field=field)
        if field.endswith("choice"):
            return Constraint(kind="choice", value=msgspec.json.encode(value).decode(), field=field)
        return _schema_constraint(value, field=field)
    return None


def _formatted(response_format: ResponseFormat) -> Constraint:
    if response_format.type == "json_object":
        return Constraint(kind="json_object", field="response_format")
    field = "response_format.json_schema"
    if response_format.json_schema is None:
        raise BadRequest(f"{field} is missing", field=field)
    if response_format.json_schema.schema is None:
        return Constraint(kind="json_object", field=field)
    return _schema_constraint(response_format.json_schema.schema, field=f"{field}.schema")


def _schema_constraint(schema: object, *, field: str) -> Constraint:
    try:
        text = schema.encode() if isinstance(schema, str) else msgspec.json.encode(schema)
    except (RecursionError, UnicodeEncodeError) as error:
        raise BadRequest(f"{field} is nested too deeply, or not valid Unicode", field=field) from error
    if len(text) > MAX_SCHEMA_BYTES:
        raise BadRequest(f"{field} is larger than {MAX_SCHEMA_BYTES >> 10} KiB", field=field)
    return Constraint(kind="json_schema", value=text.decode(), field=field)
