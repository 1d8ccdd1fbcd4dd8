"""`import fsl_sage`: light, and every name it offers has an example that runs."""

import doctest
import importlib
import os
import subprocess
import sys

import pytest

import fsl_sage
from fsl_sage.core import refusal
from fsl_sage.experiments.origins import FILES
from fsl_sage.experiments.plugins import forget

NAMES = fsl_sage.__all__


@pytest.fixture(autouse=True)
def without_the_examples_parts():
    """Examples of decorators add parts; they leave with the test."""
    yield
    for home in ["session", *{source.home for source in FILES.values()}]:
        forget(home)


def test_importing_the_package_loads_no_torch():
    code = "import sys, fsl_sage; dir(fsl_sage); fsl_sage.__version__; print([m for m in sys.modules if 'torch' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize(("given", "found"), [
    ({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, None),
])  # fmt: skip
def test_threads_sleep_after_microseconds_unless_the_user_says_how_they_wait(given, found):
    plain = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import os, fsl_sage; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain | given)
    assert done.stdout.strip() == str(found)


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_what_its_module_has(name):
    found = getattr(fsl_sage, name)
    assert found is getattr(importlib.import_module(found.__module__), name)
    assert found.__name__ == name and found.__module__.startswith("fsl_sage.")
    assert name in dir(fsl_sage)


def test_some_twenty_names():
    assert 15 <= len(NAMES) <= 25 and len(set(NAMES)) == len(NAMES)
    assert {"preset", "train", "RunStore", "load_plugins"} <= set(NAMES)


def test_an_unknown_name_is_answered_with_the_known_ones():
    message = refusal(getattr, fsl_sage, "trian", kind=AttributeError)
    assert "'trian'" in message and all(name in message for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_each_name_runs(name):
    example = doctest.DocTestParser().get_doctest(getattr(fsl_sage, name).__doc__, {}, name, None, None)
    assert example.examples, "no example"
    assert any(name in step.source for step in example.examples) and any(step.want for step in example.examples)
    said = []
    result = doctest.DocTestRunner().run(example, out=said.append)
    assert result.failed == 0, "".join(said)
