"""python -m tests.loading DIRECTORY BYTES: the host memory that loading takes, over the size of the checkpoint.

Makes a Llama checkpoint of about so many bytes, all zeros, whose file takes no room on the disk, then loads it.
"""

import json
import math
import struct
import sys
from pathlib import Path

from rlhf_jax import models
from rlhf_jax.models import config_json, directory


def make(path: Path, size: int) -> int:
    """A checkpoint of at least `size` bytes; returns how many."""
    config = models.llama(1, 1024, 16, 8, 2816, vocab_size=16000, max_length=1024)
    layers = 1 + max(0, size - 4 * models.parameter_count(config)) // (4 * 1024 * (2 * 1024 + 2 * 512 + 3 * 2816))
    config = models.llama(layers, 1024, 16, 8, 2816, vocab_size=16000, max_length=1024)
    config_json.hf_config(config, False, "float32", None).save_pretrained(path)
    header, end = {}, 0
    for *_, tensors in directory._layout(config, scalar=False):
        for name, shape in tensors.items():
            begin, end = end, end + 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


def memory(kind: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    make(folder / "small", 0)
    models.load(folder / "small")  # what importing and compiling take is not the checkpoint's
    size = make(folder / "large", int(float(sys.argv[2])))
    before = memory("VmRSS")
    model = models.load(folder / "large")
    print((memory("VmHWM") - before) / size)
