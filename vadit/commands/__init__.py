"""One module per command: its settings, whose docstrings are the command line's help, and what it does with them.

Heavy imports wait until the settings are known to be right.
"""
