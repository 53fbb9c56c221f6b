"""``python -m transformers_commvq`` is the command ``transformers-commvq``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
