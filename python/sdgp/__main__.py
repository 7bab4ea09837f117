# SPDX-License-Identifier: BSD-3-Clause
"""``python -m sdgp``: the command line."""

import sys

from sdgp_cli import main

sys.exit(main())
