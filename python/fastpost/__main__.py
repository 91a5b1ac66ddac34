# SPDX-License-Identifier: Apache-2.0
"""`python -m fastpost` is the `fastpost` command; under torchrun it is the only way to say it."""

import sys

from fastpost.cli import main

if __name__ == "__main__":
    sys.exit(main())
