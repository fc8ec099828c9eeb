"""A weight store's two places: a directory and S3 (moto's server)."""

from __future__ import annotations

import itertools
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from obstore.store import LocalStore, S3Store

from tests.contract.weight_places import Place

BUCKET = "weights"
prefix_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")):
        yield endpoint
    server.stop()


@pytest.fixture(params=["directory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "directory":
        return Place(str(tmp_path / "store"), LocalStore(prefix=tmp_path / "store", mkdir=True))
    prefix = f"demo/{next(prefix_numbers)}"
    options: dict[str, str | bool] = {
        "endpoint": request.getfixturevalue("s3_endpoint"),
        "access_key_id": "test",
        "secret_access_key": "test",
        "region": "us-east-1",
        "allow_http": True,
    }
    client_options = {"allow_http": True}
    config = {name: value for name, value in options.items() if name != "allow_http"}
    objects = S3Store(BUCKET, prefix=prefix, client_options=client_options, config=config)
    return Place(f"s3://{BUCKET}/{prefix}", objects, options)
