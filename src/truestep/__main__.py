"""`python -m truestep` is the command `truestep`."""

import sys

from truestep.cli import main

sys.exit(main())
