"""One module per command: its settings, whose docs are the command line's help, and what it does with them.

The command line parses what a command's function takes as `options`; `train` and `sample`, whose defaults depend on a
recipe or a run, take the arguments and parse them. Heavy imports wait until the settings are known to be right.
"""
