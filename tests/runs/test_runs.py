import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax import runs
from rlhf_jax.runs import checkpoint
from rlhf_jax.types import InputError, TrainState


@dataclasses.dataclass(frozen=True)
class Inner:
    clip: float = 0.2
    samples: int = 3


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path
    init: Path = Path("models/base")
    rewards: tuple[Path, ...] = ()
    data: str = "world:rows=100"
    lr: float = 0.1
    ppo: Inner = Inner()
    wandb: bool = False
    saves: checkpoint.Config = checkpoint.Config()


def with_checkpoint(cfg):
    """A run directory that has come to step 2."""
    runs.write_config(cfg.out, cfg)
    state = TrainState(step=jnp.int32(2), params={"w": jnp.ones(2)}, opt_state=(), rng=jax.random.key(0))
    with checkpoint.Writer(cfg.out / runs.CHECKPOINTS) as writer:
        writer.save(state)


def model(path, content=b"weights"):
    path.mkdir(parents=True, exist_ok=True)
    (path / "model.safetensors").write_bytes(content)
    return path


def test_another_configuration_is_refused_by_all_that_differs(tmp_path):
    cfg = Config(tmp_path / "run")
    runs.claim(cfg.out, cfg)
    with_checkpoint(cfg)
    runs.claim(cfg.out, cfg)
    other = dataclasses.replace(cfg, lr=0.2, ppo=Inner(clip=0.3), rewards=(Path("a"),))
    with pytest.raises(InputError) as raised:
        runs.claim(cfg.out, other)
    assert str(raised.value) == (
        f"{cfg.out} was made with other settings (lr: 0.1 there, 0.2 here; ppo.clip: 0.2 there, 0.3 here; rewards.0:"
        " absent there, a here): --saves.resume changed goes on with these, never starts over"
    )
    for resume in ("changed", "never"):
        runs.claim(cfg.out, dataclasses.replace(other, saves=checkpoint.Config(resume=resume)))


def test_what_changes_nothing_that_is_learnt_may_differ(tmp_path):
    cfg = Config(tmp_path / "run")
    with_checkpoint(cfg)
    (tmp_path / "run").rename(tmp_path / "moved")
    freed = {"ppo": Inner(samples=4), "wandb": True, "saves": checkpoint.Config(every=3)}
    runs.claim(tmp_path / "moved", dataclasses.replace(cfg, out=tmp_path / "moved", **freed))


def test_without_a_checkpoint_nothing_is_lost(tmp_path):
    cfg = Config(tmp_path / "run")
    runs.write_config(cfg.out, cfg)
    runs.claim(cfg.out, dataclasses.replace(cfg, lr=0.2))


def test_checkpoints_of_nobody_knows_what(tmp_path):
    cfg = Config(tmp_path / "run")
    with_checkpoint(cfg)
    (cfg.out / "config.json").write_text('{"lr"')
    with pytest.raises(InputError, match=r"run has checkpoints but no config.json to tell of what: --saves.resume"):
        runs.claim(cfg.out, cfg)


def test_a_model_or_file_that_was_made_anew_is_another(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("{}\n")
    cfg = Config(tmp_path / "run", init=model(tmp_path / "base"), data=str(data))
    with_checkpoint(cfg)
    assert set(json.loads((cfg.out / "config.json").read_text())["contents"]) == {str(cfg.init), str(data)}
    model(cfg.init)  # again, and the same
    runs.claim(cfg.out, cfg)
    model(cfg.init, b"weightz")
    with pytest.raises(InputError, match=r"\(init: .*base \([0-9a-f]{8}\) there, .*base \([0-9a-f]{8}\) here\)"):
        runs.claim(cfg.out, cfg)
    model(cfg.init)
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    runs.claim(cfg.out, dataclasses.replace(cfg, init=moved))
    data.write_text("{}\n{}\n")
    with pytest.raises(InputError, match=r"\(data: .*rows.jsonl \("):
        runs.claim(cfg.out, dataclasses.replace(cfg, init=moved))
    data.unlink()  # reading it will say so
    runs.claim(cfg.out, cfg)


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    cfg = Config(tmp_path / "run")
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match=r"records cannot be written to .*run: File exists"):
        runs.claim(cfg.out, cfg)
    monkeypatch.setattr(runs.os, "access", lambda path, mode: mode != runs.os.W_OK)
    with pytest.raises(InputError, match=r"records cannot be written to .*: it is read-only"):
        runs.claim(tmp_path, cfg)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b.json"
    runs.write(path, "one")

    def full(self, text, **kwargs):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left on device"):
        runs.write(path, "two")
    assert path.read_text() == "one"


def test_what_is_done_is_done_once(tmp_path):
    calls = []

    def main(cfg):
        calls.append(cfg)
        model(cfg.out / "model")
        return {"gold": 0.5}

    cfg = Config(tmp_path / "run")
    assert runs.once(main, cfg) == runs.once(main, cfg) == {"gold": 0.5}
    assert len(calls) == 1
    with pytest.raises(InputError, match=r"other settings \(lr: 0.1 there, 1.0 here\): name another --out, or delete"):
        runs.once(main, dataclasses.replace(cfg, lr=1.0))
    (cfg.out / "model" / "model.safetensors").unlink()
    (cfg.out / "model").rmdir()
    runs.once(main, cfg)  # which makes what is missing
    assert len(calls) == 2 and (cfg.out / "model").exists()
    runs.once(main, dataclasses.replace(cfg, lr=1.0, saves=checkpoint.Config(resume="never")))
    assert len(calls) == 3

    def stopped(cfg):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.once(stopped, dataclasses.replace(cfg, saves=checkpoint.Config(resume="never")))
    runs.once(main, cfg)  # it is no longer done
    assert len(calls) == 4


def test_checkpoints_of_what_is_done_may_be_deleted(tmp_path):
    cfg, calls = Config(tmp_path / "run"), []

    def main(cfg):
        calls.append(cfg)
        (cfg.out / runs.CHECKPOINTS).mkdir(parents=True)

    runs.once(main, cfg)
    (cfg.out / runs.CHECKPOINTS).rmdir()
    runs.once(main, cfg)
    assert len(calls) == 1
