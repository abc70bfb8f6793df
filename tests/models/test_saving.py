"""Where a model is written, and what is left of a save that fails."""

import dataclasses
import re
import shutil

import pytest
import safetensors.numpy

from rlhf_jax import models
from rlhf_jax.models import directory
from rlhf_jax.types import InputError
from tests import tiny
from tests.models.directories import model


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(safetensors.numpy, "save_file", fail)
        models.save(model(tiny.GPT), tiny.policy(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    models.save(model(tiny.GPT), tiny.policy(), tmp_path / "model")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(safetensors.numpy, "save_file", fail)
        models.save(model(tiny.GPT), tiny.policy(seed=1), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    tiny.assert_close(models.load(tmp_path / "model").params, tiny.policy(), atol=0)


def test_what_a_killed_save_left_is_cleared_away(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    others = {tmp_path / name for name in (".model-2-abcd1234", ".model-notes", "model-abcd1234")}
    for other in others:
        other.mkdir()
    models.save(model(tiny.GPT), tiny.policy(), tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # as if killed before it could
        models.save(model(tiny.GPT), tiny.policy(), tmp_path / "model")
        patch.setattr(safetensors.numpy, "save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            models.save(model(tiny.GPT), tiny.policy(), tmp_path / "model")
    assert len(list(tmp_path.iterdir())) == len(others) + 3
    models.save(model(tiny.GPT), tiny.policy(), tmp_path / "model")
    assert {*tmp_path.iterdir()} == {*others, tmp_path / "model"}


def test_a_link_is_followed(tmp_path):
    out, disk = tmp_path / "out", tmp_path / "disk"
    out.mkdir(), disk.mkdir()
    (out / "model").symlink_to(disk / "weights")  # dangling, at first
    (out / "relative").symlink_to("../disk/there/weights")
    for name, target in (("model", disk / "weights"), ("relative", disk / "there" / "weights")):
        for seed in (0, 1):
            models.check_writable(out / name)
            models.save(model(tiny.GPT), tiny.policy(seed=seed), out / name)
            assert (out / name).is_symlink() and target.is_dir() and not target.is_symlink()
            tiny.assert_close(models.load(out / name).params, tiny.policy(seed=seed), atol=0)
    assert {path.name for path in out.iterdir()} == {"model", "relative"}
    assert {path.name for path in disk.iterdir()} == {"weights", "there"}


def test_a_path_where_no_model_can_be_is_refused_before_training(tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "self").symlink_to(".")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "to_file").symlink_to(tmp_path / "file")
    (tmp_path / "things").mkdir()
    (tmp_path / "things" / "precious").write_text("mine")
    (tmp_path / "to_things").symlink_to(tmp_path / "things")
    there = sorted(tmp_path.rglob("*"))
    for name, message in {
        "loop": "it is a link that leads to itself",
        "self": "in which it lies itself",
        "file": "file is a file",
        "to_file": "file is a file",
        "file/model": "file is a file",
        "to_things": "holds other things than a model",
        "a" * 250: "File name too long",
    }.items():
        for write in (models.check_writable, lambda path: models.save(model(tiny.GPT), tiny.policy(), path)):
            with pytest.raises(InputError, match=f"a model cannot be written to .*: .*{message}") as error:
                write(tmp_path / name)
            assert "\n" not in str(error.value)
    monkeypatch.setattr(directory.os, "access", lambda *args: False)
    with pytest.raises(InputError, match=f"{tmp_path} is read-only"):
        models.check_writable(tmp_path / "some" / "model")
    assert sorted(tmp_path.rglob("*")) == there


def test_what_was_there_comes_back_if_the_last_move_fails(tmp_path, monkeypatch):
    models.save(model(tiny.GPT), tiny.policy(), tmp_path / "model")
    rename = directory.Path.rename

    def fail(self, target):
        if re.fullmatch(r"\.model-.{8}", self.name):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(directory.Path, "rename", fail)
        models.save(model(tiny.GPT), tiny.policy(seed=1), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    tiny.assert_close(models.load(tmp_path / "model").params, tiny.policy(), atol=0)
    (tmp_path / ".model-abcd1234-former").symlink_to("gone")  # as links were moved away once
    models.save(model(tiny.GPT), tiny.policy(seed=1), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_shape_that_no_family_has_is_refused(tmp_path):
    odd = dataclasses.replace(tiny.GPT, norm="rmsnorm")
    with pytest.raises(InputError, match="no Hugging Face architecture"):
        models.save(model(odd), tiny.policy(tiny.GPT), tmp_path / "model")
