"""Can PPO on choices among four continuations turn movie-review sentences positive, and leave them sentences?

After Ziegler et al. 2019 (arXiv:1909.08593), from scratch and on real text. A small GPT is pretrained on review
sentences. It continues real openings four times each; a labeler, a classifier fitted on one half of the human labels,
picks the best of four. The reward model learns from these choices alone by a softmax over the four, one epoch, and is
normalised on samples of the reference. PPO with an adaptive KL penalty follows. The judge, a classifier fitted on the
other half of the labels, reads continuations of held-out openings before and after; nothing is trained on its word.
With `--pretrain.init` any model takes the place of the small GPT; it is adapted to the sentences first.

The data are the Stanford Sentiment Treebank (Socher et al. 2013, sentences labelled by people) and the review snippets
that it was cut from (Pang & Lee 2005, used as text only). `--data` is a folder that holds

    sst_train.csv, sst_dev.csv               label,sentence (github.com/openai/generating-reviews-discovering-sentiment)
    rt_polarity.pos, rt_polarity.neg         a snippet a line (cs.cornell.edu/people/pabo/movie-review-data)

or the name of a TFDS data set with `sentence`, `label` and a split `validation`: `--data glue/sst2` downloads it.
No text that contains a sentence of sst_dev.csv, whose openings and labels are the held-out ones, is trained on.

Run:     python -m experiments.papers.sentiment --data PATH
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tensorflow_datasets as tfds
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

from experiments import ppo, pretrain, reward
from rlhf_jax import models, runs
from rlhf_jax.algorithms import best_of_n, sft
from rlhf_jax.algorithms import ppo as ppo_lib
from rlhf_jax.algorithms import reward as reward_lib
from rlhf_jax.data import pipeline, sources
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.devices import parallel
from rlhf_jax.rollouts import likelihood, rollout, sampling, scores
from rlhf_jax.runs import cli, plots
from rlhf_jax.settings import Count, Range, Seed
from rlhf_jax.types import InputError, Prompts, Rollout, named_key


# The types of the stages are quoted: by the time they were evaluated, the field would hide the module of its name.
@dataclasses.dataclass(frozen=True)
class Config(runs.Stage):
    """Defaults are for two CPU cores. The sampler's temperature is `ppo.algorithm.temperature` in every stage."""

    seed: Seed = 0  # of every stage, and of who labels what
    out: Path = Path("runs/sentiment")  # run directory; each stage has a folder in it
    data: str | None = None  # required: the folder of the four files above, or a TFDS name such as glue/sst2
    data_dir: Path | None = None  # type: ignore[assignment]  # where prepared data sets are kept; None is the folder "data" in `out`
    choices: Count = 3000  # openings for the reward model to learn from
    held_out_choices: Count = 256  # openings to measure its accuracy on, and to normalise it on
    best_of: Annotated[int, Range(least=2)] = 4  # continuations of each, of which the labeler picks one
    sample_batch: Count = 128  # continuations sampled at once, over all devices
    pretrain: "pretrain.Config" = pretrain.Config(
        preset="llama-mini", vocab_size=2048, length=64, batch=16, steps=2400, lr=3e-3, warmup=60, weight_decay=0.1
    )
    reward: "reward.Config" = reward.Config(
        batch=16, epochs=1, lr=1e-3, dropout=0.1, normalize_first=True, algorithm=reward_lib.Config(loss="choice")
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
        algorithm=ppo_lib.Config(
            minibatches=4, kl_coef=0.15, kl_target=10.0, kl_horizon=3000.0, unfinished_score=-1.0, temperature=0.7
        ),
    )


# -- text and labels ---------------------------------------------------------------------------------------------------

Labelled = list[tuple[str, int]]  # a sentence, and 1 where a person found it positive
FILES = "sst_train.csv, sst_dev.csv, rt_polarity.pos and rt_polarity.neg (--help says where they come from)"


@dataclasses.dataclass(frozen=True)
class Reviews:
    """The sentences that there are, in the order in which a seed takes them."""

    labelled: Labelled  # to train on
    sentences: list[str]  # to train on, with labels and without
    openings: list[str]  # of these, to be continued
    held_out: Labelled
    held_out_openings: list[str]


@dataclasses.dataclass(frozen=True)
class Readers:
    """The two who read continuations: classifiers, each fitted on its own half of the labelled sentences."""

    labeler: Pipeline  # makes the choices that the reward model learns from
    judge: Pipeline  # measures, and nothing is trained on its word

    def named(self) -> dict[str, Pipeline]:
        """The two by name."""
        return {"labeler": self.labeler, "judge": self.judge}


