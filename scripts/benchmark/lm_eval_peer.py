"""A peer of scripts/bench.py: lm-evaluation-harness's own backend, for PyTorch, on the workloads of questions.

Run by an interpreter that has lm-eval[hf] and torch, at the better of some batch sizes:

    python scripts/bench.py --only choice,choice_prefix --peer lm_eval=PYTHON:scripts/benchmark/lm_eval_peer.py
"""

import argparse
import importlib.metadata
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import tokenizers
import torch
import transformers
from lm_eval.models.huggingface import HFLM

from scripts.benchmark import questions

# The defaults of sizes.Config.
FIRST = 5
MODEL = transformers.LlamaConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    tie_word_embeddings=True,
    max_position_embeddings=4096,
)
SIZES = {
    "choice": questions.Sizes(),
    "choice_prefix": questions.Sizes(questions=24, examples=0, question=512, options=8, option=8),
}
BATCHES, TIMED = (4, 16, 32), 3


def backend() -> HFLM:
    """The backend with a random model of the architecture; no text is read, so the tokenizer has two words."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(MODEL).eval()
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")
    return HFLM(pretrained=model, tokenizer=tokenizer, max_length=MODEL.max_position_embeddings)


def measure(lm: HFLM, name: str) -> dict[str, Any]:
    """The requests a second at each batch size."""
    asked = [(None, *pair) for pair in questions.draw(SIZES[name], FIRST, MODEL.vocab_size)]
    found = {}
    for batch in BATCHES:
        rates = []
        for _ in range(1 + TIMED):
            start = time.perf_counter()
            lm.batch_size_per_gpu = batch
            lm._loglikelihood_tokens(asked, disable_tqdm=True)
            rates.append(len(asked) / (time.perf_counter() - start))
        found[f"batch {batch}"] = {"median_requests_per_s": statistics.median(rates[1:])}
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", required=True, choices=SIZES)
    name = parser.parse_args().only
    versions = {package: importlib.metadata.version(package) for package in ("lm_eval", "torch", "transformers")}
    print(json.dumps({"peer": "lm_eval", "versions": versions, "results": {name: measure(backend(), name)}}))
