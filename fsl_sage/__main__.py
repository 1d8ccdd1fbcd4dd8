"""`python -m fsl_sage` is `fsl-sage`."""

import sys

from fsl_sage.cli import main

sys.exit(main())
