"""What holds for every experiment that trains: how models are computed, and what a user can get wrong."""

import dataclasses

import jax.numpy as jnp
import pytest

from experiments import (
    assistant,
    dpo,
    evaluate,
    grpo,
    ppo,
    pretrain,
    rank,
    rejection,
    reward,
    rloo,
    sft,
)
from rlhf_jax import models
from rlhf_jax.algorithms import sft as sft_lib
from rlhf_jax.runs import checkpoint, cli
from tests import tiny
from tests.quickstart import TINY, refused


class Loaded(Exception):
    """Raised instead of loading a model, to see how."""


@pytest.mark.parametrize("module", [pretrain, sft, rank, reward, ppo, grpo, rloo, dpo, rejection, evaluate])
def test_how_a_model_is_computed_is_a_setting_of_each_stage(done, tmp_path, monkeypatch, module):
    cfg, _ = done

    def load(path, compute=None, place=None):
        raise Loaded(compute)

    monkeypatch.setattr(models, "load", load)
    config = getattr(cfg, module.__name__.split(".")[1], None) or module.Config()
    bfloat16 = models.Compute("bfloat16", remat="full")
    given = {"out": tmp_path, "data_dir": cfg.out / "data", "compute": bfloat16}
    if module is not evaluate:
        given |= {"init": cfg.out / "sft" / "model"}
    with pytest.raises(Loaded) as raised:
        module.main(dataclasses.replace(config, **given))
    assert raised.value.args == (bfloat16,)


@pytest.mark.parametrize(
    ("main", "flags", "message"),
    [
        (assistant.main, ["--best-of", 1], "best_of=1: expected at least 2 answers to pick from"),
        (assistant.main, ["--sft.seed", 3], "--sft.seed has no effect here, where other flags decide it: leave it out"),
        (assistant.main, ["--rank.temperature", 2], "--rank.temperature has no effect here, where other flags decide"),
        (evaluate.main, ["--best-of", 0], "best_of=0: expected more than 0"),
        (ppo.main, ["--samples-every", 0], "samples_every=0: expected more than 0"),
        (assistant.main, ["--reward.saves.every", 0], "every=0: expected more than 0"),
        (ppo.main, ["--algorithm.kl-in", "loss"], "kl_in=loss with kl_kind=k1 has no effect"),
        (ppo.main, ["--lora.alpha", 4], "lora: alpha and kernels have no effect without a rank"),
    ],
)
def test_flags_that_cannot_be(capsys, main, flags, message):
    default = {assistant.main: TINY, evaluate.main: TINY.evaluate, ppo.main: TINY.ppo}[main]
    assert message in refused(capsys, main, default, *flags)


@pytest.mark.parametrize("main", [pretrain.main, sft.main])
def test_a_batch_that_does_not_divide_over_the_devices(done, flags, capsys, main):
    cfg, _ = done
    default = cfg.sft if main is sft.main else cfg.pretrain
    default = dataclasses.replace(default, init=cfg.out / "pretrain" / "model")
    said = refused(capsys, main, default, *flags, "--batch", 4)
    assert "does not divide over 8 devices: use a multiple of 8" in said


def test_directories_that_are_not_models(done, flags, tmp_path, capsys):
    cfg, _ = done
    said = refused(capsys, sft.main, cfg.sft, *flags, "--init", tmp_path / "nowhere")
    assert said.endswith("nowhere is not a model directory: it has no config.json; run the experiment that writes it")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    said = refused(capsys, sft.main, cfg.sft, *flags, "--init", tmp_path / "bert")
    assert "model_type 'bert' is not supported: expected one of gpt2, llama, mistral, " in said
    said = refused(
        capsys, ppo.main, cfg.ppo, *flags, "--init", cfg.out / "sft" / "model", "--reward", cfg.out / "sft" / "model"
    )
    assert said.endswith("has no score head (score.weight): it is not a reward model")


def test_a_tokenizer_with_ids_that_the_model_does_not_have(done, flags, tmp_path, capsys):
    cfg, _ = done
    config = dataclasses.replace(tiny.GPT, vocab_size=300)
    tok = models.load(cfg.out / "sft" / "model").tokenizer
    models.save(models.Model(config, {}, tok, lambda: None), tiny.policy(config), tmp_path / "small")
    said = refused(capsys, sft.main, cfg.sft, *flags, "--init", tmp_path / "small")
    assert "small: the tokenizer has ids up to 511 but the model's vocabulary is 300: use the model's own" in said


@pytest.mark.parametrize("main", [pretrain.main, sft.main, reward.main, dpo.main])
def test_rows_longer_than_the_table_of_positions(capsys, tmp_path, main):
    models.save(models.Model(tiny.GPT, {}, None, lambda: None), tiny.policy(), tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"text": "t"}')
    default = {pretrain.main: pretrain, sft.main: sft, reward.main: reward, dpo.main: dpo}[main].Config()
    flags = ["--init", tmp_path / "model", "--data", tmp_path / "rows.jsonl", "--length", 25]
    said = refused(capsys, main, default, *flags, "--out", tmp_path / "run", "--data-dir", tmp_path / "data")
    assert said.startswith("error: length=25 is more than the model's context of 24 tokens")


def test_a_loss_that_is_not_finite_stops_the_run(done, flags, monkeypatch, capsys, tmp_path):
    cfg, _ = done

    def train_step(state, batch, **_):
        metrics = {"loss/next_token": jnp.where(state.step == 2, jnp.nan, 1.0)}
        return state.replace(step=state.step + 1), metrics

    monkeypatch.setattr(sft_lib, "train_step", train_step)
    default = dataclasses.replace(
        cfg.pretrain, init=cfg.out / "pretrain" / "model", steps=9, saves=checkpoint.Config(every=2)
    )
    with pytest.raises(SystemExit) as stop:
        cli.run(pretrain.main, default, [str(flag) for flag in flags])
    assert stop.value.code == cli.FAILURE
    last = capsys.readouterr().err.splitlines()[-1]
    good = tmp_path / "run" / "checkpoints" / "2"
    assert last == f"error: step 3: loss/next_token is nan; the last good checkpoint is {good}"
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [2]
    assert not (tmp_path / "run" / "model").exists()
