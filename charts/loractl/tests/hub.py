"""A fresh hub answers, and refuses a write without a token; `helm test` runs it."""

import os
import urllib.error
import urllib.request

base = os.environ["BASE"]
with urllib.request.urlopen(base + "/readyz", timeout=30) as answer:
    assert answer.status == 200
request = urllib.request.Request(base + "/api/repos/create", data=b'{"name": "x"}', method="POST")
request.add_header("Content-Type", "application/json")
try:
    status = urllib.request.urlopen(request, timeout=30).status
except urllib.error.HTTPError as refused:
    status = refused.code
if status not in {401, 403}:
    raise SystemExit(f"a stranger who makes a repo is answered {status}")
