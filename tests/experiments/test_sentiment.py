import dataclasses
import json
import random

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments import ppo, pretrain
from experiments.papers import sentiment
from rlhf_jax.algorithms import ppo as ppo_lib
from rlhf_jax.data import builders
from rlhf_jax.runs import log
from rlhf_jax.types import InputError

GOOD, BAD = ("a joy", "so warm", "very funny", "a delight"), ("a bore", "so cold", "very dull", "a mess")


def sentences(seed: int, count: int) -> list[tuple[str, int]]:
    """Made-up reviews, none twice, and whether they praise."""
    rng = random.Random(seed)
    rows = {}
    while len(rows) < count:
        label = rng.randrange(2)
        words = [rng.choice(some) for some in (("The", "This"), ("old", "new", "long"), ("film", "play", "show"))]
        end = rng.choice(("in its way", "by the end", "from the start"))
        rows[f"{' '.join(words)} of {seed} and {rng.randrange(999)} is {rng.choice((BAD, GOOD)[label])} {end}."] = label
    return list(rows.items())


def write_reviews(folder, count: int = 60):
    """A folder such as `--data` names, with so many labelled sentences to train on."""
    folder.mkdir()
    for name, rows in {"sst_train": sentences(1, count), "sst_dev": sentences(2, 20)}.items():
        lines = ["label,sentence", *(f'{label},"{text}"' for text, label in rows)]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    held_out = sentences(2, 20)[0][0].lower().replace(".", " .")
    (folder / "rt_polarity.pos").write_text(f"naïve but a joy , it 's said .\nas i said , {held_out}\n", "latin-1")
    (folder / "rt_polarity.neg").write_text("a bore .\na bore .\n", "latin-1")
    return folder


@pytest.fixture
def data(tmp_path):
    return write_reviews(tmp_path / "reviews")


def config(tmp_path, data) -> sentiment.Config:
    """Two steps of each stage."""
    return sentiment.Config(
        out=tmp_path / "run",
        data=str(data),
        choices=16,
        held_out_choices=8,
        best_of=3,
        sample_batch=8,
        pretrain=pretrain.Config(preset="tiny", vocab_size=300, length=32, batch=8, steps=2, warmup=1),
        reward=dataclasses.replace(sentiment.Config().reward, batch=8),
        ppo=ppo.Config(
            prompt_length=30,
            max_new_tokens=5,
            text=None,
            batch=8,
            steps=2,
            algorithm=ppo_lib.Config(minibatches=1, temperature=0.7, kl_target=4.0),
        ),
    )


@pytest.mark.slow
def test_two_steps_of_each_stage(tmp_path, data):
    cfg = config(tmp_path, data)
    summary = sentiment.main(cfg)
    assert summary == json.loads((cfg.out / "summary.json").read_text())
    for stage in ("base", "ppo"):
        assert all(np.isfinite(value) for value in summary[stage].values())
        assert 0 <= summary[stage]["positive_judge"] <= 1
    assert abs(summary["base"]["kl"]) < 1e-3
    assert summary["base"]["perplexity"] > 1
    assert summary["gain"] == summary["ppo"]["positive_judge"] - summary["base"]["positive_judge"]
    # The labeler's choice has rank 0, the others 1, and no choice serves both training and accuracy.
    choices, held_out = (log.read(cfg.out / "choices", f"{part}.jsonl") for part in ("train", "held_out"))
    assert (len(choices), len(held_out)) == (16, 8)
    assert all(sorted(row["ranks"]) == [0, 1, 1] for row in choices + held_out)
    losses = [row["loss/choice"] for row in log.read(cfg.out / "reward")]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert len(log.read(cfg.out / "ppo")) == 2
    assert (cfg.out / "samples.md").read_text().startswith("| opening | base | PPO |")
    assert (cfg.out / "stages.png").is_file()


def test_choices_are_kept_for_what_they_do_not_depend_on(tmp_path, data):
    cfg = config(tmp_path, data)
    made_by = sentiment.before_choices(cfg)
    later = dataclasses.replace(
        cfg, reward=dataclasses.replace(cfg.reward, lr=0.5), ppo=dataclasses.replace(cfg.ppo, lr=0.5)
    )
    assert sentiment.before_choices(later) == made_by
    hotter = dataclasses.replace(cfg.ppo, algorithm=dataclasses.replace(cfg.ppo.algorithm, temperature=0.9))
    longer = dataclasses.replace(cfg.ppo, max_new_tokens=6)
    earlier = dataclasses.replace(cfg.pretrain, lr=0.5)
    for change in ({"ppo": hotter}, {"ppo": longer}, {"pretrain": earlier}, {"best_of": 4}, {"seed": 1}):
        assert sentiment.before_choices(dataclasses.replace(cfg, **change)) != made_by


