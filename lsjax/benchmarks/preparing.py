"""Times the preparation of a corpus beside encode_batch of the tokenizers library, and measures its memory.

  python -m lsjax.benchmarks.preparing CORPUS.jsonl TOKENIZER

prepares the corpus with tokenizers' own threads in one process, then with one process per core. Each preparation is a
process of its own; its memory is the largest sum of proportional set sizes (PSS) over it and its children. Linux only.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lsjax.data.jsonl import read_jsonl, text_of
from lsjax.data.pool import core_count
from lsjax.data.tokenizer_files import load_tokenizer

_BATCH_CHARACTERS = 4 << 20
_CHILD = """
import dataclasses, sys
from pathlib import Path
from lsjax.config import Config, DataConfig, ModelConfig
from lsjax.data.prepare import prepare

if __name__ == "__main__":
    corpus, tokenizer, directory, workers = sys.argv[1:]
    config = Config(
        model=ModelConfig(vocab_size=1 << 20, context_length=2048),
        data=DataConfig(corpus=corpus, tokenizer=tokenizer),
    )
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, sequence_length=2048))
    prepare(config, Path(directory), workers=int(workers))
"""


class Preparation(NamedTuple):
    """One timed preparation, with the processes that it starts.

    speed, cpu_speed: bytes of text per second, and per second of processor time. memory: peak bytes.
    """

    seconds: float
    speed: float
    cpu_speed: float
    memory: int


def encode_batch_speed(corpus: Path, tokenizer: Path) -> tuple[float, float]:
    """Returns the bytes of text per second, and per second of processor time, that encode_batch_fast tokenizes.

    It runs on all cores. The time to read the file does not count.
    """
    backend = load_tokenizer(tokenizer).backend
    seconds = cpu_seconds = size = 0.0
    for batch in _batches(corpus):
        began, cpu_began = time.perf_counter(), time.process_time()
        backend.encode_batch_fast(batch, add_special_tokens=False)
        seconds += time.perf_counter() - began
        cpu_seconds += time.process_time() - cpu_began
        size += sum(len(text.encode()) for text in batch)
    return size / seconds, size / cpu_seconds


def time_preparation(corpus: Path, tokenizer: Path, workers: int) -> Preparation:
    """Prepares a corpus in a new process with `workers` processes, and removes the result."""
    with tempfile.TemporaryDirectory() as scratch:
        script, data = Path(scratch) / "child.py", Path(scratch) / "data"
        script.write_text(_CHILD)
        began, cpu_began, memory = time.perf_counter(), _children_cpu(), 0
        process = subprocess.Popen([sys.executable, str(script), str(corpus), str(tokenizer), str(data), str(workers)])
        while process.poll() is None:
            memory = max(memory, sum(map(_memory, _tree(process.pid))))
            time.sleep(0.1)
        seconds = time.perf_counter() - began
        if process.returncode:
            raise SystemExit(f"the preparation failed with status {process.returncode}")
        size = json.loads((data / "manifest.json").read_text())["corpus"]["bytes"]
    return Preparation(seconds, size / seconds, size / (_children_cpu() - cpu_began), memory)


def _children_cpu() -> float:
    """Returns the seconds of processor time of all processes that have ended, with their children."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _batches(corpus: Path) -> Iterator[list[str]]:
    batch, size = [], 0
    for number, row in read_jsonl(corpus):
        batch.append(text_of(row, "text", f"{corpus}:{number}"))
        size += len(batch[-1])
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tree(pid: int) -> Iterator[int]:
    """Yields a process and its descendants."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:  # it ended meanwhile
            continue
        for child in children:
            yield from _tree(int(child))


def _memory(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it ended meanwhile
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def main() -> None:
    """Prints the speeds and the memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path)
    arguments = parser.parse_args()
    speed, cpu_speed = encode_batch_speed(arguments.corpus, arguments.tokenizer)
    print(f"encode_batch on {core_count()} cores: {speed / 1e6:.2f} MB/s, {cpu_speed / 1e6:.2f} MB per CPU second")
    for workers in (1, core_count()):
        result = time_preparation(arguments.corpus, arguments.tokenizer, workers)
        how = "threads of one process" if workers == 1 else f"{workers} processes"
        print(
            f"prepare, {how}: {result.speed / 1e6:.2f} MB/s ({result.speed / speed:.0%}), "
            f"{result.cpu_speed / 1e6:.2f} MB per CPU second ({result.cpu_speed / cpu_speed:.0%}), "
            f"{result.seconds:.1f} s, {result.memory / 1e6:.0f} MB of memory",
            flush=True,
        )


if __name__ == "__main__":
    main()
