"""The command line: which command, which settings, and how a failure is told.

This module only parses and reports; the work is in `vadit.commands`, imported when a command is known, so that
`vadit --help` needs neither torch nor tyro.
"""

from __future__ import annotations

import atexit
import contextlib
import difflib
import errno
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from vadit.runtime.errors import RunError, UsageError, leave_for_torchrun

COMMANDS = {
    "demo": "the whole system in small: train, encode, sample and evaluate on real pictures, in minutes",
    "train": "train a tokenizer or a generator: vadit train RECIPE [--setting value ...]",
    "prepare": "turn images into a .beton that loads faster: vadit prepare IMAGES OUT.beton",
    "encode": "turn a folder of images into a folder of latents",
    "sample": "draw images from a generator",
    "evaluate": "measure samples, a tokenizer or latents; make a reference for samples",
    "report": "one HTML page about one or more runs: curves, speed, time to the end, samples, comparisons",
    "import": "turn a checkpoint of the authors into a folder that vadit reads",
    "export": "write a run's weights as one safetensors file with its config, or in the authors' format",
    "doctor": "say which accelerations this machine has, and how to get the others",
    "recipes": "list the recipes and what they reproduce",
}
"""Name and summary of each command."""

SHARED_MODULES = {"import": "convert", "export": "convert", "doctor": "about", "recipes": "about"}
"""Commands that share a module of `vadit.commands`, as `NAME_command`; the others have their own, as `run`."""

OUT_OF_MEMORY = {
    "train": "raise --engine.gradient-accumulation (the batch stays as it is), set --engine.gradient-checkpointing, or "
    "use more processes (--dry-run estimates the need)",
    "encode": "lower --batch-size",
    "evaluate": "lower --batch-size",
    "sample": "free it of other programs, use a GPU with more memory, or set --device cpu",
}
"""What helps a command that the GPU is too small for."""

USAGE_CODE, RUN_CODE, STOP_CODE = 2, 1, 130


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0: done, or stopped by a scheduler and saved; 1: the work failed; 2: a setting is wrong; 130: interrupted (Ctrl-C).
    """
    # Read when torch loads: threads that wait for others by spinning long make a busy machine ten times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    arguments, debug = _without_common_flags(sys.argv[1:] if argv is None else list(argv))
    try:
        return _dispatch(arguments)
    except BaseException as error:  # every way out of a command becomes an exit code here
        if debug and not isinstance(error, SystemExit):
            traceback.print_exc()
        return _report(error, debug, next(iter(arguments), ""))


def entry() -> NoReturn:
    """`main` as a process of its own.

    One of several leaves without the interpreter's end: DeepSpeed keeps groups of gloo alive that were destroyed, and a
    thread of theirs that lets go of a message's tensor while the interpreter ends takes the process down ("terminate
    called without an active exception"): a run that is done would look as if it had failed.
    """
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # its reader has left, or it is closed
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        from vadit import __version__

        print(f"vadit {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        raise UsageError(f"unknown command {name!r}; {hint}")
    module = importlib.import_module(f"vadit.commands.{SHARED_MODULES.get(name, name)}")
    command: Callable[[list[str]], None] = getattr(module, f"{name}_command" if name in SHARED_MODULES else "run")
    command(rest)
    return 0


def _without_common_flags(arguments: list[str]) -> tuple[list[str], bool]:
    """Take out --debug, and the --local_rank=N that the deepspeed launcher puts anywhere (LOCAL_RANK says the same)."""
    kept: list[str] = []
    debug = False
    skip_value = False
    for argument in arguments:
        if skip_value and re.fullmatch(r"\d+", argument):
            skip_value = False
            continue
        skip_value = argument in ("--local_rank", "--local-rank")
        if skip_value or re.fullmatch(r"--local[_-]rank=\d+", argument):
            continue
        if argument == "--debug":
            debug = True
        else:
            kept.append(argument)
    return kept, debug


def _report(error: BaseException, debug: bool, command: str = "") -> int:
    """Tell a failure in one sentence and return its exit code; a mistake of ours keeps its traceback."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else RUN_CODE if error.code else 0
    if isinstance(error, KeyboardInterrupt):
        _say("stopped; the same command goes on from the last checkpoint")
        return STOP_CODE
    if isinstance(error, BrokenPipeError):
        # The reader of our output left (`vadit recipes | head`): point stdout elsewhere, or Python complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    # A wish that the kernels cannot meet is the user's mistake, too; they are below the package and its UsageError.
    if isinstance(error, UsageError) or (isinstance(error, ValueError) and str(error).startswith("VADIT_KERNELS is ")):
        _say(f"error: {_sentence(error)}")
        return USAGE_CODE
    if isinstance(error, RunError):
        _say(f"error: {_sentence(error)}")
        return RUN_CODE
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        remedy = "; free some space or choose another folder, then run the same command" if _is_full(error) else ""
        _say(f"error: {where}{error.strerror or error}{remedy}")
        return RUN_CODE
    if type(error).__name__ == "Stopped":  # of vadit.train.loop, by name: that module imports torch
        _say(_sentence(error))
        # A scheduler that asked for the stop should see success, and not try the job elsewhere as a failed one.
        return STOP_CODE if getattr(error, "interrupted", False) else 0
    if type(error).__name__ == "OutOfMemoryError":  # of torch
        remedy = OUT_OF_MEMORY.get(command, "free it of other programs, or use a GPU with more memory")
        _say(f"error: the GPU's memory is used up; {remedy}")
        return RUN_CODE
    if not debug:
        traceback.print_exception(error)
    return RUN_CODE


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split())


def _say(text: str) -> None:
    """One line on stderr, from every process that has something to say, with its rank where there are several.

    Mistakes in settings are the same on all processes; `vadit.commands.arguments.told_once` lets only rank 0 tell them.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    print(f"[rank {os.environ.get('RANK', '0')}] {text}" if several else text, file=sys.stderr, flush=True)
    if text.startswith("error:"):
        leave_for_torchrun(text)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "vadit: VA-VAE tokenizers and LightningDiT generators, from images to samples.",
            "",
            "usage: vadit COMMAND [--setting value ...] [--debug]",
            "",
            *lines,
            "",
            "`vadit COMMAND --help` explains every setting with its unit and default.",
            "--debug, with any command, shows the traceback of an error.",
        ]
    )


if __name__ == "__main__":
    entry()
