# SPDX-License-Identifier: Apache-2.0
import os

import pytest
import torch

torch.backends.cuda.matmul.allow_tf32 = False


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where the op tests run")


@pytest.fixture(scope="session")
def device(request):
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.fail("--device cuda: torch sees no GPU here")
    return name


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What runs keep for other runs: not in the home of whoever tests."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture
def one_thread():
    """Sums in one order, so that runs are equal to the bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path_factory):
    """Tokenised data of a test goes nowhere near the user's cache, nor another test's."""
    _cache.calls += 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / f"cache{_cache.calls}"))


_cache.calls = 0
