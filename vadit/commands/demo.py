"""vadit demo: the whole system in small."""

from __future__ import annotations

from vadit.commands.arguments import parse


def run(arguments: list[str]) -> None:
    """Run the demo."""
    from vadit.demo.options import DemoOptions

    options = parse(DemoOptions, arguments, command="demo")
    from vadit.demo.run import run_demo
    from vadit.train import engine

    try:
        run_demo(options)
    finally:
        engine.finish()
