"""The two kinds of failure that a user sees as one sentence, without a traceback, and the words to print them in."""

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path


class UsageError(ValueError):
    """A setting or argument is wrong: the value found, the value needed, what to change. Exit code 2."""


class RunError(RuntimeError):
    """The work itself failed: a damaged file, a full disk, a lost process. Exit code 1."""


LESS_MEMORY = (
    "raise --engine.gradient-accumulation (the batch stays as it is), set --engine.gradient-checkpointing, or use more "
    "processes (--dry-run estimates the need)"
)
"""What helps a run for which the memory is too small."""
WANTS_CODE = "refused: it wants to run code when it is loaded"  # a pickle of more than tensors and plain values


def escaped(text: str, keep: str = "\n\t") -> str:
    """`text` with every character that a terminal obeys or does not show as `repr` shows it, but those to `keep`.

    Such are control characters, marks that change the direction of writing, and the lone surrogates by which Python
    has bytes of a file's name that are no UTF-8: they are shown as bytes.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in keep else _escape(each) for each in text)


def _escape(character: str) -> str:
    byte = ord(character) - 0xDC00
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else character.encode("unicode_escape").decode()


def one_line(text: str) -> str:
    """`escaped`, line breaks too: a name that has one shall not look like two messages."""
    return escaped(text.rstrip(), keep="")


@contextlib.contextmanager
def naming(origin: str | Path) -> Iterator[None]:
    """A UsageError of the block says of which file it is, where it does not yet."""
    try:
        yield
    except UsageError as error:
        raise error if str(origin) in str(error) else UsageError(f"{origin}: {error}") from None


def short(value: object) -> str:
    """A value for people, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def first_line(error: Exception) -> str:
    """What went wrong by another's words, on one line of at most 200 characters; the kind where it has none."""
    text = str(error).strip()
    if re.search("weights_only|allow_pickle|Python objects", text):  # they go on with how to run it
        return WANTS_CODE
    return text.splitlines()[0][:200] if text else type(error).__name__


def write_fault(error: Exception) -> str:
    """Why a file could not be written, or read, in words for people."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = first_line(error)
    # torch's zip writer tells a full disk by the position that it did not reach
    return "the disk took only a part of it" if "unexpected pos" in text else text


def used_up(error: BaseException) -> str:
    """Whose memory an error says is used up, in words; empty where it is of something else."""
    if type(error).__name__ == "OutOfMemoryError":  # of torch
        return "the GPU's memory"
    return "the memory" if isinstance(error, MemoryError) or "can't allocate memory" in str(error) else ""


def leave_for_torchrun(sentence: str) -> None:
    """Put why this process ends where torchrun looks for it: it ends its own long report with the first one's."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):  # it has been told on stderr
            Path(path).write_text(json.dumps({"message": one_line(sentence), "timestamp": int(time.time())}))
