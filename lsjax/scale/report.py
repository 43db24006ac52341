"""What a program compiled ahead of time needs of the hardware: memory, wires, and the time that physics allows."""

import re
from typing import Any

from rich.table import Table

from lsjax.config import Config
from lsjax.layerskip.chunked import EXIT_BRANCH
from lsjax.layerskip.dropout import groups_always_run
from lsjax.model.subset import SUBSET_BRANCH
from lsjax.model.transformer import LAYER_BRANCH
from lsjax.scale import hlo
from lsjax.scale.ahead import Ahead, Outcome
from lsjax.scale.collectives import collectives, summarize
from lsjax.scale.flops import early_exits, skipped_share
from lsjax.scale.hardware import GIB, Topology
from lsjax.scale.traffic import memory_traffic

# Of a GPU's memory: the rest is CUDA's and NCCL's. launch/train.py tells XLA the same (XLA_PYTHON_CLIENT_MEM_FRACTION).
GPU_SHARE = 0.92


def describe(config: Config, topology: Topology, program: Ahead, outcome: Outcome) -> dict[str, Any]:
    """The report of one program, as launch/compile_ahead.py writes it. Bytes and seconds are of one device."""
    report = {
        "program": program.name,
        "topology": str(topology),
        "devices": program.mesh.size,
        "mesh": dict(program.mesh.shape),
        "execution": str(program.execution),
        "compile_seconds": round(outcome.seconds, 1),
        "memory": memory_use(topology, program, outcome),
    }
    report["fits"] = not outcome.problem and report["memory"]["margin"] >= 0
    if outcome.problem:
        return report | {"problem": _first_lines(outcome.problem)}
    parsed = hlo.parse(outcome.text)._replace(unknown_turns=program.turns)
    share = _shares(config)
    sent = summarize(collectives(parsed, program.mesh.size, share), topology)
    report["collectives"] = sent
    return report | _roofline(topology, program, parsed, share, sent)


def memory_use(topology: Topology, program: Ahead, outcome: Outcome) -> dict[str, int]:
    """Bytes of one device by kind. `temporaries` are the compiler's, less the activations kept for the backward pass;
    they cannot be told apart by it, so the second is counted from the program's own residuals."""
    chip = topology.chip
    available = int(chip.memory_bytes * (GPU_SHARE if chip.platform == "gpu" else 1))
    kinds = dict(program.held) | {"activations": program.kept}
    if outcome.memory is None:
        kinds["temporaries"] = max(_said(outcome.problem, r"temporaries \(([\d.]+)([GM])\)") - program.kept, 0)
        total = _said(outcome.problem, r"[Uu]sed ([\d.]+)([GM]) of") or sum(kinds.values())
    else:
        m = outcome.memory
        kinds["activations"] = min(program.kept, m.temp_size_in_bytes)
        kinds["temporaries"] = m.temp_size_in_bytes - kinds["activations"]
        kinds["results"] = m.output_size_in_bytes - m.alias_size_in_bytes
        kinds["code"] = m.generated_code_size_in_bytes
        total = m.argument_size_in_bytes + sum(kinds[k] for k in ("activations", "temporaries", "results", "code"))
        total += kinds.get("optimizer, waiting", 0)
    return {k: v for k, v in kinds.items() if v} | {"total": total, "available": available, "margin": available - total}


def _said(problem: str, pattern: str) -> int:
    """A size in the compiler's words, in bytes; 0 when it is not there."""
    found = re.search(pattern, problem)
    return int(float(found[1]) * {"G": GIB, "M": 2**20}[found[2]]) if found else 0


def _shares(config: Config):
    """How often a conditional takes its costly branch, by the scope that the model gave it."""
    exits = early_exits(config) / config.model.num_layers  # each layer has the branch; the first one's is never taken
    layers, s = 1 - skipped_share(config), config.layerskip
    always = groups_always_run(s.dropout_max_rate, s.dropout_groups)
    subsets = (layers * s.dropout_groups - always) / max(s.dropout_groups - always, 1)

    def share(instruction: hlo.Instruction) -> float:
        path = instruction.operation
        if path.rfind(EXIT_BRANCH) > path.rfind(LAYER_BRANCH):
            return exits
        if SUBSET_BRANCH in path:
            return subsets
        return layers if LAYER_BRANCH in path else 1.0

    return share


