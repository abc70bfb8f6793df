"""Can PPO on choices among four continuations turn movie-review sentences positive, and leave them sentences?

After Ziegler et al. 2019 (arXiv:1909.08593), from scratch and on real text. A small GPT is pretrained on review
sentences. It continues real openings four times each; a labeler, a classifier fitted on one half of the human labels,
picks the best of four. The reward model learns from these choices alone by a softmax over the four, one epoch, and is
normalised on samples of the reference. PPO with an adaptive KL penalty follows. The judge, a classifier fitted on the
other half of the labels, reads continuations of held-out openings before and after; nothing is trained on its word.

The data are the Stanford Sentiment Treebank (Socher et al. 2013, sentences labelled by people) and the review snippets
that it was cut from (Pang & Lee 2005, used as text only). `--data` is a folder that holds

    sst_train.csv, sst_dev.csv               label,sentence (github.com/openai/generating-reviews-discovering-sentiment)
    rt_polarity.pos, rt_polarity.neg         a snippet a line (cs.cornell.edu/people/pabo/movie-review-data)

or the name of a TFDS data set with `sentence`, `label` and a split `validation`: `--data glue/sst2` downloads it.
No text that contains a sentence of sst_dev.csv, whose openings and labels are the held-out ones, is trained on.

Run:     python -m experiments.papers.sentiment --data ../shared/data
Parent:  assistant
Result:  docs/sentiment.md
"""

import csv
import dataclasses
import functools
import io
import json
import random
import re
import resource
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

from experiments import ppo, pretrain, reward
from rlhf_jax import models, runs
from rlhf_jax.algorithms import ppo as ppo_lib
from rlhf_jax.algorithms import reward as reward_lib
from rlhf_jax.algorithms import sft
from rlhf_jax.data import pipeline, sources
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.devices import parallel
from rlhf_jax.rollouts import rollout, scores
from rlhf_jax.runs import cli, plots
from rlhf_jax.types import InputError, Prompts, Rollout, named_key


# The types of the stages are quoted: by the time they were evaluated, the field would hide the module of its name.
@dataclasses.dataclass(frozen=True)
class Config:
    """Defaults are for two CPU cores. The sampler's temperature is `ppo.ppo.temperature` in every stage."""

    seed: int = 0  # of every stage, and of who labels what
    out: Path = Path("runs/sentiment")  # run directory; each stage has a folder in it
    data: str = "../shared/data"  # folder of the four files above, or a TFDS name such as glue/sst2
    data_dir: Path | None = None  # where prepared data sets are kept; None is the folder "data" in `out`
    choices: int = 3000  # openings for the reward model to learn from
    held_out_choices: int = 256  # openings to measure its accuracy on, and to normalise it on
    best_of: int = 4  # continuations of each, of which the labeler picks one
    sample_batch: int = 128  # continuations sampled at once, over all devices
    compute: models.Compute = models.Compute()  # of every stage
    devices: parallel.Config = parallel.Config()  # likewise
    pretrain: "pretrain.Config" = pretrain.Config(
        preset="llama-mini", vocab_size=2048, length=64, batch=16, steps=2400, lr=3e-3, warmup=60, weight_decay=0.1
    )
    reward: "reward.Config" = reward.Config(
        batch=16, epochs=1, lr=1e-3, dropout=0.1, normalize_first=True, reward=reward_lib.Config(loss="choice")
    )
    ppo: "ppo.Config" = ppo.Config(
        prompt_length=16,
        max_new_tokens=24,
        text=None,
        batch=64,
        steps=100,
        lr=2e-4,
        critic_lr=1e-3,
        samples_every=20,
        ppo=ppo_lib.Config(
            minibatches=4, kl_coef=0.15, kl_target=10.0, kl_horizon=3000.0, unfinished_score=-1.0, temperature=0.7
        ),
    )


# -- text and labels ---------------------------------------------------------------------------------------------------

Labelled = list[tuple[str, int]]  # a sentence, and 1 where a person found it positive


def tidy(text: str) -> str:
    """Lower case, and no spaces around punctuation: both sources in one spelling."""
    text = text.lower().replace("-lrb-", "(").replace("-rrb-", ")").replace("\xa0", " ")
    text = re.sub(r'" ([^"]*) "', r'"\1"', text)
    text = re.sub(r"\s+(n't\b|'(?:s|re|ve|ll|d|m)\b|[,.;:!?)%])", r"\1", text)
    return " ".join(re.sub(r"\(\s+", "(", text).split())


