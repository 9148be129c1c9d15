import pytest

from tests.controller import light


@pytest.fixture(scope="module")
def light_surrogate():
    """Replaces the Gaussian process by a local average for the tests of a file."""
    context = light.patch()
    yield
    context.undo()
