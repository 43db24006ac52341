"""Reports what a program compiled ahead of time needs: memory, data exchanged between devices, and the least time."""

import re
from typing import Any

from rich.table import Table

from lsjax.aot import hlo
from lsjax.aot.collectives import collectives, summarize
from lsjax.aot.programs import CompileResult, LoweredProgram
from lsjax.aot.traffic import memory_traffic
from lsjax.config import Config
from lsjax.costs.flops import early_exits, skipped_share
from lsjax.costs.hardware import GIB, Topology
from lsjax.layerskip.chunked import EXIT_BRANCH
from lsjax.layerskip.dropout import groups_always_run
from lsjax.model.batch_subset import SUBSET_BRANCH
from lsjax.model.transformer import LAYER_BRANCH

# Share of a GPU's memory that programs get; CUDA and NCCL take the rest. launch/train.py tells XLA the same
# (XLA_PYTHON_CLIENT_MEM_FRACTION).
GPU_SHARE = 0.92


def describe(config: Config, topology: Topology, program: LoweredProgram, result: CompileResult) -> dict[str, Any]:
    """Returns the report of one program, as launch/compile_ahead.py writes it; bytes and seconds are per device."""
    report = {
        "program": program.name,
        "topology": str(topology),
        "devices": program.mesh.size,
        "mesh": dict(program.mesh.shape),
        "execution": str(program.execution),
        "compile_seconds": round(result.seconds, 1),
        "memory": memory_use(topology, program, result),
    }
    report["fits"] = not result.problem and report["memory"]["margin"] >= 0
    if result.problem:
        return report | {"problem": _first_lines(result.problem)}
    parsed = hlo.parse(result.text)._replace(unknown_trip_count=program.trip_count)
    share = _branch_share(config)
    exchanged = summarize(collectives(parsed, program.mesh.size, share), topology)
    report["collectives"] = exchanged
    wire_seconds = sum(kind["seconds"] for kind in exchanged.values())
    return report | _roofline(topology, program, memory_traffic(parsed, share), wire_seconds)


def memory_use(topology: Topology, program: LoweredProgram, result: CompileResult) -> dict[str, int]:
    """Returns the bytes that one device needs, by kind, with `total`, `available` and `margin`.

    `activations` are those kept for the backward pass. The compiler counts them as temporaries, so they are counted
    from the program's own residuals and `temporaries` is the rest.
    """
    chip = topology.chip
    available = int(chip.memory_bytes * (GPU_SHARE if chip.platform == "gpu" else 1))
    kinds = dict(program.input_bytes) | {"activations": program.residual_bytes}
    if result.memory is None:
        temporaries = _stated_bytes(result.problem, r"temporaries \(([\d.]+)([GM])\)")
        kinds["temporaries"] = max(temporaries - program.residual_bytes, 0)
        total = _stated_bytes(result.problem, r"[Uu]sed ([\d.]+)([GM]) of") or sum(kinds.values())
    else:
        m = result.memory
        kinds["activations"] = min(program.residual_bytes, m.temp_size_in_bytes)
        kinds["temporaries"] = m.temp_size_in_bytes - kinds["activations"]
        kinds["results"] = m.output_size_in_bytes - m.alias_size_in_bytes
        kinds["code"] = m.generated_code_size_in_bytes
        total = m.argument_size_in_bytes + sum(kinds[k] for k in ("activations", "temporaries", "results", "code"))
        total += kinds.get("optimizer, waiting", 0)
    return {k: v for k, v in kinds.items() if v} | {"total": total, "available": available, "margin": available - total}


def _stated_bytes(problem: str, pattern: str) -> int:
    """Returns a size that the compiler's message states, in bytes; 0 when the pattern is not found."""
    found = re.search(pattern, problem)
    return int(float(found[1]) * {"G": GIB, "M": 2**20}[found[2]]) if found else 0


def _branch_share(config: Config) -> hlo.BranchShare:
    """Returns a function that gives how often a conditional takes its costly branch, by the scope the model named."""
    # Every layer has the branch of an exit, although the first layer never takes it.
    exits = early_exits(config) / config.model.num_layers
    layers, s = 1 - skipped_share(config), config.layerskip
    always_run = groups_always_run(s.dropout_max_rate, s.dropout_groups)
    subsets = (layers * s.dropout_groups - always_run) / max(s.dropout_groups - always_run, 1)

    def share(instruction: hlo.Instruction) -> float:
        path = instruction.operation
        if path.rfind(EXIT_BRANCH) > path.rfind(LAYER_BRANCH):
            return exits
        if SUBSET_BRANCH in path:
            return subsets
        return layers if LAYER_BRANCH in path else 1.0

    return share