def test_the_labeler_picks_what_it_finds_most_positive():
    labeler = sentiment.fit_classifier([(text, label) for seed in range(3) for text, label in sentences(seed, 40)])
    probability = labeler.predict_proba(["the film is a joy", "the film is a bore"])[:, 1]
    assert probability[0] > 0.8 and probability[1] < 0.2
    with pytest.raises(InputError, match="have the label 1: both are needed"):
        sentiment.fit_classifier([("a joy", 1), ("so warm", 1)])


def test_nothing_held_out_is_trained_on(tmp_path, data):
    labelled, text, held_out = sentiment.read_corpus(str(data), tmp_path)
    assert (len(labelled), len(held_out)) == (60, 20)
    # A snippet that holds a held-out sentence is left out, and so is one seen before.
    assert text == ["naïve but a joy, it's said.", "a bore."]
    with (data / "sst_train.csv").open("a") as file:
        file.write(f'1,"{held_out[3][0].upper()}"\n')
    assert sentiment.read_corpus(str(data), tmp_path)[0] == labelled


def test_tidy_spells_both_sources_alike():
    assert (
        sentiment.tidy("It 's \" Not Bad \" , they did n't say ( twice ) .")
        == "it's \"not bad\", they didn't say (twice)."
    )


def test_openings_leave_something_to_say():
    starts = sentiment.cut_openings(["a b c d e f g h i"] * 30 + ["too short to be cut in two"], random.Random(0))
    assert len(starts) == 30
    assert set(starts) == {"a b c", "a b c d", "a b c d e"}


def test_parts_of_sentences_are_dropped_of_sentences():
    rows = [("a joy", 1), ("the film is a joy.", 1), ("A Joy .", 1), ("a bore", 0)]
    assert sorted(sentiment.drop_parts(rows)) == [("a bore", 0), ("the film is a joy.", 1)]


def test_a_published_data_set(tmp_path):
    class Reviews(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Rows as those of glue/sst2."""

        VERSION = tfds.core.Version("1.0.0")
        name = "reviews"

        def _info(self):
            fields = {"sentence": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=2)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(fields))

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(name) for name in ("train", "validation")}

        def _generate_examples(self, name):
            rows = {"train": [("It is a joy .", 1), ("a joy", 1), ("a bore", 0)], "validation": [("so cold", 0)]}
            yield from enumerate({"sentence": text, "label": label} for text, label in rows[name])

    with builders.quiet():
        Reviews(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    labelled, text, held_out = sentiment.read_corpus("reviews", tmp_path)
    assert sorted(labelled) == [("a bore", 0), ("it is a joy.", 1)]
    assert (text, held_out) == ([], [("so cold", 0)])


def test_mistakes_are_named(tmp_path, data):
    cfg = config(tmp_path, data)
    with pytest.raises(InputError, match=r"^--data is required: a folder with sst_train.csv, .* or glue/sst2"):
        sentiment.main(dataclasses.replace(cfg, data=None))
    assert not cfg.out.exists()
    with pytest.raises(InputError, match=r"nowhere/sst_train.csv: no such file; point --data at a folder with"):
        sentiment.main(dataclasses.replace(cfg, data=str(tmp_path / "nowhere")))
    (data / "rt_polarity.neg").unlink()
    with pytest.raises(InputError, match=r"rt_polarity.neg: no such file"):
        sentiment.main(cfg)
    for line, message in {"2,fine": "line 62, field label: expected 0 or 1, got '2'", "1,": "field sentence"}.items():
        text = (data / "sst_train.csv").read_text()
        (data / "sst_train.csv").write_text(f"{text}{line}\n")
        with pytest.raises(InputError, match=message):
            sentiment.main(cfg)
        (data / "sst_train.csv").write_text(text)
    (data / "sst_train.csv").write_bytes("label,sentence\n1,na\xefve\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"sst_train.csv: expected UTF-8, but byte 19 is not"):
        sentiment.main(cfg)
    (data / "sst_train.csv").write_text("sentence\nfine\n")
    with pytest.raises(InputError, match="line 1: expected the columns label,sentence"):
        sentiment.main(cfg)
