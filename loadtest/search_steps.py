"""Measures Search-QA: a step that searches, in process and by the retriever, and the retriever.

The peer is what the index's own library does for the same query on the same index: its tokenizer
and its `retrieve`. A step also reads the action, looks up and shows the passages, and where a
service is asked, goes over HTTP.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bm25s
import httpx
import psutil
import Stemmer

from loadtest.comparison import Comparison, Measurement, Say, Table, format_figure, take_turns
from services.envs.search.corpus import iterate_corpus
from services.envs.search.environment import SearchEnvironment
from services.envs.search.generate import generate

NUM_QUESTIONS = 5000
"""Of the generated world, which has two passages for each."""
SEED = 0
TOPK = 3
NUM_STEPS = 600
NUM_PAIRS = 5
NUM_SESSIONS = 2000
REQUEST_SIZES = (1, 32)
NUM_CLIENTS = 8
SERVICE_S = 3.0
READY_LINE = "answers on "


@dataclass(frozen=True, slots=True)
class SearchFigures:
    """One run's plain figures.

    Memory in MiB; `index_mib` is mapped, so workers of a machine share it.
    """

    num_passages: int
    in_process_ms: float
    through_service_ms: float
    service_queries_per_s: dict[int, float]
    """By the number of queries in a request."""
    index_mib: float
    service_mib: float
    session_kib: float


def measure(say: Say) -> Measurement:
    """Pairs of steps and library calls, and a table of the rest."""
    with tempfile.TemporaryDirectory(prefix="sdar-bench-search-") as directory:
        data = Path(directory) / "search"
        generate(data, num_tasks=NUM_QUESTIONS, seed=SEED, report=lambda done, total: None)
        with serve_retriever(data / "corpus.jsonl") as (url, process):
            pairs, figures = _measure(data, url, process, say)
    steps = Comparison(
        f"a search step in process, {figures.num_passages:,} passages, top {TOPK}",
        "bm25s tokenize and retrieve",
        "ms",
        pairs,
    )
    return Measurement(
        (steps,),
        (_tabulate(figures),),
        (
            "One thread, one search after the other; the service is a process of its own on the "
            "same cores. Both sides use the same index; the peer stops at the numbers of the "
            "passages, a step goes on to their text.",
        ),
    )


def _measure(
    data: Path, url: str, process: psutil.Process, say: Say
) -> tuple[tuple[tuple[float, float], ...], SearchFigures]:
    with (
        _opened(data_dir=str(data)) as inside,
        _opened(data_dir=str(data), retriever_url=url) as outside,
    ):
        queries = [task.description for task in inside.list_tasks("train")[:NUM_STEPS]]
        library = _open_library(data / "corpus.jsonl")

        pairs = take_turns(
            lambda: _time_steps(inside, queries),
            lambda: _time_calls(library, queries),
            NUM_PAIRS,
            say,
        )
        # The second round of the two finds the service warm.
        through_service_ms = min(_time_steps(outside, queries), _time_steps(outside, queries))
        session_kib = _measure_sessions(data)

    rates = {size: _measure_service(url, queries, size) for size in REQUEST_SIZES}
    num_passages = sum(1 for _ in iterate_corpus(data / "corpus.jsonl"))
    figures = SearchFigures(
        num_passages=num_passages,
        in_process_ms=statistics.median_high(ours for ours, _ in pairs),
        through_service_ms=through_service_ms,
        service_queries_per_s=rates,
        index_mib=_mapped_mib(psutil.Process()),
        service_mib=process.memory_info().rss / 2**20,
        session_kib=session_kib,
    )
    return pairs, figures


@contextlib.contextmanager
def serve_retriever(corpus: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A retriever process of a corpus: its address, and itself. It has ended after the block."""
    command = [sys.executable, "-m", "sdar.cli.main", "retriever", "--corpus", str(corpus)]
    command += ["--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            if READY_LINE not in said:
                raise RuntimeError(f"The retriever said {said!r} and not where it listens.")
            yield said.rpartition(READY_LINE)[2].strip(), psutil.Process(process.pid)
        finally:
            process.terminate()


@contextlib.contextmanager
def _opened(**options: Any) -> Iterator[SearchEnvironment]:
    with contextlib.closing(SearchEnvironment(topk=TOPK, **options)) as environment:
        yield environment


def _time_steps(environment: SearchEnvironment, queries: Sequence[str]) -> float:
    """Milliseconds of a step that searches.

    Every episode is begun anew before its last turn, untimed.
    """
    spent_s = 0.0
    for number, query in enumerate(queries):
        if number % (environment.max_turns - 1) == 0:
            environment.reset("train-0", seed=0)
        started = time.perf_counter()
        result = environment.step(f"<think>Find it.</think><search>{query}</search>")
        spent_s += time.perf_counter() - started
        if int(result.observation.info.get("num_results", 0)) == 0:
            raise RuntimeError(
                f"The search for {query!r} found nothing: {result.observation.info}."
            )
    return 1000 * spent_s / len(queries)


def _time_calls(call: Callable[[str], object], queries: Sequence[str]) -> float:
    started = time.perf_counter()
    for query in queries:
        call(query)
    return 1000 * (time.perf_counter() - started) / len(queries)


def _open_library(corpus: Path) -> Callable[[str], object]:
    """A query by the library alone, on an index with the same settings."""
    stemmer = Stemmer.Stemmer("porter")
    contents = [passage.contents for _, passage in iterate_corpus(corpus)]
    index = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    index.index(
        bm25s.tokenize(contents, stopwords="en", stemmer=stemmer, show_progress=False),
        show_progress=False,
    )

    def query(text: str) -> object:
        tokens = bm25s.tokenize([text], stopwords="en", stemmer=stemmer, show_progress=False)
        return index.retrieve(tokens, k=TOPK, show_progress=False)

    return query


def _measure_service(url: str, queries: Sequence[str], request_size: int) -> float:
    """Queries answered a second, with clients that ask again as soon as they are answered."""
    ends_at = time.perf_counter() + SERVICE_S
    batch = [queries[number % len(queries)] for number in range(request_size)]

    def ask_on() -> int:
        num_answered = 0
        with httpx.Client(trust_env=False) as client:
            while time.perf_counter() < ends_at:
                request = {"queries": batch, "topk": TOPK, "return_scores": True}
                answer = client.post(f"{url}/retrieve", json=request)
                num_answered += len(answer.raise_for_status().json()["result"])
        return num_answered

    started = time.perf_counter()
    with ThreadPoolExecutor(NUM_CLIENTS) as threads:
        num_answered = sum(threads.map(lambda _: ask_on(), range(NUM_CLIENTS)))
    return num_answered / (time.perf_counter() - started)


def _measure_sessions(data: Path) -> float:
    """KiB allocated for one more session in a process that has the data; less than a page."""
    # The first session loads what all of them share.
    SearchEnvironment(data_dir=str(data), topk=TOPK).reset("train-0", seed=0)
    gc.collect()
    tracemalloc.start()
    environments = [SearchEnvironment(data_dir=str(data), topk=TOPK) for _ in range(NUM_SESSIONS)]
    for environment in environments:
        environment.reset("train-0", seed=0)
    allocated_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return allocated_bytes / NUM_SESSIONS / 1024


def _mapped_mib(process: psutil.Process) -> float:
    """Of the files of the index and of the corpus."""
    mappings = process.memory_maps()
    sizes = [one.size for one in mappings if one.path.endswith((".npy", ".jsonl"))]
    return sum(sizes) / 2**20


def _tabulate(figures: SearchFigures) -> Table:
    values = {
        "a search step in process, ms": figures.in_process_ms,
        "a search step through the service, ms": figures.through_service_ms,
    }
    for size, rate in figures.service_queries_per_s.items():
        values[f"queries/s of the service, {NUM_CLIENTS} clients, {size} in a request"] = rate
    values["index and corpus, mapped and shared, MiB"] = figures.index_mib
    values["the service's process, MiB"] = figures.service_mib
    values["one more session, KiB"] = figures.session_kib

    rows = tuple((name, format_figure(value)) for name, value in values.items())
    return Table(f"Search-QA on {figures.num_passages:,} passages", ("figure", "value"), rows)