def _roofline(topology: Topology, program: LoweredProgram, traffic: float, wire_seconds: float) -> dict[str, Any]:
    """Returns the least time that the hardware's peak rates allow and, for training, the MFU at that time.

    traffic: bytes of main memory that a run moves. wire_seconds: lower bound for the collectives.
    """
    chip, tokens, per_token = topology.chip, program.tokens, program.flops
    times = {
        "matmul": per_token["executed"] * tokens / chip.peak_flops,
        "memory": traffic / chip.memory_bandwidth,
        "interconnect": wire_seconds,
    }
    bound = max(times, key=lambda name: times[name])
    roofline = {f"{name}_seconds": value for name, value in times.items()}
    roofline |= {"seconds": times[bound], "bound": bound, "memory_traffic": traffic}
    if program.name == "train":
        roofline["tokens_per_second_per_device"] = tokens / times[bound]
        for name, key in (("mfu_bound", "model"), ("mfu_bound_causal", "model_causal")):
            roofline[name] = per_token[key] * tokens / chip.peak_flops / times[bound]
            roofline[f"{name}_without_overlap"] = per_token[key] * tokens / chip.peak_flops / sum(times.values())
    return {"flops_per_token": per_token, "roofline": roofline}


def _first_lines(problem: str, lines: int = 24) -> str:
    return "\n".join(problem.strip().splitlines()[:lines])


def summary_line(report: dict[str, Any]) -> str:
    """Returns one line such as "tpu:v5p:4x4x4 train: fits, 61.2 of 95.7 GiB; ...", for docstrings and logs."""
    m = report["memory"]
    verdict = "fits" if report["fits"] else "does not fit"
    line = (
        f"{report['topology']} {report['program']}: {verdict}, {m['total'] / GIB:.1f} of {m['available'] / GIB:.1f} GiB"
    )
    if not report["fits"]:
        line += f" (largest: {largest(m)})"
    if "roofline" not in report:
        return line
    r = report["roofline"]
    line += f"; bound by {r['bound']}, {r['seconds']:.3g} s"
    if "mfu_bound" in r:
        line += f"; MFU bound {r['mfu_bound']:.0%} (causal {r['mfu_bound_causal']:.0%})"
    return line


def largest(memory: dict[str, int], count: int = 3) -> str:
    """Names the kinds that take most memory, such as "activations 72.3, temporaries 3.2 GiB"."""
    kinds = [kind for kind in memory if kind not in ("total", "available", "margin")]
    kinds = sorted(kinds, key=lambda kind: memory[kind], reverse=True)[:count]
    return ", ".join(f"{kind} {memory[kind] / GIB:.1f}" for kind in kinds) + " GiB"


def tables(report: dict[str, Any]) -> list[Table]:
    """Returns the tables of memory, collectives and time; of memory alone for a program that did not compile."""
    if "roofline" not in report:
        return [_memory_table(report)]
    return [_memory_table(report), _collectives_table(report), _time_table(report)]


def _memory_table(report: dict[str, Any]) -> Table:
    table = _table(f"{report['program']} on {report['topology']}: memory of one device", "kind", "GiB", "share")
    m = report["memory"]
    for kind, size in m.items():
        if kind not in ("total", "available", "margin"):
            table.add_row(kind, f"{size / GIB:.2f}", f"{size / m['available']:.0%}")
    table.add_section()
    table.add_row("total", f"{m['total'] / GIB:.2f}", f"{m['total'] / m['available']:.0%}")
    table.add_row("available", f"{m['available'] / GIB:.2f}", "")
    table.add_row("fits, margin" if report["fits"] else "DOES NOT FIT, short of", f"{abs(m['margin']) / GIB:.2f}", "")
    return table


def _collectives_table(report: dict[str, Any]) -> Table:
    columns = "collective", "times", "GiB", "received GiB", "ms at least", "hidden"
    table = _table(f"data exchanged between devices, {_per_run(report)}", *columns)
    for kind, c in report["collectives"].items():
        numbers = f"{c['count']:.0f}", f"{c['bytes'] / GIB:.3f}", f"{c['received_bytes'] / GIB:.3f}"
        table.add_row(kind, *numbers, f"{1e3 * c['seconds']:.2f}", f"{c['hidden']:.0%}")
    return table


def _per_run(report: dict[str, Any]) -> str:
    """Names the unit of the report: a decoding loop has no known trip count, so one round of it is counted."""
    return "per run" if report["program"].startswith(("train", "evaluation", "prefill")) else "per round of the loop"


def _time_table(report: dict[str, Any]) -> Table:
    r, flops = report["roofline"], report["flops_per_token"]
    table = _table(f"least time at the hardware's peak rates, {_per_run(report)}", "", "")
    for name in ("matmul", "memory", "interconnect"):
        if r[f"{name}_seconds"]:
            table.add_row(f"{name} at its peak, ms", f"{1e3 * r[f'{name}_seconds']:.2f}")
    table.add_row(f"all overlapped, ms (bound by {r['bound']})", f"{1e3 * r['seconds']:.2f}")
    for name, value in flops.items():
        table.add_row(f"GFLOP per token: {name}", f"{value / 1e9:.2f}")
    if "mfu_bound" in r:
        table.add_row("tokens/s per device, at most", f"{r['tokens_per_second_per_device']:,.0f}")
        table.add_row("MFU bound (full attention)", f"{r['mfu_bound']:.1%}")
        table.add_row("MFU bound (causal attention)", f"{r['mfu_bound_causal']:.1%}")
        table.add_row(
            "MFU bound (causal attention), nothing overlapped", f"{r['mfu_bound_causal_without_overlap']:.1%}"
        )
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
