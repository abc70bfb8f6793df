"""What scripts/tpu_compile.py compiles, and how it leaves: on CPU devices, and for a TPU where its compiler is."""

import dataclasses
import json

import jax
import pytest

from rlhf_jax import models
from rlhf_jax.analysis import tpu
from rlhf_jax.models import config_json
from rlhf_jax.types import InputError
from scripts import tpu_compile
from tests import tiny
from tests.analysis.test_tpu import REPORT, needs_libtpu

STEPS = {
    "pretrain": ["train", "loss", "sample"],
    "sft": ["train", "loss", "sample"],
    "instruct": ["train"],
    "rank": ["sample"],
    "reward": ["train", "score"],
    "reward_hh": ["train", "score"],
    "ppo": ["collect", "score", "train"],
    "ppo_no_ptx": ["collect", "score", "train"],
    "ppo_gold": ["collect", "train"],
    "gsm8k_ppo": ["collect", "train"],
    "gsm8k_evaluate": ["sample"],
    "grpo": ["collect", "score", "train"],
    "rloo": ["collect", "score", "train"],
    "dpo": ["train", "sample"],
    "rejection": ["collect", "score", "train", "sample"],
    "evaluate": ["collect", "loss"],
    "best_of_n": ["collect", "score"],
}


def mib(tree, chips=8):
    return tpu.argument_bytes(tree, chips) / 2**20


def planned(experiment, *flags):
    steps = tpu_compile.plan_experiment(experiment, flags, jax.devices())
    return {step.name: step for step in steps}


@pytest.mark.slow
@pytest.mark.parametrize("experiment", STEPS)
def test_every_experiment_has_its_steps(experiment):
    steps = tpu_compile.plan_experiment(experiment, [], jax.devices())
    assert [step.name for step in steps] == STEPS[experiment]


@pytest.mark.slow
def test_the_quickstart_has_those_of_its_stages():
    found = [step.name for step in tpu_compile.plan_experiment("assistant", [], jax.devices())]
    assert found[:3] == ["pretrain train", "pretrain loss", "pretrain sample"] and found[-1] == "evaluate loss"


@pytest.mark.slow
def test_models_are_those_that_experiments_make_of_each_other():
    quickstart = models.parameter_count(dataclasses.replace(models.preset("llama-mini"), vocab_size=1280))
    stories = models.parameter_count(dataclasses.replace(models.preset("llama-mini-512"), vocab_size=2048))
    count = lambda step: sum(x.size for x in jax.tree.leaves(step.args[0].params)) // 8  # pmap's copies
    assert count(planned("sft")["train"]) == quickstart
    assert count(planned("gsm8k_sft")["train"]) == stories


@pytest.mark.slow
def test_a_model_is_a_directory_or_a_preset(tmp_path):
    models.save(models.Model(tiny.LLAMA, None, None, lambda: None), tiny.policy(tiny.LLAMA), tmp_path / "model")
    count = lambda *flags: sum(x.size for x in jax.tree.leaves(planned("sft", *flags)["train"].args[0].params)) // 8
    assert count("--init", str(tmp_path / "model")) == models.parameter_count(tiny.LLAMA)
    assert count("--init", "llama-micro") == models.parameter_count(models.preset("llama-micro"))
    with pytest.raises(InputError, match="nowhere is neither a model directory nor a preset: tiny, mini"):
        planned("sft", "--init", "nowhere")


@pytest.mark.slow
def test_ppo_holds_four_models():
    """While each step runs, whatever it does not take itself lies beside it."""
    presets = {"policy": "llama-tiny", "judge": "llama-micro"}
    sizes = {name: 4 * models.parameter_count(models.preset(x)) / 2**20 for name, x in presets.items()}
    judge = dataclasses.replace(models.preset(presets["judge"]), tie_embeddings=True)
    sizes["judge"] = 4 * models.parameter_count(judge) / 2**20
    steps = planned("ppo", "--init", presets["policy"], "--reward", presets["judge"])
    trained, frozen = 3 * (sizes["policy"] + sizes["judge"]), sizes["policy"] + sizes["judge"]
    for step in steps.values():
        assert mib((step.args, step.beside)) == pytest.approx(trained + frozen, rel=0.02)
    assert mib(steps["collect"].args) == pytest.approx(2 * sizes["policy"] + sizes["judge"], rel=0.02)
    assert mib(steps["score"].args) == pytest.approx(sizes["judge"], rel=0.1)
    assert mib(steps["train"].args) == pytest.approx(trained, rel=0.02)
    half = planned("ppo", "--init", presets["policy"], "--reward", presets["judge"], "--compute.frozen", "bfloat16")
    assert mib((half["train"].args, half["train"].beside)) == pytest.approx(trained + frozen / 2, rel=0.02)


