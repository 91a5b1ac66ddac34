# SPDX-License-Identifier: Apache-2.0
import pytest
import torch


@pytest.fixture(autouse=True)
def _where(request):
    """The tests of ShadowCache run on the device of --device: what they make, they make there."""
    if request.module.__name__ not in ("test_shadow", "test_shadow_choice", "test_shadow_rows"):
        yield
        return
    with torch.device(request.getfixturevalue("device")):
        yield
