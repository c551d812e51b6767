import pytest
from tiny_models import tiny

from hybrid import HybridForCausalLM


@pytest.fixture(scope="session")
def teacher() -> HybridForCausalLM:
    return tiny(0, (0, 1))


@pytest.fixture(scope="session")
def student() -> HybridForCausalLM:
    return tiny(1, (1,))
