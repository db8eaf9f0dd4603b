"""`python -m vadit`, and `deepspeed --module vadit`: the same as the console script."""

from vadit.cli import entry

entry()
