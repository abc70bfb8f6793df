"""gs:// paths, against a folder that stands in for the buckets."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import pytest
from etils import epath

from experiments import pretrain
from rlhf_jax import models, runs
from rlhf_jax.devices import hosts, preemption
from rlhf_jax.runs import checkpoint, cli, gcs
from rlhf_jax.types import InputError
from tests import tiny
from tests.quickstart import TINY, metrics_of, refused
from tests.runs.test_checkpoint import make_state
from tests.runs.test_resume import ask_to_end


@dataclasses.dataclass(frozen=True)
class Inner:
    held_out: str | None = None
    rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path = Path("run")
    init: Path | None = None
    reward: tuple[Path, ...] = ()
    data: str = "world:rows=8"
    data_dir: Path = Path("data")
    inner: Inner = Inner()


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that holds gs://b; this machine's own files are elsewhere."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(gcs, "at", lambda name: epath.Path(name.replace("gs://", f"{tmp_path}/cloud/")))
    (tmp_path / "cloud" / "b").mkdir(parents=True)
    return tmp_path / "cloud" / "b"


def mirror(name: str) -> Path:
    return Path.home() / ".cache" / "rlhf_jax" / "buckets" / "b" / name


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def contents(directory: Path) -> dict[str, str]:
    return {str(one.relative_to(directory)): one.read_text() for one in directory.rglob("*") if one.is_file()}


def test_each_gs_path_becomes_its_mirror(remote):
    for name in ("model/model.safetensors", "judge/config.json", "t.json", "hh.jsonl.gz"):
        write(remote / name, name)
    given = Config(
        out=Path("gs://b/runs/ppo"),
        init=Path("gs://b/model"),
        reward=(Path("here"), Path("gs://b/judge")),
        data="template:gs://b/t.json:gs://b/hh.jsonl.gz[:90%]",
        inner=Inner(held_out="hh:gs://b/hh.jsonl.gz[90%:]"),
    )
    with gcs.mirrored(given) as local:
        rows = mirror("hh.jsonl.gz")
        assert local == Config(
            out=mirror("runs/ppo"),
            init=mirror("model"),
            reward=(Path("here"), mirror("judge")),
            data=f"template:{mirror('t.json')}:{rows}[:90%]",
            inner=Inner(held_out=f"hh:{rows}[90%:]"),
        )
        assert rows.read_text() == "hh.jsonl.gz" and contents(mirror("judge")) == {"config.json": "judge/config.json"}
        said = runs.settings(local)
    assert said["out"] == "gs://b/runs/ppo" and said["data"] == given.data  # whatever machine it is
    assert said["contents"]["data"].keys() == {"gs://b/t.json", "gs://b/hh.jsonl.gz"}
    assert said["contents"]["init"].keys() == {"gs://b/model"}
    assert gcs.named(f"no {mirror('model')} there") == "no gs://b/model there"


def test_without_gs_paths_nothing_happens(monkeypatch):
    monkeypatch.setattr(gcs, "at", lambda name: pytest.fail(name))
    config = Config(init=Path("a/b"), data="hh:c.jsonl.gz")
    with gcs.mirrored(config) as local:
        assert local is config
    assert gcs.place(Path("run/checkpoints")) == Path("run/checkpoints")


def test_only_what_changed_is_fetched_again(remote, monkeypatch, capsys):
    write(remote / "model" / "config.json", "{}")
    write(remote / "model" / "model.safetensors", "weights")
    to = mirror("model")
    assert gcs.pull(to)
    assert "gs://b/model: fetched 0.0 MiB" in capsys.readouterr().out
    before = {one: one.stat().st_ino for one in to.iterdir()}
    assert gcs.pull(to)
    assert capsys.readouterr().out == ""
    write(remote / "model" / "config.json", "[]")  # as long, but newer
    os.utime(remote / "model" / "config.json", (1, 1))
    write(to / "left.safetensors", "of another model")
    gcs.pull(to)
    assert contents(to) == {"config.json": "[]", "model.safetensors": "weights"}
    assert to.joinpath("model.safetensors").stat().st_ino == before[to / "model.safetensors"]


def test_what_the_run_writes_is_sent_and_what_it_deletes_is_deleted(remote):
    write(remote / "run" / "old.md", "old")
    write(remote / "run" / "kept.md", "kept")
    write(remote / "run" / "checkpoints" / "4" / "state", "large")
    with gcs.mirrored(Config(out=Path("gs://b/run"))) as local:
        assert contents(local.out) == {"old.md": "old", "kept.md": "kept"}  # no checkpoints
        (local.out / "old.md").unlink()
        write(local.out / "a" / "metrics.jsonl", "1\n")
        write(local.out / ".partial", "half")
        write(local.out / "a" / "checkpoints" / "x", "not here")
        write(remote / "run" / "notes.md", "somebody's")
        gcs.push()
        now = {"kept.md": "kept", "a/metrics.jsonl": "1\n", "notes.md": "somebody's", "checkpoints/4/state": "large"}
        assert contents(remote / "run") == now
        sent = (remote / "run" / "a" / "metrics.jsonl").stat()
        gcs.push()
        assert (remote / "run" / "a" / "metrics.jsonl").stat() == sent  # not again
        write(local.out / "a" / "metrics.jsonl", "2\n")
    assert contents(remote / "run") == now | {"a/metrics.jsonl": "2\n"}  # at the end
    shutil.rmtree(remote / "run")  # by somebody who wants to begin anew
    with gcs.mirrored(Config(out=Path("gs://b/run"))) as local:
        assert "a/metrics.jsonl" not in contents(local.out)


def test_a_mirror_that_is_lost_takes_nothing_with_it(remote):
    write(remote / "run" / "model" / "config.json", "{}")
    lost = r"deleted the copy of gs://b/run that this run works on"
    with pytest.raises(InputError, match=lost), gcs.mirrored(Config(out=Path("gs://b/run"))) as local:
        write(local.out / "metrics.jsonl", "1\n")
        gcs.push()
        shutil.rmtree(Path.home())  # to make room
        write(local.out / "metrics.jsonl", "2\n")
    assert contents(remote / "run") == {"model/config.json": "{}", "metrics.jsonl": "1\n"}


def test_records_are_sent_after_an_error(remote, capsys, monkeypatch):
    def main(cfg):
        write(cfg.out / "metrics.jsonl", "1\n")
        raise InputError(f"{cfg.out / 'x'} is wrong")

    assert refused(capsys, main, Config(), "--out", "gs://b/run") == "error: gs://b/run/x is wrong"
    assert contents(remote / "run") == {"metrics.jsonl": "1\n"}

    def fail(path):
        raise InputError("gs://b cannot be written to")

    monkeypatch.setattr(gcs, "_send", fail)
    with pytest.raises(KeyError), gcs.mirrored(Config(out=Path("gs://b/run"))) as local:
        write(local.out / "new", "")
        raise KeyError
    assert capsys.readouterr().err == "warning: gs://b cannot be written to\n"


def test_the_other_processes_fetch_what_the_first_writes(remote, monkeypatch):
    met: list[str] = []
    monkeypatch.setattr(hosts, "meet", met.append)
    with gcs.mirrored(Config(out=Path("gs://b/run"))) as local:
        runs.write(local.out / "labels.jsonl", "first\n")
        models.save(models.Model(tiny.GPT, tiny.policy(), None, lambda: None), tiny.policy(), local.out / "model")
        gcs.share(local.out / "model")
        assert (remote / "run" / "model" / "model.safetensors").exists()
        shutil.rmtree(Path.home())  # on another host
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        runs.write(local.out / "labels.jsonl", "of the other\n")
        models.save(models.Model(tiny.GPT, tiny.policy(), None, lambda: None), tiny.policy(), local.out / "model")
        gcs.share(local.out / "model")
        assert (local.out / "labels.jsonl").read_text() == "first\n"
        assert (local.out / "model" / "model.safetensors").exists()
        write(local.out / "own", "of the other")
    assert not (remote / "run" / "own").exists()
    assert len(met) == 9  # all of them, each time


@pytest.mark.slow
def test_a_stage_goes_on_where_there_is_nothing_but_the_bucket(remote, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(TINY.pretrain, data_dir=tmp_path / "data", steps=3, out=tmp_path / "alone")
    cli.run(pretrain.main, config, [])
    run = ["--out", "gs://b/run"]
    ask_to_end(monkeypatch)
    with pytest.raises(SystemExit) as stop:
        cli.run(pretrain.main, config, run)
    assert stop.value.code == preemption.EXIT
    assert len(metrics_of(remote / "run")) == 1 and (remote / "run" / "checkpoints" / "1").is_dir()
    assert not list(Path.home().rglob("checkpoints"))
    # As if the machine had gone before the end, and with a save that had only begun.
    write(remote / "run" / "checkpoints" / "2" / "_CHECKPOINT_METADATA", "{}")
    assert checkpoint.steps(mirror("run/checkpoints")) == [1]
    shutil.rmtree(Path.home())
    cli.run(pretrain.main, config, run)
    assert "gs://b/run goes on after step 1" in capsys.readouterr().out
    assert metrics_of(remote / "run") == metrics_of(config.out)
    saved = "model/model.safetensors"
    assert (remote / "run" / saved).read_bytes() == (config.out / saved).read_bytes()
    assert checkpoint.steps(mirror("run/checkpoints")) == [1, 3]
    assert json.loads((remote / "run" / "config.json").read_text())["out"] == "gs://b/run"


def test_records_are_sent_before_each_checkpoint(remote, monkeypatch):
    save, sent = checkpoint.ocp.CheckpointManager.save, []

    def look(*args, **settings):
        sent.append((remote / "run" / "metrics.jsonl").read_text())
        return save(*args, **settings)

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", look)
    with gcs.mirrored(Config(out=Path("gs://b/run"))) as local:
        directory = local.out / runs.CHECKPOINTS
        with checkpoint.Writer(directory) as writer:
            write(local.out / "metrics.jsonl", "7\n")
            writer.save(make_state(step=7))
        assert sent == ["7\n"]
        assert str(checkpoint.latest(directory)) == str(remote / "run" / "checkpoints" / "7")
        assert int(checkpoint.restore(directory, make_state(step=0))[0].step) == 7
        (remote / "run" / "checkpoints" / "7" / "commit_success.txt").unlink()  # which is written last
        assert checkpoint.latest(directory) is None
        with checkpoint.Writer(directory):
            assert not list((remote / "run" / "checkpoints").iterdir())
        assert not directory.exists()


def test_a_stage_that_is_done_is_told_of_last(remote, monkeypatch):
    sent = []
    send = gcs._send
    monkeypatch.setattr(gcs, "_send", lambda path: (send(path), sent.append(path.name)))

    def main(cfg):
        write(cfg.out / "zoo.png", "drawn")
        return {"accuracy": 0.5}

    with gcs.mirrored(Config(out=Path("gs://b/run"))) as local:
        stage = dataclasses.replace(local, out=local.out / "stage")
        assert runs.once(main, stage) == {"accuracy": 0.5}
        assert sent == ["zoo.png", "done.json"]
    shutil.rmtree(Path.home())
    with gcs.mirrored(Config(out=Path("gs://b/run"))) as local:
        stage = dataclasses.replace(local, out=local.out / "stage")
        assert runs.once(lambda _: pytest.fail("ran"), stage) == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--init", "gs://b/none"], "--init gs://b/none does not exist"),
        (["--data", "hh:gs://b/none.jsonl.gz[:9]"], "--data gs://b/none.jsonl.gz does not exist"),
        (["--data-dir", "gs://b/data"], "--data-dir gs://b/data: expected a path on this machine"),
    ],
)
def test_what_is_not_there_is_named(remote, capsys, flags, message):
    main = lambda _: pytest.fail("ran")
    assert refused(capsys, main, Config(), *flags) == f"error: {message}"


def test_what_the_bucket_refuses_is_an_error_of_the_input(remote, monkeypatch, capsys):
    class Refusing:
        def info(self, name):
            raise RuntimeError("403: no access\nand more")

    monkeypatch.setattr(gcs, "_opened", lambda path: (Refusing(), str(path)))
    said = refused(capsys, lambda _: pytest.fail("ran"), Config(), "--init", "gs://b/model")
    assert said == "error: gs://b/model cannot be read from: RuntimeError 403: no access"


def test_the_packages_that_are_missing_are_named(monkeypatch, capsys):
    monkeypatch.setattr(gcs.importlib.util, "find_spec", lambda name: None)
    said = refused(capsys, lambda _: pytest.fail("ran"), Config(), "--out", "gs://b/run")
    assert said.startswith("error: gs://b/run: gs:// paths need gcsfs; install the extra tpu")


def test_mixtures_and_patterns(remote):
    for name in ("d/a.jsonl", "d/b.jsonl", "d/c.csv", "e/y=1/z.parquet"):
        write(remote / name, name)
    write(mirror("d/old.jsonl"), "of another time")
    given = Config(
        data="hh:gs://b/d/*.jsonl[:90%]=0.5,gs://b/e/y=1/z.parquet=2e-1,world=0.3,seed=1",
        inner=Inner(held_out="gs://b/d/[cd].csv,gs://b/d/a.jsonl[:5]"),
    )
    with gcs.mirrored(given) as local:
        assert local.data == (
            f"hh:{mirror('d/*.jsonl')}[:90%]=0.5,{mirror('e/y=1/z.parquet')}=2e-1,world=0.3,seed=1"
        )  # fmt: skip
        assert local.inner.held_out == f"{mirror('d/[cd].csv')},{mirror('d/a.jsonl')}[:5]"
        assert contents(mirror("")) == {name: name for name in ("d/a.jsonl", "d/b.jsonl", "d/c.csv", "e/y=1/z.parquet")}
        said = runs.settings(local)
    assert said["data"] == given.data
    assert said["contents"]["data"].keys() == {"gs://b/d/*.jsonl", "gs://b/e/y=1/z.parquet"}
    with pytest.raises(InputError, match=r"--data gs://b/d/\*\.json does not exist"), gcs.mirrored(
        Config(data="gs://b/d/*.json")
    ):  # fmt: skip
        pass
