# SPDX-License-Identifier: Apache-2.0
import on_host
import pytest

from fastpost import _core


@pytest.fixture(scope="session")
def core(tmp_path_factory):
    """fastpost's core with the CUDA kernels, on the CPU."""
    return on_host.Core(on_host.build_library(tmp_path_factory.mktemp("cuda_on_host")), rest=_core)
