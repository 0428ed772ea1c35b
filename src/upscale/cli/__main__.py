"""``python -m upscale.cli`` is ``upscale``."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