def key(text: str) -> str:
    """What two spellings of one sentence share."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def read_labelled(path: Path) -> Labelled:
    """The rows of a file `label,sentence`."""
    try:
        text = _bytes(path).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8, but byte {error.start} is not") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if not {"label", "sentence"} <= set(reader.fieldnames or ()):
        raise InputError(f"{path}, line 1: expected the columns label,sentence, got {reader.fieldnames}")
    rows = []
    for row in reader:
        if row["label"] not in ("0", "1"):
            raise InputError(f"{path}, line {reader.line_num}, field label: expected 0 or 1, got {row['label']!r}")
        if not (row["sentence"] or "").strip():
            raise InputError(f"{path}, line {reader.line_num}, field sentence: expected some text, got none")
        rows.append((tidy(row["sentence"]), int(row["label"])))
    return rows


def read_snippets(path: Path) -> list[str]:
    """The lines of a file in UTF-8 or, as first published, in latin-1."""
    return [tidy(_decode(line)) for line in _bytes(path).splitlines() if line.strip()]


def _decode(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line.decode("latin-1")


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; point --data at a folder with sst_train.csv, sst_dev.csv, rt_polarity.pos and"
            " rt_polarity.neg (--help says where they come from), or use --data glue/sst2"
        )
    return path.read_bytes()


def read_published(name: str, data_dir: Path, split: str) -> Labelled:
    """The rows of a TFDS data set with the fields `sentence` and `label`."""
    texts = sources.rows(f"{name}:sentence", "text", data_dir=data_dir, split=split)
    records = tfds.builder(name, data_dir=data_dir).as_data_source(split)
    return [(tidy(row["text"]), int(record["label"])) for row, record in zip(texts, records, strict=True)]


def whole(rows: Labelled) -> Labelled:
    """The rows that are no part of a longer one: glue/sst2 labels phrases too, and halves must not share a sentence."""
    kept, seen = [], ""
    for row in sorted(rows, key=lambda row: -len(key(row[0]))):
        if key(row[0]) not in seen:
            kept.append(row)
            seen += " " + key(row[0])
    return kept


def corpus(cfg: Config) -> tuple[Labelled, list[str], Labelled]:
    """Labelled training sentences, further text, and held-out labelled sentences that neither of them contains."""
    snippets: list[str] = []
    if (folder := Path(cfg.data)).is_dir() or not re.fullmatch(r"\w+(/\w+)?", cfg.data):
        train, held_out = read_labelled(folder / "sst_train.csv"), read_labelled(folder / "sst_dev.csv")
        snippets = [text for sign in ("pos", "neg") for text in read_snippets(folder / f"rt_polarity.{sign}")]
    else:
        train, held_out = (read_published(cfg.data, _data_dir(cfg), split) for split in ("train", "validation"))
        train = whole(train)
    hidden = {key(text) for text, _ in held_out} - {""}
    taken = set(hidden)
    labelled = [row for row in train if _take(key(row[0]), taken)]
    names = ((x, key(x)) for x in snippets)
    text = [x for x, name in names if _take(name, taken) and not any(part in name for part in hidden)]
    return labelled, text, held_out


def _take(name: str, taken: set[str]) -> bool:
    """True, once, for each name."""
    new = name not in taken
    taken.add(name)
    return new


def openings(texts: Iterable[str], rng: random.Random) -> list[str]:
    """The first three to five words of each sentence that has at least three more."""
    words = [text.split() for text in texts]
    return [" ".join(some[: rng.randint(3, 5)]) for some in words if len(some) >= 8]


def classifier(rows: Labelled) -> Pipeline:
    """Who finds a sentence positive: logistic regression on its words and pairs of words."""
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=1000)
    )
    texts, labels = zip(*rows, strict=True)
    if len(set(labels)) < 2:
        raise InputError(f"the {len(rows)} sentences of one half all have the label {labels[0]}: both are needed")
    return model.fit(texts, labels)


# -- stages ------------------------------------------------------------------------------------------------------------


def choose(cfg: Config, model: models.Model, labeler: Pipeline, prompts: Sequence[str]) -> Iterator[dict]:
    """Rankings: `best_of` continuations of each opening, with rank 0 for the one that the labeler likes best."""
    tokenizer = models.tokenizer_of(model)
    batch, counts = pipeline.every_prompt([{"prompt": x} for x in prompts], tokenizer, length=cfg.ppo.prompt_length)
    print(f"openings to choose continuations of: {counts}")
    sample = rollout.respond(
        model,
        model.params,
        jax.tree.map(lambda x: np.repeat(x, cfg.best_of, axis=0), batch),
        named_key(cfg.seed, "sentiment/choices"),
        batch=cfg.sample_batch,
        max_new_tokens=cfg.ppo.max_new_tokens,
        temperature=cfg.ppo.ppo.temperature,
        eos_id=tokenizer.eos_token_id,
        layout=parallel.layout(cfg.devices),
    )
    said = (tokenizer_lib.decode(tokenizer, *row) for row in zip(sample.tokens, sample.mask, strict=True))
    for index in batch.index:
        prompt = prompts[index]
        responses = [next(said) for _ in range(cfg.best_of)]
        best = int(np.argmax(labeler.predict_proba([prompt + response for response in responses])[:, 1]))
        yield {"prompt": prompt, "responses": responses, "ranks": [int(k != best) for k in range(cfg.best_of)]}


def continuations(cfg: Config, paths: Sequence[Path], learnt: Path, prompts: Prompts) -> Iterator[Rollout]:
    """A continuation of each opening by the policy at each path, with its score and its KL to the first policy."""
    layout = parallel.layout(cfg.devices)
    given: dict[str, Any] = {"compute": cfg.compute, "place": layout.sharding}
    reference = models.load(paths[0], **given)
    scalar = models.load_reward(learnt, **given)
    score = scores.reward_models([scalar], models.tokenizer_of(reference).eos_token_id, layout=layout)
    key = named_key(cfg.seed, "sentiment/continuations")
    for path in paths:
        yield rollout.episodes(
            models.load(path, **given),
            reference,
            prompts,
            key,
            score,
            batch=cfg.sample_batch,
            max_new_tokens=cfg.ppo.max_new_tokens,
            temperature=cfg.ppo.ppo.temperature,
            layout=layout,
        )


def text_nll(cfg: Config, paths: Sequence[Path], texts: Sequence[str]) -> Iterator[float]:
    """Mean negative log-likelihood of held-out sentences under the model at each path, nats a token."""
    layout = parallel.layout(cfg.devices)
    given: dict[str, Any] = {"compute": cfg.compute, "place": layout.sharding}
    model = models.load(paths[0], **given)
    rows = [{"text": text} for text in texts]
    sizes = {"length": cfg.pretrain.length, "batch": cfg.pretrain.batch, "seed": 0, "epochs": 1}
    batches = pipeline.text(rows, models.tokenizer_of(model), **sizes)
    step = layout.step(functools.partial(sft.evaluate, apply_fn=model.apply))
    for path in paths:
        params = layout.state(models.load(path, **given).params)
        totals = [layout.get(step(params, layout.rows(batch))) for batch in batches]
        nll, count = np.sum(jax.device_get(totals), axis=0)
        yield float(nll / count)


def main(cfg: Config) -> dict:
    """Run the stages one after the other, and return the summary."""
    start = time.monotonic()

    def begin(stage: str) -> None:
        print(f"\n== {stage} ({time.monotonic() - start:.0f} s)", flush=True)

    out, data_dir = cfg.out, _data_dir(cfg)
    runs.write_config(out, cfg)
    base, learnt, final = (out / stage / "model" for stage in ("pretrain", "reward", "ppo"))
    files = {name: out / f"{name}.jsonl" for name in ("text", "choices", "choices_held_out", "prompts")}
    shared: dict[str, Any] = {"seed": cfg.seed, "data_dir": data_dir, "compute": cfg.compute, "devices": cfg.devices}
    # Before anything runs, so that a flag without effect is refused at once.
    stages = {
        "pretrain": cli.hand_down("pretrain", cfg.pretrain, data=str(files["text"]), out=out / "pretrain", **shared),
        "reward": cli.hand_down(
            "reward",
            cfg.reward,
            init=base,
            data=str(files["choices"]),
            held_out=str(files["choices_held_out"]),
            length=cfg.ppo.prompt_length + cfg.ppo.max_new_tokens + 1,  # every one ends with EOS here
            out=out / "reward",
            **shared,
        ),
        "ppo": cli.hand_down(
            "ppo", cfg.ppo, init=base, reward=(learnt,), data=str(files["prompts"]), out=out / "ppo", **shared
        ),
    }
    rng = random.Random(cfg.seed)
    labelled, unlabelled, held_out = corpus(cfg)
    rng.shuffle(labelled)
    half = len(labelled) // 2
    labeler, judge = classifier(labelled[:half]), classifier(labelled[half:])
    answers = {"labeler": labeler, "judge": judge}
    texts, labels = zip(*held_out, strict=True)
    accuracies = {name: float(model.score(texts, labels)) for name, model in answers.items()}
    print(f"{len(labelled)} labelled and {len(unlabelled)} further sentences; right on {len(texts)} held-out ones: "
          + ", ".join(f"{name} {100 * value:.1f} %" for name, value in accuracies.items()))  # fmt: skip
    sentences = [text for text, _ in labelled] + unlabelled
    rng.shuffle(sentences)
    starts = openings(sentences, rng)
    test = openings(texts, rng)
    if len(starts) <= cfg.held_out_choices:
        raise InputError(
            f"{cfg.data}: {len(starts)} sentences have an opening, and {cfg.held_out_choices} are set aside;"
            " lower --held-out-choices"
        )

    _write(files["text"], ({"text": text} for text in sentences))
    runs.once(pretrain.main, stages["pretrain"])

    begin("choose")
    split = cfg.held_out_choices
    chosen = list(choose(cfg, models.load(base, compute=cfg.compute), labeler, starts[: split + cfg.choices]))
    _write(files["choices_held_out"], chosen[:split])
    _write(files["choices"], chosen[split:])

    reward_result = runs.once(reward.main, stages["reward"])
    print(f"reward model: {100 * reward_result['accuracy']:.1f} % of held-out pairs of the best and another")

    _write(files["prompts"], ({"prompt": prompt} for prompt in starts))
    runs.once(ppo.main, stages["ppo"])

    begin("evaluate")
    tokenizer = models.tokenizer_of(models.load(base, compute=cfg.compute))
    prompts, counts = pipeline.every_prompt(
        [{"prompt": prompt} for prompt in test], tokenizer, length=cfg.ppo.prompt_length
    )
    print(f"held-out openings: {counts}")
    results, said = {}, {}
    paths = (base, final)
    sampled, losses = continuations(cfg, paths, learnt, prompts), text_nll(cfg, paths, texts)
    for stage, episodes, nll in zip(("base", "PPO"), sampled, losses, strict=True):
        rows = zip(episodes.tokens, episodes.mask, strict=True)
        said[stage] = [tokenizer_lib.decode(tokenizer, *row).strip() for row in rows]
        kl = np.sum(np.where(episodes.response_mask, episodes.logp - episodes.logp_ref, 0.0), axis=1)
        results[stage] = {
            **{f"positive_{name}": float(np.mean(model.predict(said[stage]))) for name, model in answers.items()},
            "reward": float(episodes.score.mean()),
            "kl": float(kl.mean()),
            "ended": float(episodes.ended.mean()),
            "tokens": float(episodes.response_mask.sum(axis=1).mean()),
            "distinct": len(set(said[stage])) / len(said[stage]),
            "nll": nll,
        }
    summary = {
        "seed": cfg.seed,
        "seconds": round(time.monotonic() - start, 1),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        "openings": len(prompts.index),
        **{name: {"accuracy": value} for name, value in accuracies.items()},
        "reward": reward_result,
        **{stage.lower(): values for stage, values in results.items()},
        "gain": results["PPO"]["positive_judge"] - results["base"]["positive_judge"],
    }
    runs.write(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    report(out, [test[index] for index in prompts.index], results, said, summary)
    return summary


def report(
    out: Path, prompts: Sequence[str], stages: dict[str, dict], said: dict[str, list[str]], summary: dict
) -> None:
    """Print the table of the stages and three openings as each continues them; write both as plots and Markdown."""
    names = {
        "positive_judge": "judged positive (share)",
        "kl": "KL to the base (nats)",
        "reward": "reward model's score",
        "ended": "sentences that end (share)",
        "distinct": "distinct sentences (share)",
        "nll": "loss on held-out text (nats a token)",
    }
    panels = {label: {stage: values[name] for stage, values in stages.items()} for name, label in names.items()}
    plots.stages(out / "stages.png", panels)
    for label, values in panels.items():
        print(f"{label:<40}" + "".join(f"{stage:>6}{value:>8.3f}" for stage, value in values.items()))
    lines = ["| opening | " + " | ".join(said) + " |", "| --- " * (len(said) + 1) + "|"]
    for n, prompt in enumerate(prompts):
        rests = [texts[n].removeprefix(prompt).replace("|", r"\|") for texts in said.values()]
        lines.append("| " + " | ".join([prompt, *(f"...{rest}" for rest in rests)]) + " |")
        if n < 3:
            print("\n" + "\n".join(f"  {stage:<5} {texts[n]}" for stage, texts in said.items()))
    runs.write(out / "samples.md", "\n".join(lines) + "\n")
    print(f"\n{summary['seconds']:.0f} s, {summary['peak_memory_gib']:.1f} GiB; everything is in {out}")


def _data_dir(cfg: Config) -> Path:
    return cfg.data_dir or cfg.out / "data"


def _write(path: Path, rows: Iterable[dict]) -> None:
    runs.write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    cli.run(main, Config())
