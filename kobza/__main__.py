"""python -m kobza is the kobza command."""

import sys

from kobza.cli import main

sys.exit(main())
