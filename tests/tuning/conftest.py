import pytest

from convnext_kernels.tuning import cache


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Every test has a cache folder of its own."""
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path / "cache"))
    cache.forget()
    cache._warn_once.cache_clear()
    yield
    cache.forget()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "cache" / cache.FILE


@pytest.fixture
def remember():
    """``remember(kernel, problem, gpu, name)``: what `tune` keeps."""
    return lambda *entry: cache.keep({cache.key(*entry[:-1]): entry[-1]})