def tidy(text: str) -> str:
    """Lower case, and no spaces around punctuation: both sources in one spelling."""
    text = text.lower().replace("-lrb-", "(").replace("-rrb-", ")").replace("\xa0", " ")
    text = re.sub(r'" ([^"]*) "', r'"\1"', text)
    text = re.sub(r"\s+(n't\b|'(?:s|re|ve|ll|d|m)\b|[,.;:!?)%])", r"\1", text)
    return " ".join(re.sub(r"\(\s+", "(", text).split())


def key(text: str) -> str:
    """The letters and digits, which two spellings of one sentence share."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def read_labelled(path: Path) -> Labelled:
    """The rows of a file `label,sentence`."""
    try:
        text = read_bytes(path).decode()
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
    return [tidy(decode(line)) for line in read_bytes(path).splitlines() if line.strip()]


def decode(line: bytes) -> str:
    """The text of a line of snippets."""
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line.decode("latin-1")


def read_bytes(path: Path) -> bytes:
    """The contents of one of the four files."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; point --data at a folder with {FILES}, or use --data glue/sst2")
    return path.read_bytes()


def read_published(name: str, data_dir: Path, split: str) -> Labelled:
    """The rows of a TFDS data set with the fields `sentence` and `label`."""
    texts = sources.rows(f"{name}:sentence", "text", data_dir=data_dir, split=split)
    records = tfds.builder(name, data_dir=data_dir).as_data_source(split)
    return [(tidy(row["text"]), int(record["label"])) for row, record in zip(texts, records, strict=True)]


def drop_parts(rows: Labelled) -> Labelled:
    """The rows that are no part of a longer one: glue/sst2 labels phrases too, and halves must not share a sentence."""
    kept, seen = [], ""
    for row in sorted(rows, key=lambda row: -len(key(row[0]))):
        if key(row[0]) not in seen:
            kept.append(row)
            seen += " " + key(row[0])
    return kept


def read_corpus(data: str, data_dir: Path) -> tuple[Labelled, list[str], Labelled]:
    """Labelled training sentences, further text, and held-out labelled sentences that neither of them contains."""
    snippets: list[str] = []
    if (folder := Path(data)).is_dir() or not re.fullmatch(r"\w+(/\w+)?", data):
        train, held_out = read_labelled(folder / "sst_train.csv"), read_labelled(folder / "sst_dev.csv")
        snippets = [text for sign in ("pos", "neg") for text in read_snippets(folder / f"rt_polarity.{sign}")]
    else:
        train, held_out = (read_published(data, data_dir, split) for split in ("train", "validation"))
        train = drop_parts(train)
    hidden = {key(text) for text, _ in held_out} - {""}
    taken = set(hidden)
    labelled = [row for row in train if is_new(key(row[0]), taken)]
    names = ((x, key(x)) for x in snippets)
    text = [x for x, name in names if is_new(name, taken) and not any(part in name for part in hidden)]
    return labelled, text, held_out


def is_new(name: str, taken: set[str]) -> bool:
    """True, once, for each name: it is taken afterwards."""
    new = name not in taken
    taken.add(name)
    return new


def cut_openings(texts: Iterable[str], rng: random.Random) -> list[str]:
    """The first three to five words of each sentence that has at least three more."""
    words = [text.split() for text in texts]
    return [" ".join(some[: rng.randint(3, 5)]) for some in words if len(some) >= 8]


def read_reviews(cfg: Config) -> Reviews:
    """The sentences that `cfg.data` holds, shuffled, and their openings."""
    if cfg.data is None:
        raise InputError(f"--data is required: a folder with {FILES}, or glue/sst2, which is downloaded")
    rng = random.Random(cfg.seed)
    labelled, unlabelled, held_out = read_corpus(cfg.data, shared_settings(cfg).data_dir)
    rng.shuffle(labelled)
    sentences = [text for text, _ in labelled] + unlabelled
    rng.shuffle(sentences)
    openings = cut_openings(sentences, rng)
    held_out_openings = cut_openings((text for text, _ in held_out), rng)
    if len(openings) <= cfg.held_out_choices:
        raise InputError(
            f"{cfg.data}: {len(openings)} sentences have an opening, and {cfg.held_out_choices} are set aside;"
            " lower --held-out-choices"
        )
    return Reviews(labelled, sentences, openings, held_out, held_out_openings)


