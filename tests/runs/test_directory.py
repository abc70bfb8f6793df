import dataclasses
import fcntl
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from huggingface_hub import constants

from rlhf_jax import hub, runs
from rlhf_jax.runs import checkpoint
from rlhf_jax.types import InputError, TrainState
from tests import hub_server


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


@dataclasses.dataclass(frozen=True)
class Prepared(Config):
    data_dir: Path = Path("data")


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
    recorded = json.loads((cfg.out / "config.json").read_text())["contents"]
    assert recorded.keys() == {"init", "data"} and recorded["init"][str(cfg.init)].keys() == {"model.safetensors"}
    model(cfg.init)  # again, and the same
    runs.claim(cfg.out, cfg)
    model(cfg.init, b"weightz")
    with pytest.raises(InputError, match=r"\(init: .*base/model.safetensors differs\): --saves.resume"):
        runs.claim(cfg.out, cfg)
    model(cfg.init)
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    runs.claim(cfg.out, dataclasses.replace(cfg, init=moved))
    data.write_text("{}\n{}\n")
    with pytest.raises(InputError, match=r"\(data: .*rows.jsonl differs\)"):
        runs.claim(cfg.out, dataclasses.replace(cfg, init=moved))
    data.unlink()  # reading it will say so
    runs.claim(cfg.out, cfg)


