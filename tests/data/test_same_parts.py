"""A seed means the same parts in every version: the address of a stored run does not tell which code cut them."""

import hashlib

import pytest
import torch

from fsl_sage.data.partition import partition


@pytest.mark.parametrize(
    ("distribution", "more", "sizes", "digest"),
    [
        ("iid", {}, [150] * 4, "cccfa7e70bb22668"),
        ("iid", {"size_spread": 0.5}, [106, 90, 286, 114], "855e82ad6c290884"),
        ("noniid", {"shard_num": 3}, [150] * 4, "26dd2598cc3ecf8d"),
        ("noniid_dirichlet", {"alpha": 0.3}, [150] * 4, "273eaa3d72963e11"),
        ("balanced", {"samples_per_client": 40}, [40] * 4, "0fe0ddcf98905c0a"),
    ],
)
def test_parts_are_those_of_earlier_versions(distribution, more, sizes, digest):
    parts = partition(torch.arange(600) % 10, 4, distribution, seed=7, **more)
    assert [len(part) for part in parts] == sizes
    positions = b"".join(part.numpy().astype("<i8").tobytes() for part in parts)
    assert hashlib.sha256(positions).hexdigest()[:16] == digest