def fit_classifier(rows: Labelled) -> Pipeline:
    """Logistic regression on the words and pairs of words of a sentence: does a person find it positive?"""
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=1000)
    )
    texts, labels = zip(*rows, strict=True)
    if len(set(labels)) < 2:
        raise InputError(f"the {len(rows)} sentences of one half all have the label {labels[0]}: both are needed")
    return model.fit(texts, labels)


def fit_readers(reviews: Reviews) -> tuple[Readers, dict[str, float]]:
    """Labeler and judge, and on what share of the held-out sentences each is right."""
    half = len(reviews.labelled) // 2
    readers = Readers(fit_classifier(reviews.labelled[:half]), fit_classifier(reviews.labelled[half:]))
    texts, labels = zip(*reviews.held_out, strict=True)
    accuracies = {name: float(reader.score(texts, labels)) for name, reader in readers.named().items()}
    count, further = len(reviews.labelled), len(reviews.sentences) - len(reviews.labelled)
    shares = ", ".join(f"{name} {100 * value:.1f} %" for name, value in accuracies.items())
    print(f"{count} labelled and {further} further sentences; right on {len(texts)} held-out ones: {shares}")
    return readers, accuracies


# -- stages ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stages:
    """The configuration of each stage. They name the files that hand rows from one to the next."""

    pretrain: "pretrain.Config"
    reward: "reward.Config"
    ppo: "ppo.Config"


def shared_settings(cfg: Config) -> runs.Stage:
    """The settings that all stages have in common."""
    return runs.Stage(
        seed=cfg.seed,
        out=cfg.out,
        data_dir=cfg.data_dir or cfg.out / "data",
        compute=cfg.compute,
        devices=cfg.devices,
    )


def plan_stages(cfg: Config) -> Stages:
    """The configuration of each stage; raises InputError for a flag without effect."""
    shared, base = shared_settings(cfg), cfg.out / "pretrain" / "model"
    return Stages(
        pretrain=cli.hand_down(
            "pretrain",
            cfg.pretrain,
            shared,
            data=str(cfg.out / "text.jsonl"),
            out=cfg.out / "pretrain",
        ),
        reward=cli.hand_down(
            "reward",
            cfg.reward,
            shared,
            init=base,
            data=str(cfg.out / "choices" / "train.jsonl"),
            held_out=str(cfg.out / "choices" / "held_out.jsonl"),
            length=cfg.ppo.prompt_length + cfg.ppo.max_new_tokens + 1,  # every one ends with EOS here
            out=cfg.out / "reward",
        ),
        ppo=cli.hand_down(
            "ppo",
            cfg.ppo,
            shared,
            init=base,
            reward=(cfg.out / "reward" / "model",),
            data=str(cfg.out / "prompts.jsonl"),
            out=cfg.out / "ppo",
        ),
    )


