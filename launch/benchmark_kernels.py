"""Measures the KV cache's kernels on this machine's TPU or GPU: against plain JAX, and against what JAX ships.

  python launch/benchmark_kernels.py --report=kernels.json
  python launch/benchmark_kernels.py --rows=1,8 --tokens=1,5 --lengths=512,8192 --capacity=8192 --num_kv_heads=32
  python launch/benchmark_kernels.py --dtype=int8 --chip=tpu:v5e

For writing T new tokens a row into the cache, and for attending to it with them: time a call, GB/s, share of the chip's
peak, and how far the result is from plain JAX's. Ways take turns, calls follow each other inside one program on the
caches of several layers, times are medians. Where there is no accelerator nothing runs: the table then has the bytes
that each moves, and the time that these take at the bandwidth of --chip. The sizes by default are Llama 3 8B's.
"""

import itertools
import json
from pathlib import Path

from absl import flags

from lsjax import commands

ROWS = flags.DEFINE_list("rows", "1,8", "B: rows of a batch.")
TOKENS = flags.DEFINE_list("tokens", "1,5", "T: tokens a row; 1 drafts, d + 1 verify d drafts.")
LENGTHS = flags.DEFINE_list("lengths", "512,2048,4096", "Entries that every row holds.")
CAPACITY = flags.DEFINE_integer("capacity", 4096, "C: entries that there is room for.")
NUM_KV_HEADS = flags.DEFINE_integer("num_kv_heads", 8, "K.")
GROUP = flags.DEFINE_integer("group", 4, "G: query heads a KV head.")
HEAD_WIDTH = flags.DEFINE_integer("head_width", 128, "H.")
DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["bfloat16", "float32", "int8"], "Of cache and queries; int8: of the cache, beside bfloat16."
)
CHIP = flags.DEFINE_string(
    "chip", None, "Whose bandwidth is the peak, such as gpu:a100-80 (default: this one's; without one, gpu:h100)."
)
REPEATS = flags.DEFINE_integer("repeats", 5, "Measurements of each.")
REPORT = flags.DEFINE_string("report", None, "Write the results to this JSON file.")


def main() -> None:
    from lsjax.decoding.kernel_benchmark import Case, benchmark_kernels
    from lsjax.evaluation.tables import kernel_table, print_table
    from lsjax.files import check_writable, write_atomically

    if REPORT.value:
        check_writable(Path(REPORT.value), "--report")
    sizes = itertools.product(*map(commands.integers, (ROWS, TOKENS, LENGTHS)))
    others = CAPACITY.value, NUM_KV_HEADS.value, GROUP.value, HEAD_WIDTH.value, DTYPE.value
    report = benchmark_kernels([Case(*size, *others) for size in sizes], CHIP.value, REPEATS.value, print)
    print_table(kernel_table(report))
    if not report["measured"]:
        print(f"no accelerator here: nothing was measured; bytes, and their time at the bandwidth of {report['chip']}")
    if REPORT.value:
        write_atomically(Path(REPORT.value), json.dumps(report, indent=2))
        print(f"report: {REPORT.value}")


if __name__ == "__main__":
    commands.run(main)
