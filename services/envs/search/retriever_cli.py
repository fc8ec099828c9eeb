"""The command `sdar retriever`: its options, and what it serves.

It imports what it needs only when it runs, since `sdar` reads every command's options.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from services.envs.search.passages import Retriever


def retriever(
    corpus: Annotated[
        Path, typer.Option(help="Passages: JSON lines with id and contents.", show_default=False)
    ],
    index: Annotated[
        Path | None,
        typer.Option(
            help="A faiss index of the corpus; without it, passages are ranked by BM25.",
            show_default=False,
        ),
    ] = None,
    encoder: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the model that the index was built with.", show_default=False
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to bind to.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes any free one.", min=0, max=65535)] = 8000,
) -> None:
    """Serve a corpus to searching agents.

    POST /retrieve as in Search-R1, /healthz, /readyz, /metrics. Runs until SIGTERM.
    """
    from sdar.contracts.errors import ConfigurationError

    if (index is None) != (encoder is None):
        raise ConfigurationError(
            "--index and --encoder belong together: give both for dense retrieval, neither for "
            "BM25."
        )
    open_retriever = functools.partial(_open_retriever, corpus, index, encoder)
    _serve(open_retriever, corpus, host, port)


def _serve(open_retriever: Callable[[], Retriever], corpus: Path, host: str, port: int) -> None:
    import asyncio

    from sdar.process.lifecycle import run_until_stopped
    from sdar.process.settings import load_settings
    from sdar.process.telemetry import configure_logging
    from sdar.wire.security import Security
    from services.envs.search.retriever_service import serve_retriever

    def print_address(bound_port: int) -> None:
        typer.echo(f"Retriever of {corpus} answers on http://{host}:{bound_port}")

    settings = load_settings()
    configure_logging("retriever", settings.instance, settings.log_level, settings.log_format)
    serve = functools.partial(
        serve_retriever,
        open_retriever=open_retriever,
        host=host,
        port=port,
        security=Security.from_settings(settings),
        on_ready=print_address,
    )
    asyncio.run(run_until_stopped(serve))


def _open_retriever(corpus: Path, index: Path | None, encoder: Path | None) -> Retriever:
    """A dense retriever where an index and its encoder are given, BM25 otherwise."""
    if index is not None and encoder is not None:
        from services.envs.search.dense import open_dense_retriever

        return open_dense_retriever(corpus, index, encoder)
    from services.envs.search.lexical import open_lexical_retriever

    return open_lexical_retriever(corpus)
