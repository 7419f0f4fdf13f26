"""Run the command, as ``python -m softdb.cli``."""

import sys

from softdb.cli.main import main

sys.exit(main())
