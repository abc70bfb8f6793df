from pathlib import Path
from rlhf_jax import models
from rlhf_jax.data import tokenizer as lib
from tests import tiny
out = Path("/tmp/d_c/m"); out.mkdir(exist_ok=True)
config = models.gpt(1, 16, 2, vocab_size=260, max_length=128)
tokenizer = lib.train(["no words"], 257, out)
model = models.Model(config, tiny.policy(config), tokenizer, models.bind(models.Transformer(config)))
for n in "ab": models.save(model, model.params, out / n)
Path("/tmp/d_c/p.jsonl").write_text('{"prompt": "hi"}\n')