def test_a_model_of_the_hub_is_compared_by_its_commit(tmp_path, monkeypatch):
    """A branch that moved on is another model; the commit by name is the one that the branch was at."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    files = {"config.json": b"{}", "model.safetensors": b"weights"}
    hub_server.cached(tmp_path / "cache", "owner/tiny", files)
    cfg = Config(tmp_path / "run", init=Path("owner/tiny"), data="owner/tiny")
    with_checkpoint(cfg)
    recorded = json.loads((cfg.out / "config.json").read_text())["contents"]
    assert recorded == {"init": {"owner/tiny": {"@commit": hub_server.SHA}}}
    runs.claim(cfg.out, cfg)
    hub._fetch.cache_clear()  # as in another process
    hub_server.cached(tmp_path / "cache", "owner/tiny", files, "f" * 40)
    with pytest.raises(InputError, match=rf"\(init: owner/tiny \(commit {hub_server.SHA} there\) differs\): --saves"):
        runs.claim(cfg.out, cfg)
    runs.claim(cfg.out, dataclasses.replace(cfg, init=Path(f"owner/tiny@{hub_server.SHA}")))
    hub._fetch.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))  # loading it will say so
    runs.claim(cfg.out, cfg)


@pytest.mark.parametrize(
    "spec",
    ["{}", "{}[:90%]", "alpaca:{}", "hh:{}[90%:]", "template:{}:other.jsonl", "template:other.jsonl:{}",
     "world=0.5,alpaca:{}[:9]=0.5", "~/rows.jsonl", "link.jsonl"],
)  # fmt: skip
@pytest.mark.parametrize("relative", [True, False])
def test_rows_that_changed_are_found_however_they_are_named(tmp_path, monkeypatch, spec, relative):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "other.jsonl").write_text("{}\n")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "rows.jsonl")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    cfg = Config(tmp_path / "run", data=spec.format("rows.jsonl" if relative else rows), rewards=("a", spec))
    with_checkpoint(cfg)
    runs.claim(cfg.out, cfg)
    rows.write_text("[]\n")
    with pytest.raises(InputError, match=r"\(data: [^ ]*.jsonl differs"):
        runs.claim(cfg.out, cfg)


def test_the_same_rows_by_another_name_are_the_same(tmp_path):
    for name in ("rows.jsonl", "copy.jsonl"):
        (tmp_path / name).write_text("{}\n")
    cfg = Config(tmp_path / "run", data=f"alpaca:{tmp_path}/rows.jsonl[:90%]")
    with_checkpoint(cfg)
    runs.claim(cfg.out, dataclasses.replace(cfg, data=f"alpaca:{tmp_path}/copy.jsonl[:90%]"))
    with pytest.raises(InputError, match=r"data: .*rows.jsonl\[:90%\] there, .*copy.jsonl\[:80%\] here"):
        runs.claim(cfg.out, dataclasses.replace(cfg, data=f"alpaca:{tmp_path}/copy.jsonl[:80%]"))


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "tokenizer.json", "generation_config.json"])
def test_a_file_of_the_model_that_changed_is_named(tmp_path, name):
    cfg = Config(tmp_path / "run", init=model(tmp_path / "base"), rewards=(model(tmp_path / "judge"),))
    with_checkpoint(cfg)
    runs.once(lambda _: None, cfg)
    (cfg.rewards[0] / name).write_text('{"rope_theta": 1e4}')
    with pytest.raises(InputError, match=rf"\(rewards.0: {cfg.rewards[0]}/{name} differs\)"):
        runs.claim(cfg.out, cfg)
    with pytest.raises(InputError, match=rf"\(rewards.0: {cfg.rewards[0]}/{name} differs\)"):
        runs.once(lambda _: None, cfg)


def test_a_data_set_that_was_prepared_anew_is_another(tmp_path):
    records = tmp_path / "data" / "glue" / "sst2" / "1.0.0" / "sst2-train.array_record-00000-of-00001"
    records.parent.mkdir(parents=True)
    records.write_text("a")
    cfg = Prepared(tmp_path / "run", data="glue/sst2[:90%]", data_dir=tmp_path / "data")
    with_checkpoint(cfg)
    (tmp_path / "data").rename(tmp_path / "moved")
    runs.claim(cfg.out, cfg)
    runs.claim(cfg.out, dataclasses.replace(cfg, data_dir=tmp_path / "moved"))
    (tmp_path / "moved").rename(tmp_path / "data")
    records.write_text("b")
    with pytest.raises(InputError, match=r"\(data: glue/sst2/1.0.0/sst2-train.array_record-00000-of-00001 differs\)"):
        runs.claim(cfg.out, cfg)


def test_a_directory_of_an_earlier_version_goes_on(tmp_path, capsys):
    """It had a checksum a path, nothing of the environment, and not all of the settings."""
    cfg = Config(tmp_path / "run", init=model(tmp_path / "base"))
    with_checkpoint(cfg)
    there = json.loads((cfg.out / "config.json").read_text())
    there["contents"] = {str(cfg.init): "0123abcd"}
    del there["environment"], there["ppo"]["clip"], there["data"], there["rewards"]
    (cfg.out / "config.json").write_text(json.dumps(there))
    runs.claim(cfg.out, cfg)
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(
        InputError, match=r"\(data: world:rows=100 there, glue/sst2 here; ppo.clip: 0.2 there, 0.3 here"
    ):
        runs.claim(cfg.out, dataclasses.replace(cfg, data="glue/sst2", ppo=Inner(clip=0.3)))


def test_what_is_taken_from_outside_is_compared(tmp_path):
    cfg = Config(tmp_path / "run")
    with_checkpoint(cfg)
    expected = r"\(environment.jax_default_matmul_precision: None there, float32 here\)"
    with jax.default_matmul_precision("float32"), pytest.raises(InputError, match=expected):
        runs.claim(cfg.out, cfg)


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    cfg = Config(tmp_path / "run")
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match=r"records cannot be written to .*run: File exists"):
        runs.claim(cfg.out, cfg)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(InputError, match=r"records cannot be written to .*: it is read-only"):
        runs.claim(tmp_path, cfg)


@pytest.mark.parametrize("name", ["x" * 300, "run/" * 2000])
def test_a_name_that_no_file_can_have(tmp_path, name):
    with pytest.raises(InputError, match=r"records cannot be written to .*File name too long") as raised:
        runs.claim(tmp_path / name, Config(tmp_path / name))
    assert "\n" not in str(raised.value)


def test_the_root_is_no_run_directory():
    with pytest.raises(InputError, match=r"--out / is the root of the file system: name a folder in it"):
        runs.claim(Path("/"), Config(Path("/")))


def test_the_working_directory_may_be_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs.claim(Path("."), Config(Path(".")))
    runs.write_config(Path("."), Config(Path(".")))


@pytest.mark.parametrize("name", ["model", "checkpoints", "tensorboard", "metrics.jsonl", "samples.jsonl", ""])
def test_a_link_that_leads_nowhere(tmp_path, name):
    cfg = Config(tmp_path / "run")
    if name:
        cfg.out.mkdir()
    (cfg.out / name).symlink_to(tmp_path / "gone")
    with pytest.raises(
        InputError, match=rf"^{cfg.out / name} is a link to {tmp_path / 'gone'}(:|, which does not exist)"
    ):
        runs.claim(cfg.out, cfg)
    with pytest.raises(InputError, match="is a link"):
        runs.write_config(cfg.out, cfg)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.md"])
def test_records_are_no_links(tmp_path, name):
    cfg = Config(tmp_path / "run")
    cfg.out.mkdir()
    (tmp_path / "file").write_text("other")
    (cfg.out / name).symlink_to(tmp_path / "file")
    with pytest.raises(InputError, match=rf"{name} is a link to .*: delete it"):
        runs.claim(cfg.out, cfg)


def test_links_to_folders_are_followed_and_told_of(tmp_path, capsys):
    cfg = Config(tmp_path / "run")
    for name in ("elsewhere", "weights"):
        (tmp_path / name).mkdir()
    cfg.out.symlink_to(tmp_path / "elsewhere")
    (cfg.out / "model").symlink_to(tmp_path / "weights")
    runs.claim(cfg.out, cfg)
    assert capsys.readouterr().out == (f"{cfg.out}/model is a link: what is written there goes to {tmp_path}/weights\n")


@pytest.mark.parametrize("name", ["model", "checkpoints", "config.json", "metrics.jsonl"])
def test_a_file_where_a_folder_should_be_and_the_other_way_round(tmp_path, name):
    cfg = Config(tmp_path / "run")
    cfg.out.mkdir()
    (cfg.out / name).mkdir() if "." in name else (cfg.out / name).write_text("")
    with pytest.raises(InputError, match=rf"{name} is a (file|folder), where the run writes a (file|folder): move it"):
        runs.claim(cfg.out, cfg)


def test_a_model_directory_is_no_run_directory(tmp_path):
    cfg = Config(model(tmp_path / "base"))
    (cfg.out / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match=r"base is a model directory, whose config.json a run would replace"):
        runs.claim(cfg.out, cfg)
    assert (cfg.out / "config.json").read_text() == '{"model_type": "llama"}'


def test_a_run_does_not_read_what_it_writes(tmp_path, monkeypatch):
    out = tmp_path / "run"
    model(out / "model")
    (out / "samples.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    for init in (out / "model", Path("run/model"), Path("run/../run/model")):
        with pytest.raises(InputError, match=rf"^--init {init} is what this run writes: name another --out"):
            runs.claim(out, Config(out, init=init))
    with pytest.raises(InputError, match=r"--rewards run/model is what"):
        runs.claim(out, Config(out, rewards=(Path("run/model"),)))
    with pytest.raises(InputError, match=r"--data alpaca:run/samples.jsonl is what|--data run/samples.jsonl is what"):
        runs.claim(out, Config(out, data="alpaca:run/samples.jsonl[:9]"))


def test_what_tells_that_it_is_done_cannot_be_read(tmp_path):
    cfg = Config(tmp_path / "run")
    cfg.out.mkdir()
    for text in ("{", "[]", "{}"):
        (cfg.out / "done.json").write_text(text)
        with pytest.raises(InputError, match=r"done.json cannot be read: delete it"):
            runs.once(lambda _: None, cfg)


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


def test_a_directory_that_another_process_uses(tmp_path):
    """Its lock is another open file, which flock takes for another process."""
    cfg = Config(tmp_path / "run")
    cfg.out.mkdir()
    with (cfg.out / ".lock").open("w") as file:
        file.write("process 7 on elsewhere\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        for use in (runs.claim, runs.write_config, lambda _, cfg: runs.once(lambda _: None, cfg)):
            with pytest.raises(InputError, match=rf"^{cfg.out} is in use by process 7 on elsewhere: wait until"):
                use(cfg.out, cfg)
    runs.once(lambda _: None, cfg)
    with (cfg.out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # what is done is free
    assert ".lock" not in (cfg.out / "done.json").read_text()