@pytest.mark.slow
def test_a_mesh_keeps_one_copy_where_pmap_makes_another():
    """Of the policy that is its own reference, of what a stage samples with at its end."""
    weights = lambda step: mib(list({id(x): x for x in jax.tree.leaves((step.args, step.beside))}.values()))
    whole = 4 * models.parameter_count(dataclasses.replace(models.preset("llama-mini"), vocab_size=1280))
    whole /= 2**20
    mesh = "--devices.fsdp", "8"
    assert weights(planned("best_of_n")["collect"]) > 2.7 * whole
    assert weights(planned("best_of_n", *mesh)["collect"]) < 2.4 * whole / 8
    assert weights(planned("pretrain")["sample"]) == pytest.approx(whole, rel=0.05)
    assert weights(planned("pretrain", *mesh)["sample"]) == pytest.approx(3 * whole / 8, rel=0.1)  # the optimiser's too


def test_a_recipe_names_its_stage():
    (train, _) = tpu_compile.plan_experiment("tldr_stiennon2020:reward-1.3b", [], jax.devices())
    billions = sum(x.size for x in jax.tree.leaves(train.args[0].params)) / 8e9
    assert billions == pytest.approx(1.32, rel=0.02)


@pytest.mark.slow
def test_flan_is_at_the_paper_s_sizes_and_adafactor_takes_little():
    mesh = "--devices.fsdp", "4", "--devices.tensor", "2"
    (step,) = tpu_compile.plan_experiment("flan:tune-422m", mesh, jax.devices())
    assert step.tokens == 8192
    state = step.args[0]
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree) if hasattr(x, "size"))
    assert size(state.opt_state) < 0.02 * size(state.params)
    after, _ = step.step.lower(*step.args).out_info
    assert size(after) == size(state)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(), ("--devices.fsdp", "8")], ids=["pmap", "mesh"])
def test_a_loaded_reward_model_is_gone_where_the_scorer_has_its_copy(mesh):
    for experiment in ("best_of_n", "rejection"):
        steps = planned(experiment, *mesh)
        judge = mib(steps["score"].args[0])
        policies = mib({id(x): x for x in jax.tree.leaves(steps["collect"].args[0])})
        assert mib(steps["collect"].beside) == pytest.approx(judge, rel=0.01)
        assert mib(steps["score"].beside) == pytest.approx(policies, rel=0.01)


@pytest.mark.slow
def test_nothing_is_written_or_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for experiment in ("pretrain", "reward", "rank", "ppo", "evaluate"):
        planned(experiment)
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


@pytest.mark.parametrize(
    ("experiment", "flags", "message"),
    [
        ("pppo", (), "experiment 'pppo': expected one of answers, arena, assistant"),
        ("instructgpt", (), "experiment 'instructgpt': expected"),
        ("instructgpt:ppo-2b", (), "experiment 'instructgpt:ppo-2b': expected"),
        ("rounds", (), "no steps of its own"),
        ("sft", ("--lrr", "1"), "unknown flag --lrr"),
        ("sft", ("--batch", "9"), "does not divide over 8"),
        ("sft", ("--devices.fsdp", "3"), "but there are 8"),
    ],
)
def test_wrong_input_is_refused(experiment, flags, message):
    with pytest.raises(InputError, match=message):
        planned(experiment, *flags)


@pytest.fixture
def told(monkeypatch):
    """The script, with a compiler that says what the test has put here."""
    reports = []
    monkeypatch.setattr(tpu, "devices", lambda topology: jax.devices())
    monkeypatch.setattr(
        tpu, "compile_report", lambda program, *_: dataclasses.replace(reports.pop(0), name=program.name)
    )
    return reports


