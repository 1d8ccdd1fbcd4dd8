"""Runs in double precision: models and images in float64."""

from contextlib import contextmanager

import pytest
import torch

from fsl_sage import core
from fsl_sage.data import batches


@contextmanager
def double_precision():
    """Within the block everything that is made is float64."""
    single, before = batches.normalise, torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "normalise", lambda *images: single(*images).double())
        patch.setattr(core, "DTYPE", torch.float64)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
