"""`python -m vadit`, and `deepspeed --module vadit`: the same as the console script."""

import sys

from vadit.cli import main

sys.exit(main())
