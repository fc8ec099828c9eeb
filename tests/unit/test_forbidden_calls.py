"""What no code of ours may do: run what it reads.

By the syntax tree, so that neither a comment nor a line break decides.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for room in ("sdar", "services", "loadtest", "tools", "examples")
    for path in (ROOT / room).rglob("*.py")
    if not path.is_relative_to(ROOT / "sdar" / "v1")
)

ALLOWED = {
    (
        "services/envs/alfworld/grammar.py",
        "call of compile",
    ): "of a tree in which only names, attributes and + are allowed",
    ("services/envs/alfworld/grammar.py", "call of eval"): "the same, without builtins",
    (
        "sdar/engines/vllm_worker.py",
        "import of multiprocessing",
    ): "asks who its parent is, and sends nothing",
    ("sdar/engines/vllm_worker.py", "call of multiprocessing.parent_process"): "the same",
    (
        "loadtest/peers.py",
        "import of pickle",
    ): "the peer that is measured against: PipelineRL sends pickles",
    ("loadtest/peers.py", "call of pickle.dumps"): "the same",
    ("loadtest/peers.py", "call of pickle.loads"): "the same; its own bytes, written a moment ago",
}

MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "multiprocessing",
}
"""multiprocessing and joblib send pickles."""
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "torch.load",
    "torch.save",
    "torch.hub.load",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.full_load_all",
    "yaml.unsafe_load",
    "yaml.unsafe_load_all",
    "pandas.read_pickle",
}
PICKLING_COLLECTIVES = {
    "broadcast_object_list",
    "all_gather_object",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
}
ARRAY_FILES = {
    "np.load",
    "numpy.load",
    "np.lib.format.read_array",
    "np.save",
    "np.lib.format.write_array",
}
TRUSTING = {"from_pretrained", "from_config", "AsyncEngineArgs", "EngineArgs", "LLM"}
"""Calls that would run a model's own Python code, of transformers and vLLM."""


def find_uses(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of each thing that is forbidden."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            names = []
        yield from (
            (node.lineno, f"import of {name}") for name in names if name.split(".")[0] in MODULES
        )
        if isinstance(node, ast.Call):
            yield from ((node.lineno, use) for use in judge_call(node))


def judge_call(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    constants = {
        word.arg: word.value.value
        for word in call.keywords
        if word.arg and isinstance(word.value, ast.Constant)
    }
    if name in CALLS or name.split(".")[0] in MODULES or last in PICKLING_COLLECTIVES:
        yield f"call of {name}"
    if constants.get("shell") is True:
        yield f"{name} by a shell"
    if constants.get("weights_only") is False:
        yield f"{name} with weights_only=False"
    if name in ARRAY_FILES and constants.get("allow_pickle") is not False:
        yield f"{name} without allow_pickle=False"
    if (
        last == "from_pretrained"
        and "Model" in name
        and constants.get("use_safetensors") is not True
    ):
        yield f"{name} without use_safetensors=True"
    if last in TRUSTING and constants.get("trust_remote_code") is not False:
        yield f"{name} without trust_remote_code=False"
    if (
        "trust_remote_code" in {word.arg for word in call.keywords}
        and constants.get("trust_remote_code") is not False
    ):
        yield f"{name} with trust_remote_code other than False"


def test_nothing_of_ours_runs_what_it_reads():
    found = {
        (str(path.relative_to(ROOT)), use): line
        for path in SOURCES
        for line, use in find_uses(ast.parse(path.read_text(encoding="utf-8")))
    }
    unexpected = {
        f"{path}:{line}: {use}" for (path, use), line in found.items() if (path, use) not in ALLOWED
    }
    assert not unexpected
    assert not ALLOWED.keys() - found.keys(), "an exception that nothing needs any more"


@pytest.mark.parametrize(
    ("code", "use"),
    [
        ("import pickle", "import of pickle"),
        ("import pickle as p", "import of pickle"),
        ("from pickle import loads", "import of pickle"),
        ("import multiprocessing.connection", "import of multiprocessing.connection"),
        ("def f():\n    import dill", "import of dill"),
        ("eval('1')", "call of eval"),
        ("torch.load(\n    path)", "call of torch.load"),
        ("yaml.load(text, Loader=yaml.SafeLoader)", "call of yaml.load"),
        ("dist.broadcast_object_list(x)", "call of dist.broadcast_object_list"),
        ("subprocess.run('ls', shell=True)", "subprocess.run by a shell"),
        ("np.load(path)", "np.load without allow_pickle=False"),
        ("np.load(path, allow_pickle=flag)", "np.load without allow_pickle=False"),
        (
            "AutoModel.from_pretrained(path)",
            "AutoModel.from_pretrained without trust_remote_code=False",
        ),
        (
            "AutoModel.from_pretrained(path, trust_remote_code=False)",
            "AutoModel.from_pretrained without use_safetensors=True",
        ),
        ("f(trust_remote_code=flag)", "f with trust_remote_code other than False"),
    ],
)
def test_the_audit_sees(code, use):
    assert use in [found for _, found in find_uses(ast.parse(code))]


@pytest.mark.parametrize(
    "code",
    [
        "# import pickle",
        "'pickle.loads'",
        "model.eval()",
        "np.load(p, allow_pickle=False)",
        "yaml.safe_load(t)",
        "re.compile(t)",
    ],
)
def test_the_audit_lets_pass(code):
    assert not list(find_uses(ast.parse(code)))
