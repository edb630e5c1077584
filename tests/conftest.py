"""Small things that several test files need, and one thread for torch: here, and in every process and notebook that a test starts."""

import os

os.environ["OMP_NUM_THREADS"] = "1"       # before torch is imported

import subprocess
import sys
import xml.etree.ElementTree as xml
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import lessons
import minilora as ml

torch.set_num_threads(1)

ROOT = Path(lessons.__file__).parent.parent


@pytest.fixture(scope="session")
def alone():
    """The environment of a pytest that a test starts: no options, no plugins, no worker of xdist."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")} | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


@pytest.fixture(scope="session")
def without_malloc():
    """The environment without malloc's settings, by which freed memory may stay resident: for tests that measure what a process holds."""
    return {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}


@pytest.fixture(scope="session")
def verdicts(tmp_path_factory, alone):
    """verdicts(kind): {answer's name: [(test, "" or its message), …]}; one pytest for all lessons, each kind once."""
    done = {}

    def verdicts(kind):
        if kind not in done:
            report = tmp_path_factory.mktemp("junit") / "report.xml"
            run = subprocess.run([sys.executable, "-m", "pytest", "lessons", "-q", "--tb=no", f"--answers={kind}", f"--junitxml={report}", "-p", "no:cacheprovider"],
                                 cwd=ROOT, capture_output=True, text=True, env=alone)
            assert run.returncode in (0, 1), run.stdout + run.stderr
            done[kind] = defaultdict(list)
            for case in xml.parse(report).iter("testcase"):
                if case.find("skipped") is not None:                     # a test of an exercise to which this file has no answer
                    continue
                properties = {p.get("name"): p.get("value") for p in case.iter("property")}
                failed = case.find("failure") is not None or case.find("error") is not None
                done[kind][properties["answer"]].append((case.get("name"), (properties.get("message") or "no message") if failed else ""))
        return done[kind]

    return verdicts


@pytest.fixture
def tiny():
    """A small TinyGPT: non-square layers (16 -> 64 -> 16), biases that are not zero."""
    torch.manual_seed(0)
    model = ml.TinyGPT(ml.GPTConfig(context=32, width=16, layers=2, heads=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


@pytest.fixture
def ids():
    return torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def wake():
    """wake(model): give every adapter parameter random values, so that nothing hides behind B = 0."""

    def wake(model, seed=2):
        dice = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, adapter in ml.adapters(model):
                for name, parameter in adapter.named_parameters():
                    if not name.startswith("base."):
                        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=dice, dtype=torch.float64))
        return model

    return wake
