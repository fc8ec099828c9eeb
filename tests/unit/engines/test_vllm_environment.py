"""What vLLM is told before it is imported: where no C++ compiler is, it must not try to compile."""

import pytest

from sdar.engines.vllm_weights import vllm_environment


@pytest.mark.parametrize("has_compiler", [True, False])
def test_vllm_compiles_nothing_where_there_is_no_compiler(tmp_path, monkeypatch, has_compiler):
    if has_compiler:
        (tmp_path / "g++").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ("TORCHDYNAMO_DISABLE" in vllm_environment(1)) is not has_compiler
