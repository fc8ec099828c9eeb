"""Search-QA as an environment: a question, searches whose passages are shown, and one answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdar.contracts.errors import ConfigurationError
from sdar.contracts.types import Task
from sdar.environments.base import Environment, Observation, StepResult
from sdar.process.settings import read_variable
from services.envs.search.client import RetrieverClient, RetrieverFailedError
from services.envs.search.lexical import LexicalRetriever, open_lexical_retriever
from services.envs.search.passages import Hit, Passage
from services.envs.search.questions import QuestionSet, open_questions
from services.envs.search.scoring import Action, ActionKind, is_exact_match, parse_action

DATA_VARIABLE = "SDAR_SEARCH_DATA"
"""Directory of the questions, where the option data_dir is empty."""
MAX_PASSAGE_CHARACTERS = 1500
"""Published passages have about 600; a longer one is cut where everybody can see it."""
MAX_QUERY_CHARACTERS = 500
MAX_TOPK = 100

RETRIEVER_ERROR = "retriever_error"
"""A key of a step's info, with the reason, and of its reward components, which evaluations count.
"""

FIRST_OBSERVATION = "You have searched nothing yet."
NO_ACTION = (
    "That was neither a search nor an answer. Write <search>words to look for</search> or "
    "<answer>answer</answer>."
)
SEARCH_FAILED = "The search failed for a technical reason."
NO_TURN_LEFT = "No turn is left to answer in."


class SearchEnvironment(Environment):
    """Reward 1 for an answer that matches one of the question's right ones, 0 otherwise.

    The seed changes nothing.

    A response's first search or answer is played. A response with several of the tags is invalid
    but still played; one with none, with an empty search or with an overlong one only uses a turn.
    Only the answer in the agent's own response is scored: whatever a passage holds, it is shown and
    nothing else.

    Options:
        data_dir: holds train.parquet and test.parquet (either may be missing), as Search-R1
            publishes them; by default the directory that $SDAR_SEARCH_DATA names.
        retriever_url: a retriever service, such as http://127.0.0.1:8000; without it this process
            searches `corpus` itself.
        corpus: JSON lines with id and contents; data_dir/corpus.jsonl by default.
        topk: passages shown for a search.
        retriever_timeout_s: the longest that a search may take, retries included; keep it below the
            server's step timeout.
    """

    name = "search"
    version = "1"
    splits: tuple[str, ...] = ("train", "test")
    instructions = (
        "Answer the question. Think first, inside <think> and </think>. Whenever you lack "
        "knowledge, search for it: write "
        "<search>words to look for</search>, and the best passages are shown between <information> "
        "and </information>. When "
        "you know the answer, write it inside <answer> and </answer> in as few words as possible: "
        "<answer>Beijing</answer>."
    )
    action_format = (
        "Think inside <think> and </think>, then write exactly one <search>words to look "
        "for</search> or one "
        "<answer>answer</answer>."
    )
    max_turns = 4

    def __init__(
        self,
        data_dir: str = "",
        retriever_url: str = "",
        corpus: str = "",
        topk: int = 3,
        retriever_timeout_s: float = 20.0,
    ) -> None:
        if retriever_url and corpus:
            raise ConfigurationError(
                f"Search got retriever_url {retriever_url!r} and corpus {corpus!r}. Give one of "
                "them: a service, or a file."
            )
        if not isinstance(topk, int) or not 1 <= topk <= MAX_TOPK:
            raise ConfigurationError(
                f"Search option topk is {topk!r}, expected 1 to {MAX_TOPK} passages."
            )

        directory = _resolve_directory(data_dir)
        self._questions = _open_splits(directory)
        self.splits = tuple(self._questions)
        self._topk = topk
        self._retriever: RetrieverClient | LexicalRetriever
        if retriever_url:
            self._retriever = RetrieverClient(retriever_url, retriever_timeout_s)
        else:
            path = Path(corpus) if corpus else directory / "corpus.jsonl"
            self._retriever = open_lexical_retriever(path)
        # A call to a service waits; a search in this process computes.
        self.is_blocking = bool(retriever_url)

        self._targets: tuple[str, ...] = ()
        self._num_turns = 0

    def list_tasks(self, split: str) -> Sequence[Task]:
        if split not in self._questions:
            raise self.unknown_split(split)
        return self._questions[split]

    def get_task(self, task_id: str) -> Task:
        return self._find(task_id)[0]

    def reset(self, task_id: str, seed: int) -> Observation:
        _, self._targets = self._find(task_id)
        self._num_turns = 0
        return Observation(FIRST_OBSERVATION)

    def step(self, text: str) -> StepResult:
        self._num_turns += 1
        action = parse_action(text)
        if action is not None and action.kind is ActionKind.ANSWER:
            return self._answer(action)

        is_last = self._num_turns >= self.max_turns
        observation, is_playable = self._search(action, is_last)
        components = {"exact_match": 0.0} if is_last else {}
        if RETRIEVER_ERROR in observation.info:
            components[RETRIEVER_ERROR] = 1.0
        return StepResult(
            observation=observation,
            truncated=is_last,
            reward_components=components,
            action=str(action) if action else "",
            is_action_valid=is_playable and action is not None and action.is_valid,
        )

    def close(self) -> None:
        if isinstance(self._retriever, RetrieverClient):
            self._retriever.close()

    def _answer(self, action: Action) -> StepResult:
        exact_match = is_exact_match(action.content, self._targets)
        return StepResult(
            observation=Observation("The episode is over."),
            reward=float(exact_match),
            reward_components={"exact_match": float(exact_match)},
            terminated=True,
            action=str(action),
            is_action_valid=action.is_valid,
            is_success=exact_match,
        )

    def _search(self, action: Action | None, is_last: bool) -> tuple[Observation, bool]:
        """What a search shows, and whether it was one that can be played."""
        if action is None or not action.content:
            return Observation(NO_ACTION), False
        length = len(action.content)
        if length > MAX_QUERY_CHARACTERS:
            refusal = f"That search has {length} characters. Use at most {MAX_QUERY_CHARACTERS}."
            return Observation(refusal), False
        if is_last:
            return Observation(NO_TURN_LEFT), True
        try:
            [hits] = self._retriever.retrieve([action.content], self._topk)
        except RetrieverFailedError as error:
            # Never shown as "nothing found": the agent must not learn that the corpus has no
            # answer.
            return Observation(SEARCH_FAILED, info={RETRIEVER_ERROR: error.message}), True
        return Observation(show_hits(hits), info={"num_results": str(len(hits))}), True

    def _find(self, task_id: str) -> tuple[Task, tuple[str, ...]]:
        for questions in self._questions.values():
            found = questions.find(task_id)
            if found is not None:
                return found
        raise self.unknown_task(task_id)


def show_hits(hits: Sequence[Hit]) -> str:
    """The passages found, one a line, as the agent sees them."""
    lines = [_show_passage(number, hit.passage) for number, hit in enumerate(hits, start=1)]
    if not lines:
        lines = ["Nothing was found."]
    return "\n".join(["<information>", *lines, "</information>"])


def _show_passage(number: int, passage: Passage) -> str:
    shown = f"Doc {number} (Title: {passage.title}) {' '.join(passage.text.split())}"
    if len(shown) <= MAX_PASSAGE_CHARACTERS:
        return shown
    note = f"[cut: {MAX_PASSAGE_CHARACTERS} of {len(shown)} characters are shown]"
    return f"{shown[:MAX_PASSAGE_CHARACTERS]} {note}"


def _resolve_directory(data_dir: str) -> Path:
    directory = data_dir or read_variable(DATA_VARIABLE)
    if not directory:
        raise ConfigurationError(
            f"Search has no questions: the option data_dir is empty and {DATA_VARIABLE} is not "
            "set. Make some with `sdar env generate search DIRECTORY`, or fetch Search-R1's "
            "parquet files, and name their directory in data_dir."
        )
    return Path(directory).expanduser()


def _open_splits(data_dir: Path) -> dict[str, QuestionSet]:
    found: dict[str, QuestionSet] = {}
    for split in ("train", "test"):
        path = data_dir / f"{split}.parquet"
        if path.is_file():
            found[split] = open_questions(SearchEnvironment.name, split, path)
    if not found:
        raise ConfigurationError(
            f"{data_dir} holds neither train.parquet nor test.parquet. Set data_dir to a question "
            "set, or make one: sdar env generate search DIRECTORY."
        )
    return found
