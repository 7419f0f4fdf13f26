"""Entry point of ``python -m softdb.cli``."""

import sys

from softdb.cli.main import main

sys.exit(main())
