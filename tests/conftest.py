"""What several test files share: small models of each layout; a short toy run, of which each file makes its own."""

import baselines
import fakes
import pytest


@pytest.fixture
def google(tmp_path):
    return fakes.write_google(tmp_path / "google", fakes.google_arrays())


@pytest.fixture
def hub(tmp_path):
    return fakes.write_hugging_face(tmp_path / "hub", fakes.hugging_face_names(fakes.google_arrays()))


@pytest.fixture
def roberta(tmp_path):
    return fakes.write_roberta(tmp_path / "roberta", safe=False)[0]


@pytest.fixture(scope="module")
def few_sentences():
    """A twelfth of the toy task's sentences, for the whole file."""
    with fakes.small_toy_task(12):
        yield


@pytest.fixture(scope="module")
def toy_run(few_sentences, tmp_path_factory):
    """The folder of a short run, 682 training and 50 dev examples."""
    return fakes.short_toy_run(tmp_path_factory.mktemp("toy"), batch=16)


@pytest.fixture
def run(toy_run):
    """That run, opened anew for each test, so that a test may change its models."""
    return baselines.open_run(toy_run)
