"""The short toy run that the tests of the figures and of the attributions share; each file makes its own."""

import pytest
from fakes import short_toy_run, small_toy_task


@pytest.fixture(scope="module")
def few_sentences():
    """A twelfth of the toy task's sentences, for the whole file."""
    with small_toy_task(12):
        yield


@pytest.fixture(scope="module")
def toy_run(few_sentences, tmp_path_factory):
    """The folder of a short run, 682 training and 50 dev examples."""
    return short_toy_run(tmp_path_factory.mktemp("toy"), batch=16)
