"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tracmod import kernels


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device of the kernels; "cuda" is skipped without a GPU or in a build without CUDA."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        if kernels.build_info()["cuda"] is None:
            pytest.skip("built without CUDA")
    return torch.device(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of PyTorch's threads after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
