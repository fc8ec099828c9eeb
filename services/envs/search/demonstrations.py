"""An expert of Search-QA on the generated world to learn from; it sees only what an agent sees.

Never used while playing: the environment does not know it exists.
"""

from __future__ import annotations

import re

from services.envs.search.world import QUESTIONS, STATEMENTS

_PASSAGE = re.compile(r'^Doc \d+ \(Title: "(?P<title>.*?)"\) (?P<text>.*)$', re.MULTILINE)
_ASKED: list[tuple[tuple[str, ...], re.Pattern[str]]] = []
"""Every wording of a question as a pattern, with the chain of relations that it asks for."""
for _chain, _wordings in QUESTIONS.items():
    for _wording in _wordings:
        _pattern = re.compile(re.escape(_wording).replace(r"\{\}", "(.+)"))
        _ASKED.append((_chain, _pattern))
UNKNOWN = "unknown"


class SearchExpert:
    """Looks up a question's relations one search at a time; one expert plays one episode.

    It reads the passage of each thing on the way.
    """

    def __init__(self) -> None:
        self._chain: list[str] = []
        self._thing = ""

    def next_action(self, description: str, task_type: str, observation: str) -> str:
        """The response to this observation; `task_type` changes nothing, the question suffices."""
        if not self._thing:
            self._thing, self._chain = parse_question(description)
        else:
            found = read_fact(observation, self._thing, self._chain[0])
            if found is None:
                return write_response("Not there.", answer=UNKNOWN)
            self._thing = found
            self._chain.pop(0)

        if self._chain:
            return write_response(f"Find {self._thing}.", search=self._thing)
        return write_response(f"It is {self._thing}.", answer=self._thing)


def parse_question(question: str) -> tuple[str, list[str]]:
    """The thing named and the chain of relations to look up from it.

    Raises ValueError for a question that is not of the generated world.
    """
    for chain, wording in _ASKED:
        asked = wording.fullmatch(question)
        if asked:
            return asked[1], list(chain)
    raise ValueError(
        f"{question!r} is no question of the generated world; the expert knows no other."
    )


def read_fact(observation: str, thing: str, relation: str) -> str | None:
    """What the passages shown say that a thing's relation is, None if they do not say."""
    passages = {passage["title"]: passage["text"] for passage in _PASSAGE.finditer(observation)}
    text = passages.get(thing, "")
    for statement in STATEMENTS[relation]:
        # A character that no passage has keeps the object's place while the rest is escaped.
        literal = re.escape(statement.format(subject=thing, object="\0"))
        stated = re.search(literal.replace("\0", "([^.]+)"), text)
        if stated:
            return stated[1]
    return None


def write_response(thought: str, *, search: str = "", answer: str = "") -> str:
    """A response in the agent's form, with a search or an answer."""
    action = f"<search>{search}</search>" if search else f"<answer>{answer}</answer>"
    return f"<think>{thought}</think>{action}"
