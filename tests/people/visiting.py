"""People of tests who visit the pages without a browser."""

import json
import re
from typing import Any

from starlette.testclient import TestClient

from rlhf_jax.people import access, frame, server
from rlhf_jax.people.store import Store


def client(store: Store, options: frame.Options | None = None, *parts: frame.Part) -> TestClient:
    return TestClient(server.app(store, options, *parts), base_url="http://127.0.0.1:8000", follow_redirects=False)


class Browser:
    """Somebody who has followed their link."""

    def __init__(self, store: Store, name: str = "ann", role: Any = "labeler", *parts: frame.Part):
        self.client = client(store, None, *parts)
        assert self.client.post("/enter", json={"token": access.invite(store, name, role)}).json() == {"to": "/"}
        page = self.client.get("/guidelines").text
        found = re.search(r'name="csrf" content="(\w{64})"', page)
        assert found
        self.headers = {"X-CSRF": found[1]}
        self.csrf = found[1]

    def task(self) -> Any:
        return self.client.get("/api/task").json()["task"]

    def post(self, path: str, **body: Any) -> Any:
        return self.client.post(path, content=json.dumps(body), headers=self.headers)

    def submit(self, number: int, answer: Any, name: str = "submission") -> Any:
        return self.post("/api/submit", assignment=number, submission=name, answer=answer, seconds=1.5)

    def act(self, action: str, **form: Any) -> Any:
        return self.client.post(f"/admin/{action}", data={"csrf": self.csrf} | form)
