"""azu-demo: a whole swarm on this machine, as separate processes, and one question through it."""

from __future__ import annotations

from functools import partial

from azu.cli import program, run_program, settings_options
from azu.demo.settings import DemoSettings

__all__ = ["main"]


@program(
    "azu-demo",
    examples=[
        'azu-demo --prompt "Why is the sky blue?"',
        "azu-demo --workers 5 --keep",
        "azu-demo --payments anvil",
        "azu-demo --model ./my-model --json > figures.json",
    ],
    single=True,
)
@settings_options(DemoSettings)
def main(settings: DemoSettings) -> None:
    """Start a bootstrap node, a coordinator and workers here, ask a question, and show who did what.

    Each worker may use too little memory for the whole model, so that the answer has to come from several. Exit code 0
    means that all of it happened: every layer covered, an answer, every worker's work confirmed by its receipt.
    """
    from azu.demo.run import run  # httpx and rich load here, so that --help is fast

    run_program(partial(run, settings), settings=settings)
