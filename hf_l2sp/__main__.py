"""`python -m hf_l2sp` is the command `hf-l2sp`."""

import sys

from .cli import main

sys.exit(main())
