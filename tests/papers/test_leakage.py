"""What smashed data reveal: measures against other people's code."""

import pytest
import torch
from skimage.metrics import structural_similarity

from fsl_sage.papers.leakage import ssim


@pytest.mark.parametrize("shape", [(1, 11, 11), (1, 28, 28), (3, 32, 32), (2, 17, 40)])
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.5])
def test_ssim_is_that_of_scikit_image(shape, noise):
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(4, *shape, generator=generator, dtype=torch.float64)
    y = (x + noise * torch.randn(x.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)
    as_published = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    theirs = [
        structural_similarity(a.numpy(), b.numpy(), channel_axis=0, **as_published) for a, b in zip(x, y, strict=True)
    ]
    torch.testing.assert_close(ssim(x, y), torch.tensor(theirs, dtype=torch.float64), rtol=0, atol=1e-6)
