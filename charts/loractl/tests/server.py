"""One real completion on the base of a fresh release; `helm test` runs it."""

import json
import os
import urllib.request

base = os.environ["BASE"]
headers = {"Content-Type": "application/json"}
if keys := os.environ.get("KEYS"):
    headers["Authorization"] = (
        "Bearer " + next(line for line in keys.splitlines() if line.strip() and not line.startswith("#")).split()[0]
    )


def ask(path: str, body: object = None) -> dict[str, list[dict[str, object]]]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(base + path, data=data, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


model = ask("/v1/models")["data"][0]["id"]
answer = ask("/v1/completions", {"model": model, "prompt": "Hello", "max_tokens": 4})
assert answer["choices"], answer
