"""The command line: which command, which settings, and how a failure is reported.

This module only parses and reports; the work is in `vadit.commands`, imported when a command is known, so that
`vadit --help` needs neither torch nor tyro. Commands are a table here and not tyro's subcommands: these would import
every command's settings for any of them, could not take the defaults of `train` and `sample` from a recipe or a run,
and do not say to which command an unknown flag was given.
"""

import atexit
import contextlib
import difflib
import errno
import importlib
import os
import re
import sys
import traceback
import typing
from typing import NoReturn

from vadit.runtime import launcher
from vadit.runtime.console import guarded_streams, say
from vadit.runtime.errors import LESS_MEMORY, RunError, UsageError, leave_for_torchrun, one_line, used_up

COMMANDS = {
    "demo": ("demo:run", "the whole system in small: train, encode, sample and evaluate on real pictures, in minutes"),
    "new": ("new:run", "your own pictures: look at them and at this machine, and write a project that fits both"),
    "train": ("train:run", "train a tokenizer or a generator: vadit train RECIPE [--setting value ...]"),
    "prepare": ("prepare:run", "turn images into a .beton that loads faster: vadit prepare IMAGES OUT.beton"),
    "encode": ("encode:run", "turn a folder of images into a folder of latents"),
    "sample": ("sample:run", "draw images from a generator"),
    "evaluate samples": ("evaluate:samples", "FID, sFID, IS, precision, recall, KID and FD-DINOv2 of samples"),
    "evaluate tokenizer": ("evaluate:tokenizer", "PSNR, SSIM, LPIPS and rFID of a tokenizer's reconstructions"),
    "evaluate latents": ("evaluate:latents", "how evenly latents are spread: the paper's Table 6"),
    "evaluate make-reference": ("evaluate:make_reference", "a reference like ADM's for any set of images"),
    "report": ("report:run", "one HTML page about one or more runs: curves, speed, time to the end, comparisons"),
    "import": ("convert:import_command", "turn a checkpoint of the authors into a folder that vadit reads"),
    "export": ("convert:export_command", "write a run's weights as safetensors with its config, or as the authors'"),
    "doctor": ("about:doctor", "say which accelerations this machine has, and how to get the others"),
    "recipes": ("about:recipes", "list the recipes and what they reproduce"),
}
"""Function in `vadit.commands` and summary of each command."""

OUT_OF_MEMORY = {"train": LESS_MEMORY, "encode": "lower --batch-size", "evaluate": "lower --batch-size"}
"""What helps a command that the GPU is too small for."""

USAGE_CODE, RUN_CODE, STOP_CODE = 2, 1, 130


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0: done, or stopped by a scheduler and saved; 1: the work failed; 2: a setting is wrong; 130: interrupted (Ctrl-C).
    """
    # Read when torch loads: threads that wait for others by spinning long make a busy machine ten times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    given = sys.argv[1:] if argv is None else argv
    debug = "--debug" in given
    # --local_rank=N is what the deepspeed launcher puts anywhere; its LOCAL_RANK says the same.
    arguments = [each for each in given if each != "--debug" and not re.fullmatch(r"--local[_-]rank=\d+", each)]
    with guarded_streams():
        try:
            launcher.read()
            _dispatch(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()
            return 0
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
    if launcher.known().world_size > 1:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # its reader has left, or it is closed
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _dispatch(arguments: list[str]) -> None:
    first = next(iter(arguments), "--help")
    name = next((name for name in (" ".join(arguments[:2]), first) if name in COMMANDS), None)
    if name is not None:
        _run(name, arguments[len(name.split()) :])
        return
    several = [name.partition(" ")[2] for name in COMMANDS if name.startswith(f"{first} ")]
    if first in ("-h", "--help", "help") or (several and arguments[1:] in (["-h"], ["--help"])):
        say(*_help(first if several else ""))
    elif first == "--version":
        from vadit import __version__

        say(f"vadit {__version__}")
    elif several:
        found = next(iter(arguments[1:]), "nothing")
        raise UsageError(f"vadit {first} needs {', '.join(several)} first, found {found}")
    else:
        words = list(dict.fromkeys(name.split()[0] for name in COMMANDS))
        near = difflib.get_close_matches(first, words, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(words)}"
        raise UsageError(f"unknown command {first!r}; {hint}")


def _run(name: str, arguments: list[str]) -> None:
    """Run a command: with settings of the kind that its function takes, or with `arguments` where it parses itself."""
    module, _, function = COMMANDS[name][0].partition(":")
    command = getattr(importlib.import_module(f"vadit.commands.{module}"), function)
    kind = typing.get_type_hints(command).get("options")
    if kind is not None:
        from vadit.commands.arguments import parse

        command(parse(kind, arguments, command=name))
    else:
        command(arguments)


def _report(error: BaseException, debug: bool, command: str = "") -> int:
    """Print a failure as one sentence and return its exit code; a mistake of ours keeps its traceback."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else RUN_CODE if error.code else 0
    if isinstance(error, KeyboardInterrupt):
        return _end("stopped; the same command goes on from the last checkpoint", STOP_CODE)
    # A wish that the kernels cannot meet is the user's mistake, too; they are below the package and its UsageError.
    if isinstance(error, UsageError) or str(error).startswith("VADIT_KERNELS is "):
        return _end(f"error: {error}", USAGE_CODE)
    if isinstance(error, RunError):
        return _end(f"error: {error}", RUN_CODE)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "; free some space or choose another folder, then run the same command" if full else ""
        return _end(f"error: {where}{error.strerror or error}{remedy}", RUN_CODE)
    if type(error).__name__ == "Stopped":  # of vadit.train.loop, by name: that module imports torch
        # A scheduler that asked for the stop should see success, and not try the job elsewhere as a failed one.
        return _end(str(error), STOP_CODE if getattr(error, "interrupted", False) else 0)
    if memory := used_up(error):
        remedy = OUT_OF_MEMORY.get(command, "free it of other programs, or use a machine with more")
        return _end(f"error: {memory} is used up; {remedy}", RUN_CODE)
    if not debug:
        traceback.print_exception(error)
    return RUN_CODE


def _end(text: str, code: int) -> int:
    """`code`, after one line on stderr from every process that has something to say, with its rank if it has others.

    Mistakes in settings are the same on all processes: see `vadit.commands.arguments.reported_once`.
    """
    text = one_line(re.sub(r"\s*\n\s*", " ", text))  # of libraries, whose messages have several
    here = launcher.known()
    with contextlib.suppress(OSError):  # the exit code tells, too, where nobody can read
        print(f"[rank {here.rank}] {text}" if here.world_size > 1 else text, file=sys.stderr, flush=True)
    if text.startswith("error:"):
        leave_for_torchrun(text)
    return code


def _help(group: str) -> list[str]:
    """The commands, or those of a group such as evaluate, with their summaries."""
    chosen = {name: summary for name, (_, summary) in COMMANDS.items() if name.startswith(group)}
    width = max(map(len, chosen))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in chosen.items()]
    return [
        "vadit: VA-VAE tokenizers and LightningDiT generators, from images to samples.",
        "",
        f"usage: vadit {f'{group} KIND' if group else 'COMMAND'} [--setting value ...] [--debug]",
        "",
        *lines,
        "",
        "`vadit COMMAND --help` explains every setting with its unit and default.",
        "--debug, with any command, shows the traceback of an error.",
    ]