@pytest.mark.parametrize(("gib", "status"), [(1.0, 0), (10.0, 1)])
def test_the_status_says_whether_all_fits_together(told, capsys, gib, status):
    told += [REPORT, REPORT, dataclasses.replace(REPORT, beside=gib * tpu.GIB)]
    assert tpu_compile.main(["--experiment", "pretrain", "--topology", "v5e:2x4"]) == status
    head, _, train, loss, sample, record = capsys.readouterr().out.splitlines()
    assert (
        head.startswith("| step |")
        and train.startswith("| train |")
        and loss.startswith("| loss |")
        and sample.startswith("| sample |")
    )
    assert ("does not fit" in sample) == bool(status)
    assert [step["name"] for step in json.loads(record)] == ["train", "loss", "sample"]
    assert json.loads(record)[0]["traffic"]["collectives"] == {"all-reduce": 1.5 * tpu.GIB}


@pytest.mark.slow
def test_some_steps_alone(told, capsys):
    told += [REPORT]
    assert tpu_compile.main(["--experiment", "ppo", "--topology", "v5e:2x4", "--only", "score"]) == 0
    assert "| score |" in capsys.readouterr().out and not told
    with pytest.raises(InputError, match="step 'scores': expected one of collect, score, train"):
        tpu_compile.main(["--experiment", "ppo", "--topology", "v5e:2x4", "--only", "scores"])


SMALL = "--init", "llama-micro", "--reward", "llama-micro", "--prompt-length", "4", "--max-new-tokens", "4"


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(), ("--devices.fsdp", "4", "--devices.tensor", "2")], ids=["pmap", "mesh"])
def test_steps_compile(mesh):
    """On CPU devices: the shapes that each step hands on are those that the next one takes."""
    steps = planned("ppo", *SMALL, "--text-length", "8", "--batch", "32", *mesh)
    for step in steps.values():
        report = tpu.compile_report(step, "v5e:2x4", 8)
        assert report.arguments == pytest.approx(tpu.argument_bytes(step.args, 8), rel=0.01)
        assert report.flops.total > 0 and report.share < 0.01


@needs_libtpu
def test_steps_compile_for_a_tpu(capsys):
    flags = ["--experiment", "sft", "--topology", "v5e:2x4", "--init", "llama-micro", "--only", "train"]
    assert tpu_compile.main(flags) == 0
    assert "all-reduce" in capsys.readouterr().out


def widened(config):
    """The same block, wide enough for a mesh to divide; rows of 256 columns are worth a kernel."""
    long = models.LongScaling((1.0,) * 16, (2.0,) * 16, original_length=128, attention_factor=1.25)
    return dataclasses.replace(
        config,
        d_model=256,
        n_kv_heads=4 if config.n_kv_heads == config.n_heads else 2,
        n_heads=4,
        head_dim=64,
        d_ff=512,
        vocab_size=512,
        max_length=512,
        window=config.window and 64,
        query_size=config.query_size and 64,
        rotary_size=config.rotary_size and 32,
        rope_scaling=long if isinstance(config.rope_scaling, models.LongScaling) else config.rope_scaling,
    )


ALL = tiny.CONFIGS | tiny.MORE
ROLLS = "--prompt-length", "160", "--max-new-tokens", "96", "--batch", "16", "--algorithm.ptx-coef", "0"
STAGES = {
    "ppo": (("collect", "train"), ROLLS),
    "sft": (("train",), ("--length", "256", "--text", "None")),
    "reward": (("train",), ("--length", "256", "--batch", "8")),
}


@needs_libtpu
@pytest.mark.full
@pytest.mark.parametrize("name", ALL)
def test_every_family_compiles_for_a_tpu(name, tmp_path):
    """Sampling, and the steps of SFT, reward model and PPO, over a mesh that splits heads, MLPs and experts."""
    config_json.hf_config(widened(ALL[name]), False, "float32", None).save_pretrained(tmp_path)
    mesh = "--devices.fsdp", "2", "--devices.tensor", "2", "--compute.dtype", "bfloat16", "--compute.remat", "full"
    devices = tpu.devices("v5e:2x2")
    for experiment, (steps, flags) in STAGES.items():
        judge = ("--reward", str(tmp_path)) if experiment == "ppo" else ()
        every = tpu_compile.plan_experiment(experiment, ("--init", str(tmp_path), *judge, *flags, *mesh), devices, 4)
        reports = [tpu.compile_report(step, "v5e:2x2", 4) for step in every if step.name in steps]
        assert len(reports) == len(steps) and all(report.traffic.collectives for report in reports)
