"""The command that serves models: its settings, and all that it does before the first request."""

import sys
from pathlib import Path

import pytest

from experiments import serve
from rlhf_jax import models
from rlhf_jax.data import tokenizer as lib
from rlhf_jax.devices import parallel
from rlhf_jax.serving.engine import Request
from rlhf_jax.types import InputError
from tests import tiny


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"host": "0.0.0.0"},
            r"without https, what is asked .* \(ssh -L 8001:127.0.0.1:8001 HOST\)",
        ),
        ({"model": ()}, "--model: expected one directory or several, each once"),
        ({"model": (Path("a"), Path("a"))}, "each once"),
        ({"api_key": ""}, "--api-key is empty"),
        ({"certificate": Path("missing.pem")}, "--certificate missing.pem: no such file"),
        ({"devices": parallel.Config(microbatches=2)}, "devices.microbatches does nothing"),
    ],
)
def test_settings_that_cannot_be_served_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        serve.Config(**settings)
    serve.Config(host="0.0.0.0", behind_proxy=True)


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_without_the_extra_it_says_which(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=r"serving needs the extra people: pip install -e .\[people\]"):
        serve.main(serve.Config())


@pytest.mark.slow
def test_each_model_answers_by_the_name_of_its_directory(tmp_path, monkeypatch, capsys):
    pytest.importorskip("uvicorn", reason="needs the extra people: pip install -e .[people]")
    config = models.gpt(1, 16, 2, vocab_size=260, max_length=24)
    tokenizer = lib.train(["no words"], 257, tmp_path)
    model = models.Model(config, tiny.policy(config), tokenizer, models.bind(models.Transformer(config)))
    paths = tuple(tmp_path / name for name in "ab")
    for path in paths:
        models.save(model, model.params, path)
    told = []

    def answer(cfg, engines, listener):
        assert listener.getsockname()[1] > 0 and [*engines] == [*map(str, paths)]
        for engine in engines.values():
            engine.submit(Request(prompts=((4, 5),), max_tokens=2, temperature=0.0), told.append)

    monkeypatch.setattr(serve, "_serve", answer)
    serve.main(serve.Config(model=paths, port=0, rows=1))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{paths[0]}: compiling for parts of prompts of 16 tokens"
    assert said[2].startswith(f"serving {paths[0]}, {paths[1]}: http://127.0.0.1:") and said[2].endswith("/v1")
    assert len(told) >= 2  # each engine began, or was closed before it could