def _roofline(topology: Topology, program: Ahead, parsed: hlo.Program, share, sent) -> dict[str, Any]:
    chip = topology.chip
    tokens, per_token, moved = program.tokens, program.flops, memory_traffic(parsed, share)
    times = {
        "matmul": per_token["executed"] * tokens / chip.peak_flops,
        "memory": moved / chip.memory_bandwidth,
        "interconnect": sum(kind["seconds"] for kind in sent.values()),
    }
    bound = max(times, key=times.get)
    roofline = {f"{name}_seconds": value for name, value in times.items()}
    roofline |= {"seconds": times[bound], "bound": bound, "memory_traffic": moved}
    if program.name == "train":
        roofline["tokens_per_second_per_device"] = tokens / times[bound]
        for name, key in (("mfu_bound", "model"), ("mfu_bound_causal", "model_causal")):
            roofline[name] = per_token[key] * tokens / chip.peak_flops / times[bound]
            roofline[f"{name}_without_overlap"] = per_token[key] * tokens / chip.peak_flops / sum(times.values())
    return {"flops_per_token": per_token, "roofline": roofline}


def _first_lines(problem: str, lines: int = 24) -> str:
    return "\n".join(problem.strip().splitlines()[:lines])


def summary_line(report: dict[str, Any]) -> str:
    """ "tpu:v5p:4x4x4 train: fits, 61.2 of 95.7 GiB; ..." in one line, for docstrings and logs."""
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
    """ "activations 72.3, temporaries 3.2 GiB": what takes most of a device."""
    kinds = [kind for kind in memory if kind not in ("total", "available", "margin")]
    kinds = sorted(kinds, key=memory.get, reverse=True)[:count]
    return ", ".join(f"{kind} {memory[kind] / GIB:.1f}" for kind in kinds) + " GiB"


def tables(report: dict[str, Any]) -> list[Table]:
    """Memory, wires and time, for a person."""
    return [_memory_table(report), *([_wires_table(report), _time_table(report)] if "roofline" in report else [])]


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


def _wires_table(report: dict[str, Any]) -> Table:
    columns = "collective", "times", "GiB", "received GiB", "ms at least", "hidden"
    table = _table(f"sent between devices, {_turn(report)}", *columns)
    for kind, c in report["collectives"].items():
        numbers = f"{c['count']:.0f}", f"{c['bytes'] / GIB:.3f}", f"{c['received_bytes'] / GIB:.3f}"
        table.add_row(kind, *numbers, f"{1e3 * c['seconds']:.2f}", f"{c['hidden']:.0%}")
    return table


def _turn(report: dict[str, Any]) -> str:
    """A loop whose turns depend on values counts once."""
    return "a run" if report["program"].startswith(("train", "evaluation", "prefill")) else "a round of the loop"


def _time_table(report: dict[str, Any]) -> Table:
    r, flops = report["roofline"], report["flops_per_token"]
    table = _table(f"time that physics allows, {_turn(report)}", "", "")
    for name in ("matmul", "memory", "interconnect"):
        if r[f"{name}_seconds"]:
            table.add_row(f"{name} at its peak, ms", f"{1e3 * r[f'{name}_seconds']:.2f}")
    table.add_row(f"all at once, ms (bound by {r['bound']})", f"{1e3 * r['seconds']:.2f}")
    for name, value in flops.items():
        table.add_row(f"GFLOP a token: {name}", f"{value / 1e9:.2f}")
    if "mfu_bound" in r:
        table.add_row("tokens/s a device, at most", f"{r['tokens_per_second_per_device']:,.0f}")
        table.add_row("MFU bound (attention in full)", f"{r['mfu_bound']:.1%}")
        table.add_row("MFU bound (causal attention)", f"{r['mfu_bound_causal']:.1%}")
        table.add_row("the same, nothing overlapped", f"{r['mfu_bound_causal_without_overlap']:.1%}")
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
