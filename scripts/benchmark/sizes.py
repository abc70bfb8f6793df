"""The sizes of the workloads."""

import dataclasses
from typing import Literal

from rlhf_jax.settings import Count, Fraction, NonNegative, Positive, Settings, Whole


@dataclasses.dataclass(frozen=True)
class Llama(Settings):
    """The model, where no preset is named."""

    vocab: Count = 4096
    hidden: Count = 256
    intermediate: Count = 688
    layers: Count = 4
    heads: Count = 4
    kv_heads: Count = 4
    head_dim: Count = 64
    tied_embeddings: bool = True
    rope_theta: Positive = 10000.0
    norm_eps: Positive = 1e-5


@dataclasses.dataclass(frozen=True)
class Sft(Settings):
    """One step a repetition, on rows without padding."""

    batch: Count = 16
    target_tokens: Count = 128  # of each row, which has one more
    warmup_steps: Count = 3
    timed_steps: Count = 12


@dataclasses.dataclass(frozen=True)
class Packing(Settings):
    """The same on documents of geometric lengths, packed."""

    batch: Count = 16
    length: Count = 128
    mean: Positive = 40.0  # tokens of a document
    warmup_steps: Count = 3
    timed_steps: Count = 12


@dataclasses.dataclass(frozen=True)
class Decode(Settings):
    """One batch of responses without EOS a repetition."""

    batch: Count = 32
    prompt: Count = 32
    new: Count = 64
    warmup: Count = 2
    timed: Count = 3


@dataclasses.dataclass(frozen=True)
class Rank(Settings):
    """Several responses to each of some long prompts a repetition, each prompt computed once or, in turn, each time."""

    prompts: Count = 8
    responses: Count = 9
    prompt: Count = 256
    new: Count = 32
    warmup: Count = 1
    timed: Count = 3


@dataclasses.dataclass(frozen=True)
class DecodeRagged(Settings):
    """Responses that end early; one pass over all prompts a repetition, at the better of the batch sizes."""

    prompts: Count = 128
    prompt: Count = 32
    max_new: Count = 64
    eos_fraction: Fraction = 0.03  # of the vocabulary
    batches: tuple[Count, ...] = (32, 128)
    warmup: Count = 1
    timed: Count = 3


@dataclasses.dataclass(frozen=True)
class DecodeSlots(Settings):
    """The same in one batch, some rows at a time or, in turn, all at once."""

    prompts: Count = 128
    slots: Count = 32
    prompt: Count = 32
    max_new: Count = 64
    eos_fraction: Fraction = 0.03  # of the vocabulary
    warmup: Count = 1
    timed: Count = 3


@dataclasses.dataclass(frozen=True)
class Reward(Settings):
    """One step of the reward model on comparisons of two responses a repetition."""

    pairs: Count = 16
    length: Count = 96
    warmup_steps: Count = 3
    timed_steps: Count = 12


@dataclasses.dataclass(frozen=True)
class RewardK(Settings):
    """One step on rankings of K responses, each scored once for all its pairs."""

    prompts: Count = 16
    responses: Count = 9
    length: Count = 96
    warmup_steps: Count = 2
    timed_steps: Count = 6


@dataclasses.dataclass(frozen=True)
class RewardRagged(Settings):
    """One step on comparisons of responses of geometric lengths, beside as many parts of whole rows."""

    pairs: Count = 64
    prompt: Count = 32
    max_new: Count = 64
    mean: Positive = 33.0  # tokens of a response that is not cut
    buckets: Count = 8
    warmup_steps: Count = 2
    timed_steps: Count = 6


@dataclasses.dataclass(frozen=True)
class Ppo(Settings):
    """One iteration a repetition: sample, score by three models, update policy and critic."""

    episodes: Count = 64
    prompt: Count = 32
    new: Count = 32
    eos_fraction: Fraction = 0.0  # of the vocabulary
    epochs: Count = 4
    minibatches: Count = 1
    buckets: Count = 1
    clip: Positive = 0.2
    value_clip: Positive = 0.2
    kl_coef: NonNegative = 0.05
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    temperature: Positive = 1.0
    warmup: Count = 2
    timed: Count = 5


@dataclasses.dataclass(frozen=True)
class Choice(Settings):
    """The log-probabilities of the options of all questions a repetition; a request is an option."""

    questions: Count = 32
    examples: Whole = 5  # in front of each question, its own ones
    question: Count = 48  # tokens of a question and of an example, on average
    options: Count = 4  # of a question
    option: Count = 6  # tokens of an option, on average
    batch: Count = 16  # rows at a time
    warmup: Count = 1
    timed: Count = 3


@dataclasses.dataclass(frozen=True)
class Text(Settings):
    """Text on disk to the first batch, once; the limit is the tokenizer's own rate, with all its threads."""

    megabytes: Positive = 100.0
    small: Positive = 10.0  # megabytes, with whose peak of memory that of the others is compared
    tokenizer: str | None = None  # a directory; None trains one of the model's vocabulary
    length: Count = 1024
    batch: Count = 8


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """The model, and the sizes of each workload."""

    device: Literal["cpu", "gpu", "tpu"] | None = None  # None is the best there is
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the trunk
    preset: str | None = None  # a model of models.PRESETS instead of the Llama below
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass computes again
    learning_rate: Positive = 1e-4
    model: Llama = Llama()
    sft: Sft = Sft()
    decode: Decode = Decode()
    decode_ragged: DecodeRagged = DecodeRagged()
    decode_long: Decode = Decode(new=256, warmup=1)
    decode_slots: DecodeSlots = DecodeSlots()
    reward: Reward = Reward()
    ppo: Ppo = Ppo()
    reward_k9: RewardK = RewardK()
    reward_ragged: RewardRagged = RewardRagged()
    ppo_ragged: Ppo = Ppo(new=64, eos_fraction=0.03, buckets=8)
    packing: Packing = Packing()
    choice: Choice = Choice()  # multiple choice with five examples in the prompt
    rank_prefix: Rank = Rank()  # sampling
    reward_prefix: Rank = Rank()  # one step of the reward model on rankings
    grpo_prefix: Rank = Rank(responses=8)  # one iteration: sample, score by two models, update
    # Options that share a long prompt.
    choice_prefix: Choice = Choice(questions=24, examples=0, question=512, options=8, option=8)
    text_10gb: Text = Text()  # for ten gigabytes, as in its name, set `megabytes`
