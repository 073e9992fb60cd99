"""The model's tests are made in float64."""

import jax
import pytest


@pytest.fixture(scope="module")
def float64():
    """For a whole file, its weights included: `pytestmark = pytest.mark.usefixtures("float64")`."""
    with jax.enable_x64(True):
        yield
