"""`python -m container` is `lmi`."""

import sys

from container.cli import main

sys.exit(main())
