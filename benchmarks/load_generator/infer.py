"""What each of locust's users does: ask for one inference after the other, with binary tensors, and check the answer.

Run by ``benchmarks/serving.py``, which says through the environment what to send. Writes each request's milliseconds,
and what failed, to a file at the end: locust's own tables round to whole milliseconds.
"""

import json
import os
from pathlib import Path
from typing import Any

from locust import FastHttpUser, constant, events, task

SETTINGS = json.loads(os.environ["MIRRORMASK_LOAD"])
BODY = bytes.fromhex(SETTINGS["body"])
HEADERS = {"Inference-Header-Content-Length": str(SETTINGS["json"]), "Content-Type": "application/octet-stream"}

_milliseconds: list[float] = []
_failures: list[str] = []


class Client(FastHttpUser):
    """A client that waits for its answer before it asks again."""

    wait_time = constant(0)

    @task
    def infer(self) -> None:
        with self.client.post(SETTINGS["path"], data=BODY, headers=HEADERS, catch_response=True) as response:
            if response.status_code != 200 or len(response.content) < SETTINGS["least"]:
                response.failure(f"status {response.status_code}, {len(response.content or b'')} bytes")


@events.request.add_listener
def _note(response_time: float, exception: Exception | None, **_: Any) -> None:
    if exception is None:
        _milliseconds.append(response_time)
    else:
        _failures.append(str(exception)[:200])


@events.quitting.add_listener
def _write(**_: Any) -> None:
    Path(SETTINGS["out"]).write_text(json.dumps({"milliseconds": _milliseconds, "failures": _failures}))
