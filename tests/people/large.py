"""A store with many labels, made many times faster than by answering."""

import json
import os
import random
from pathlib import Path

from rlhf_jax.people import access, forms
from rlhf_jax.people.rules import Rules
from rlhf_jax.people.store import Store

FULL_SIZE = "FULL_SIZE" in os.environ  # long tests take the sizes of docs/people.md instead of small ones


def fill(path: Path, labels: int, people: int = 8, overlap: int = 2, responses: int = 4) -> None:
    """Create a store in which `overlap` of the people ordered and rated the responses of each item, nearly alike."""
    rng = random.Random(0)

    def answer() -> str:
        quality = [k + rng.gauss(0, 0.7) for k in range(responses)]
        ranks = [sorted(quality).index(value) for value in quality]
        rated = [min(7, max(1, round(7 - 1.5 * value))) for value in quality]
        ratings = [dict.fromkeys(forms.SCALES, value) for value in rated]
        return json.dumps({"ranks": ranks, "ratings": ratings, "confirmed": False})

    with Store(path) as store:
        store.set_rules(Rules(ratings="none", gold_share=0.0, repeat_share=0.0))
        for n in range(people):
            access.invite(store, f"person {n}")
        asked = json.dumps([f"response {k} " * 20 for k in range(responses)])
        shown = json.dumps(list(range(responses)))
        with store.writer() as db:
            db.executemany(
                "INSERT INTO items (key, round, task, prompt, responses, words, overlap, taken, created)"
                " VALUES (?, 0, 'rank', ?, ?, 3, ?, ?, 1.0)",
                ((b"%d" % n, json.dumps(f"prompt {n}"), asked, overlap, overlap) for n in range(labels // overlap)),
            )
            rows = ((1 + n // overlap, 1 + n % people, n % overlap) for n in range(labels))
            db.executemany(
                "INSERT INTO assignments (item, person, kind, slot, shown, created, expires, state)"
                f" VALUES (?, ?, 'slot', ?, '{shown}', 1, 2, 'done')",
                rows,
            )
            said = ((n + 1, 1 + n // overlap, 1 + n % people, f"submission-{n}", answer(), n) for n in range(labels))
            db.executemany(
                "INSERT INTO labels (assignment, item, person, kind, submission, answer, started, created, seconds,"
                " fast) VALUES (?, ?, ?, 'slot', ?, ?, 1, ?, 1, 0)",
                said,
            )