def write_rows(path: str | Path, rows: Iterable[dict]) -> None:
    """Write the rows as JSON Lines."""
    runs.write(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def sampled_as(cfg: Config, model: models.Model) -> sampling.Config:
    """The sampling of every continuation: that of PPO."""
    return sampling.Config(
        max_new_tokens=cfg.ppo.max_new_tokens,
        temperature=cfg.ppo.algorithm.temperature,
        eos_id=models.stop_ids(model),
    )


def asked(openings: Sequence[str]) -> list[dict]:
    """The rows of prompts of these openings."""
    return [{"prompt": opening} for opening in openings]


def choose(cfg: Config, model: models.Model, labeler: Pipeline, openings: Sequence[str]) -> Iterator[dict]:
    """Rankings: `best_of` continuations of each opening, with rank 0 for the one that the labeler likes best."""
    tokenizer = models.tokenizer_of(model)
    rows = asked(openings)
    batch, counts = pipeline.every_prompt(rows, tokenizer, length=cfg.ppo.prompt_length)
    print(f"openings to choose continuations of: {counts}")
    sampled = rollout.episodes(
        model,
        best_of_n.repeat(batch, cfg.best_of),
        named_key(cfg.seed, "sentiment/choices"),
        sampled_as(cfg, model),
        batch=cfg.sample_batch,
        layout=parallel.layout(cfg.devices),
    )
    said = zip(sampled.response_tokens, sampled.response_mask, strict=True)
    texts = (tokenizer_lib.decode(tokenizer, tokens, mask) for tokens, mask in said)
    for index in batch.index:
        responses = [next(texts) for _ in range(cfg.best_of)]
        best = int(np.argmax(labeler.predict_proba([openings[index] + response for response in responses])[:, 1]))
        yield rows[index] | {"responses": responses, "ranks": [int(k != best) for k in range(cfg.best_of)]}


def before_choices(cfg: Config) -> Config:
    """`cfg` with the defaults wherever the choices do not depend on it."""
    policy = dataclasses.replace(
        Config.ppo,
        prompt_length=cfg.ppo.prompt_length,
        max_new_tokens=cfg.ppo.max_new_tokens,
        algorithm=dataclasses.replace(Config.ppo.algorithm, temperature=cfg.ppo.algorithm.temperature),
    )
    return dataclasses.replace(cfg, reward=Config.reward, ppo=policy)


def write_choices(stage: "reward.Config", labeler: Pipeline, openings: Sequence[str], cfg: Config) -> None:
    """Write the labeler's choices among continuations by the base: the first ones are held out."""
    base, split = models.load(stage.init, compute=cfg.compute), cfg.held_out_choices
    chosen = list(choose(cfg, base, labeler, openings[: split + cfg.choices]))
    write_rows(str(stage.held_out), chosen[:split])
    write_rows(stage.data, chosen[split:])


def continuations(cfg: Config, paths: Sequence[Path], learnt: Path, prompts: Prompts) -> Iterator[Rollout]:
    """A continuation of each opening by the policy at each path, with its score and its KL to the first policy."""
    layout = parallel.layout(cfg.devices)
    reference = models.load(paths[0], compute=cfg.compute, place=layout.sharding)
    reward_model = models.load_reward(learnt, compute=cfg.compute, place=layout.sharding)
    score = scores.reward_models([reward_model], models.stop_ids(reference), layout=layout)
    for path in paths:
        yield rollout.episodes(
            models.load(path, compute=cfg.compute, place=layout.sharding),
            prompts,
            named_key(cfg.seed, "sentiment/continuations"),
            sampled_as(cfg, reference),
            batch=cfg.sample_batch,
            reference=reference,
            score=score,
            layout=layout,
        )


def fluency(cfg: Config, untouched: Path, prompts: Prompts) -> Callable[[Rollout], float]:
    """A function of continuations: their perplexity, a token, by the model at this path, without a temperature."""
    layout = parallel.layout(cfg.devices)
    model = models.load(untouched, compute=cfg.compute, place=layout.sharding)
    reader = likelihood.Reader(model, layout, cfg.sample_batch)

    def perplexity(episodes: Rollout) -> float:
        requests = [
            likelihood.Request(prompt[real].tolist(), tokens[said].tolist())
            for prompt, real, tokens, said in zip(
                prompts.tokens, prompts.mask, episodes.response_tokens, episodes.response_mask, strict=True
            )
        ]
        return float(np.exp(-sum(one.total for one in reader(requests)) / episodes.response_mask.sum()))

    return perplexity


def text_nll(cfg: Config, paths: Sequence[Path], texts: Sequence[str]) -> Iterator[float]:
    """Mean negative log-likelihood of held-out sentences under the model at each path, nats a token."""
    layout = parallel.layout(cfg.devices)
    model = models.load(paths[0], compute=cfg.compute, place=layout.sharding)
    batches = pipeline.text(
        [{"text": text} for text in texts],
        models.tokenizer_of(model),
        length=cfg.pretrain.length,
        batch=cfg.pretrain.batch,
        seed=0,
        epochs=1,
    )
    step = layout.step(functools.partial(sft.evaluate, logprobs_fn=models.logprobs_fn(model.config)))
    for path in paths:
        params = layout.state(models.load(path, compute=cfg.compute, place=layout.sharding).params)
        totals = [layout.get(step(params, layout.rows(batch))) for batch in batches]
        nll, count = np.sum(jax.device_get(totals), axis=0)
        yield float(nll / count)


@dataclasses.dataclass(frozen=True)
class Continued:
    """A policy's continuations of the held-out openings, and what was measured of them."""

    sentences: list[str]  # opening included
    measures: dict[str, float]


def measure(episodes: Rollout, sentences: list[str], readers: Readers, perplexity: float, nll: float) -> Continued:
    """Measure how positive the sentences are, how far from the base's, and whether they are sentences at all."""
    kl = np.sum(np.where(episodes.response_mask, episodes.logp - episodes.logp_ref, 0.0), axis=1)
    measures = {
        **{f"positive_{name}": float(np.mean(reader.predict(sentences))) for name, reader in readers.named().items()},
        "reward": float(episodes.score.mean()),
        "kl": float(kl.mean()),
        "ended": float(episodes.ended.mean()),
        "tokens": float(episodes.response_mask.sum(axis=1).mean()),
        "distinct": len(set(sentences)) / len(sentences),
        "perplexity": perplexity,
        "nll": nll,
    }
    return Continued(sentences, measures)


def evaluate(cfg: Config, plan: Stages, reviews: Reviews, readers: Readers) -> tuple[list[str], dict[str, Continued]]:
    """The held-out openings that fit, and what base and PPO make of them."""
    base, final, (learnt,) = plan.ppo.init, plan.ppo.out / "model", plan.ppo.reward
    untouched = plan.pretrain.init or base
    tokenizer = models.tokenizer_of(models.load(base, compute=cfg.compute))
    openings = reviews.held_out_openings
    prompts, counts = pipeline.every_prompt(asked(openings), tokenizer, length=cfg.ppo.prompt_length)
    print(f"held-out openings: {counts}")
    sampled = continuations(cfg, (base, final), learnt, prompts)
    losses = text_nll(cfg, (base, final), [text for text, _ in reviews.held_out])
    perplexity = fluency(cfg, untouched, prompts)
    results = {}
    for stage, episodes, nll in zip(("base", "PPO"), sampled, losses, strict=True):
        rows = zip(episodes.tokens, episodes.mask, strict=True)
        texts = (tokenizer_lib.decode(tokenizer, tokens, mask) for tokens, mask in rows)
        sentences = [text.strip() for text in texts]
        results[stage] = measure(episodes, sentences, readers, perplexity(episodes), nll)
    return [openings[index] for index in prompts.index], results


def main(cfg: Config) -> dict:
    """Run the stages one after the other, and return the summary."""
    start = time.monotonic()
    plan = plan_stages(cfg)  # before anything runs, so that a flag without effect is refused at once
    reviews = read_reviews(cfg)
    runs.write_config(cfg.out, cfg)
    readers, accuracies = fit_readers(reviews)

    write_rows(plan.pretrain.data, ({"text": text} for text in reviews.sentences))
    runs.once(pretrain.main, plan.pretrain)

    choosing = functools.partial(write_choices, plan.reward, readers.labeler, reviews.openings)
    runs.once(choosing, before_choices(cfg), cfg.out / "choices")

    learnt = runs.once(reward.main, plan.reward)
    print(f"reward model: {100 * learnt['accuracy']:.1f} % of held-out pairs of the best and another")

    write_rows(plan.ppo.data, asked(reviews.openings))
    runs.once(ppo.main, plan.ppo)

    print(f"\n== evaluate ({time.monotonic() - start:.0f} s)", flush=True)
    openings, results = evaluate(cfg, plan, reviews, readers)
    base, final = results["base"].measures, results["PPO"].measures
    summary = {
        "seed": cfg.seed,
        "seconds": round(time.monotonic() - start, 1),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        "openings": len(openings),
        **{name: {"accuracy": value} for name, value in accuracies.items()},
        "reward": learnt,
        "base": base,
        "ppo": final,
        "gain": final["positive_judge"] - base["positive_judge"],
    }
    runs.write(cfg.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    report(cfg.out, openings, results)
    print(f"\n{summary['seconds']:.0f} s, {summary['peak_memory_gib']:.1f} GiB; everything is in {cfg.out}")
    return summary


def report(out: Path, openings: Sequence[str], results: dict[str, Continued]) -> None:
    """Print the table of the stages and three openings as each continues them; write both as plots and Markdown."""
    names = {
        "positive_judge": "judged positive (share)",
        "kl": "KL to the base (nats)",
        "reward": "reward model's score",
        "ended": "sentences that end (share)",
        "distinct": "distinct sentences (share)",
        "perplexity": "perplexity by the untouched model",
        "nll": "loss on held-out text (nats a token)",
    }
    panels = {
        label: {stage: continued.measures[name] for stage, continued in results.items()}
        for name, label in names.items()
    }
    plots.stages(out / "stages.png", panels)
    for label, values in panels.items():
        print(f"{label:<40}" + "".join(f"{stage:>6}{value:>8.3f}" for stage, value in values.items()))
    lines = ["| opening | " + " | ".join(results) + " |", "| --- " * (len(results) + 1) + "|"]
    for n, opening in enumerate(openings):
        sentences = {stage: continued.sentences[n] for stage, continued in results.items()}
        rests = [text.removeprefix(opening).replace("|", r"\|") for text in sentences.values()]
        lines.append("| " + " | ".join([opening, *(f"...{rest}" for rest in rests)]) + " |")
        if n < 3:
            print("\n" + "\n".join(f"  {stage:<5} {text}" for stage, text in sentences.items()))
    runs.write(out / "samples.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    cli.run(main, Config())
