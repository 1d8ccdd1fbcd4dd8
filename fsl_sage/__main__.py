"""`python -m fsl_sage` is `fsl-sage`."""

import sys

from fsl_sage.commands.train import main

sys.exit(main())
