"""A log of 5 GB is packed in memory that does not depend on its size."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys

import pytest

GIGABYTES = 5
GROWTH = 200  # MB that the peak may grow by
LENGTH = 4096

# peak resident memory after a first small file, then after the log; one token a line keeps the tokenizer out of the
# measurement
MEASURE = """
import json, resource, sys, time
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast
from hf_sparse_attn.data.training_data import packing_report, training_rows

small, large, way, length = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
backend = Tokenizer(WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>"))
backend.pre_tokenizer = Split(Regex("\\n"), "removed")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")

def run(file):
    rows = training_rows([file], tokenizer, length, streaming=way == "stream", progress=False)
    count = sum(1 for _ in rows) if way == "stream" else len(rows)
    return {**vars(packing_report(rows)), "count": count}

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

run(small)
before, start = peak(), time.perf_counter()
report = run(large)
print(json.dumps({"before": before, "growth": peak() - before, "seconds": time.perf_counter() - start, **report}))
"""


def write_log(path, size):
    """Lines of a log, ``size`` bytes of them; how many."""
    r, written, lines = random.Random(0), 0, 0
    words = ("connection", "closed", "by", "peer", "timeout", "retrying", "block", "received", "error", "disk")
    stamps = [f"2026-11-{1 + i % 28:02d} {i % 24:02d}:{i % 60:02d}" for i in range(20_000)]
    block = "".join(f"{stamp} node{r.randrange(4096)} {' '.join(r.choices(words, k=9))}\n" for stamp in stamps)
    with path.open("w", encoding="utf-8") as log:
        while written < size:
            head = f"part {lines}\n"
            log.write(head + block)
            written, lines = written + len(head) + len(block), lines + 20_001
    return lines


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_five_gigabytes_are_streamed_and_cached_in_flat_memory(tmp_path):
    if shutil.disk_usage(tmp_path).free < (GIGABYTES + 3) << 30:
        pytest.skip(f"needs {GIGABYTES + 3} GB of free disk")
    write_log(tmp_path / "small.log", 8 << 20)
    lines = write_log(tmp_path / "large.log", GIGABYTES << 30)
    environment = {**os.environ, "HF_SPARSE_ATTN_CACHE": str(tmp_path / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    for way in ("stream", "cache"):
        command = [
            sys.executable,
            "-c",
            MEASURE,
            str(tmp_path / "small.log"),
            str(tmp_path / "large.log"),
            way,
            str(LENGTH),
        ]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        result = json.loads(run.stdout.splitlines()[-1])
        print(way, result)
        assert result["tokens"] == lines + 1  # one a line and the end of text
        assert result["rows"] == result["count"] == (lines + 1) // LENGTH
        assert result["dropped"] == (lines + 1) % LENGTH and result["padding"] == 0
        assert result["growth"] < GROWTH, result
