"""Names from outside can't leave their place: stores, runs, tasks, tokens in addresses."""

from __future__ import annotations

import contextlib
import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from sdar.config import RunName
from sdar.contracts.errors import ConfigurationError, CorruptionError, UnknownResourceError
from sdar.contracts.types import ModelIdentity, TensorEntry, WeightsManifest
from sdar.weights.objects import DirectoryStore
from sdar.weights.store import WeightStore
from services.envs.household import HouseholdEnvironment
from tests.support import EXAMPLES

SECRET = "what lies beside the store"
PIECES = (
    "..",
    ".",
    "/",
    "\\",
    "\0",
    "%2e%2e",
    "%2f",
    "~",
    "$HOME",
    "\n",
    "\u202e",
    "\uff0e\uff0e",
    "aux",
    " ",
    "a" * 300,
    "run",
    "v00000001",
)
NASTY = st.one_of(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), st.text(max_size=40))
KNOWN = (
    "..",
    "../secret",
    "/etc/passwd",
    "run/../../secret",
    "run//../../secret",
    "..\\secret",
    "%2e%2e/secret",
    "link/secret",
    "",
)


def each_known(test):
    for name in KNOWN:
        test = example(name=name)(test)
    return test


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A store's root with a secret beside it, and inside a link that leads there."""
    directory = tmp_path_factory.mktemp("place")
    (directory / "secret").write_text(SECRET)
    root = directory / "store"
    (root / "run").mkdir(parents=True)
    (root / "link").symlink_to(directory)
    (root / "linked-secret").symlink_to(directory / "secret")
    return directory


def outside(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@given(name=NASTY)
@each_known
def test_no_name_leads_out_of_a_directory_of_weights(place, name):
    store, before = DirectoryStore(place / "store"), outside(place)
    refusals = (CorruptionError, OSError, ValueError)
    with contextlib.suppress(*refusals):
        assert SECRET.encode() not in store.get(name)
    for write in (store.put, store.create):
        with contextlib.suppress(*refusals):
            write(name, b"planted")
    with contextlib.suppress(*refusals):
        assert "secret" not in [
            Path(found).name for found in store.list(name) if not found.startswith("link/")
        ]
    with contextlib.suppress(*refusals):
        store.delete(name)
    assert outside(place) == before


def test_a_link_in_a_directory_of_weights_is_not_followed(place):
    store = DirectoryStore(place / "store")
    for name in ("linked-secret", "link/secret"):
        with pytest.raises((CorruptionError, OSError)):
            store.get(name)


@given(name=NASTY)
@each_known
def test_a_run_whose_name_is_no_plain_word_is_refused(tmp_path_factory, name):
    is_plain = (
        0 < len(name) <= 63
        and set(name) <= set(string.ascii_lowercase + string.digits + "-")
        and name[0] != "-"
    )
    adapter = TypeAdapter(RunName)
    if is_plain:
        assert adapter.validate_python(name) == name
    else:
        with pytest.raises(ValidationError):
            adapter.validate_python(name)


@given(name=NASTY)
@each_known
def test_a_store_of_weights_refuses_a_run_that_could_lead_out(place, name):
    is_plain = set(name) <= set(string.ascii_letters + string.digits + "._-") and name[:1] not in (
        "",
        ".",
        "_",
        "-",
    )
    if is_plain:
        WeightStore(str(place / "store"), name)
    else:
        with pytest.raises(ConfigurationError, match="cannot name a directory"):
            WeightStore(str(place / "store"), name)


@given(name=NASTY)
@each_known
def test_a_manifest_that_leads_out_is_refused_before_anything_is_read(place, name):
    store = WeightStore(str(place / "store"), "run")
    entry = TensorEntry("weight", "float32", (1,), "0" * 64, name)
    model = ModelIdentity("model", "hash")
    for manifest in (
        WeightsManifest("run", 1, "run/v00000001", (entry,), 4, model, 0.0),
        WeightsManifest("run", 1, name, (), 0, model, 0.0),
    ):
        with pytest.raises(CorruptionError):
            list(store.iter_tensors(manifest))


def build_household() -> HouseholdEnvironment:
    return HouseholdEnvironment()


def build_alfworld():
    from services.envs.alfworld import AlfworldEnvironment

    return AlfworldEnvironment(data_dir=str(EXAMPLES / "data" / "alfworld-tiny"))


def build_search():
    from services.envs.search.environment import SearchEnvironment

    return SearchEnvironment(data_dir=str(EXAMPLES / "data" / "search"))


@pytest.fixture(
    scope="module",
    params=[build_household, build_alfworld, build_search],
    ids=lambda build: build.__name__,
)
def environment(request):
    built = request.param()
    yield built
    built.close()


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(name=NASTY)
@each_known
def test_a_task_nobody_listed_is_unknown_whatever_its_name(environment, name):
    with pytest.raises(UnknownResourceError):
        environment.reset(name, 0)
    with pytest.raises(UnknownResourceError):
        environment.list_tasks(name)
