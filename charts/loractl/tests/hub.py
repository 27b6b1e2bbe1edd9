"""A fresh hub answers, and refuses a write without a token; `helm test` runs it."""

import os
import urllib.error
import urllib.request

base = os.environ["BASE"]
with urllib.request.urlopen(base + "/health/ready", timeout=30) as answer:
    assert answer.status == 200
request = urllib.request.Request(base + "/api/repos/create", data=b'{"name": "x"}', method="POST")
request.add_header("Content-Type", "application/json")
try:
    urllib.request.urlopen(request, timeout=30)
except urllib.error.HTTPError as refused:
    assert refused.code in (401, 403), refused.code
else:
    raise SystemExit("the hub let a stranger make a repo")
