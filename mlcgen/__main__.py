"""`python -m mlcgen`."""

import sys

from mlcgen.cli import main

sys.exit(main())
