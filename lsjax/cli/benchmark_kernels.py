"""Measures the KV cache's kernels on this machine's TPU or GPU, against plain JAX and against what JAX ships.

  lsjax benchmark_kernels --report=kernels.json
  lsjax benchmark_kernels --rows=1,8 --tokens=1,5 \\
    --lengths=512,8192 --capacity=8192 --num_kv_heads=32
  lsjax benchmark_kernels --dtype=int8 --chip=tpu:v5e

There are two operations: writing T new tokens per row into the cache, and attending to it with them. The table shows
the time of a call, GB/s, the share of the chip's peak, and how far the result is from plain JAX's. The implementations
take turns, calls follow each other inside one program on the caches of several layers, and times are medians. Without
an accelerator nothing runs: the table then shows the bytes that each moves, and the time that these take at the
bandwidth of --chip. The default sizes are Llama 3 8B's.
"""

import itertools
import json

from lsjax.cli.flags import Arguments, CommandFlags


def define_flags(flags: CommandFlags) -> None:
    """Defines the flags of this command."""
    flags.group("Shapes")
    flags.comma_list("rows", "1,8", "B: rows of a batch.")
    flags.comma_list("tokens", "1,5", "T: tokens per row; 1 drafts, d + 1 verify d drafts.")
    flags.comma_list("lengths", "512,2048,4096", "Entries that every row holds.")
    flags.integer("capacity", 4096, "C: entries that a row has room for.")
    flags.integer("num_kv_heads", 8, "K: KV heads.")
    flags.integer("group", 4, "G: query heads per KV head.")
    flags.integer("head_width", 128, "H: width of a head.")
    flags.choice(
        "dtype",
        "bfloat16",
        ["bfloat16", "float32", "int8"],
        "Dtype of cache and queries; int8: of the cache, with bfloat16 queries.",
    )
    flags.group("Measuring")
    flags.text(
        "chip",
        None,
        "Chip whose bandwidth is the peak, such as gpu:a100-80 (default: this machine's; without one, gpu:h100).",
    )
    flags.integer("repeats", 5, "Measurements of each.")
    flags.group("Output")
    flags.path("report", None, "Write the results to this JSON file.")


def main(arguments: Arguments) -> None:
    """Runs the command."""
    from lsjax.benchmarks.kernels import KernelCase, benchmark_kernels
    from lsjax.files import check_report, path_of, write_atomically
    from lsjax.reports.tables import kernel_table, print_table

    check_report(arguments.report, "runs")
    sizes = itertools.product(*(arguments.integers(name) for name in ("rows", "tokens", "lengths")))
    cases = [
        KernelCase(
            batch_size=batch_size,
            tokens=tokens,
            length=length,
            capacity=arguments.capacity,
            num_kv_heads=arguments.num_kv_heads,
            group=arguments.group,
            head_width=arguments.head_width,
            dtype=arguments.dtype,
        )
        for batch_size, tokens, length in sizes
    ]
    report = benchmark_kernels(cases, chip=arguments.chip, repeats=arguments.repeats, note=print)
    print_table(kernel_table(report))
    if not report["measured"]:
        print(f"no accelerator here: nothing was measured; bytes, and their time at the bandwidth of {report['chip']}")
    if arguments.report:
        write_atomically(path_of(arguments.report), json.dumps(report, indent=2))
        print(f"report: {arguments.report}")
